"""The contract both stages share: corpus and cache on disk, codecs, order, loader."""
