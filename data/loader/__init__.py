"""Batches by number: the order of an epoch, windows of blocks, batches."""
