"""Samples drawn from a large source."""
