"""Data: prompt templates, tasks as YAML, reading files, preparing examples, encoding them to tokens.

The path of a row: `read.read_rows` -> `tasks.Task.example` (inside `examples.load_examples`) ->
`encode.encode_examples`. Nothing here imports torch or the adapter code.
"""
