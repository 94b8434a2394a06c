"""Group a file's single experts by module, check them, and stack them into mola's tensors."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mola.errors import MolaError


@dataclass(frozen=True)
class ModuleExperts:
    """Experts and router of one module."""

    lora_A: list[torch.Tensor]  # one `(r, in)` per expert
    lora_B: list[torch.Tensor]  # one `(out, r)` per expert
    router: torch.Tensor  # `(E, in)`

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return len(self.lora_A)

    def stack(self, module: str) -> dict[str, torch.Tensor]:
        """mola's tensors of this module: `mola_A (E, r, in)`, `mola_B (E, r, out)`, `mola_router (E, in)`.

        The router is float32. With one expert the router has no effect and is left out.
        """
        tensors = {
            f"{module}.mola_A": torch.stack(self.lora_A),
            f"{module}.mola_B": torch.stack([b.t() for b in self.lora_B]),
        }
        if self.num_experts > 1:
            # A copy: tensors of one file may share memory, which safetensors does not write.
            tensors[f"{module}.mola_router"] = self.router.float().clone(memory_format=torch.contiguous_format)
        return tensors


def group_experts(
    tensors: Mapping[str, torch.Tensor], key: re.Pattern[str], format_name: str, expected: str
) -> dict[str, ModuleExperts]:
    """Group the tensors of a file into the experts and the router of each module.

    Args:
        tensors: the file's content.
        key: matches every key of the format, with the groups `module`, `part` ("A" or "B") and `expert`, or
            `module` and `router`.
        format_name: name of the format, for messages.
        expected: the keys of the format, for messages.

    Returns:
        Name of the module, as in the file -> its experts.

    Raises:
        MolaError: a key is not of this format, the experts' numbers have a gap, or a router is missing or made for a
            different number of experts.
    """
    numbered: dict[str, dict[str, dict[int, torch.Tensor]]] = defaultdict(lambda: {"A": {}, "B": {}})
    routers = {}
    for name, tensor in tensors.items():
        match = key.fullmatch(name)
        if match is None:
            raise MolaError(f"{name!r} is no key of {format_name}; expected {expected}.")
        if match["router"]:
            routers[match["module"]] = tensor
        else:
            numbered[match["module"]][match["part"]][int(match["expert"])] = tensor
    for module in routers:
        if module not in numbered:
            raise MolaError(f"{module!r} has a router but no experts. The file is incomplete.")
    return {module: _check_experts(module, parts, routers.get(module)) for module, parts in numbered.items()}


def _check_experts(
    module: str, parts: dict[str, dict[int, torch.Tensor]], router: torch.Tensor | None
) -> ModuleExperts:
    count = len(parts["A"])
    if set(parts["A"]) != set(range(count)) or set(parts["B"]) != set(range(count)):
        raise MolaError(
            f"{module!r} has experts A {sorted(parts['A'])} and B {sorted(parts['B'])}; both must be numbered "
            "from 0 without a gap. The file is incomplete."
        )
    if router is None or router.shape[0] != count:
        found = "no router" if router is None else f"a router for {router.shape[0]}"
        raise MolaError(f"{module!r} has {count} experts and {found}. The file is incomplete.")
    lora_A, lora_B = ([parts[part][index] for index in range(count)] for part in "AB")
    return ModuleExperts(lora_A, lora_B, router)
