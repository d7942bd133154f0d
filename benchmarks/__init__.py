"""Measurements of the product; run as modules from the root of the checkout."""
