"""What `mola train` is made of: run folder, callbacks, set-up. The command itself is `mola.train`."""
