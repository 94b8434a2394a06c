"""The computation of a mixture of LoRA experts, behind one door: `mola.tuner.kernels.dispatch`.

- `api`: what a backend is given, what it returns.
- `dispatch`: the table of backends, the first that supports its inputs wins; `autograd`: the one autograd function.
- `reference`: the formula. The others compute the same faster; `cpu/` holds those that need numba, and may be missing.
"""
