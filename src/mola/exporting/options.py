"""Options of `mola convert`, and which options each direction reads."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from mola.checkpoints.recorded_base import base_model_of
from mola.errors import MolaError
from mola.models.options import settle_base_model
from mola.options.fields import START, Group, check_positive, convert_paths, option, required

METHODS = ("regression", "mean", "usage")


@dataclass
class ConvertOptions:
    """Options of `mola convert`."""

    _start: ClassVar = START
    source: list[str] = field(
        metadata={"help": "Folder of the adapter to convert; with --from lora the folders of all adapters."}
    )
    output: str = field(metadata={"help": "Folder to write; it must be new or empty.", "writes": "folder"})
    source_format: str | None = option(
        None,
        "Format of the source, to convert it to mola's format: 'published' is the research code's, 'lora' is PEFT's "
        "LoRA.",
        "from",
    )
    target_format: str | None = option(
        None,
        "Format to convert an adapter of mola to: 'published' is the research code's, 'lora' is PEFT's LoRA.",
        "to",
    )
    base_model: str | None = option(
        None,
        "The adapter's base model, a folder or a hub id. Its weights are read only if data are given. Default: the one "
        "that the source was trained on.",
    )
    top_k: str | None = option(
        None,
        "Experts per token. With --from published: the number used in training, which the adapter's files do not hold. "
        "With --from lora: the number for the new mixture (default 2). An integer, or one per layer between commas.",
    )
    trust_remote_code: bool = option(False, "Run code that comes with the base model; only for sources you trust.")

    _lora: ClassVar = Group("to lora")
    rank: int | None = option(None, "Rank of the LoRA. An adapter with one expert everywhere needs none.", "r")
    method: str | None = option(
        None,
        "regression: the LoRA nearest to the mixture on `data` or `text`. It is the default if one of them is given. "
        "Otherwise the default is mean: the mean of the experts. With usage the mean is weighted by the gates in the "
        "last interval of the adapter's routing.jsonl.",
    )
    fit_passes: int = option(
        1,
        "regression: number of groups of layers that are fitted one after the other. Each group is fitted to the "
        "inputs it gets once the groups before it are converted. The data are read once per group; little memory can "
        "make more groups necessary.",
    )
    answer_weight: float = option(
        10.0,
        "regression: weight of the tokens that predict a token of an answer or of `text`; other tokens have weight 1.",
    )
    test: str | None = option(
        None,
        "Test file: measures the loss of base, mixture and LoRA, and with a `task` that has answers their accuracy and "
        "its differences.",
    )
    test_text: str | None = option(None, "Text file to measure the LoRA on; the LoRA is not fitted to it.")
    scoring: str = option("likelihood", "How `test` is scored: likelihood or generate, as in `mola evaluate`.")

    _mixture: ClassVar = Group("from lora")
    num_experts: str | None = option(None, "Experts per layer of the new mixture, in any notation of `mola train`.")
    noise: float = option(
        0.1,
        "Standard deviation of the noise on copies of an adapter, relative to the standard deviation of the adapter's "
        "weights. 0 makes equal copies.",
    )

    _data: ClassVar = Group("data, with lora")
    data: list[str] | None = option(
        None,
        "Data like the adapter's training data: a JSON, JSON lines or CSV file, or a saved dataset. With --from lora "
        "one for each adapter, in the same order: routers are fitted to tell the adapters' inputs apart.",
    )
    task: str | None = option(None, "Task of `data` and `test`: a name or a task file (YAML). Free text needs none.")
    template: str | None = option(
        None,
        "Prompt template of `data` and `test`. Default: the template used in the adapter's training, else the task's, "
        "else the tokenizer's chat template, else alpaca.",
    )
    split: str = option("train", "Split to read if `data` has several; of `test`, the split test is read.")
    text: str | None = option(None, "File of general text, to keep the LoRA near the mixture on such text as well.")
    limit: int = option(2000, "Read at most this many samples of `data` and pieces of `text` and `test_text`.")
    seed: int = option(0, "Random seed of routers and noise.")
    memory_gb: float = option(
        8.0, "Memory for statistics of the layers' inputs, in GB. With less memory the data are read more often."
    )
    dtype: str = option("auto", "Dtype of the base model: auto, float32, bfloat16 or float16.")
    device: str | None = option(None, "Device, such as cpu or cuda:0; by default the best one available.")

    def __post_init__(self) -> None:
        convert_paths(self)

    def check(self) -> None:
        """Check what needs no model; see `check_direction`."""
        check_direction(self)


def check_sources(sources: list[str]) -> None:
    """Raise if one of the adapters to convert is no folder."""
    for source in sources:
        if not os.path.isdir(os.path.expanduser(source)):
            raise MolaError(f"`source` must be the folder of an adapter, there is none at {source!r}.")


_DATA = ("data", "task", "template", "split", "limit", "memory_gb", "dtype", "device", "trust_remote_code")
# Direction -> the options that it requires, and the options that it reads if they are given.
_DIRECTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "--from published": (("base_model", "top_k"), ("trust_remote_code",)),
    "--from lora": (("base_model", "num_experts"), ("top_k", "noise", "seed", *_DATA)),
    "--to published": ((), ()),
    "--to lora": (
        ("base_model",),
        ("rank", "method", "fit_passes", "answer_weight", "test", "test_text", "scoring", "text", *_DATA),
    ),
}
_REGRESSION = ("fit_passes", "answer_weight", "memory_gb")
# Option -> options of which one must be given, or the option has no effect.
_NEEDS_ONE_OF = {
    **dict.fromkeys(_REGRESSION, ("data", "text")),
    "limit": ("data", "text", "test_text"),
    **dict.fromkeys(("dtype", "device"), ("data", "text", "test", "test_text")),
    "split": ("data",),
    **dict.fromkeys(("task", "template"), ("data", "test")),
    "scoring": ("test",),
}
_CURES = {
    "top_k": "The files do not hold it, and a wrong number gives different outputs without an error. Pass the value of "
    "the training command, such as --top_k 2.",
    "num_experts": "Pass one number such as --num_experts 4, or one number per layer.",
}


def check_direction(options: ConvertOptions) -> str:
    """Check that the options fit one direction of the conversion, and set `base_model` if only the source names it.

    Returns:
        The direction, such as "--to lora".

    Raises:
        MolaError: not exactly one direction is given, a required option is missing, or an option would be ignored.
    """
    ways = {"--from": options.source_format, "--to": options.target_format}
    given = " ".join(f"{way} {name}" for way, name in ways.items() if name is not None)
    if given not in _DIRECTIONS:
        raise MolaError(f"exactly one of {', '.join(_DIRECTIONS)} must be given, got {given or 'none'}.")
    needed = _DIRECTIONS[given][0]
    if "base_model" in needed:
        options.base_model = base_model_of(options.base_model, map(os.path.expanduser, options.source))
    for name in needed:
        if getattr(options, name) is None:
            raise MolaError(f"`{name}` must be given with {given}. {_CURES[name]}")
    if len(options.source) > 1 and given != "--from lora":
        raise MolaError(f"`source` must be one adapter for {given}, got {options.source}. --from lora accepts several.")
    check_positive(limit=options.limit)
    _check_no_option_is_ignored(options, given)
    return given


def _check_no_option_is_ignored(options: ConvertOptions, direction: str) -> None:
    always_read = {"source", "output", "source_format", "target_format"}
    is_read = {name: always_read.union(*names) for name, names in _DIRECTIONS.items()}
    given: dict[str, Any] = {
        each.name: value for each in fields(options) if (value := getattr(options, each.name)) != each.default
    }
    for name, value in given.items():
        if name not in is_read[direction]:
            readers = [each for each, names in is_read.items() if name in names]
            raise MolaError(f"`{name}` is only for {' and '.join(readers)}, got {value!r}. Leave it out.")
        needed = [other for other in _NEEDS_ONE_OF.get(name, ()) if other in is_read[direction]]
        if needed and not given.keys() & needed:
            others = " or ".join(f"`{other}`" for other in needed)
            raise MolaError(f"`{name}` has no effect without {others}: got {value!r}. Add one, or leave it out.")
        if name in _REGRESSION and options.method in ("mean", "usage"):
            raise MolaError(f"`{name}` is not used by `method` {options.method}: got {value!r}. Leave it out.")


@dataclass
class MergeOptions:
    """Options of `mola merge`."""

    adapter: str = field(
        metadata={"help": "Folder of an adapter that merges: plain LoRA, or a mola adapter with one expert everywhere."}
    )
    base_model: str = option(
        None, "Folder or hub id of its base model, not quantised. Default: the one that the adapter was trained on."
    )
    output: str = required("Folder to write; it must be new or empty.", writes="folder")
    dtype: str = option("auto", "Dtype of the merged model: float32, bfloat16 or float16; auto: the base model's own.")
    device: str | None = option("cpu", "Where to compute, such as cpu or cuda:0.")
    trust_remote_code: bool = option(False, "Run code that comes with the base model; only for sources you trust.")

    def __post_init__(self) -> None:
        settle_base_model(self, [os.path.expanduser(self.adapter)])
