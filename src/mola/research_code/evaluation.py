"""The research code's evaluation script: its flags and its result file, on top of `mola evaluate`."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mola.evaluation.evaluate import EvaluateOptions
from mola.evaluation.evaluate import main as evaluate_main
from mola.files.atomic import atomic_write_json, check_new_file
from mola.options.fields import option
from mola.research_code.adapters import lists_of, usable_adapter
from mola.research_code.flag_names import flag_names

logger = logging.getLogger(__name__)

# The preparation script leaves a letter out; people correct it.
_SPELLINGS = ("scienceq_", "scienceqa_")
# Flags that `mola evaluate` has, too.
_SAME_OPTIONS = (
    *("base_model", "limit", "batch_size", "max_new_tokens", "overwrite"),
    *("dtype", "device", "trust_remote_code", "template"),
)


@dataclass
class ResearchEvaluateOptions:
    """Flags of `evaluation_scienceqa.py`."""

    test_dataset: str = option(
        "./scienceqa/scienceq_test.json",
        "Prepared test data; the names scienceq_* and scienceqa_* stand for each other.",
    )
    base_model: str = option("NousResearch/Llama-2-7b-hf", "Folder or hub id of the base model.")
    mola_weights: str = option(
        "./scienceqa_mola",
        "Folder of the adapter: mola's, or the research code's, which is converted to <folder>.mola.",
    )
    number_experts: str | None = option(
        None, "Experts per layer. The adapter says it itself; if given it must be the same."
    )
    top_k: str | None = option(
        None,
        "Experts used per token. Needed for an adapter of the research code, whose files do not hold it: the value of "
        "its training (2 was the default). For others as number_experts.",
    )
    lora_target_modules: str | None = option(None, "Adapted linears; as number_experts.")
    save_path: str = option("./results/mola_test_sciqa_seed_10.json", "Result file (JSON).")
    batch_size: int = option(8, "Samples per batch.")

    # Not in the research code.
    max_new_tokens: int = option(128, "Tokens to generate per sample.")
    template: str | None = option(None, "Prompt template that the adapter was trained with; default: alpaca.")
    limit: int | None = option(None, "Evaluate only the first so many samples.")
    overwrite: bool = option(False, "Replace an existing result file.")
    dtype: str = option("auto", "Dtype: auto, float32, bfloat16 or float16.")
    device: str | None = option(None, "Device, such as cpu or cuda:0; by default the best one here.")
    trust_remote_code: bool = option(False, "Run code shipped with the model.")


def main(options: ResearchEvaluateOptions) -> int:
    """Evaluate, print the table of `mola evaluate`, write the result file.

    The file has the names of the research code (`acc` in percent, `correct`, `len`, `results`, `outputs`) and
    all those of a result of `mola evaluate`.
    """
    check_new_file("save_path", options.save_path, options.overwrite)
    lists = lists_of(options)
    same = {name: getattr(options, name) for name in _SAME_OPTIONS}
    with flag_names({"data": "test_dataset", "adapter": "mola_weights", "output": "save_path"}):
        adapter = usable_adapter(options.mola_weights, options.base_model, lists, options.trust_remote_code)
        data = _either_spelling(options.test_dataset)
        code = evaluate_main(
            EvaluateOptions(**same, task="scienceqa", data=data, adapter=adapter, output=options.save_path)
        )
    result = json.loads(Path(options.save_path).read_text(encoding="utf-8"))
    atomic_write_json(options.save_path, {**research_result(result), **result})
    return code


def research_result(result: dict[str, Any]) -> dict[str, Any]:
    """The research code's part of a result file of `mola evaluate`.

    Returns:
        `acc` (percent), `correct`, `len`, `results` (per sample a list with its answer, empty if there is none) and
        `outputs` (per sample the text of the model, without special tokens).
    """
    samples = result["samples"]
    return {
        "acc": 100 * result["accuracy"],
        "correct": result["correct"],
        "len": result["total"],
        "results": [[] if sample["predicted"] is None else [sample["predicted"]] for sample in samples],
        "outputs": [sample["output"] for sample in samples],
    }


def _either_spelling(path: str) -> str:
    """`path`, or the file of the other spelling if only that one is there."""
    place = Path(path)
    if place.exists():
        return path
    for old, new in (_SPELLINGS, _SPELLINGS[::-1]):
        other = place.with_name(new + place.name.removeprefix(old))
        if place.name.startswith(old) and other.exists():
            logger.warning("There is no %s; reading %s.", path, other)
            return str(other)
    return path
