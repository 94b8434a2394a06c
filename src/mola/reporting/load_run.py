"""Reads the folder of a run, or of an adapter that a different trainer saved. Files may be missing."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mola.errors import MolaError
from mola.files.digests import find_weights
from mola.files.reading import read_json_lines, read_json_object
from mola.insight import ROUTING_FILE
from mola.reporting.adapter_weights import AdapterWeights, read_adapter_weights
from mola.reporting.other_trainers import read_trainer_state, record_of_adapter
from mola.reporting.routing_log import RoutingLog, read_routing_log

_RESULT_FILES = {"before": "before.json", "after": "after.json", "inspection": "inspect.json", "export": "export.json"}
_EVALUATION = {"total", "interval_95", "samples", "settings"}
_ACCURACY, _LOSS = {*_EVALUATION, "accuracy", "correct", "groups"}, {*_EVALUATION, "loss", "perplexity", "tokens"}
_RESULT_KEYS: dict[str, tuple[str, list[set[str]]]] = {  # the command that writes a result, and keys of its files
    "before": ("mola evaluate", [_ACCURACY, _LOSS]),
    "after": ("mola evaluate", [_ACCURACY, _LOSS]),
    "inspection": ("mola inspect", [{"usage", "redundancy", "samples", "settings"}]),
    "export": (
        "mola convert --to lora",
        [{"method", "rank", "explained_by_kind", "divergence", "loss", "accuracy", "differences"}],
    ),
}


@dataclass(frozen=True)
class Run:
    """The content of a run folder."""

    folder: Path  # the run folder, as the user named it
    record: Mapping[str, Any]  # its `run.json`, or what is known without one: see `has_record`
    # losses by step; keys `training` and `evaluation`, if logged
    curves: Mapping[str, list[tuple[int, float]]] = field(default_factory=dict)
    adapter: AdapterWeights | None = None  # None before the run has saved an adapter
    routing: RoutingLog | None = None  # the telemetry of the routers over training
    before: Mapping[str, Any] | None = None  # result of `mola evaluate` without the adapter
    after: Mapping[str, Any] | None = None  # result of `mola evaluate` with the adapter
    inspection: Mapping[str, Any] | None = None  # result of `mola inspect`
    export: Mapping[str, Any] | None = None  # report of `mola convert --to lora`
    # files of `before`, `after`, `inspection` and `export`, which may be missing
    paths: Mapping[str, Path] = field(default_factory=dict)
    has_record: bool = True  # whether there is a `run.json`, which `mola train` writes and other trainers do not
    losses_file: str = "metrics.jsonl"  # the file of the losses, in the folder

    @property
    def name(self) -> str:
        """The repository of the run on the Hub, else the name of its folder."""
        return str(self.record.get("repository") or self.folder.resolve().name)

    @property
    def accuracies(self) -> dict[str, Mapping[str, Any]]:
        """Those of the results `before` and `after` that measure accuracy."""
        return self._evaluations("accuracy")

    @property
    def losses(self) -> dict[str, Mapping[str, Any]]:
        """Those of the results `before` and `after` that measure the loss of free text."""
        return self._evaluations("loss")

    def _evaluations(self, key: str) -> dict[str, Mapping[str, Any]]:
        results = {"before": self.before, "after": self.after}
        return {name: result for name, result in results.items() if result is not None and key in result}

    @property
    def has_routers(self) -> bool:
        """Whether a module has several experts; also true before an adapter is saved."""
        return self.adapter is None or bool(self.adapter.redundancy) or self.routing is not None

    @property
    def has_experts_pattern(self) -> bool:
        """Whether a pattern sets the number of experts of some modules, so that modules of one layer differ."""
        config = self.adapter.config if self.adapter else self.record.get("adapter_settings", {})
        return bool(config.get("num_experts_pattern"))


def load_run(run_dir: str, **results: str | None) -> Run:
    """Read a run folder, or an adapter of a different trainer, and the results that belong to it.

    Args:
        run_dir: the folder.
        **results: files of `before`, `after`, `inspection` and `export`, see `Run`. A file that is None or not given
            is looked for in the folder: `before.json`, `after.json`, `inspect.json`, `export.json`.

    Raises:
        MolaError: the folder holds no run and no adapter, or a result file is missing or of a different kind.
    """
    folder = Path(run_dir)
    adapter, record = read_adapter_weights(folder), read_json_object(folder / "run.json")
    has_record, losses_file = "settings" in record, "metrics.jsonl"
    if has_record:
        losses = read_losses(folder / losses_file, step_of_weights(record))
    elif adapter is not None:
        state, losses_file = read_trainer_state(folder)
        record = record_of_adapter(folder, adapter, state)
        losses = losses_by_step(state.get("log_history", []), step_of_weights(record))
    else:
        missing = "it holds neither" if folder.is_dir() else "there is no such folder"
        raise MolaError(
            "`run_dir` must be a folder with the run.json of `mola train`, or with an adapter (adapter_config.json "
            f"and its weights): got {run_dir!r}, {missing}. Pass a different folder."
        )
    for name, path in results.items():
        if path is not None and not Path(path).is_file():
            raise MolaError(
                f"`{name}` must be a file: {path!r} is none. Pass a different path, or leave the option out."
            )
    paths = {name: Path(results.get(name) or folder / default) for name, default in _RESULT_FILES.items()}
    return Run(
        folder,
        record,
        losses,
        adapter,
        read_routing_log(read_json_lines(folder / ROUTING_FILE)),
        **{name: _read_result(name, path) for name, path in paths.items()},
        paths=paths,
        has_record=has_record,
        losses_file=losses_file,
    )


def _read_result(name: str, path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    content = read_json_object(path)
    command, keys = _RESULT_KEYS[name]
    if not any(each <= content.keys() for each in keys):
        raise MolaError(
            f"`{name}` must be a result file of `{command}`: {str(path)!r} is none. Pass a different one, or remove it."
        )
    return content


def step_of_weights(record: Mapping[str, Any]) -> int | None:
    """The step whose weights a run has saved as its best weights; None if it has saved its last weights."""
    number = str(record.get("best_checkpoint") or "").rpartition("-")[2]
    return int(number) if re.fullmatch("[0-9]{1,18}", number) else None


def read_losses(path: Path, saved_step: int | None = None) -> dict[str, list[tuple[int, float]]]:
    """The losses in a `metrics.jsonl`; see `losses_by_step`."""
    return losses_by_step(read_json_lines(path), saved_step)


def losses_by_step(
    entries: Iterable[Mapping[str, Any]], saved_step: int | None = None
) -> dict[str, list[tuple[int, float]]]:
    """Training and evaluation loss by step in the log of a trainer; the last loss if a step has several.

    `saved_step` is the step of the best weights, if these were saved instead of the last weights. The evaluation after
    the training is logged at the last step, but measures the saved weights: its loss counts for `saved_step`.
    """
    curves: dict[str, dict[int, float]] = {"training": {}, "evaluation": {}}
    is_over = False
    for entry in entries:
        # Only the summary at the end of a training has `train_loss`. If the run was continued, further losses follow.
        is_over = "train_loss" in entry or (is_over and "loss" not in entry)
        if entry.get("loss") is not None:
            curves["training"][entry["step"]] = entry["loss"]
        if entry.get("eval_loss") is not None:
            curves["evaluation"][saved_step if is_over and saved_step is not None else entry["step"]] = entry[
                "eval_loss"
            ]
    return {label: sorted(curve.items()) for label, curve in curves.items() if curve}


def outdated_results(run: Run) -> list[str]:
    """Names of results that are older than the adapter, such as after a second training in the same folder."""
    weights = find_weights(run.folder)
    if weights is None:
        return []
    saved = weights.stat().st_mtime
    paths = {name: run.paths[name] for name in ("after", "inspection", "export")}
    return [name for name, path in paths.items() if path.is_file() and path.stat().st_mtime < saved]


def results_of_other_adapters(run: Run) -> list[tuple[str, str]]:
    """Names of results that were measured with a different adapter than the run's, each with that adapter."""
    found = []
    for name in ("after", "inspection"):
        adapter = str((getattr(run, name) or {}).get("settings", {}).get("adapter") or "")
        if adapter and not _may_be_adapter_of(run, adapter):
            found.append((name, adapter))
    return found


def _may_be_adapter_of(run: Run, adapter: str) -> bool:
    """Whether an adapter may be the run's. Only names are compared, since users copy folders and change directories."""
    path = Path(adapter)
    if path.exists() and path.samefile(run.folder):
        return True
    return path.name in ("", "..", run.folder.resolve().name) or adapter == run.record.get("repository")
