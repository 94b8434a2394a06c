"""Options of `mola evaluate` and `mola lm-eval`."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

from mola.errors import MolaError
from mola.models.options import BASE_MODEL_HELP, SKILL_HELP, ModelOptions, settle_base_model
from mola.options.fields import START, Group, check_positive, check_results, option, required

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
    output: str | None = option(None, "Result file (JSON) with every sample.", writes="file")
    overwrite: bool = option(False, "Replace an existing result; discard an unfinished run with other settings.")
    seed: int = option(0, "Random seed; decoding is greedy, so only code shipped with a model may use it.")

    def check(self) -> None:
        """Check what needs neither model nor data.

        Raises:
            MolaError: a number is out of its range, or the result would replace a file.
        """
        check_positive(batch_size=self.batch_size, max_new_tokens=self.max_new_tokens, limit=self.limit)
        if not 0 <= self.seed < 2**32:
            raise MolaError(f"`seed` must be a whole number from 0 to 2**32 - 1: got {self.seed}.")
        check_results(self)
        if self.output is not None and os.path.realpath(self.output) == os.path.realpath(self.data):
            raise MolaError(f"`output` must not be `data` ({self.data!r}), which it would replace. Choose another.")


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
    output: str | None = option(None, "Result file (JSON).", writes="file")
    log_samples: bool = option(False, "Also write every sample, to a file for each task beside the result file.")
    overwrite: bool = option(False, "Replace an existing result.")
    dtype: str = option("auto", "Dtype: auto, float32, bfloat16 or float16.")
    device: str | None = option(None, "Device, such as cpu or cuda:0; by default the best one here.")
    trust_remote_code: bool = option(False, "Run code shipped with the model or a data set.")

    def __post_init__(self) -> None:
        settle_base_model(self, [] if self.adapter is None else [self.adapter])

    def check(self) -> None:
        """Check what needs neither model nor tasks.

        Raises:
            MolaError: the harness is not installed, an option is wrong, or the result would replace a file.
        """
        if find_spec("lm_eval") is None:
            raise MolaError(
                "`mola lm-eval` needs the package lm-eval. Install it with pip install 'mola-peft[lm-eval]'."
            )
        if self.limit is not None and not (0 < self.limit < 1 or (self.limit >= 1 and self.limit % 1 == 0)):
            raise MolaError(f"`limit` must be a number of samples or a share between 0 and 1: got {self.limit:g}.")
        if self.log_samples and self.output is None:
            raise MolaError("`log_samples` needs a file to write the samples beside: pass `output` as well.")
        check_results(self)
