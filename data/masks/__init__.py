"""Which tokens are masked, and which positions carry signals."""
