"""Options of `mola convert`, and which of them belong to which direction."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar

from mola.errors import MolaError
from mola.options.fields import START, Group, option, paths_as_text

METHODS = ("regression", "mean", "usage")


@dataclass
class ConvertOptions:
    """Options of `mola convert`."""

    _start: ClassVar = START
    source: list[str] = field(metadata={"help": "Folder of the adapter to convert; of several with --from lora."})
    output: str = field(metadata={"help": "Folder to write; it must be new or empty."})
    source_format: str | None = option(
        None,
        "Format of the source, to convert it to mola's: 'published' is the research code's, 'moe_peft' MoE-PEFT's with "
        "mola routing, 'lora' PEFT's LoRA. Also written --from.",
        aliases=["--from"],
    )
    target_format: str | None = option(
        None,
        "Format to convert an adapter of mola to: 'published' is the research code's, 'lora' PEFT's LoRA. Also written "
        "--to.",
        aliases=["--to"],
    )
    base_model: str | None = option(
        None,
        "The adapter's base model, a folder or a name on the hub. Its weights are read only with data.",
    )
    top_k: str | None = option(
        None,
        "Experts per token: with --from published those the adapter was trained with, which its files do not say; with "
        "--from lora those of the new mixture (default 2). An integer, or one per layer between commas.",
    )
    trust_remote_code: bool = option(False, "Run code that comes with the base model; only for sources you trust.")

    _lora: ClassVar = Group("to lora")
    rank: int | None = option(None, "Rank of the LoRA.")
    method: str | None = option(
        None,
        "regression: nearest to the mixture on `data` or `text`, the default with them. mean, the default without: the "
        "experts' mean. usage: weighted by their gates in the last interval of the adapter's routing.jsonl.",
    )
    fit_passes: int = option(
        1,
        "regression: fit the layers in so many parts one after the other, each to the inputs that it has when those "
        "before it are converted. The data are read once for each; little memory asks for more.",
    )
    answer_weight: float = option(
        10.0, "regression: how often a token counts at which an answer, or a text, is predicted; others count once."
    )
    distill_steps: int = option(0, "Train the LoRA for so many batches of the data towards the mixture's logits.")
    distill_learning_rate: float = option(1e-5, "Learning rate of the first of these steps; it falls to 0.")
    test: str | None = option(None, "Test file of `task`: accuracy of base, mixture and LoRA, and their differences.")
    test_text: str | None = option(None, "Text file that the LoRA is measured on without being fitted to it.")
    scoring: str = option("likelihood", "How `test` is scored: likelihood or generate, as in `mola evaluate`.")

    _mixture: ClassVar = Group("from lora")
    num_experts: str | None = option(None, "Experts per layer of the new mixture, in any notation of `mola train`.")
    noise: float = option(
        0.1, "Noise on copies of an adapter, as a part of its standard deviation; 0 keeps them equal."
    )

    _data: ClassVar = Group("data, with lora")
    data: list[str] | None = option(
        None,
        "Data like those the adapter is for: a JSON, JSON lines or CSV file, or a saved dataset. With --from lora one "
        "for each adapter, in their order: routers are fitted to tell them apart.",
    )
    task: str | None = option(None, "Task of `data` and `test`, a name or a task file (YAML).")
    template: str | None = option(
        None, "Prompt template of `data` and `test`. Default: that of the adapter's training, else the task's own."
    )
    split: str = option("train", "Split to read where `data` has several; `test` has its own.")
    text: str | None = option(None, "Text file of general text, to keep the LoRA near the mixture there as well.")
    limit: int = option(2000, "Read only the first so many samples of `data`, and pieces of `text` and `test_text`.")
    seed: int = option(0, "Random seed: of routers and noise, of the order of batches that are trained on.")
    memory_gb: float = option(
        8.0, "Most memory for statistics of the layers' inputs at once: with less, the data are read more often."
    )
    dtype: str = option("auto", "Dtype of the base: auto, float32, bfloat16 or float16.")
    device: str | None = option(None, "Device, such as cpu or cuda:0; by default the best one here.")

    def __post_init__(self) -> None:
        paths_as_text(self)


_ANY = ("source", "output", "source_format", "target_format")
_DATA = ("data", "task", "template", "split", "limit", "seed", "dtype", "device")
# What each direction takes besides; the first names of each must be given.
_TAKES = {
    "--from published": ("base_model", "top_k", "trust_remote_code"),
    "--from moe_peft": ("base_model", "trust_remote_code"),
    "--from lora": ("base_model", "num_experts", "top_k", "noise", "memory_gb", "trust_remote_code", *_DATA),
    "--to published": (),
    "--to lora": (
        *("base_model", "rank", "method", "fit_passes", "answer_weight", "distill_steps", "distill_learning_rate"),
        *("test", "test_text", "scoring", "memory_gb", "text", "trust_remote_code", *_DATA),
    ),
}
# Options that do nothing unless one of others is given.
_NEEDS_ONE_OF = {
    **dict.fromkeys(("fit_passes", "answer_weight", "memory_gb"), ("data", "text")),
    "limit": ("data", "text", "test_text"),
    **dict.fromkeys(("dtype", "device"), ("data", "text", "test", "test_text")),
    "seed": ("distill_steps", "num_experts"),  # of which --from lora has the latter in any case
    "split": ("data",),
    "template": ("task",),
    "scoring": ("test",),
    "distill_learning_rate": ("distill_steps",),
}
_REGRESSION = ("fit_passes", "answer_weight", "memory_gb")
_WHY = {
    "base_model": "its config.json says whether the shapes fit",
    "top_k": "the files do not hold it, and a wrong one gives other outputs without an error. Pass the value of the "
    "training command, such as --top_k 2",
    "rank": "it is the LoRA's size. The rank of one expert is a good start, such as --rank 8",
    "num_experts": "such as --num_experts 4, or one number per layer",
}
_NEEDED = {"--from published": 2, "--from moe_peft": 1, "--from lora": 2, "--to published": 0, "--to lora": 2}


def check_direction(options: ConvertOptions) -> str:
    """The direction, such as "--to lora", after a check of which options are given.

    Raises:
        MolaError: not exactly one direction, an option that it lacks, or one that it does not take.
    """
    given = {"--from": options.source_format, "--to": options.target_format}
    if (options.source_format is None) == (options.target_format is None):
        raise MolaError(
            f"exactly one of `--from` and `--to` must be given, got {options.source_format!r} and "
            f"{options.target_format!r}. The directions are {', '.join(_TAKES)}."
        )
    way, name = next((way, name) for way, name in given.items() if name is not None)
    direction = f"{way} {name}"
    if direction not in _TAKES:
        known = [each.partition(" ")[2] for each in _TAKES if each.startswith(f"{way} ")]
        raise MolaError(f"`{way}` must be {' or '.join(map(repr, known))}, got {name!r}.")
    if len(options.source) > 1 and direction != "--from lora":
        raise MolaError(
            f"`source` must be one adapter for {direction}, got {options.source}. Only --from lora takes more."
        )
    for needed in _TAKES[direction][: _NEEDED[direction]]:
        if getattr(options, needed) is None:
            raise MolaError(f"`{needed}` must be given with {direction}: {_WHY[needed]}.")
    for each in fields(options):
        value = getattr(options, each.name)
        if each.name not in (*_ANY, *_TAKES[direction]) and value != each.default:
            takers = " and ".join(other for other, names in _TAKES.items() if each.name in names)
            raise MolaError(f"`{each.name}` is only for {takers}, got {value!r}. Leave it out.")
    if options.limit < 1:
        raise MolaError(f"`limit` must be at least 1, got {options.limit}.")
    _check_effect(options, _TAKES[direction])
    if not options.memory_gb > 0:
        raise MolaError(f"`memory_gb` must be above 0, got {options.memory_gb}.")
    return direction


def _check_effect(options: ConvertOptions, taken: tuple[str, ...]) -> None:
    """Refuse what would be ignored."""
    given = {each.name: value for each in fields(options) if (value := getattr(options, each.name)) != each.default}
    for name, helpful in _NEEDS_ONE_OF.items():
        others = [other for other in helpful if other in taken]
        if name in given and not any(other in given for other in others):
            needed = " or ".join(f"`{other}`" for other in others)
            raise MolaError(f"`{name}` counts only with {needed}: got {given[name]!r}. Give that, or leave it out.")
        if name in given and name in _REGRESSION and options.method in ("mean", "usage"):
            raise MolaError(
                f"`{name}` is of `method` regression, which is {options.method}: got {given[name]!r}. Leave one out."
            )
