"""Words of a command line."""


def replaced(words, more):
    """The words with those of `more` after them, in place of flags that both have."""
    names = {word for word in more if word.startswith("--")}
    kept, is_kept = [], True
    for word in words:
        is_kept = word not in names if word.startswith("--") else is_kept
        kept += [word] if is_kept else []
    return [*kept, *more]
