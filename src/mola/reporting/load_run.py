"""What a run folder holds. A file that is not there is None; one that is there and is something else is an error."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mola.errors import MolaError
from mola.files.digests import find_weights
from mola.files.reading import read_json_lines, read_json_object
from mola.files.schema import check_form
from mola.insight import ROUTING_FILE
from mola.reporting.adapter_weights import AdapterWeights, read_adapter_weights
from mola.reporting.routing_log import RoutingLog, read_routing_log
from mola.reporting.schema import EVALUATION, EXPORT, INSPECTION, INTERVAL, LOSS, RECORD

_CURE = "Restore the file, or remove it."
_RESULTS = {"before": "before.json", "after": "after.json", "inspection": "inspect.json", "export": "export.json"}


@dataclass(frozen=True)
class Run:
    """A run and what is known about it."""

    folder: Path  # the run folder, as the user named it
    record: Mapping[str, Any]  # its `run.json`
    # losses by step, `training` and `evaluation`; those without a value are left out
    curves: Mapping[str, list[tuple[int, float]]]
    # its `adapter_config.json` and what its weights say; None before the run has saved any
    adapter: AdapterWeights | None
    routing: RoutingLog | None  # the telemetry of the routers over training
    before: Mapping[str, Any] | None  # result of `mola evaluate` without the adapter
    after: Mapping[str, Any] | None  # the same with it
    inspection: Mapping[str, Any] | None  # result of `mola inspect`
    export: Mapping[str, Any] | None  # report of `mola convert --to lora`
    paths: Mapping[str, Path]  # where `before`, `after`, `inspection` and `export` are, or would be

    @property
    def name(self) -> str:
        """What the run is called: its repository on the hub, or its folder."""
        return str(self.record.get("repository") or self.folder.resolve().name)

    @property
    def has_routers(self) -> bool:
        """Whether a module has several experts, or nobody knows yet."""
        return self.adapter is None or bool(self.adapter.redundancy) or self.routing is not None


def gather(
    run_dir: str,
    before: str | None = None,
    after: str | None = None,
    inspection: str | None = None,
    export: str | None = None,
) -> Run:
    """Read a run folder.

    Results of `mola evaluate` without and with the adapter, of `mola inspect` and of `mola convert --to lora`, are
    those in the folder, if any, where no others are named.

    Raises:
        MolaError: no run in the folder, or a file that is not what it should be.
    """
    folder, record = Path(run_dir), read_record(run_dir)
    given = {"before": before, "after": after, "inspection": inspection, "export": export}
    paths = {name: Path(value or folder / _RESULTS[name]) for name, value in given.items()}
    for name, value in given.items():
        if value is not None and not paths[name].is_file():
            raise MolaError(f"`{name}` must be a file: {value!r} is none. Pass another one, or leave the option out.")
    return Run(
        folder,
        record,
        read_losses(folder / "metrics.jsonl", step_of_weights(record)),
        read_adapter_weights(folder),
        read_routing_log(_intervals(folder / ROUTING_FILE)),
        _result("before", paths["before"], EVALUATION, "mola evaluate"),
        _result("after", paths["after"], EVALUATION, "mola evaluate"),
        _result("inspection", paths["inspection"], INSPECTION, "mola inspect"),
        _result("export", paths["export"], EXPORT, "mola convert --to lora"),
        paths,
    )


def read_record(run_dir: str) -> dict[str, Any]:
    """The `run.json` of a run folder.

    Raises:
        MolaError: it is not there, or says nothing about a run.
    """
    record = read_json_object(Path(run_dir) / "run.json")
    if "settings" not in record:
        missing = "it has no run.json that tells of a run" if Path(run_dir).is_dir() else "there is no such folder"
        raise MolaError(
            f"`run_dir` must be a run folder of `mola train`: got {run_dir!r}, {missing}. Pass another one."
        )
    check_form(record, RECORD, str(Path(run_dir) / "run.json"), "Restore the file, or train again.")
    return record


def step_of_weights(record: Mapping[str, Any]) -> int | None:
    """The step whose weights a run has kept, if it has kept the best ones; None for the last."""
    number = str(record.get("best_checkpoint") or "").rpartition("-")[2]
    return int(number) if re.fullmatch("[0-9]{1,18}", number) else None


def read_losses(path: Path, kept: int | None = None) -> dict[str, list[tuple[int, float]]]:
    """Training and evaluation loss by step in a `metrics.jsonl`, the last one where a step has several.

    `kept` is the step whose weights were saved, unless they are the last ones: the evaluation after the training is of
    these, though it is logged at the last step.
    """
    curves: dict[str, dict[int, float]] = {"training": {}, "evaluation": {}}
    is_over = False
    for entry in read_json_lines(path):
        if entry.get("loss") is not None or entry.get("eval_loss") is not None:
            check_form(entry, LOSS, str(path), _CURE)
        is_over = "train_loss" in entry or (is_over and "loss" not in entry)  # a run that goes on has more of both
        if entry.get("loss") is not None:
            curves["training"][entry["step"]] = entry["loss"]
        if entry.get("eval_loss") is not None:
            curves["evaluation"][kept if is_over and kept is not None else entry["step"]] = entry["eval_loss"]
    return {label: sorted(curve.items()) for label, curve in curves.items() if curve}


def old_results(run: Run) -> list[str]:
    """Names of results that are older than the adapter: a folder that was trained in again may still hold them."""
    weights = find_weights(run.folder)
    return [
        name
        for name in ("after", "inspection", "export")
        if weights is not None
        and run.paths[name].is_file()
        and run.paths[name].stat().st_mtime < weights.stat().st_mtime
    ]


def other_adapters(run: Run) -> list[tuple[str, str]]:
    """Results that were measured with another adapter than the run's, and with which."""
    found = []
    for name in ("after", "inspection"):
        adapter = (getattr(run, name) or {}).get("settings", {}).get("adapter")
        if adapter and not _is_of(str(adapter), run):
            found.append((name, str(adapter)))
    return found


def _is_of(adapter: str, run: Run) -> bool:
    """Whether an adapter may be the run's: by its name, for folders are copied and commands run in other ones."""
    path = Path(adapter)
    if path.exists() and path.samefile(run.folder):
        return True
    return path.name in ("", "..", run.folder.resolve().name) or adapter == run.record.get("repository")


def _intervals(path: Path) -> Iterator[dict[str, Any]]:
    for entry in read_json_lines(path):
        check_form(entry, INTERVAL, str(path), _CURE)
        yield entry


def _result(option: str, path: Path, form: Mapping[str, Any], command: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    content = read_json_object(path)
    if not {key for key in form if not key.endswith("?")} <= content.keys():
        raise MolaError(
            f"`{option}` must be a result file of `{command}`: {str(path)!r} is none. Pass another one, or remove it."
        )
    check_form(content, form, str(path), f"Run `{command}` again, pass another file, or remove it.")
    if form is INSPECTION:
        _check_square(content, path)
    return content


def _check_square(content: Mapping[str, Any], path: Path) -> None:
    agreement = content.get("agreement")
    if not isinstance(agreement, dict):
        return
    size, rows = len(agreement["modules"]), agreement["cramers_v"]
    if len(rows) != size or any(len(row) != size for row in rows):
        raise MolaError(
            f"`agreement.cramers_v` must have {size} rows of {size}, one for each of `modules`, in {str(path)!r}. Run "
            "`mola inspect` again, pass another file, or remove it."
        )
