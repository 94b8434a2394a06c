"""Options of the base model that several commands share, and those of `mola plan`."""

from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any, ClassVar

from mola.checkpoints.recorded_base import base_model_of
from mola.errors import MolaError
from mola.options.fields import START, Group, check_positive, check_required, convert_paths, option

DTYPE_NAMES = ("float32", "bfloat16", "float16")
BASE_MODEL_HELP = "Folder or hub id of the base model. Default: the one that the adapter was trained on."
SKILL_HELP = (
    "Of a skills folder: the skill that answers everything, or base for the base model alone. Default: each prompt "
    "asks the skill that knows it."
)
GGUF_HELP = "GGUF file in the folder `base_model`; loading unpacks it."


@dataclass(kw_only=True)
class Quantization:
    """How the base model's weights are stored; the defaults leave the weights as they are.

    The options classes of commands inherit from this class.
    """

    _base: ClassVar = Group("base model")
    load_in_8bit: bool = option(False, "Quantise the base to 8 bits while it loads (bitsandbytes).")
    load_in_4bit: bool = option(False, "Quantise the base to 4 bits while it loads (bitsandbytes).")
    bnb_4bit_quant_type: str | None = option(None, "4-bit format: nf4 (default) or fp4.")
    bnb_4bit_compute_dtype: str | None = option(None, "dtype in which 4-bit layers compute. Default: the base's.")
    bnb_4bit_use_double_quant: bool = option(False, "Quantise the scales of the 4-bit weights as well.")
    gguf_file: str | None = option(None, GGUF_HELP)

    @property
    def quantizes_on_loading(self) -> bool:
        """Whether weights are quantised while they load."""
        return self.load_in_8bit or self.load_in_4bit

    @property
    def asked(self) -> str:
        """The name of the option that quantises weights; only meaningful with `quantizes_on_loading`."""
        return "load_in_8bit" if self.load_in_8bit else "load_in_4bit"


QUANTIZATION_OPTIONS = tuple(item.name for item in fields(Quantization))


@dataclass
class ModelOptions(Quantization):
    """The options that choose the base model and how it is loaded; commands add their own options."""

    _start: ClassVar = START
    base_model: str = option(None, BASE_MODEL_HELP)

    _: KW_ONLY
    _base: ClassVar = Group("base model")
    dtype: str = option("auto", "Dtype: auto, float32, bfloat16 or float16.")
    device: str | None = option(None, "Device, such as cpu or cuda:0; by default the best one available.")
    trust_remote_code: bool = option(False, "Run code shipped with the model.")

    def __post_init__(self) -> None:
        settle_base_model(self, self.adapters())

    def adapters(self) -> list[str]:
        """The folders of the adapters that the options name."""
        adapter = getattr(self, "adapter", None)
        return [] if adapter is None else [adapter]


def check_dtype(name: str) -> None:
    """Raise if the option `dtype` is neither "auto" nor one of `DTYPE_NAMES`."""
    if name != "auto" and name not in DTYPE_NAMES:
        raise MolaError(f"`dtype` must be one of auto, {', '.join(DTYPE_NAMES)}: got {name!r}.")


def settle_base_model(options: Any, adapters: list[str]) -> None:
    """Convert the paths in options, check the required ones, and set `base_model` if only the adapters name it.

    Raises:
        MolaError: a required option is missing, or `base_model` is not known; see `base_model_of`.
    """
    convert_paths(options)
    check_required(options)
    options.base_model = base_model_of(options.base_model, adapters)


@dataclass
class PlanOptions:
    """Options of `mola plan`."""

    base_model: str = field(
        metadata={"help": "Model: a folder with config.json, a config.json file, or a name on the hub."}
    )
    num_experts: str | None = option(
        None,
        "Experts per module: an integer and a comma ('8,'), one per group of layers ('2468' or '2-4', lowest layers "
        "first), integers between commas, a shape's name or a JSON file. Default 2468.",
    )
    r: str = option("8", "Rank of each expert: an integer, or one per layer between commas.")
    top_k: str = option("2", "Experts used per token: an integer, or one per layer between commas.")
    target_modules: str | None = option(
        None,
        "Linears to adapt, names between commas or 'all-linear'. Default: the seven LLaMA linears where they exist, "
        "else PEFT's choice for the architecture.",
    )
    target_parameters: str | None = option(
        None, "Parameters that hold the base model's own stacked experts, between commas: each expert gets one LoRA."
    )
    num_experts_pattern: dict[str, Any] | str | None = option(
        None,
        'Experts of modules by name, as JSON: {"mlp.*": 8}. Other modules follow `num_experts`, whose file may '
        "also hold this pattern.",
    )
    rank_pattern: dict[str, Any] | str | None = option(None, "The same for `r`.")
    cutoff_len: int = option(512, "Tokens of a training sample, or of a prompt with its answer, for the memory.")
    batch_size: int = option(8, "Samples in a batch, or answers generated side by side, for the memory.")
    dtype: str = option("auto", "Dtype of the base model, for the memory: auto, float32, bfloat16 or float16.")
    activation_checkpointing: bool = option(False, "Memory of a training with activation checkpointing.")
    gguf_file: str | None = option(None, GGUF_HELP)
    json: str | None = option(
        None,
        "Result file (JSON); - prints JSON instead of the table.",
        nargs="?",
        const="-",
        metavar="FILE",
        writes="file",
    )
    overwrite: bool = option(False, "Replace an existing result file.")
    verbose: bool = option(False, "Also print which kernel computes the layers on this machine's CPU.")
    trust_remote_code: bool = option(False, "Run code that comes with the model; only for sources you trust.")

    def check(self) -> None:
        """Check what needs no torch."""
        check_positive(cutoff_len=self.cutoff_len, batch_size=self.batch_size)
