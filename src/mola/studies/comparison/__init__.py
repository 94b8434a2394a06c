"""Recipes x tasks x seeds: their runs, record, statistics and tables."""
