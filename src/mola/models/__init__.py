"""Loads and quantises base models, attaches adapters, and counts what an allocation costs."""
