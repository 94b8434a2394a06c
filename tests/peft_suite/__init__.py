"""Runs the tests that PEFT publishes with its source, with `MolaConfig` in place of PEFT's own methods."""
