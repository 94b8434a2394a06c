"""Counts what a piece of code asks of the device."""

from torch.utils._python_dispatch import TorchDispatchMode


class CountOperators(TorchDispatchMode):
    """Counts operators, and those that make the host wait for the device."""

    SYNCHRONISING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_unique", "masked_select", "bincount")

    def __init__(self):
        super().__init__()
        self.operators = 0
        self.syncs = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators += 1
        name = func.__name__
        if any(name.startswith(word) for word in self.SYNCHRONISING):
            self.syncs.append(name)
        return func(*args, **(kwargs or {}))
