"""Signals to bytes and back."""
