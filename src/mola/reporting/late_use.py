"""What routers did in the last quarter of a run, from its telemetry."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mola.errors import MolaError
from mola.files.reading import read_json_lines
from mola.files.schema import INTEGER, NUMBER, TEXT, check_form

_PART = 0.25
_FORM = {
    "step": INTEGER,
    "modules": [
        {
            **{"module": TEXT, "num_tokens": INTEGER, "shares": [NUMBER]},
            **{"margin": (NUMBER, None), "entropy?": (NUMBER, None)},
        },
    ],
}


@dataclass
class LateUse:
    """Means of one module over the tokens of that time.

    Attributes:
        tokens: how many.
        shares: of each expert, the share of tokens that chose it; they add up to `top_k`.
        margin: largest minus second largest gate.
        entropy: of the softmax over all experts, over its largest value.
    """

    tokens: int = 0
    shares: list[float] = field(default_factory=list)
    margin: float = 0.0
    entropy: float = 1.0

    def add(self, record: Mapping[str, Any]) -> None:
        """Count one interval in."""
        self.tokens += record["num_tokens"]
        weight = record["num_tokens"] / self.tokens if self.tokens else 0.0
        before = self.shares or [0.0] * len(record["shares"])
        self.shares = [old + weight * (new - old) for old, new in zip(before, record["shares"], strict=True)]
        margin = 1.0 if record["margin"] is None else record["margin"]  # no number: it says nothing
        self.margin += weight * (margin - self.margin)
        entropy = 1.0 if (found := record.get("entropy")) is None else found  # as for the margin
        self.entropy += weight * (entropy - self.entropy)

    @property
    def top_k(self) -> int:
        """Experts that a token chooses."""
        return round(sum(self.shares))


def read_late_use(path: Path, last_step: int = 0) -> dict[str, LateUse]:
    """By module; empty without telemetry of that time.

    Args:
        path: the `routing.jsonl` of the run.
        last_step: the run's last step, if it is known to be later than that of the telemetry.

    Raises:
        MolaError: the file is not telemetry as mola writes it.
    """
    recorded = 0
    for entry in read_json_lines(path):
        check_form(entry, _FORM, str(path), "Restore the file, or remove it.")
        recorded = entry["step"]
    first = (1 - _PART) * max(recorded, last_step)
    modules: dict[str, LateUse] = {}
    for entry in read_json_lines(path):
        for record in entry["modules"] if entry["step"] > first else []:
            use = modules.setdefault(record["module"], LateUse())
            if use.shares and len(use.shares) != len(record["shares"]):
                raise MolaError(
                    f"{str(path)!r} must be the telemetry of one run: {record['module']!r} has {len(record['shares'])} "
                    f"experts at step {entry['step']} and {len(use.shares)} before. Restore the file, or remove it."
                )
            use.add(record)
    return modules
