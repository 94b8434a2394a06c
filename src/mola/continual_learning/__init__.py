"""What `mola continual` is made of: options, stages, record, metrics. The command itself is `mola.continual`."""
