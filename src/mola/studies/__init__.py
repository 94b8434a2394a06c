"""Runs made of runs: the quickstart, comparisons, continual learning."""
