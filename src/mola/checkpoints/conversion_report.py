"""What `mola convert` did, as a value and as text."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ConvertReport:
    """What was converted; the lists have one entry per decoder layer, lowest first.

    Attributes:
        output: the folder written.
        num_experts: experts per module.
        top_k: experts used per token.
        r: rank of each expert.
        lora_alpha: numerator of the scale.
        tensors_read: tensors in the source.
        tensors_written: tensors in the output.
        target_modules: names of the adapted linears.
        routers_dropped: routers of one-expert layers, left out because they decide nothing.
        routers_added: routers of zeros for one-expert layers, because the format wants one.
        not_saved: settings that the output format has no place for.
        notes: settings that are written in another way than they were read.
    """

    output: Path
    num_experts: list[int]
    top_k: list[int]
    r: list[int]
    lora_alpha: float
    tensors_read: int
    tensors_written: int
    target_modules: list[str] = field(default_factory=list)
    routers_dropped: int = 0
    routers_added: int = 0
    not_saved: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"layers            {len(self.num_experts)}",
            f"experts per layer {_shown(self.num_experts)}",
            f"top_k             {_shown(self.top_k)}",
            f"r                 {_shown(self.r)}",
            f"lora_alpha        {self.lora_alpha:g}",
            f"linears           {', '.join(self.target_modules)}",
            f"tensors           {self.tensors_read} read, {self.tensors_written} written",
        ]
        if self.routers_dropped:
            lines.append(f"left out          {self.routers_dropped} routers of layers with one expert")
        if self.routers_added:
            lines.append(f"added             {self.routers_added} routers of zeros for layers with one expert")
        lines += [f"note              {note}" for note in self.notes]
        if self.not_saved:
            lost = ", ".join(f"{name} = {_shown(value)}" for name, value in self.not_saved.items())
            lines.append(f"not in this format, write it down: {lost}")
        return "\n".join([*lines, f"written to {self.output}"])


def _shown(values: Any) -> str:
    if not isinstance(values, list):
        return str(values)
    return f"{values[0]} everywhere" if len(set(values)) == 1 else ",".join(map(str, values))
