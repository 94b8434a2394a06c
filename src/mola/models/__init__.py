"""Base models: loading and quantising them, adapters for them, what an allocation costs."""
