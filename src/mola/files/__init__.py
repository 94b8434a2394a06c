"""Files: atomic writes, JSON and YAML, digests of adapters, errors of the machine."""
