"""The folder that `mola with` puts on the path of a program."""
