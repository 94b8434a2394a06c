"""Drawing samples from a large source."""
