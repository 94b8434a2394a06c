"""What the experts do: what routers decide, and tables of it for people."""
