"""`MolaConfig`: every setting of a mixture of LoRA experts, as it is saved in `adapter_config.json`."""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Collection
from dataclasses import dataclass, fields
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

from peft import PeftConfig
from peft.utils import CONFIG_NAME, PeftType

from mola.architecture.notation import DEFAULT_NUM_EXPERTS, check_notation, pattern_with
from mola.architecture.patterns import check_pattern
from mola.errors import MolaError
from mola.files.atomic import atomic_write_json
from mola.files.digests import check_digest, weights_sha256
from mola.files.reading import read_json_object
from mola.tuner.initialization import check_initialization
from mola.tuner.routing import DEFAULT_ROUTER, ROUTERS

_CHOICES: dict[str, Collection[Any]] = {
    "router": ROUTERS,
    "router_aux_loss_reduction": ("module", "layer"),
    "bias": ("none", "all", "mola_only"),
    "use_rslora": (False, True),
    "ensure_weight_tying": (False, True),
}
_PATTERNS = ("num_experts_pattern", "rank_pattern", "alpha_pattern")
# A saved adapter must contain these fields: defaults would change what it computes.
# Fields of earlier versions, which saved them with these values if they were not set.
_EARLIER_DEFAULTS = (("layer_replication", None), ("shared_a", False), ("sparsegen_lambda", 0.0))
_REQUIRED_WHEN_SAVED = ("r", "num_experts", "top_k", "lora_alpha")

_Class = TypeVar("_Class")


def _refuse_unknown_fields(cls: type[_Class]) -> type[_Class]:
    """Class decorator: unknown fields raise MolaError.

    PEFT's loader would catch a dataclass's TypeError, drop the field with a warning and load a different model.
    """
    dataclass_init: Any = cls.__init__

    @functools.wraps(dataclass_init)
    def checked_init(self: Any, *args: Any, **kwargs: Any) -> None:
        known = [field.name for field in fields(cls)]  # type: ignore[arg-type] # a dataclass
        kwargs = {name: value for name, value in kwargs.items() if (name, value) not in _EARLIER_DEFAULTS}
        unknown = sorted(set(kwargs) - set(known))
        if unknown:
            raise MolaError(
                f"MolaConfig has no fields {', '.join(unknown)}. Its fields are {', '.join(known)}. "
                "docs/reference/lora-fields.md explains which LoraConfig fields MolaConfig lacks. If the field is in a "
                "saved adapter, a different version wrote it: install the matching mola-peft or peft."
            )
        dataclass_init(self, *args, **kwargs)

    cls.__init__ = checked_init  # type: ignore[method-assign]
    return cls


