"""One page that shows a cache and its students."""
