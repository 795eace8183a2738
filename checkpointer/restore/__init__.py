"""From a question ("last", "best", a step) to a verified and loaded checkpoint."""
