"""The command-line programs of the paper's research code, on top of mola."""
