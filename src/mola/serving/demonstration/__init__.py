"""What `mola demo` is made of: a model that answers with and without its adapter, and the page around it."""
