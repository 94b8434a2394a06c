"""What `mola train` is made of: run folder, callbacks, set-up. The command itself is in `train.py`."""
