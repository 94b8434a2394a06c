"""Runs made of runs: the quickstart, comparisons, one task after the other."""
