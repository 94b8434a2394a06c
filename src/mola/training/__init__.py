"""A run: set-up, checkpoints, callbacks, run folder."""
