"""`AllocateOptions`, and what can be wrong with them before a model is met."""

import math
import re
from dataclasses import dataclass, field

from mola.architecture.notation import SHAPES
from mola.errors import MolaError
from mola.models.quantization import GGUF_HELP
from mola.options.fields import option, paths_as_text

DEFAULT_BETA = {"alphalora": 2.5, "redundancy": 1.0, "usage": 1.0, "gradient": 1.0, "activation": 1.0}
_COMPUTE = ("alphalora", "gradient", "activation")  # with weights, on `device`
_READS = {
    "redundancy": ("adapter",),
    "usage": ("adapter", "inspection"),
    "gradient": ("data",),
    "activation": ("data",),
}
_UNIFORM = "uniform"


@dataclass
class AllocateOptions:
    """Options of `mola allocate`."""

    base_model: str = field(
        metadata={"help": "Folder or hub id of the base model; alphalora, gradient and activation read its weights."}
    )
    method: str = field(
        metadata={
            "help": "Where scores come from: a shape (inverted_triangle, triangle, hourglass, diamond, rectangle, or "
            "digits such as 2468), uniform, alphalora (the weights' spectra), redundancy (how different the experts of "
            "`adapter` are), usage (how many of them are used), gradient (how much a first step on `data` changes) or "
            "activation (how much of their inputs' variance few directions explain)."
        }
    )
    budget: int = field(metadata={"help": "Experts in all: the numbers of the layers add up to it."})
    output: str | None = option(None, "File to write (JSON), a value of `num_experts`.")
    adapter: str | None = option(None, "Folder of a probe run, for redundancy and usage.")
    inspection: str | None = option(
        None, "File of `mola inspect --json` on the probe, for usage; by default the `routing.jsonl` of `adapter`."
    )
    data: str | None = option(None, "Data for gradient and activation: a file or a saved dataset.")
    task: str | None = option(None, "Task of `data`: its name or a YAML file.")
    template: str | None = option(
        None, "Prompt template of `data`; chat is the base model's chat template. Default: the task's own."
    )
    split: str = option("train", "Split of `data` to read where it has several.")
    limit: int = option(32, "Samples of `data` to read, the first so many; activation ends at 1,024 tokens.")
    min_experts: int = option(1, "Fewest experts of a layer.")
    max_experts: int | None = option(None, "Most experts of a layer; by default there is no bound.")
    beta: float | None = option(
        None,
        "Experts are in proportion to score ** beta; 2.5 by default for alphalora, 1 for others that measure.",
    )
    target_modules: str | None = option(
        None,
        "Linears that will be adapted, as in `mola train`: their layers get experts, and they are measured. With "
        "`adapter` that says it.",
    )
    per_module: bool = option(
        False,
        "A number for every linear instead of every layer, by methods that measure. A budget B is then B experts for "
        "each of the M kinds of linears, B x M in all, as if every linear of a layer had the layer's number.",
    )
    shuffle: int | None = option(
        None,
        "Seed by which the numbers found change places, over the layers or with `per_module` over the linears of a "
        "kind: to see whether it matters where experts are.",
    )
    gguf_file: str | None = option(None, GGUF_HELP)
    device: str = option("cpu", "Where scores are computed, such as cpu or cuda:0; alphalora needs float64.")
    trust_remote_code: bool = option(False, "Run code shipped with the model.")
    overwrite: bool = option(False, "Replace an existing result.")

    def __post_init__(self) -> None:
        paths_as_text(self)


def method_name(method: str) -> str:
    """As it is written here, whatever its case and dashes were."""
    return method.strip().lower().replace("-", "_")


def check_options(options: AllocateOptions) -> tuple[str | None, float | None]:
    """The digits of the method's shape, if it is one, and the exponent of its scores, if it is none.

    Raises:
        MolaError: a value is out of its range, or options contradict each other.
    """
    name = method_name(options.method)
    digits = "1" if name == _UNIFORM else SHAPES.get(name, name if re.fullmatch("[1-9]+", name) else None)
    if digits is None and name not in DEFAULT_BETA:
        known = ", ".join((*SHAPES, _UNIFORM, *DEFAULT_BETA))
        raise MolaError(f"`method` must be one of {known}, or digits from 1 to 9 such as 2468: got {options.method!r}.")
    for bound, value, least in (
        ("budget", options.budget, 1),
        ("min_experts", options.min_experts, 1),
        ("shuffle", options.shuffle, 0),
    ):
        if value is not None and value < least:
            raise MolaError(f"`{bound}` must be at least {least}: got {value}.")
    if options.per_module and digits is not None:
        raise MolaError(
            f"`per_module` needs a method that measures linears ({', '.join(DEFAULT_BETA)}): {options.method!r} says "
            "something of layers only. Leave `per_module` out."
        )
    _check_sources(options, name)
    if options.beta is not None:
        if digits is not None:
            raise MolaError(f"`beta` ({options.beta:g}) means nothing for the shape {options.method!r}. Leave it out.")
        if not (math.isfinite(options.beta) and options.beta >= 0):
            raise MolaError(f"`beta` must be a number of at least 0: got {options.beta}.")
    return digits, DEFAULT_BETA.get(name) if options.beta is None else options.beta


def _check_sources(options: AllocateOptions, name: str) -> None:
    """What a method reads must be given, and nothing else."""
    reads = _READS.get(name, ())
    if options.device != AllocateOptions.device and name not in _COMPUTE:
        raise MolaError(
            f"`device` ({options.device!r}) is where {', '.join(_COMPUTE)} compute: `method` {options.method!r} "
            "computes nothing there. Leave it out."
        )
    for source in ("adapter", "inspection", "data"):
        value = getattr(options, source)
        if value is not None and source not in reads:
            raise MolaError(f"`{source}` ({value!r}) is not read by `method` {options.method!r}. Leave it out.")
    for about_data in ("task", "template", "split", "limit"):
        value = getattr(options, about_data)
        if value != getattr(AllocateOptions, about_data) and "data" not in reads:
            raise MolaError(
                f"`{about_data}` ({value!r}) is about `data`, which `method` {options.method!r} does not read. Leave "
                "it out."
            )
    if "data" in reads:
        if options.gguf_file is not None:
            raise MolaError(
                "`gguf_file` is not read by methods that look at data. Convert the file to a model folder first."
            )
        if options.data is None or options.task is None:
            raise MolaError(f"`method` {name} looks at samples: pass --data FILE --task TASK.")
        if options.limit < 1:
            raise MolaError(f"`limit` must be at least 1: got {options.limit}.")
        return
    if reads and all(getattr(options, source) is None for source in reads):
        raise MolaError(
            f"`method` {name} looks at a trained adapter: pass {' or '.join(f'--{source}' for source in reads)}. A "
            "short run with the same number of experts everywhere will do."
        )
    if options.adapter is not None and options.target_modules is not None:
        raise MolaError(
            f"`target_modules` ({options.target_modules!r}) counts only where nothing else says what is adapted: here "
            "it is what the probe, `adapter`, adapted. Leave it out."
        )
