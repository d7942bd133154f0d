"""What runs: corpus, teacher cache (stage one), student training (stage two), evaluation."""
