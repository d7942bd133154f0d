"""Check stored signals against the cache's own teacher."""
