"""The commands that make what a report does not have yet."""

import json
import shlex
from typing import Any

from mola.data.read import FILE_ENDINGS
from mola.data.tasks import load_task
from mola.errors import MolaError
from mola.evaluation.questions import MAX_NEW_TOKENS
from mola.models.quantization import QUANTIZATION_OPTIONS
from mola.reporting.load_run import Run

# Of how rows are asked, what `mola evaluate` does by itself.
_USUAL = {"limit": None, "scoring": "generate", "max_new_tokens": MAX_NEW_TOKENS}


def has_answers(run: Run) -> bool:
    """Whether there may be something to evaluate: not where the task of the training is free text."""
    name = run.record["settings"].get("task")
    try:
        return name is None or load_task(name).answer is not None
    except MolaError:  # a file that is elsewhere now
        return True


def evaluate_command(run: Run, name: str) -> str:
    """The command for `before` or `after`; without a task of the training its `TASK` is to be filled in."""
    other = (run.after if name == "before" else run.before) or {"settings": {}}  # which it will stand beside
    asked = {key: other["settings"].get(key) for key in ("task", *_USUAL)}
    words = [
        "mola",
        "evaluate",
        *_base(run),
        "--task",
        asked.pop("task") or run.record["settings"].get("task") or "TASK",
    ]
    adapter = ["--adapter", str(run.folder)] if name == "after" else []
    unusual = _flags({key: value for key, value in asked.items() if value != _USUAL[key]})
    return shlex.join(
        [*words, *adapter, *_rows(run, of_adapter=name == "after"), *unusual, "--output", str(run.paths[name])]
    )


def inspect_command(run: Run) -> str:
    """The command for `inspection`, which replaces one that is there."""
    words = ["mola", "inspect", *_base(run), "--adapter", str(run.folder)]
    task = _asked(run).get("task") or run.record["settings"].get("task")
    words += ["--task", task] if task else []
    words += [*_rows(run), *(["--overwrite"] if run.inspection else [])]
    return shlex.join([*words, "--json", str(run.paths["inspection"])])


def _base(run: Run) -> list[str]:
    """The base model, loaded as it was in the run."""
    settings = run.record["settings"]
    names = ("trust_remote_code", *QUANTIZATION_OPTIONS)
    return ["--base_model", str(settings["base_model"]), *_flags({name: settings.get(name) for name in names})]


def _asked(run: Run) -> dict[str, Any]:
    """Settings of the first result that is there and says of which data it is; empty if there is none."""
    results = (result["settings"] for result in (run.after, run.before, run.inspection) if result is not None)
    return next((settings for settings in results if settings.get("data")), {})


def _rows(run: Run, *, of_adapter: bool = True) -> list[str]:
    """Data, the rows of them and their prompts: as a result that is there was asked, else as the run was trained.

    What that result leaves open is asked of the adapter as it was trained, of the base model as the result was.
    """
    settings, asked = run.record["settings"], _asked(run)
    data = str(asked["data"]) if asked else _data(run)
    # Without a task the run was asked in a template that the task named here may not have.
    template = settings.get("template") or (None if settings.get("task") else run.record.get("template"))
    trained = {"template": template, "filters": settings.get("filters")} if of_adapter or not asked else {}
    values = {name: asked.get(name) or trained.get(name) for name in ("template", "filters", "split")}
    values["split"] = None if values["split"] == "test" else values["split"]
    return ["--data", data, *_flags(values)]


def _flags(values: dict[str, Any]) -> list[str]:
    """Those that were given; none is on unless it is."""
    given = {name: value for name, value in values.items() if value}
    return [
        word
        for name, value in given.items()
        for word in (f"--{name}", value if isinstance(value, str) else json.dumps(value))
    ]


def _data(run: Run) -> str:
    """Those of the run, if they may have a split `test`: it is read."""
    data = str(run.record["settings"]["data"])
    return "TEST_DATA" if data.removesuffix(".gz").endswith(FILE_ENDINGS) else data  # a file has training rows only
