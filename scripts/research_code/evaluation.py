"""`evaluation_scienceqa.py`: the research code's flags and result file, on top of `mola evaluate`."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mola.evaluation.evaluate import EvaluateOptions
from mola.evaluation.evaluate import main as evaluate_main
from mola.files.atomic import atomic_write_json, check_new_file
from mola.options.fields import option
from research_code.adapters import adapter_flags, usable_adapter

logger = logging.getLogger("mola.research_code")  # a child of "mola", whose log lines are shown

# Flags that `mola evaluate` has under the same name.
_SAME_NAME = (
    "base_model",
    "limit",
    "batch_size",
    "max_new_tokens",
    "overwrite",
    "dtype",
    "device",
    "trust_remote_code",
    "template",
)


@dataclass
class ResearchEvaluateOptions:
    """Flags of `evaluation_scienceqa.py`."""

    test_dataset: str = option(
        "./scienceqa/scienceq_test.json",
        "Prepared test data. If there is no file scienceq_*, scienceqa_* is read, and vice versa.",
    )
    base_model: str = option("NousResearch/Llama-2-7b-hf", "Folder or hub id of the base model.")
    mola_weights: str = option(
        "./scienceqa_mola",
        "Folder of an adapter of mola or of the research code. An adapter of the research code is converted to "
        "<folder>.mola.",
    )
    number_experts: str | None = option(
        None, "Experts per layer. May be left out; else it must equal the adapter's value."
    )
    top_k: str | None = option(
        None,
        "Experts used per token. Needed for an adapter of the research code, whose files do not hold it: the value "
        "used in training (2 was the default). For other adapters it may be left out.",
    )
    lora_target_modules: str | None = option(
        None, "Adapted linears. May be left out; else they must equal the adapter's."
    )
    save_path: str = option("./results/mola_test_sciqa_seed_10.json", "Result file (JSON).")
    batch_size: int = option(8, "Samples per batch.")

    # Not in the research code.
    max_new_tokens: int = option(128, "Tokens to generate per sample.")
    template: str | None = option(None, "Prompt template that the adapter was trained with. Default: alpaca.")
    limit: int | None = option(None, "Number of samples to evaluate, from the start of the data. Default: all.")
    overwrite: bool = option(False, "Replace an existing result file.")
    dtype: str = option("auto", "Dtype: auto, float32, bfloat16 or float16.")
    device: str | None = option(None, "Device, such as cpu or cuda:0. Default: the best one of this machine.")
    trust_remote_code: bool = option(False, "Run code shipped with the model.")


def main(options: ResearchEvaluateOptions) -> int:
    """Evaluate, print the table of `mola evaluate` and write the result file.

    The file has the names of the research code (`acc` in percent, `correct`, `len`, `results`, `outputs`) and all
    names of a result of `mola evaluate`.
    """
    check_new_file("save_path", options.save_path, options.overwrite)
    adapter = usable_adapter(
        options.mola_weights, options.base_model, adapter_flags(options), options.trust_remote_code
    )
    code = evaluate_main(
        EvaluateOptions(
            task="scienceqa",
            data=_existing_spelling(options.test_dataset),
            adapter=adapter,
            output=options.save_path,
            **{name: getattr(options, name) for name in _SAME_NAME},
        )
    )
    result = json.loads(Path(options.save_path).read_text(encoding="utf-8"))
    atomic_write_json(options.save_path, {**_research_result(result), **result})
    return code


def _research_result(result: dict[str, Any]) -> dict[str, Any]:
    """The research code's names for a result of `mola evaluate`; `results` has an empty list if there is no answer."""
    samples = result["samples"]
    return {
        "acc": 100 * result["accuracy"],
        "correct": result["correct"],
        "len": result["total"],
        "results": [[] if sample["predicted"] is None else [sample["predicted"]] for sample in samples],
        "outputs": [sample["output"] for sample in samples],
    }


def _existing_spelling(path: str) -> str:
    """`path`, or its name with scienceqa_ for scienceq_ or vice versa, if only that file exists.

    The research code's preparation script writes scienceq_, without an a.
    """
    place = Path(path)
    for old, new in (("scienceq_", "scienceqa_"), ("scienceqa_", "scienceq_")):
        other = place.with_name(new + place.name.removeprefix(old))
        if place.name.startswith(old) and other.exists() and not place.exists():
            logger.warning("There is no %s. Reading %s.", path, other)
            return str(other)
    return path
