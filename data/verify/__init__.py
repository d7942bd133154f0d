"""Every checksum of a cache, read again."""
