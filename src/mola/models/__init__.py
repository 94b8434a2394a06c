"""Base models: loading them, their cost, converting adapters for them."""
