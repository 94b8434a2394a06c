"""`mola lm-eval`: a base model, with or without an adapter, on the tasks of the LM Evaluation Harness.

- The harness's own command runs, with its `hf` model; importing mola is what lets it load the adapter.
- Options, model, adapter, task names and the tasks' data are checked before weights are loaded.
- Further flags of the harness are handed on in `lm_eval_args`.
"""

import glob
import io
import json
import logging
import math
import os
import shlex
import tempfile
from argparse import ArgumentParser, Namespace
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mola.errors import MolaError
from mola.files.atomic import atomic_write_json, atomic_write_text, check_new_file
from mola.files.environment import software_versions
from mola.files.reading import read_json_object
from mola.models.adapters import check_adapter, warn_other_base
from mola.models.base_model import load_config
from mola.models.devices import resolve_device, resolve_dtype
from mola.models.loading import check_adapter_fits
from mola.options.fields import option, paths_as_text

# Flags of the harness that an option of this command sets, and that option.
_OWN_FLAGS = {
    "model": "base_model",
    "tasks": "tasks",
    "limit": "limit",
    "batch_size": "batch_size",
    "include_path": "include_path",
    "output_path": "output",
    "device": "device",
    "trust_remote_code": "trust_remote_code",
}
_OWN_MODEL_ARGUMENTS = {"pretrained": "base_model", "peft": "adapter", "dtype": "dtype"}

logger = logging.getLogger(__name__)


@dataclass
class LmEvalOptions:
    """Options of `mola lm-eval`."""

    base_model: str = field(metadata={"help": "Folder or hub id of the base model."})
    tasks: str = field(metadata={"help": "Tasks of the harness, names between commas, or task files (YAML)."})
    adapter: str | None = option(None, "Folder of an adapter; none evaluates the base model alone.")
    limit: float | None = option(None, "Only the first so many samples of every task, or below 1 this share of them.")
    batch_size: str = option("8", "Samples per batch, or auto.")
    include_path: str | None = option(None, "Folder with further task files.")
    output: str | None = option(None, "Result file (JSON); with --log_samples the samples are written beside it.")
    overwrite: bool = option(False, "Replace an existing result.")
    dtype: str = option("auto", "Dtype: auto, float32, bfloat16 or float16.")
    device: str | None = option(None, "Device, such as cpu or cuda:0; by default the best one here.")
    trust_remote_code: bool = option(False, "Run code shipped with the model or a data set.")
    lm_eval_args: str = option(
        "", "Further flags of the harness as one text: --lm_eval_args='--num_fewshot 5 --log_samples'."
    )

    def __post_init__(self) -> None:
        paths_as_text(self)


def lm_eval(options: LmEvalOptions) -> dict[str, Any]:
    """Evaluate with the LM Evaluation Harness; it prints its table.

    Args:
        options: what to evaluate.

    Returns:
        The harness's results, with what made them under `mola`.

    Raises:
        MolaError: anything wrong with the options, the tasks or their data, before the model is loaded; the package
            lm-eval is missing.
    """
    arguments = _check_options(options)
    with tempfile.TemporaryDirectory() as folder:
        arguments.output_path = folder
        _check_tasks(options, arguments)
        arguments.func(arguments)
        result = _result(options, Path(folder))
    return result


def main(options: LmEvalOptions) -> int:
    """Run the command."""
    lm_eval(options)
    if options.output is not None:
        print(f"Results are in {options.output}")
    return 0


