"""Sources of text as documents."""
