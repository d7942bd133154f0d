"""The cache on disk: schema, shards, manifest, and the copies of it elsewhere."""
