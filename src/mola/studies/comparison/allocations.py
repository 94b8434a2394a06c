"""Experts by layer of recipes that leave it to `mola allocate`; kept as files and in the record."""

import copy
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mola.allocation.allocate import AllocateOptions, allocate, one_per_layer
from mola.allocation.options import check_options, method_name
from mola.data.encode import data_fingerprint
from mola.data.examples import distinct_questions, load_examples
from mola.data.tasks import load_task
from mola.errors import MolaError
from mola.files.digests import find_weights, weights_sha256
from mola.files.reading import read_json_object
from mola.options.fields import first_difference
from mola.studies.comparison.begun import begin_or_go_on
from mola.studies.comparison.checks import Run
from mola.studies.comparison.options import Key
from mola.studies.comparison.record import Result
from mola.studies.overlaps import Questions, holds_the_other, warn_of_seen
from mola.training.setup import check_model_options

_PATTERN = "num_experts_pattern"
_PROBED = ("redundancy", "usage")
_PLACES = ("adapter", "output", "overwrite")
_OF_A_MACHINE = (*_PLACES, "base_model", "data")  # the record may go to another one


def probed_by(probe: Run, runs: Sequence[Run]) -> list[Run]:
    """Runs whose allocation comes from the adapter of this one."""
    place = probe.key.task, probe.key.recipe, probe.key.seed
    return [run for run in runs if (run.key.task, run.probe, run.key.seed) == place]


