"""The computation of a mixture of LoRA experts. Layers call `mola.tuner.kernels.dispatch`, which chooses a backend.

- `api`: what a backend is given and what it returns; `autograd`: how autograd calls a backend.
- `reference`: the formula in plain operators. All other backends are tested against it.
- `dense`, `grouped`, `decode`: backends in operators of torch.
- `dropout`, `gates`, `gemm`, `tensors`: what several backends share.
- `cpu`: backends that numba compiles; `gpu`: the backend that Triton compiles. `native` loads compiled code.
"""
