"""Mutation test of `mola.tuner`: small faults are put into the code one by one, and some test should notice each."""
