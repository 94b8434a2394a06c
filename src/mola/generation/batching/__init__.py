"""Continuous batching: answers join and leave a running batch between two tokens, each with its own adapter.

- `rows`: one answer, the listener that receives it, and how its tokens are chosen.
- `cache`, `forward`: keys and values of padded rows, and one forward pass over the rows.
- `engine`: which answers join, which prompts are read next, which answers leave.
"""
