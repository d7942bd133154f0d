"""Engines of stage one: where the shards are computed. What is written is the same everywhere."""
