"""Files: atomic writes, JSON and YAML, adapter digests, machine errors."""
