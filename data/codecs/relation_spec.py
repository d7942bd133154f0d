"""Roles of the tensors that relations are replayed with. No torch here."""

KINDS = ("query", "key", "value")
"""The relations, in their order."""
FUSED = "qkv"
"""Role of one map that gives queries, keys and values side by side."""
TOKENS = "tokens.weight"
"""Role of the word embeddings."""
ROLES = (TOKENS, *(f"{kind}.{end}" for kind in (*KINDS, FUSED) for end in ("weight", "bias")))
"""There are ``query.weight``, ``key.weight`` and ``value.weight``, or ``qkv.weight``; biases may be
missing."""
