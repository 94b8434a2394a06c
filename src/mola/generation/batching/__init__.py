"""Continuous batching: answers join and leave a running batch at token boundaries, each with its own adapter.

- `rows`: an answer to be made, and who hears of it.
- `sampling`: the next token of each row.
- `cache`, `forward`: keys and values of padded rows, and one forward pass over them.
- `engine`: who joins, who is next, who leaves. `single` does the same one answer after the other.
"""
