"""A mixture as one operator of a compiler, on a CPU: writing loops for its small steps takes minutes and gains nothing.

As vLLM's attention it is found by its name in the context of a forward pass.
"""

from __future__ import annotations

import torch
from vllm.forward_context import get_forward_context


def _add_mixture(output: torch.Tensor, x: torch.Tensor, name: str) -> None:
    get_forward_context().no_compile_layers[name](x, output)


_LIBRARY = torch.library.Library("mola_vllm", "FRAGMENT")
_LIBRARY.define("add_mixture(Tensor(a!) output, Tensor x, str name) -> ()", tags=(torch.Tag.needs_fixed_stride_order,))
_LIBRARY.impl("add_mixture", _add_mixture, "CPU")
_LIBRARY.impl("add_mixture", lambda *arguments: None, "Meta")
