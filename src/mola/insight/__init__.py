"""What the experts do: what routers decide, and tables of it for people."""

ROUTING_FILE = "routing.jsonl"  # in a run folder: the use of experts during training
