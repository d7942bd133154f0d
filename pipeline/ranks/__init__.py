"""Several processes for one student."""
