"""A page with a model that answers with and without its adapter."""
