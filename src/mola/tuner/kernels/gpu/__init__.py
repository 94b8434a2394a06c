"""The backend for GPUs, whose kernels Triton compiles.

- `backend`: the backend, in torch; it loads `launch` when it is first used on a GPU.
- `first_use`: compares the kernels with the reference before they are used.
- `launch`: calls the kernels of `jit` with their shapes and grids.
"""
