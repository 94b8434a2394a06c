"""Reads and writes adapter folders, also in the formats of other programs."""
