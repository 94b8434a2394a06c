"""One task after the other: stages, record, metrics."""
