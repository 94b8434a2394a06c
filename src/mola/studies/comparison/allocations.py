"""Experts by layer of recipes that leave it to `mola allocate`; kept as files, so that a stop costs nothing."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mola.allocation.allocate import AllocateOptions, allocate
from mola.allocation.options import check_options
from mola.errors import MolaError
from mola.files.reading import read_json_object
from mola.options.fields import first_difference
from mola.studies.comparison.checks import Run

_PATTERN = "num_experts_pattern"
_PLACES = ("adapter", "output", "overwrite", "beta")  # the file holds the exponent that was used


class Allocations:
    """Makes allocations, or takes those that were made before.

    In the folder of the comparison an allocation is `TASK/RECIPE.json`, one that was made from a probe
    `TASK/RECIPE-seed-N.json`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[str, dict[str, Any]] = {}

    def make_and_check(self, runs: Sequence[Run]) -> None:
        """Make those that need no probe, and check what can be checked of the others; an error names the recipe."""
        for run in runs:
            if run.allocation is None:
                continue
            try:
                if run.probe is None:
                    self.make(run)
                else:
                    _check_probed(run.allocation, run.options.target_modules)
            except MolaError as error:
                raise MolaError(f"task `{run.key.task}`, recipe `{run.key.recipe}`: {error}") from error

    def make(self, run: Run, adapter: str | None = None) -> dict[str, Any]:
        """What the file of a run's allocation holds; `adapter` is that of its probe.

        Raises:
            MolaError: as `allocate`; there is a file of another allocation; a probe is needed and is not there.
        """
        assert run.allocation is not None
        seed = f"-seed-{run.key.seed}" if run.probe else ""
        # Without a probe nothing of what a search tries can change it.
        recipe = run.key.recipe if run.probe else run.key.plain_recipe
        path = self.folder / run.key.task / f"{recipe}{seed}.json"
        found = read_json_object(path)
        if found:
            _check_same(found, run.allocation, path)
            return found
        if run.probe and not (adapter and Path(adapter).is_dir()):
            raise MolaError(
                f"`recipes.{run.key.recipe}` needs the adapter of {run.probe!r} on {run.key.task} with seed "
                f"{run.key.seed}, which is gone. Take that run out of the `record`, so that it is trained again."
            )
        name = repr(asdict(run.allocation))
        if run.probe or name not in self._made:  # tasks share what does not depend on them
            options = replace(run.allocation, output=str(path), adapter=adapter or run.allocation.adapter)
            self._made[name] = allocate(options).to_dict()
        return self._made[name]

    def options(self, run: Run) -> dict[str, Any]:
        """The allocation of a run as values of `num_experts` and, for one per module, of `num_experts_pattern`."""
        probe = Path(run.options.output_dir or "").parents[1] / str(run.probe) / f"seed-{run.key.seed}"
        made = self.make(run, str(probe) if run.probe else None)
        pattern = {_PATTERN: made[_PATTERN] or None} if _PATTERN in made else {}
        experts = made["num_experts"]
        return {"num_experts": ",".join(map(str, experts)) if len(experts) > 1 else f"{experts[0]},", **pattern}


def _check_probed(allocation: AllocateOptions, targets: str | None) -> None:
    """Options and budget; what the probe will say is open."""
    if allocation.method not in ("redundancy", "usage"):
        raise MolaError(f"`allocate` must not have a `probe` with method {allocation.method!r}. Leave it out.")
    check_options(replace(allocation, adapter="-"))
    stand_in = {"method": "uniform", "beta": None, "output": None, "per_module": False, "target_modules": targets}
    allocate(replace(allocation, **stand_in))  # type: ignore[arg-type]


def _check_same(found: dict[str, Any], allocation: AllocateOptions, path: Path) -> None:
    # A file of an earlier version lacks later options, which had their defaults.
    wanted, old = asdict(allocation), asdict(AllocateOptions("", "", 0)) | found.get("settings", {})
    name = first_difference(old, wanted, (name for name in wanted if name not in _PLACES))
    is_whole = isinstance(found.get("num_experts"), list) and allocation.per_module == (_PATTERN in found)
    if name is not None or not is_whole:
        what = f"an allocation with another `{name}`: {old[name]!r}" if name else "no whole allocation"
        raise MolaError(f"{str(path)!r} is {what}. Delete it, or pass another `output_dir`.")
