"""Models and tokenizers of others: opened, checked, and understood."""
