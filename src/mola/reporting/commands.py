"""The commands that produce missing parts of a report."""

import json
import shlex
from typing import Any

from mola.data.read import FILE_ENDINGS
from mola.data.tasks import load_task
from mola.errors import MolaError
from mola.evaluation.questions import MAX_NEW_TOKENS
from mola.models.quantization import QUANTIZATION_OPTIONS
from mola.reporting.load_run import Run

_EVALUATE_DEFAULTS = {"limit": None, "scoring": "generate", "max_new_tokens": MAX_NEW_TOKENS}


def has_answers(run: Run) -> bool:
    """Whether `mola evaluate` can measure the run: its task has answers, or is not known."""
    name = run.record["settings"].get("task")
    try:
        return name is None or load_task(name).answer is not None
    except MolaError:  # the task is a file that has been moved
        return True


def evaluate_command(run: Run, name: str) -> str:
    """The `mola evaluate` command that makes the result `name`, "before" or "after".

    If the other one of the two results exists, the command has the settings of that result. If neither that result nor
    the training names a task, the command has the placeholder `TASK`, which the user replaces.
    """
    other = run.after if name == "before" else run.before
    settings = other["settings"] if other else {}
    options = _base_model_options(run)
    options["task"] = settings.get("task") or run.record["settings"].get("task") or "TASK"
    if name == "after":
        options["adapter"] = str(run.folder)
    options |= _data_options(run, with_adapter=name == "after")
    for key, default in _EVALUATE_DEFAULTS.items():
        if settings.get(key, default) != default:
            options[key] = settings[key]
    return _command("evaluate", options | {"output": str(run.paths[name])})


def inspect_command(run: Run) -> str:
    """The `mola inspect` command that makes the run's inspection, or replaces it."""
    options = _base_model_options(run) | {"adapter": str(run.folder)}
    options["task"] = _settings_of_result(run).get("task") or run.record["settings"].get("task")
    options |= _data_options(run, with_adapter=True)
    flags = ["--overwrite"] if run.inspection else []
    return _command("inspect", options, *flags, "--json", str(run.paths["inspection"]))


def _command(name: str, options: dict[str, Any], *words: str) -> str:
    """A command line with the options that have a value, followed by `words`."""
    given = {key: value for key, value in options.items() if value}
    flags = [(f"--{key}", value if isinstance(value, str) else json.dumps(value)) for key, value in given.items()]
    return shlex.join(["mola", name, *(word for pair in flags for word in pair), *words])


def _base_model_options(run: Run) -> dict[str, Any]:
    """Options that load the base model in the same way as the training."""
    settings = run.record["settings"]
    names = ("trust_remote_code", *QUANTIZATION_OPTIONS)
    return {"base_model": str(settings["base_model"])} | {name: settings.get(name) for name in names}


def _settings_of_result(run: Run) -> dict[str, Any]:
    """Settings of the first result that names its data; empty if there is none."""
    results = (result["settings"] for result in (run.after, run.before, run.inspection) if result is not None)
    return next((settings for settings in results if settings.get("data")), {})


def _data_options(run: Run, *, with_adapter: bool) -> dict[str, Any]:
    """Options for the rows and their prompts: from an existing result, else from the training.

    Settings that the existing result lacks come from the training for a result with the adapter. For a result of the
    base model alone, they stay unset.
    """
    settings, result = run.record["settings"], _settings_of_result(run)
    trained: dict[str, Any] = {}
    if with_adapter or not result:
        # A run without a task records its template, since the task in this command may have a different template.
        template = settings.get("template") or (None if settings.get("task") else run.record.get("template"))
        trained = {"template": template, "filters": settings.get("filters")}
    data = str(result["data"]) if result else str(settings["data"])
    if not result and data.removesuffix(".gz").endswith(FILE_ENDINGS):
        data = "TEST_DATA"  # a file holds only the rows of the training, a saved dataset has a split `test`
    options = {name: result.get(name) or trained.get(name) for name in ("template", "filters", "split")}
    return {"data": data} | options | {"split": None if options["split"] == "test" else options["split"]}
