"""What mola costs, side by side with its alternatives: `python -m benchmarks --help`."""
