"""Token blocks on disk: how text is packed, and the parts that hold it."""
