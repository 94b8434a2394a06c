"""Options of `mola allocate`, and the checks of them that need no model."""

import math
import re
from dataclasses import dataclass, field

from mola.architecture.notation import SHAPES
from mola.errors import MolaError
from mola.models.options import GGUF_HELP, settle_base_model
from mola.options.fields import option, required

DEFAULT_BETA = {"alphalora": 2.5, "redundancy": 1.0, "usage": 1.0, "gradient": 1.0, "activation": 1.0}
_ON_DATA = ("gradient", "activation")
_ON_PROBE = ("redundancy", "usage")
# Options that some methods ignore -> the methods that read them.
_READ_BY: dict[str, tuple[str, ...]] = {
    "adapter": _ON_PROBE,
    "inspection": ("usage",),
    **dict.fromkeys(("data", "task", "template", "split", "limit"), _ON_DATA),
    "device": ("alphalora", *_ON_DATA),
    **dict.fromkeys(("beta", "per_module"), tuple(DEFAULT_BETA)),
}


@dataclass
class AllocateOptions:
    """Options of `mola allocate`."""

    base_model: str = option(
        None,
        "Folder or hub id of the base model; alphalora, gradient and activation read its weights. Default: the one "
        "that `adapter` was trained on.",
    )
    method: str = required(
        "How layers are scored. Without data: uniform, or a shape (inverted_triangle, triangle, hourglass, diamond, "
        "rectangle, or digits such as 2468). By the base model's weights: alphalora. By a trained `adapter`: "
        "redundancy (how different its experts are) or usage (how many are used). By `data`: gradient (squared "
        "gradients) or activation (how much variance of the inputs few directions explain)."
    )
    budget: int = required("Total number of experts: the sum over the layers.")
    output: str | None = option(None, "File to write (JSON); it can be passed as `num_experts`.", writes="file")
    adapter: str | None = option(None, "Folder of a probe run, for redundancy and usage.")
    inspection: str | None = option(
        None, "For usage: file of `mola inspect --json` on the probe. Default: the `routing.jsonl` of `adapter`."
    )
    data: str | None = option(None, "Data for gradient and activation: a file or a saved dataset.")
    task: str | None = option(None, "Task of `data`: its name or a YAML file. Free text needs none.")
    template: str | None = option(
        None,
        "Prompt template of `data`; chat is the base model's chat template. Default: the task's own, else that chat "
        "template, else alpaca.",
    )
    split: str = option("train", "Split to read if `data` has several.")
    limit: int = option(
        32, "Number of samples to read from the start of `data`; activation reads at most 1,024 tokens."
    )
    min_experts: int = option(1, "Lowest number of experts in a layer.")
    max_experts: int | None = option(None, "Highest number of experts in a layer; by default there is no bound.")
    beta: float | None = option(
        None,
        "Experts are in proportion to score ** beta. Default: 2.5 for alphalora, 1 for other methods that measure.",
    )
    target_modules: str | None = option(
        None,
        "Linears that will be adapted, as in `mola train`: these linears are measured, and their layers get experts. "
        "With `adapter`, the linears of the probe are used.",
    )
    per_module: bool = option(
        False,
        "Give every linear its own number instead of every layer; for methods that measure. A budget B then means B "
        "experts for each of the M kinds of linears, B x M in all, as if every linear had the number of its layer.",
    )
    shuffle: int | None = option(
        None,
        "Seed to shuffle the numbers over the layers, or with `per_module` over the linears of a kind, to test whether "
        "it matters which layers or linears have more experts.",
    )
    gguf_file: str | None = option(None, GGUF_HELP)
    device: str = option("cpu", "Device that computes the scores, such as cpu or cuda:0; alphalora needs float64.")
    trust_remote_code: bool = option(False, "Run code shipped with the model.")
    overwrite: bool = option(False, "Replace an existing result.")

    def __post_init__(self) -> None:
        settle_base_model(self, [] if self.adapter is None else [self.adapter])

    def check(self) -> None:
        """Check what needs no model; see `check_options`."""
        check_options(self)


def method_name(method: str) -> str:
    """Normalise the name of a method: lower case, with underscores."""
    return method.strip().lower().replace("-", "_")


def check_options(options: AllocateOptions) -> tuple[str | None, float | None]:
    """Check the options.

    Returns:
        For shapes the digits and None; for methods that measure None and the exponent of the scores.

    Raises:
        MolaError: a value is out of range, options contradict each other, or an option would be ignored.
    """
    name = method_name(options.method)
    digits = "1" if name == "uniform" else SHAPES.get(name, name if re.fullmatch("[1-9]+", name) else None)
    if digits is None and name not in DEFAULT_BETA:
        known = ", ".join((*SHAPES, "uniform", *DEFAULT_BETA))
        raise MolaError(f"`method` must be one of {known}, or digits from 1 to 9 such as 2468: got {options.method!r}.")
    for option_name, methods in _READ_BY.items():
        value = getattr(options, option_name)
        if value != getattr(AllocateOptions, option_name) and name not in methods:
            raise MolaError(
                f"`{option_name}` ({value!r}) has no effect with `method` {options.method!r}: the option is for "
                f"{', '.join(methods)}. Leave it out."
            )
    if name in _ON_DATA:
        if options.gguf_file is not None:
            raise MolaError(
                f"`gguf_file` cannot be used with `method` {name}. Convert the file to a model folder first."
            )
        if options.data is None:
            raise MolaError(f"`method` {name} needs samples: pass --data FILE.")
        if options.limit < 1:
            raise MolaError(f"`limit` must be at least 1: got {options.limit}.")
    if name in _ON_PROBE:
        if options.adapter is None and options.inspection is None:
            flags = "--adapter or --inspection" if name == "usage" else "--adapter"
            raise MolaError(
                f"`method` {name} needs a trained adapter: pass {flags}. A short run with the same number of experts "
                "everywhere is enough."
            )
        if options.adapter is not None and options.target_modules is not None:
            raise MolaError(
                f"`target_modules` ({options.target_modules!r}) has no effect with `adapter`: the probe determines the "
                "linears. Leave it out."
            )
    if options.beta is not None and not (math.isfinite(options.beta) and options.beta >= 0):
        raise MolaError(f"`beta` must be a number of at least 0: got {options.beta}.")
    return digits, DEFAULT_BETA.get(name) if options.beta is None else options.beta


@dataclass
class ReallocateOptions:
    """Options of `mola reallocate`."""

    adapter: str = field(metadata={"help": "Folder of a trained adapter."})
    num_experts: str = field(
        metadata={"help": "New numbers of experts, in any notation of `mola train`, such as a file of `mola allocate`."}
    )
    output_dir: str = field(
        metadata={"help": "Folder to write; it must be new or empty.", "aliases": ["--output"], "writes": "folder"}
    )
    inspection: str | None = option(
        None,
        "File of `mola inspect --json` on the adapter. With this file, experts are merged and copied by their use; "
        "without it, the experts with the smallest updates are dropped.",
    )
    top_k: str | None = option(
        None,
        "New number of experts used per token, one number or a list. Default: unchanged. A new number changes answers.",
    )
    seed: int = option(0, "Random seed of new routers and router rows.")
    base_model: str | None = option(
        None,
        "The adapter's base model, to count its layers. Needed if neither the adapter nor the numbers name all layers.",
    )
    trust_remote_code: bool = option(False, "Run code that comes with the base model; only for sources you trust.")
