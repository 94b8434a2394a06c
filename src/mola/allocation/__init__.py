"""Chooses how many experts each decoder layer gets: scores of layers, and numbers from scores."""
