"""Files: written in one step, read with checks, known by their digests."""
