"""Backends for CPUs whose inner loops numba compiles (the extra `cpu`).

- `decode`, `train`: the backends, in torch. `decode_operator`: the same as operators for `torch.compile`.
- `jit_decode`, `jit_train`, `jit_gates`, `jit_dropout`: native functions, loaded by `mola.tuner.kernels.native` when
  they are first used. `jit`: what they share.
- `jit_products`, `jit_vectors`, `jit_instructions`: the loops of `jit_train`, down to LLVM's vector instructions.
"""
