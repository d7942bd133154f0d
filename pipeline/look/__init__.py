"""A look into a cache: figures, sequences, and a page for any browser."""
