"""One page that shows what a cache holds and what students made of it."""
