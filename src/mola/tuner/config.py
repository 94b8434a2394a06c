"""`MolaConfig`: every setting of a mixture of LoRA experts, as it is saved in `adapter_config.json`."""

from __future__ import annotations

import copy
import functools
import math
import re
from dataclasses import dataclass, fields
from numbers import Integral
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME, PeftType

from mola.architecture.notation import check_notation, pattern_with
from mola.architecture.patterns import check_pattern
from mola.errors import MolaError
from mola.files.atomic import atomic_write_json
from mola.files.digests import DIGEST_FIELD, check_digest, weights_sha256
from mola.files.reading import read_json_object
from mola.tuner.initialization import check_initialization
from mola.tuner.lora_fields import LORA_ONLY
from mola.tuner.routing import DEFAULT_ROUTER, ROUTERS

REDUCTIONS = ("module", "layer")
_BELOW_0 = math.nextafter(0.0, -1.0)
_PATTERNS = ("num_experts_pattern", "rank_pattern", "alpha_pattern")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_]+")
# Fields whose absence from a checkpoint would load another model than the one that was saved.
_REQUIRED_IN_CHECKPOINT = ("r", "num_experts", "top_k", "lora_alpha")


@dataclass
class MolaConfig(PeftConfig):
    r"""Configuration of a mixture of LoRA experts (MoLA, arXiv 2402.08562).

    For an adapted linear map the output is

        y = x W^T + b + sum_e g_e(x) * (lora_alpha / r) * B_e A_e dropout(x)

    with gates `g` from the `top_k` largest of `num_experts` router logits. See `MolaLinear`.

    Args:
        r (`int | list[int] | str`): rank of each expert; one value, or one per decoder layer (of an encoder-decoder
            one per layer of the encoder, then of the decoder).
        num_experts (`int | list[int] | str`): experts per adapted module; one value, one per decoder
            layer, digits over equal groups of layers ("2468", lowest layers first), a shape of the
            paper ("inverted_triangle", "triangle", "hourglass", "rectangle", "diamond") or a JSON file.
            A layer with one expert is plain LoRA and has no router.
        top_k (`int | list[int] | str`): experts used per token; at most the layer's `num_experts`.
        lora_alpha (`float`): scale numerator; the update is multiplied by `lora_alpha / r`.
        lora_dropout (`float`): dropout on the experts' input (the router sees the input as it is).
        target_modules (`list[str] | str`): names of linears to adapt, one name, a regular expression,
            or "all-linear". Default: the seven LLaMA linears where they exist, else PEFT's choice for
            the architecture.
        exclude_modules (`list[str] | str`): names or regular expression of modules to leave alone.
        modules_to_save (`list[str]`): modules trained in full and saved with the adapter.
        layers_to_transform (`int | list[int]`): adapt these decoder layers only. Per-layer lists still
            have one entry for every layer of the model.
        layers_pattern (`list[str] | str`): name of the layer list, for `layers_to_transform`.
        target_parameters (`list[str]`): names of parameters that hold the base model's own experts, stacked, such as
            ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]: each expert gets one LoRA, no mixture, as by PEFT's
            field. With it `target_modules` may be an empty list, which adapts no linears.
        bias (`str`): "none", "all" or "mola_only", as in PEFT.
        init_lora_weights (`bool | str`): how experts start, see `mola.tuner.initialization`. All but False start as
            the base model: True (`B` zero), "gaussian", "orthogonal" and "principal". False draws `B` at random too,
            for tests.
        use_rslora (`bool`): multiply the update by `lora_alpha / sqrt(r)` instead of `lora_alpha / r`.
        num_experts_pattern (`dict[str, int]`): experts of modules whose name ends with, or matches as a regular
            expression, a key: `{"mlp.*": 8}`; the first key that does counts. Others have their layer's number.
            A JSON file in `num_experts` may hold it.
        rank_pattern (`dict[str, int]`), alpha_pattern (`dict[str, float]`): the same for `r` and `lora_alpha`.
        trainable_token_indices (`list[int] | dict[str, list[int]]`): tokens whose embeddings are trained, as in PEFT.
        ensure_weight_tying (`bool`): keep tied what `modules_to_save` or `trainable_token_indices` train, as in PEFT.
        layer_replication (`list[tuple[int, int]]`): build a deeper model of ranges of layers, as in PEFT. Per-layer
            settings then count the layers of that model.
        router (`str`): how experts are chosen, a name in `mola.tuner.routing.ROUTERS`.
        router_aux_loss_coef (`float`): weight of the balance loss, 0 = off. The paper's code uses 1e-3
            together with the "layer" reduction.
        router_aux_loss_reduction (`str`): "module" = one loss per router, averaged, padding and ignored
            positions left out; "layer" = as the paper's code: logits pooled per decoder layer, summed
            over layers, padding counted.
        router_z_loss_coef (`float`): weight of the mean squared log-sum-exp of router logits, 0 = off.
        router_jitter_noise (`float`): in training the router's input is multiplied by uniform noise
            from [1 - noise, 1 + noise]; 0 = off.
        base_model_type (`str`): kind of model that the adapter is for, `model_type` in its `config.json`; filled in
            when a model is met, another kind is refused then.
        weights_sha256 (`str`): sha256 of the weights file, filled in where a configuration is saved beside one, and
            checked where it is read from there.

    Raises:
        MolaError: a value is out of range, contradicts another one, or a saved file lacks a field.
    """

    r: int | list[int] | str | None = None
    num_experts: int | list[int] | str | None = None
    top_k: int | list[int] | str | None = None
    lora_alpha: float = None  # type: ignore[assignment] # None only on the way in, see __post_init__
    lora_dropout: float = 0.0
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    target_parameters: list[str] | None = None
    bias: str = "none"
    init_lora_weights: bool | str = True
    use_rslora: bool = False
    num_experts_pattern: dict[str, int] | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    layer_replication: list[tuple[int, int]] | None = None
    router: str = DEFAULT_ROUTER
    router_aux_loss_coef: float = 0.0
    router_aux_loss_reduction: str = "module"
    router_z_loss_coef: float = 0.0
    router_jitter_noise: float = 0.0
    base_model_type: str | None = None
    weights_sha256: str | None = None

    def __post_init__(self) -> None:
        from_checkpoint = self.peft_type is not None
        try:
            super().__post_init__()
        except ValueError as error:  # of PEFT, which checks `task_type` there
            raise MolaError(f"`task_type` is wrong: {error}") from error
        if from_checkpoint:
            self._check_complete()
            # Copies of a configuration have a `peft_type`, too: those of a file say what they are of.
            is_saved = self.base_model_type is not None or self.weights_sha256 is not None
            if is_saved and self.target_parameters and self.target_modules is None:
                self.target_modules = []  # of a version that then adapted no linears
            if is_saved and self.layers_to_transform == []:
                self.layers_to_transform = self.layers_pattern = None  # so PEFT took it
        self.peft_type = PeftType("MOLA")
        for name, default in (("r", 8), ("num_experts", "2468"), ("top_k", 2), ("lora_alpha", 16)):
            if getattr(self, name) is None:
                setattr(self, name, default)
        for name in ("r", "num_experts", "top_k"):
            check_notation(getattr(self, name), name)
        self._check_numbers()
        for name in _PATTERNS:
            check_pattern(getattr(self, name), name, is_integer=name != "alpha_pattern")
            if pattern := getattr(self, name):  # NumPy's numbers cannot be written as JSON
                plain = {key: int(n) if isinstance(n, Integral) else float(n) for key, n in pattern.items()}
                setattr(self, name, plain)
        pattern = pattern_with(self.num_experts, self.num_experts_pattern)  # type: ignore[arg-type] # set above
        self.num_experts_pattern = dict(pattern) if pattern else self.num_experts_pattern
        self._check_target_parameters()
        self._check_targets()
        for name in ("base_model_type", DIGEST_FIELD):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise MolaError(f"`{name}` must be text or None, got {getattr(self, name)!r}. mola fills it in.")

    def _check_complete(self) -> None:
        missing = [name for name in _REQUIRED_IN_CHECKPOINT if getattr(self, name) is None]
        if missing:
            raise MolaError(
                f"`adapter_config.json` of a MOLA adapter must hold {list(_REQUIRED_IN_CHECKPOINT)}: "
                f"{missing} missing. Without them another model would be loaded; restore the file."
            )
        if self.peft_type != "MOLA":
            raise MolaError(f"`peft_type` must be 'MOLA' for MolaConfig, got {self.peft_type!r}.")

    def _check_numbers(self) -> None:
        ranges = {
            "lora_alpha": (0.0, math.inf, "above 0"),
            "lora_dropout": (_BELOW_0, 1.0, "at least 0 and below 1"),
            "router_aux_loss_coef": (_BELOW_0, math.inf, "at least 0"),
            "router_z_loss_coef": (_BELOW_0, math.inf, "at least 0"),
            "router_jitter_noise": (_BELOW_0, 1.0, "at least 0 and below 1"),
        }
        for name, (low, high, rule) in ranges.items():
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and low < value < high):
                raise MolaError(f"`{name}` must be a number {rule}, got {value!r}.")
        choices = {"router": ROUTERS, "router_aux_loss_reduction": REDUCTIONS, "bias": ("none", "all", "mola_only")}
        for name, known in choices.items():
            if getattr(self, name) not in tuple(known):
                raise MolaError(f"`{name}` must be one of {list(known)}, got {getattr(self, name)!r}.")
        check_initialization(self.init_lora_weights)
        for name in ("use_rslora", "ensure_weight_tying"):
            if not isinstance(getattr(self, name), bool):
                raise MolaError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")

    def _check_target_parameters(self) -> None:
        names = self.target_parameters
        if names is None:
            return
        if not isinstance(names, (list, tuple, set)) or not names or not all(isinstance(n, str) and n for n in names):
            raise MolaError(
                "`target_parameters` must be a non-empty list of names of parameters, such as "
                f"['mlp.experts.gate_up_proj']: got {names!r}."
            )
        self.target_parameters = sorted(set(names))
        if self.lora_dropout:
            raise MolaError(
                "`lora_dropout` must be 0 with `target_parameters`: an update of a weight has no input to drop from, "
                f"got {self.lora_dropout}. LoRA refuses it, too."
            )
        if self.init_lora_weights == "principal":
            raise MolaError(
                "`init_lora_weights` 'principal' reads the weights of linears, and `target_parameters` adapts others: "
                "take another start."
            )

    def _check_targets(self) -> None:
        self.layers_to_transform = _layers(self.layers_to_transform)
        self.modules_to_save = _names(self.modules_to_save, "modules_to_save")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                # A lone name is a name: PEFT would take it for a regular expression that matches nothing.
                if value != "all-linear" and _PLAIN_NAME.fullmatch(value):
                    setattr(self, name, [value])
            elif value is not None:
                if not isinstance(value, (list, tuple, set)):
                    raise MolaError(f"`{name}` must be names in a list, or text: got {value!r}.")
                names = list(value)
                wrong = [item for item in names if not isinstance(item, str) or item != item.strip() or not item]
                if wrong or not (names or (name == "target_modules" and self.target_parameters)):
                    raise MolaError(f"`{name}` must be a non-empty list of module names without spaces, got {names!r}.")
                setattr(self, name, set(names))
        is_text = isinstance(self.target_modules, str)
        if is_text and (self.layers_to_transform is not None or self.layers_pattern is not None):
            kind = "" if self.target_modules == "all-linear" else "the regular expression "
            raise MolaError(
                "`layers_to_transform` and `layers_pattern` need `target_modules` as a list of names, "
                f"got {kind}{self.target_modules!r}."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise MolaError("`layers_pattern` is only used together with `layers_to_transform`, which is not set.")

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, see PEFT, with the digest of the weights that are in the folder already.

        Only where the caller says that they are there, by `auto_mapping_dict` as PEFT does: Transformers writes them
        afterwards.
        """
        saved = copy.copy(self)
        saved.weights_sha256 = weights_sha256(save_directory) if "auto_mapping_dict" in kwargs else None
        super(MolaConfig, saved).save_pretrained(save_directory, **kwargs)
        patterns = {name: pattern for name in _PATTERNS if (pattern := getattr(saved, name))}
        if patterns:  # PEFT sorts all keys, and of patterns the first one that matches counts
            path = Path(save_directory, CONFIG_NAME)
            atomic_write_json(path, read_json_object(path) | patterns)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read a configuration, see PEFT; weights that are in the same folder must be those it was saved with.

        Raises:
            MolaError: a setting is wrong, or given beside the folder; or the weights are not those that were saved.
        """
        own = {"number_experts", *(each.name for each in fields(cls))} - {each.name for each in fields(PeftConfig)}
        if given := sorted(own & kwargs.keys()):
            raise MolaError(
                f"`{given[0]}` must not be passed beside a saved adapter, which says it itself: got "
                f"{kwargs[given[0]]!r} and {pretrained_model_name_or_path!r}. Leave it out."
            )
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        check_digest(Path(pretrained_model_name_or_path, subfolder or ""))
        return config

    def to_dict(self) -> dict:
        """The fields as plain values; sets become sorted lists, so that a file is the same every time."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}


def _layers(value: Any) -> list[int] | int | None:
    if value is None:
        return None
    numbers = [value] if isinstance(value, Integral) else value
    is_list = isinstance(numbers, (range, list, tuple, set)) and len(numbers) > 0
    if not is_list or not all(isinstance(n, Integral) and not isinstance(n, bool) and int(n) >= 0 for n in numbers):
        raise MolaError(
            "`layers_to_transform` must be the number of a layer, the lowest is 0, or a non-empty list of numbers: got "
            f"{value!r}. Leave it out to adapt all layers."
        )
    return int(value) if isinstance(value, Integral) else [int(number) for number in numbers]


def _names(value: Any, field: str) -> list[str] | None:
    """A list of names; a lone one makes one, for PEFT would go through its letters."""
    names = [value] if isinstance(value, str) else value
    if names is None:
        return None
    if not isinstance(names, (list, tuple, set)) or not all(isinstance(each, str) and each for each in names):
        raise MolaError(f"`{field}` must be a list of module names: got {value!r}.")
    return sorted(names) if isinstance(names, set) else list(names)


_dataclass_init = MolaConfig.__init__


@functools.wraps(_dataclass_init)
def _init(self: MolaConfig, *args, **kwargs) -> None:
    """Refuse unknown fields: PEFT's loader would drop them with a warning and go on with another model."""
    unknown = sorted(set(kwargs) - {f.name for f in fields(MolaConfig)})
    for name in unknown:
        if name in LORA_ONLY:
            raise MolaError(f"MolaConfig has no field `{name}` of LoraConfig: {LORA_ONLY[name]}")
    if unknown:
        raise MolaError(
            f"MolaConfig has no field {unknown}. The known ones are {[f.name for f in fields(MolaConfig)]}. "
            "If they come from a saved adapter, it was written by a newer version: upgrade mola-peft or peft."
        )
    _dataclass_init(self, *args, **kwargs)


MolaConfig.__init__ = _init  # type: ignore[method-assign]
