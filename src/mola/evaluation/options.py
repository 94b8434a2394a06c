"""Options of `mola evaluate` and `mola lm-eval`."""

from dataclasses import dataclass
from typing import Any, ClassVar

from mola.models.options import BASE_MODEL_HELP, SKILL_HELP, ModelOptions, settle_base_model
from mola.options.fields import START, Group, option, required

MAX_NEW_TOKENS = 16  # enough for a short answer
_ADAPTER = "Folder of an adapter, or a skills folder; none evaluates the base model alone."


@dataclass
class EvaluateOptions(ModelOptions):
    """Options of `mola evaluate`."""

    _start: ClassVar = START
    task: str | None = option(
        None,
        "Name of a task, or a task file (YAML). Free text needs none: its loss and perplexity are measured. If a "
        "task has answers, or rows without a task have `choices`, the accuracy is measured.",
    )
    data: str = required("Test data: a JSON, JSONL, CSV or parquet file, a folder, or a Hub id.")
    adapter: str | None = option(None, _ADAPTER)
    skill: str | None = option(None, SKILL_HELP)

    _data: ClassVar = Group("data")
    split: str = option("test", "Split to read if the data has several.")
    filters: dict[str, Any] | str | None = option(None, "Keep rows with these values: {column: value, or a list}.")
    limit: int | None = option(None, "Evaluate only this many samples, the first ones.")

    _answers: ClassVar = Group("answers")
    batch_size: int = option(8, "Samples per batch.")
    max_new_tokens: int = option(
        MAX_NEW_TOKENS, "Tokens to generate per sample; enough for a short answer (the research code uses 128)."
    )
    template: str | None = option(
        None,
        "Prompt template; chat is the chat template of adapter or base model. Default: the one of the adapter's "
        "training, else the task's own, else the tokenizer's chat template, else alpaca.",
    )
    scoring: str = option(
        "generate",
        "'generate': decode greedily and extract the answer. 'likelihood': the possible answer (letter or "
        "word) that is most probable where the expected output states it.",
    )

    _run: ClassVar = Group("run")
    output: str | None = option(None, "Result file (JSON) with every sample.")
    overwrite: bool = option(False, "Replace an existing result; discard an unfinished run with other settings.")
    seed: int = option(0, "Random seed; decoding is greedy, so only code shipped with a model may use it.")


@dataclass
class LmEvalOptions:
    """Options of `mola lm-eval`."""

    base_model: str = option(None, BASE_MODEL_HELP)
    tasks: str = required("Tasks of the harness, names between commas, or task files (YAML).")
    adapter: str | None = option(None, _ADAPTER)
    skill: str | None = option(None, SKILL_HELP)
    limit: float | None = option(None, "Only this many samples of every task, the first ones; below 1 a share of them.")
    num_fewshot: int | None = option(None, "Solved examples in every prompt. Default: the task's own number.")
    apply_chat_template: bool = option(False, "Write prompts with the base model's chat template.")
    batch_size: str = option("8", "Samples per batch, or auto.")
    include_path: str | None = option(None, "Folder with further task files.")
    output: str | None = option(None, "Result file (JSON).")
    log_samples: bool = option(False, "Also write every sample, to a file for each task beside the result file.")
    overwrite: bool = option(False, "Replace an existing result.")
    dtype: str = option("auto", "Dtype: auto, float32, bfloat16 or float16.")
    device: str | None = option(None, "Device, such as cpu or cuda:0; by default the best one here.")
    trust_remote_code: bool = option(False, "Run code shipped with the model or a data set.")

    def __post_init__(self) -> None:
        settle_base_model(self, [] if self.adapter is None else [self.adapter])
