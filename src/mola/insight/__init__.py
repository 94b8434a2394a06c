"""What routers decide and how experts are used, recorded in training and measured on data."""

ROUTING_FILE = "routing.jsonl"  # in a run folder: the use of experts during training