def _check_options(options: LmEvalOptions) -> Namespace:
    """Everything that can be wrong without the tasks' data; the harness's own arguments."""
    if find_spec("lm_eval") is None:
        raise MolaError("`mola lm-eval` needs the package lm-eval. Install it with pip install 'mola-peft[lm-eval]'.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise MolaError("`mola lm-eval` runs in one process: start it without a launcher (`WORLD_SIZE` is above 1).")
    limit = options.limit
    if limit is not None and not (0 < limit < 1 or (math.isfinite(limit) and limit >= 1 and limit == int(limit))):
        raise MolaError(f"`limit` must be a number of samples or a share between 0 and 1: got {limit:g}.")
    if options.batch_size != "auto" and not (options.batch_size.isdecimal() and int(options.batch_size) > 0):
        raise MolaError(f"`batch_size` must be at least 1, or auto: got {options.batch_size!r}.")
    if options.include_path is not None and not Path(options.include_path).is_dir():
        raise MolaError(f"`include_path` must be a folder with task files: got {options.include_path!r}.")
    names = [name.strip() for name in options.tasks.split(",")]
    if not all(names):
        raise MolaError(f"`tasks` must be names between commas: got {options.tasks!r}.")
    device = resolve_device(options.device)
    dtype = str(resolve_dtype(options.dtype, device)[0]).removeprefix("torch.")
    load_config(options.base_model, options.trust_remote_code)
    if options.adapter is not None:
        config = check_adapter(options.adapter)
        check_adapter_fits(options.base_model, options.adapter, options.trust_remote_code)
        warn_other_base(options.base_model, options.adapter, config)
    if options.output is not None:
        check_new_file("output", options.output, options.overwrite)
    arguments = _harness_arguments(options.lm_eval_args)
    # With `predict_only` the harness turns `log_samples` on.
    logs_samples = getattr(arguments, "log_samples", False) or getattr(arguments, "predict_only", False)
    if options.output is not None and logs_samples and not options.overwrite:
        target = Path(options.output)
        found = sorted(target.parent.glob(f"{glob.escape(target.stem)}.*.jsonl"))
        if there := [path for path in found if not _is_of_another(path, target)]:
            raise MolaError(
                f"`output` has samples of an earlier result beside it: {str(there[0])!r}. Pass --overwrite true to "
                "replace it, or another file."
            )
    if options.output is None and logs_samples:
        raise MolaError("`lm_eval_args` asks for every sample, which needs a file: pass `output` as well.")
    arguments.model, arguments.tasks, arguments.limit = "hf", names, limit
    arguments.batch_size, arguments.include_path = options.batch_size, options.include_path
    arguments.device = str(device)
    if options.trust_remote_code:
        arguments.trust_remote_code = True
    arguments.model_args = {
        **(arguments.model_args or {}),
        "pretrained": _place(options.base_model),
        "dtype": dtype,
        **({"peft": _place(options.adapter)} if options.adapter is not None else {}),
    }
    return arguments


def _samples_of(target: Path) -> list[Path]:
    """Files with the samples of the result that is there."""
    tasks = read_json_object(target).get("results")
    names = (_samples_file(target, task) for task in tasks) if isinstance(tasks, dict) else ()
    return [path for path in names if path.is_file()]


def _samples_file(target: Path, task: str) -> Path:
    return target.with_name(f"{target.stem}.{task}.jsonl")


def _is_of_another(samples: Path, target: Path) -> bool:
    """Whether samples beside a result are of one there whose name begins with the same, as in a.json and a.b.json."""
    parts = samples.name.removeprefix(f"{target.stem}.").removesuffix(".jsonl").split(".")
    names = [".".join([target.stem, *parts[:number]]) + target.suffix for number in range(1, len(parts))]
    return any(target.with_name(name).exists() for name in names)


def _place(name: str) -> str:
    """A folder by its full path: the harness would ask the hub about a short one."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _harness_arguments(text: str) -> Namespace:
    """`lm_eval_args` as the harness's own parser reads it, without flags that an option of this command sets."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise MolaError(f"`lm_eval_args` cannot be split into words: {text!r} ({error}).") from error
    untouched, given = _parse([]), _parse(words)
    if given.config is not None:
        raise MolaError("`lm_eval_args` must not hold --config: write its flags out, or use --config of this command.")
    for flag, name in _OWN_FLAGS.items():
        if getattr(given, flag, None) != getattr(untouched, flag, None):
            raise MolaError(f"`lm_eval_args` must not hold --{flag}: pass `{name}` instead.")
    for key, name in _OWN_MODEL_ARGUMENTS.items():
        if key in (given.model_args or {}):
            raise MolaError(f"`lm_eval_args` must not set {key} in --model_args: pass `{name}` instead.")
    return given


def _parse(words: list[str]) -> Namespace:
    from lm_eval._cli.run import Run

    parser = ArgumentParser(prog="lm-eval")
    Run.create(parser.add_subparsers())
    message = io.StringIO()
    try:
        with redirect_stderr(message):
            return parser.parse_args(["run", *words])
    except (SystemExit, ValueError, AssertionError) as error:
        if isinstance(error, SystemExit) and not error.code:
            raise  # --help
        lines = message.getvalue().strip().splitlines() or [str(error)]
        reason = lines[-1].rpartition("error: ")[2]
        raise MolaError(
            f"`lm_eval_args` is refused by the harness: {reason}. `lm-eval run --help` lists its flags."
        ) from error


def _check_tasks(options: LmEvalOptions, arguments: Namespace) -> None:
    """Load the tasks with their data once; the harness itself would do it after loading the model."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    try:
        settings = EvaluatorConfig.from_cli(arguments)
    except (ValueError, TypeError) as error:
        raise MolaError(f"`lm_eval_args` is refused by the harness: {error}") from error
    try:
        manager = settings.process_tasks(settings.metadata)
        manager.load(settings.tasks)
    # No such task; no such file, no network; a package that a task needs; data that come as a script.
    except (ValueError, KeyError, OSError, ImportError, RuntimeError, AttributeError) as error:
        raise MolaError(
            f"`tasks` must name tasks whose data is at hand or can be downloaded: {options.tasks!r}: "
            f"{type(error).__name__}: {error}. `lm-eval ls tasks` lists the names; `include_path` adds own ones."
        ) from error


def _result(options: LmEvalOptions, folder: Path) -> dict[str, Any]:
    """The harness's result, in `output` if that is given."""
    found, samples = sorted(folder.rglob("results_*.json")), sorted(folder.rglob("samples_*.jsonl"))
    if not found:  # the harness catches every error there and goes on
        raise MolaError(
            "the harness could not write its result, for the reason it gives above: make room for temporary files "
            "(TMPDIR), or give model and adapter shorter paths."
        )
    (file,) = found
    made_by = {"settings": asdict(options), "versions": software_versions()}
    not_finite: list[str] = []
    measured = json.loads(file.read_text(encoding="utf-8"), parse_constant=not_finite.append)  # which gives None
    if not_finite:
        logger.warning("%d numbers of the result are not finite, and null in it.", len(not_finite))
    result = {**measured, "mola": made_by}
    if options.output is not None:
        target = Path(options.output)
        earlier = _samples_of(target)  # which `overwrite` has allowed to replace
        new = {path.name.removeprefix("samples_").rpartition("_")[0]: path for path in samples}
        for task, path in new.items():
            atomic_write_text(_samples_file(target, task), path.read_text(encoding="utf-8"))
        atomic_write_json(target, result)
        for path in earlier:
            if path not in {_samples_file(target, task) for task in new}:
                path.unlink()
    return result
