"""The commands that make what a report does not have yet."""

import shlex

from mola.reporting.load_run import Run


def evaluate_command(run: Run, name: str) -> str:
    """The command for `before` or `after`."""
    words = ["mola", "evaluate", *_base(run), "--task", run.record["settings"].get("task") or "TASK"]
    adapter = ["--adapter", str(run.folder)] if name == "after" else []
    return shlex.join([*words, *adapter, "--data", _data(run), "--output", str(run.paths[name])])


def inspect_command(run: Run) -> str:
    """The command for `inspection`, which replaces one that is there."""
    words = ["mola", "inspect", *_base(run), "--adapter", str(run.folder)]
    task = run.record["settings"].get("task")
    words += ["--task", task] if task else []
    words += ["--data", _data(run), *(["--overwrite"] if run.inspection else [])]
    return shlex.join([*words, "--json", str(run.paths["inspection"])])


def _base(run: Run) -> list[str]:
    return ["--base_model", str(run.record["settings"]["base_model"])]


def _data(run: Run) -> str:
    """The test data if a result names them, else those of the run: their split `test` is read."""
    for result in (run.after, run.before, run.inspection):
        if result is not None and result["settings"].get("data"):
            return str(result["settings"]["data"])
    return str(run.record["settings"]["data"])
