"""What `mola evaluate` is made of: questions, decoding, scoring, resuming. The command is in `evaluate.py`."""