class Allocations:
    """Makes allocations, or takes those that were made before.

    In the folder of the comparison an allocation is `TASK/RECIPE.json`, one that was made from a probe
    `TASK/RECIPE-seed-N.json`. The record has them under these names, without the ending.

    Attributes:
        known: what the record keeps of all that were made here or are in it; other processes add to it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[str, dict[str, Any]] = {}
        self._made: dict[str, dict[str, Any]] = {}
        self._checked: set[str] = set()
        self._sources: dict[tuple[Any, ...], tuple[dict[str, str], Questions | None]] = {}

    def make_and_check(self, runs: Sequence[Run], results: Mapping[Key, Result]) -> None:
        """Make those that can be made, and check what can be checked of the others; an error names the recipe.

        `results` are those of finished runs, which can be probes.
        """
        for run in runs:
            if run.allocation is None:
                continue
            probe = None if run.probe is None else results.get(run.key._replace(recipe=run.probe))
            try:
                if probe is not None and probe.diverged_at is not None:
                    raise MolaError(f"its probe, {probe.key}, has diverged. Take another one.")
                if run.probe is None or probe is not None:
                    self._check_numbers(run)
                else:
                    _check_probed(run.allocation, run.options.target_modules)
                self._check_unseen(run)
            except MolaError as error:
                raise MolaError(f"task `{run.key.task}`, recipe `{run.key.recipe}`: {error}") from error

    def _check_unseen(self, run: Run) -> None:
        """Whether the allocation is made from questions of the test."""
        assert run.allocation is not None
        questions = self._sources_of(run.allocation)[1]
        if questions is None or run.key.candidate:
            return
        if holds_the_other(questions, run.questions):
            raise MolaError(
                f"`allocate` must not be made from the questions of the test: `data` {run.allocation.data!r} has them. "
                "Name the training data."
            )
        warn_of_seen(run.key.task, run.questions, questions, f"in the `data` of `allocate` of {run.key.recipe!r}")

    def _check_numbers(self, run: Run) -> None:
        """Whether the run can be trained with what is found, before hours of others are."""
        numbers = self.options(run)
        known = json.dumps([run.key.task, run.key.recipe, numbers], sort_keys=True)
        if known in self._checked:  # seeds make no difference
            return
        options = copy.copy(run.options)
        for name, value in numbers.items():
            setattr(options, name, value)
        check_model_options(options)
        self._checked.add(known)

    def make(self, run: Run, adapter: str | None = None) -> dict[str, Any]:
        """The numbers of a run's allocation, and how they were found; `adapter` is that of its probe.

        Raises:
            MolaError: as `allocate`; there is another allocation; a probe is needed and is not there.
        """
        assert run.allocation is not None
        place, sources = self._place(run), self._sources_of(run.allocation)[0]
        made_from = {"base_model": run.base_model, **sources}
        if place in self.known:
            where, advice = (
                f"`allocations` of the `record` has, as {place!r},",
                "Rename the recipe, or pass another `record`.",
            )
            _check_same(self.known[place], run.allocation, _OF_A_MACHINE, where, advice)
            earlier = self.known[place].get("made_from", {})  # records of earlier versions have none
            if (name := first_difference(earlier, made_from, earlier)) is not None:
                raise MolaError(f"{where} an allocation that was made from another `{name}`. {advice}")
            return self.known[place]
        found = self._from_file_or_new(run, adapter, sources)
        settings = {name: value for name, value in found["settings"].items() if name not in _OF_A_MACHINE}
        numbers = {name: found[name] for name in ("num_experts", _PATTERN) if name in found}
        self.known[place] = {**numbers, "settings": settings, "made_from": made_from}
        return self.known[place]

    def _place(self, run: Run) -> str:
        seed = f"-seed-{run.key.seed}" if run.probe else ""
        # Without a probe nothing of what a search tries can change it.
        recipe = run.key.recipe if run.probe else run.key.plain_recipe
        return f"{run.key.task}/{recipe}{seed}"

    def _sources_of(self, options: AllocateOptions) -> tuple[dict[str, str], Questions | None]:
        """Fingerprints of what an allocation is made from besides the base model, and the questions; read once."""
        _check_options(options)
        key = options.adapter, options.data, options.task, options.split, options.limit
        if key not in self._sources:
            found, questions = {}, None
            if options.adapter is not None:
                found["adapter"] = weights_sha256(options.adapter) or ""
            if options.data is not None:
                examples = load_examples(options.data, load_task(str(options.task)), options.split, limit=options.limit)
                found["data"], questions = data_fingerprint(examples), distinct_questions(examples)
            self._sources[key] = found, questions
        return self._sources[key]

    def _from_file_or_new(self, run: Run, adapter: str | None, sources: dict[str, str]) -> dict[str, Any]:
        assert run.allocation is not None
        path = self.folder / f"{self._place(run)}.json"
        begin_or_go_on(path, {"model": {"base_model": run.base_model}, "source": sources})
        found = read_json_object(path)
        if found:
            _check_same(found, run.allocation, _PLACES, f"{str(path)!r} is", "Delete it, or pass another `output_dir`.")
            return found
        if run.probe and not (adapter and find_weights(Path(adapter))):
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
        return {"num_experts": one_per_layer(made["num_experts"]), **pattern}


def _check_probed(allocation: AllocateOptions, targets: str | None) -> None:
    """Options and budget; what the probe will say is open."""
    if allocation.method not in _PROBED:
        raise MolaError(f"`allocate` must not have a `probe` with method {allocation.method!r}. Leave it out.")
    check_options(replace(allocation, adapter="-"))
    stand_in = {"method": "uniform", "beta": None, "output": None, "per_module": False, "target_modules": targets}
    allocate(replace(allocation, **stand_in))  # type: ignore[arg-type]


def _check_options(allocation: AllocateOptions) -> tuple[str | None, float | None]:
    """As `check_options`; the adapter of a probe may be still to come."""
    is_probed = allocation.method in _PROBED and allocation.adapter is None
    return check_options(replace(allocation, adapter="-") if is_probed else allocation)


def _check_same(
    found: dict[str, Any], allocation: AllocateOptions, places: Collection[str], where: str, advice: str
) -> None:
    # A file of an earlier version lacks later options, which had their defaults.
    wanted, old = asdict(allocation), asdict(AllocateOptions("", "", 0)) | found.get("settings", {})
    old["method"] = method_name(old["method"])
    # The exponent that was used, which may be a method's own; records of earlier versions lack it.
    wanted["beta"] = _check_options(allocation)[1] if old["beta"] is not None else None
    name = first_difference(old, wanted, (name for name in wanted if name not in places))
    is_whole = isinstance(found.get("num_experts"), list) and allocation.per_module == (_PATTERN in found)
    if name is not None or not is_whole:
        what = f"an allocation with another `{name}`: {old[name]!r}" if name else "no whole allocation"
        raise MolaError(f"{where} {what}. {advice}")
