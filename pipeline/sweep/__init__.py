"""Several students from one cache."""
