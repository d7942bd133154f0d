"""Processes, clusters, and who of them does what."""
