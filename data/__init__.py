"""What stage one and stage two have in common: corpus and cache on disk, codecs, loader."""