@_refuse_unknown_fields
@dataclass
class MolaConfig(PeftConfig):
    r"""Configuration of a mixture of LoRA experts (MoLA, arXiv 2402.08562).

    For an adapted linear map the output is

        y = x W^T + b + sum_e g_e(x) * (lora_alpha / r) * B_e A_e dropout(x)

    with gates `g` from the `top_k` largest of `num_experts` router logits. See `MolaLinear`.

    Args:
        r (int | list[int] | str): rank of each expert: one integer, a list with one entry per decoder layer, a
            string such as "8,8,16,16", or a JSON file. Default: 8. In an encoder-decoder, every per-layer list has one
            entry per encoder layer, then one per decoder layer.
        num_experts (int | list[int] | str): experts per adapted module: like `r`, or a string with one number per
            group of layers of nearly equal size ("2468" or "2-4", lowest layers first), or one of the paper's shapes
            ("inverted_triangle", "triangle", "hourglass", "rectangle", "diamond"). A layer with one expert is plain
            LoRA and has no router. With 1 the adapter stays in mola's format, while `mola train --num_experts 1` writes
            a LoRA of PEFT. Default: "2468"; models with one, two or three layers get 5, [3, 7] or [2, 4, 7],
            respectively.
        top_k (int | list[int] | str): experts used per token, like `r`. More than a layer's
            `num_experts` is an error, except for layers with one expert. Default: 2.
        lora_alpha (float): the experts' output is multiplied by `lora_alpha / r`. Default: 16.
        lora_dropout (float): dropout on the input of the experts. The router's input has no dropout.
        target_modules (list[str] | str): names of linears to adapt, one name, a regular expression,
            or "all-linear". Default: the seven LLaMA linears if the model has them, else PEFT's choice for
            the architecture.
        exclude_modules (list[str] | str): names or regular expression of modules that are not adapted.
        modules_to_save (list[str]): modules trained in full and saved with the adapter.
        layers_to_transform (int | list[int]): adapt these decoder layers only. Per-layer lists still
            have one entry for every layer of the model.
        layers_pattern (list[str] | str): name of the layer list, for `layers_to_transform`.
        target_parameters (list[str]): names of parameters that stack the base model's own experts, such as
            ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]. Each of these experts gets a LoRA, not a mixture,
            as with PEFT's field. `target_modules` may then be an empty list, so that no linears are adapted.
        bias (str): biases that are trained: "none", "all" or "mola_only" (those of adapted linears).
        init_lora_weights (bool | str): initial values of the experts, see `mola.tuner.initialization`. With
            True (`B` zero), "gaussian", "orthogonal" and "principal" the adapted model starts with the base model's
            outputs. False draws `B` at random, for tests.
        use_rslora (bool): multiply the experts' output by `lora_alpha / sqrt(r)` instead of `lora_alpha / r`.
        num_experts_pattern (dict[str, int]): experts of individual modules, such as `{"mlp.*": 8}`. A key is a
            regular expression for a module's whole name or for the end of the name after a dot; the first matching key
            applies. Other modules use their layer's `num_experts`. If `num_experts` is a JSON file, the file may
            contain this pattern.
        rank_pattern (dict[str, int]): the same for `r`.
        alpha_pattern (dict[str, float]): the same for `lora_alpha`.
        trainable_token_indices (list[int] | dict[str, list[int]]): tokens whose embeddings are trained, as in PEFT.
        ensure_weight_tying (bool): keep tied weights tied when `modules_to_save` or `trainable_token_indices` train
            them, as in PEFT.
        router (str): how experts are chosen, a name in `mola.tuner.routing.ROUTERS`.
        router_aux_loss_coef (float): weight of the balance loss, 0 = off. The paper's code uses 1e-3 with the
            reduction "layer".
        router_aux_loss_reduction (str): "module" is the mean over routers; it ignores padding and tokens without
            a label. "layer" follows the paper: pool the routers of each decoder layer, sum over layers, and include
            padding.
        router_z_loss_coef (float): weight of the mean squared log-sum-exp of router logits, 0 = off.
        router_jitter_noise (float): in training the router's input is multiplied by uniform noise
            from [1 - noise, 1 + noise]; 0 = off.
        base_model_type (str): `model_type` in the `config.json` of the base model. mola fills it in, and refuses
            to load the adapter into a model of a different type.
        weights_sha256 (str): sha256 of the weights file. mola fills it in when it saves the adapter, and checks it
            when it loads the adapter.

    Raises:
        MolaError: a value is out of range, two values contradict each other, or a saved file lacks a field.
    """

    r: int | list[int] | str | None = None
    num_experts: int | list[int] | str | None = None
    top_k: int | list[int] | str | None = None
    lora_alpha: float = None  # type: ignore[assignment] # `__post_init__` replaces None
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
    router: str = DEFAULT_ROUTER
    router_aux_loss_coef: float = 0.0
    router_aux_loss_reduction: str = "module"
    router_z_loss_coef: float = 0.0
    router_jitter_noise: float = 0.0
    base_model_type: str | None = None
    weights_sha256: str | None = None

    has_default_num_experts = (
        False  # True if the user left `num_experts` out; no dataclass field, as it is not annotated
    )

    def __post_init__(self) -> None:
        # PEFT sets `peft_type` from a saved file. A copy of an existing configuration has it, too.
        is_loaded = self.peft_type is not None
        try:
            super().__post_init__()
        except ValueError as error:  # PEFT checks `task_type` only
            raise MolaError(f"`task_type` is invalid: {error}") from error
        if is_loaded:
            self._check_complete()
            self._migrate_from_older_version()
        self.peft_type = PeftType("MOLA")
        self.has_default_num_experts = self.num_experts is None
        for name, default in (("r", 8), ("num_experts", DEFAULT_NUM_EXPERTS), ("top_k", 2), ("lora_alpha", 16)):
            if getattr(self, name) is None:
                setattr(self, name, default)
        for name in ("r", "num_experts", "top_k"):
            check_notation(getattr(self, name), name)
        _check_values(self)
        for name in _PATTERNS:
            setattr(self, name, _plain_pattern(getattr(self, name), name))
        pattern = pattern_with(self.num_experts, self.num_experts_pattern)  # type: ignore[arg-type] # no longer None
        self.num_experts_pattern = dict(pattern) if pattern else self.num_experts_pattern
        self.target_parameters = sorted({*(_name_list(self.target_parameters, "target_parameters") or ())}) or None
        self.modules_to_save = _name_list(self.modules_to_save, "modules_to_save")
        self.target_modules = _module_names(self.target_modules, "target_modules")
        self.exclude_modules = _module_names(self.exclude_modules, "exclude_modules")
        self.layers_to_transform = _layer_numbers(self.layers_to_transform)
        _check_combinations(self)

    def _check_complete(self) -> None:
        missing = [name for name in _REQUIRED_WHEN_SAVED if getattr(self, name) is None]
        if missing:
            raise MolaError(
                f"`adapter_config.json` of a MOLA adapter must contain {list(_REQUIRED_WHEN_SAVED)}: "
                f"{missing} are missing. Copy the original file back, or save the adapter again."
            )
        if self.peft_type != "MOLA":
            raise MolaError(f"`peft_type` must be 'MOLA' for MolaConfig, got {self.peft_type!r}.")

    def _migrate_from_older_version(self) -> None:
        # mola sets at least one of these two fields when it uses or saves an adapter.
        was_used = self.base_model_type is not None or self.weights_sha256 is not None
        if was_used and self.target_parameters and self.target_modules is None:
            self.target_modules = []  # in earlier versions None meant that no linears are adapted
        if was_used and self.layers_to_transform == []:
            self.layers_to_transform = self.layers_pattern = None  # PEFT adapts all layers if the list is empty

    # ------------------------------------------------------------------ saving and loading

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json` (see PEFT), with the digest of the weights in the same folder.

        The digest is written only in calls from PEFT, which pass `auto_mapping_dict` and save the weights first.
        Transformers calls this before it saves the weights, so there is nothing yet to digest.
        """
        saved = copy.copy(self)
        saved.weights_sha256 = weights_sha256(save_directory) if "auto_mapping_dict" in kwargs else None
        super(MolaConfig, saved).save_pretrained(save_directory, **kwargs)
        patterns = {name: pattern for name in _PATTERNS if (pattern := getattr(saved, name))}
        if patterns:  # PEFT has sorted all keys; restore the user's order, because the first matching key applies
            path = Path(save_directory, CONFIG_NAME)
            atomic_write_json(path, read_json_object(path) | patterns)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read a configuration (see PEFT). Weights in the same folder must match the digest in the file.

        Raises:
            MolaError: a setting is invalid or is passed as an argument, or the weights have a different digest.
        """
        # The research code's name for `num_experts` is refused, too.
        own = {"number_experts", *(each.name for each in fields(cls))} - {each.name for each in fields(PeftConfig)}
        if given := sorted(own & kwargs.keys()):
            raise MolaError(
                f"`{given[0]}` cannot be overridden when loading a saved adapter: got {kwargs[given[0]]!r} for "
                f"{pretrained_model_name_or_path!r}. Leave it out."
            )
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        check_digest(Path(pretrained_model_name_or_path, subfolder or ""))
        return config

    def to_dict(self) -> dict:
        """The fields as plain values; sets become sorted lists, so that the same settings give the same file."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}


# ---------------------------------------------------------------------- checks


def _check_values(config: MolaConfig) -> None:
    for names, is_allowed, rule in (
        (["lora_alpha"], lambda value: 0 < value < math.inf, "above 0"),
        (["router_aux_loss_coef", "router_z_loss_coef"], lambda value: 0 <= value < math.inf, "at least 0"),
        (["lora_dropout", "router_jitter_noise"], lambda value: 0 <= value < 1, "at least 0 and below 1"),
    ):
        for name in names:
            value = getattr(config, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (is_number and is_allowed(value)):
                raise MolaError(f"`{name}` must be a number {rule}, got {value!r}.")
    for name, allowed in _CHOICES.items():
        value, choices = getattr(config, name), list(allowed)
        if value not in choices or not isinstance(value, type(choices[0])):  # 1 == True, but only True is allowed
            raise MolaError(f"`{name}` must be one of {choices}, got {value!r}.")
    check_initialization(config.init_lora_weights)


def _plain_pattern(pattern: Any, field: str) -> Any:
    check_pattern(pattern, field, is_integer=field != "alpha_pattern")
    if not pattern:
        return pattern
    # NumPy's numbers cannot be written as JSON.
    return {key: int(n) if isinstance(n, Integral) else float(n) for key, n in pattern.items()}


def _name_list(value: Any, field: str) -> list[str] | None:
    """A list of names; PEFT would read a single name as a list of letters."""
    if value is None:
        return None
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple, set)) or not all(isinstance(each, str) and each for each in names):
        raise MolaError(f"`{field}` must be a list of names: got {value!r}.")
    return sorted(names) if isinstance(names, set) else list(names)


def _module_names(value: Any, field: str) -> set[str] | str | None:
    """Names as a set, or a regular expression; PEFT would read a single name as an expression."""
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z0-9_]+", value):
        return value
    names = _name_list(value, field)
    return None if names is None else set(names)


def _layer_numbers(value: Any) -> list[int] | int | None:
    if value is None:
        return None
    numbers = [value] if isinstance(value, Integral) else list(value)
    if not numbers or not all(isinstance(n, Integral) and not isinstance(n, bool) and int(n) >= 0 for n in numbers):
        raise MolaError(
            "`layers_to_transform` must be a layer number (from 0) or a non-empty list of layer numbers: got "
            f"{value!r}. Leave it out to adapt all layers."
        )
    return int(value) if isinstance(value, Integral) else [int(number) for number in numbers]


def _check_combinations(config: MolaConfig) -> None:
    """Raise MolaError for values that are allowed individually, but not together."""
    if config.target_modules == set() and not config.target_parameters:
        raise MolaError("`target_modules` must not be empty unless `target_parameters` is set.")
    if config.target_parameters and config.lora_dropout:
        raise MolaError(
            f"`lora_dropout` must be 0 with `target_parameters`, as with LoRA: got {config.lora_dropout}. "
            "These LoRAs are added to the weight itself, so there is no input to drop."
        )
    if config.target_parameters and config.init_lora_weights == "principal":
        raise MolaError(
            "`init_lora_weights` 'principal' reads the weights of linears, but `target_parameters` are not linears: "
            "choose a different initialisation."
        )
    # In the two cases below PEFT would ignore `layers_to_transform` or `layers_pattern`.
    has_layers = config.layers_to_transform is not None
    if isinstance(config.target_modules, str) and (has_layers or config.layers_pattern is not None):
        raise MolaError(
            "`layers_to_transform` and `layers_pattern` need `target_modules` as a list of names, "
            f"got {config.target_modules!r}."
        )
    if config.layers_pattern and not has_layers:
        raise MolaError("`layers_pattern` is only used together with `layers_to_transform`, which is not set.")
