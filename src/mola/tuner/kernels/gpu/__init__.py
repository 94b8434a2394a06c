"""What Triton compiles for GPUs. Entered by `mola.tuner.kernels.native.load` only.

- `backend`: the backend, in torch; it loads `launch` when it is first used on a GPU.
- `first_use`: compares the kernels with the reference before they are trusted.
- `launch`: calls of the kernels in `jit`, with their grids.
"""
