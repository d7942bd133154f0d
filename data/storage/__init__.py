"""Files and objects: atomic writes, storage elsewhere, blocks kept of it."""
