"""`mola lm-eval`: a base model, with or without an adapter, on the tasks of the LM Evaluation Harness.

The harness evaluates with its `hf` model, which can load the adapter once mola is imported; of a skills folder each
context asks the skill that knows it. The tasks and their data are loaded before the weights. For further flags of the
harness: `mola with python -m lm_eval ...`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mola.checkpoints.adapter_settings import adapter_settings, is_skills_folder, named_adapter
from mola.errors import MolaError
from mola.evaluation.options import LmEvalOptions
from mola.evaluation.skills import count_asked
from mola.files.atomic import atomic_write_json, atomic_write_text
from mola.files.environment import software_versions
from mola.models.adapters import warn_other_base
from mola.models.base_model import load_config
from mola.models.devices import resolve_device, resolve_dtype
from mola.models.from_options import adapter_alone, adapter_for
from mola.models.loading import check_adapter_fits, load_model


def lm_eval(options: LmEvalOptions) -> dict[str, Any]:
    """Evaluate with the LM Evaluation Harness, and print its table.

    Returns:
        The harness's results, and under `mola` the options and versions that made them; of a skills folder also how
        many contexts asked each skill (`asked`).

    Raises:
        MolaError: the package lm-eval is missing, or something is wrong with options, adapter, tasks or their data.
    """
    model_arguments = _check_options(options)
    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable, make_table

    tasks, manager = _load_tasks(options, model_arguments)
    model = _model_with_skills(options, model_arguments)
    result: Any = simple_evaluate(
        model="hf" if model is None else model,
        model_args=model_arguments,
        tasks=tasks,
        task_manager=manager,
        num_fewshot=options.num_fewshot,
        apply_chat_template=options.apply_chat_template,
        batch_size=options.batch_size,
        device=str(resolve_device(options.device)),
        limit=options.limit,
        log_samples=options.log_samples,
    )
    samples = result.pop("samples", {})
    print(make_table(result))
    if result.get("groups"):
        print(make_table(result, "groups"))
    # JSON has no NaN, which some metrics give: it becomes null.
    text = json.dumps(result, default=handle_non_serializable)
    result = json.loads(text, parse_constant=lambda name: None)
    result["mola"] = {"settings": asdict(options), "versions": software_versions()}
    if model is not None:
        result["mola"]["asked"] = count_asked(model.asked.elements())
    if options.output is not None:
        for task, rows in samples.items():
            lines = [json.dumps(row, default=handle_non_serializable, ensure_ascii=False) + "\n" for row in rows]
            target = Path(options.output)
            atomic_write_text(target.with_name(f"{target.stem}.{task}.jsonl"), "".join(lines))
        atomic_write_json(options.output, result)
    return result


def _model_with_skills(options: LmEvalOptions, arguments: Mapping[str, Any]) -> Any:
    """The harness's model of a skills folder whose skills are asked; None for every other model."""
    folder = named_adapter(options.adapter, options.skill)
    if folder is None or not is_skills_folder(folder):
        return None
    from mola.evaluation.lm_eval_skills import SkillsLM

    model = load_model(options.base_model, folder, options.dtype, options.device, options.trust_remote_code)
    return SkillsLM(
        model,
        tokenizer=arguments["pretrained"],
        batch_size=options.batch_size,
        trust_remote_code=options.trust_remote_code,
    )


def main(options: LmEvalOptions) -> int:
    """Run the command."""
    lm_eval(options)
    if options.output is not None:
        print(f"Results are in {options.output}")
    return 0


def _check_options(options: LmEvalOptions) -> dict[str, Any]:
    """Check the options before tasks and weights are loaded. Returns the arguments of the harness's model."""
    options.check()
    load_config(options.base_model, options.trust_remote_code)
    dtype = str(resolve_dtype(options.dtype, resolve_device(options.device))[0]).removeprefix("torch.")
    arguments: dict[str, Any] = {
        "pretrained": _full_path(options.base_model),
        "dtype": dtype,
        "trust_remote_code": options.trust_remote_code,
    }
    adapter = adapter_alone(adapter_for(options))
    if adapter is not None:
        check_adapter_fits(options.base_model, adapter, options.trust_remote_code)
        warn_other_base(options.base_model, adapter, adapter_settings(adapter))
        arguments["peft"] = _full_path(adapter)
    return arguments


def _full_path(name: str) -> str:
    """The full path of a folder: the harness would read a short path as a model name on the Hub."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _load_tasks(options: LmEvalOptions, model_arguments: dict[str, Any]) -> tuple[list[Any], Any]:
    """Load the tasks with their data, which the harness itself would load after the weights."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    settings = EvaluatorConfig(tasks=options.tasks, include_path=options.include_path)
    try:
        manager = settings.process_tasks(model_arguments)
        manager.load(settings.tasks)
    # No such task or file, no network, a package that a task needs, data that come as a script.
    except (ValueError, KeyError, OSError, ImportError, RuntimeError, AttributeError) as error:
        raise MolaError(
            f"`tasks` must name tasks whose data is at hand or can be downloaded: {options.tasks!r}: "
            f"{type(error).__name__}: {error}. `lm-eval ls tasks` lists the names; `include_path` adds own ones."
        ) from error
    return settings.tasks, manager
