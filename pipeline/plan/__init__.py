"""``distilcache plan``: tokens, bytes, hours and money of a project, before anything runs."""
