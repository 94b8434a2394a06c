"""`mola continual`: options, stages, record, metrics."""
