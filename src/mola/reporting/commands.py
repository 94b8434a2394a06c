"""The commands that produce missing parts of a report."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mola.data.read import FILE_ENDINGS, split_names
from mola.data.tasks import load_task
from mola.errors import MolaError
from mola.files.digests import CONFIG_FILE
from mola.files.reading import read_json_object
from mola.models.options import QUANTIZATION_OPTIONS
from mola.options.command_line import command_line
from mola.reporting.load_run import Run


def measures_loss(run: Run) -> bool:
    """Whether `mola evaluate` measures the loss of free text with the run's data, not accuracy."""
    if run.accuracies or run.losses:
        return not run.accuracies
    name = run.record["settings"].get("task")
    try:
        return name is None or load_task(name).answer is None
    except MolaError:  # the task is a file that has been moved
        return False


def evaluate_command(run: Run, name: str) -> str:
    """The `mola evaluate` command that makes the result `name`, "before" or "after", with the settings of the other."""
    other = (run.after if name == "before" else run.before) or {"settings": {}}
    options = _model_and_rows(run, with_adapter=name == "after")
    options["task"] = other["settings"].get("task") or run.record["settings"].get("task")
    options |= {key: other["settings"].get(key) for key in ("limit", "scoring", "max_new_tokens")}
    words = [str(run.folder)] if name == "after" else []
    return command_line("evaluate", options | {"output": str(run.paths[name])}, *words)


def commands_after_training(folder: Path) -> list[str]:
    """The commands that measure, describe and serve the adapter of the finished run in `folder`."""
    run = Run(folder, read_json_object(folder / "run.json"), paths={"after": folder / "after.json"})
    report, serve = command_line("report", {}, str(folder)), command_line("serve", _loading(run), str(folder))
    return [evaluate_command(run, "after"), report, serve]


def inspect_command(run: Run) -> str:
    """The `mola inspect` command that makes the run's inspection, or replaces it."""
    options = _model_and_rows(run, with_adapter=True)
    options["task"] = _settings_of_result(run).get("task") or run.record["settings"].get("task")
    results = {"overwrite": bool(run.inspection), "json": str(run.paths["inspection"])}
    return command_line("inspect", options | results, str(run.folder))


def _settings_of_result(run: Run) -> dict[str, Any]:
    """Settings of the first result that names its data; empty if there is none."""
    results = (result["settings"] for result in (run.after, run.before, run.inspection) if result is not None)
    return next((settings for settings in results if settings.get("data")), {})


def _model_and_rows(run: Run, *, with_adapter: bool) -> dict[str, Any]:
    """Options that load the model like the training, and the rows of an existing result, else of the training.

    An adapter is not among them: the run's folder is the first word of a command. It names its base model.
    Settings that the existing result lacks come from the training for a result with the adapter. For a result of the
    base model alone, they stay unset.
    """
    settings, result = run.record["settings"], _settings_of_result(run)
    rows = {name: result.get(name) for name in ("data", "template", "filters", "split")}
    if with_adapter or not result:
        # A run without a task records its template, since the task in this command may have a different template.
        template = settings.get("template") or (None if settings.get("task") else run.record.get("template"))
        rows["template"] = rows["template"] or template
        rows["filters"] = rows["filters"] or settings.get("filters")
    if not result:
        rows |= _unseen_rows(settings)
    if rows["split"] == "test":  # the default
        rows["split"] = None
    is_recorded = with_adapter and (run.folder / CONFIG_FILE).is_file()
    return {"base_model": None if is_recorded else str(settings["base_model"]), **_loading(run), **rows}


def _unseen_rows(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Data and split that a run was not trained on; the data are the placeholder `TEST_DATA` if it names none."""
    source = str(settings.get("eval_data") or settings.get("data") or "")  # an adapter of a different trainer has none
    is_file = source.removesuffix(".gz").endswith(FILE_ENDINGS)
    splits, split = _splits_of_folder(source), settings.get("eval_split")
    if settings.get("eval_data"):
        return {"data": source, "split": split if splits else None}
    if splits and "test" not in splits and split in splits:
        return {"data": source, "split": split}
    return {"data": "TEST_DATA" if is_file or not source else source}


def _splits_of_folder(source: str) -> list[str]:
    try:
        return split_names(source) if os.path.isdir(os.path.expanduser(source)) else []
    except MolaError:  # the folder has changed since the training
        return []


def _loading(run: Run) -> dict[str, Any]:
    settings = run.record["settings"]
    return {name: settings.get(name) for name in ("trust_remote_code", *QUANTIZATION_OPTIONS)}
