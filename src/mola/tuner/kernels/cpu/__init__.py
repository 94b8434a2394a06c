"""Everything that numba compiles for CPUs: the extra `cpu`. Entered by `mola.tuner.kernels.native.load` only.

- `decode`, `train`: the backends, in torch; they load native functions when they are first used.
- `registry`: finds the layer that owns a `mola_B`, for compiled graphs.
- `jit`: what native functions share. `jit_decode`, `jit_train`, `jit_gates`, `jit_dropout`, `jit_linear`: they;
  `jit_products`, `jit_vectors`, `jit_instructions`: what `jit_train` consists of, down to LLVM's vector instructions.
"""
