"""What the scripts of the paper's research code share: their flags, and how `mola` commands do the work."""
