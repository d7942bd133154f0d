"""Text to token blocks."""
