"""What stands in for PEFT's own methods: `MolaConfig` with one expert (LoRA, merges) and with several (a mixture)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import LoraConfig

from mola import MolaConfig


class OneExpert(MolaConfig):
    """One expert unless a test says otherwise: what LoRA can do, this must do."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"num_experts": 1, **settings})


class Mixture(MolaConfig):
    """Several experts; PEFT's tests leave out what is particular to a method, so it is set here."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"num_experts": 4, "top_k": 2, **settings})


KINDS = (OneExpert, Mixture)

# Model of PEFT's tests of custom modules, and settings: those that LoRA's own cases have, where linears are adapted.
_CUSTOM = (
    ("MLP", {"target_modules": "lin0"}),
    ("MLP", {"target_modules": ["lin0"]}),
    ("MLP", {"target_modules": ["lin1"]}),
    ("MLP", {"target_modules": ["lin0", "lin1"]}),
    ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP", {"target_modules": ["lin0"], "lora_alpha": 4, "lora_dropout": 0.1}),
    ("MLP", {"target_modules": "all-linear", "r": 2, "exclude_modules": ["lin1"]}),
    ("EmbConv1D", {"target_modules": ["conv1d"]}),
    ("EmbConv1D", {"target_modules": ["conv1d", "lin0"], "lora_alpha": 32}),
    ("Conv2d", {"target_modules": ["lin0"]}),
)
_ACTIVE_TOGETHER = {"same": ("lin0", "lin0"), "different": ("lin0", "lin1")}
# Layer by layer another number of experts: all models here have two layers, or two and two.
_LAYERS = {"SEQ_2_SEQ_LM": [2, 4, 3, 2]}
_TASKS = {
    "test_decoder_models": "CAUSAL_LM",
    "test_encoder_decoder_models": "SEQ_2_SEQ_LM",
    "test_feature_extraction_models": "FEATURE_EXTRACTION",
    "test_seq_classifier": "SEQ_CLS",
}
_TASKS_OF_CLASSES = {"TestTokenClassificationModels": "TOKEN_CLS", "TestQuestionAnsweringModels": "QUESTION_ANS"}


def _custom() -> list[tuple]:
    return [
        (f"{kind.__name__} {model} {number}", model, kind, settings)
        for kind in KINDS
        for number, (model, settings) in enumerate(_CUSTOM, start=1)
    ]


def _active_together() -> list[tuple]:
    return [
        (f"{kind.__name__} {name}", "mola", kind, *({"target_modules": [t], "init_lora_weights": False} for t in pair))
        for kind in KINDS
        for name, pair in _ACTIVE_TOGETHER.items()
    ]


def _with_task(task_type: str) -> list[tuple]:
    common = {"task_type": task_type, "target_modules": None}
    layers = _LAYERS.get(task_type, [2, 4])
    return [(OneExpert, common), (Mixture, {**common, "num_experts": layers, "lora_dropout": 0.05})]


def _of_both_adapters(theirs: Sequence[Any]) -> list | None:
    """Our configurations with the targets and ranks of LoRA's, for a mixed batch; None where LoRA adapts no linears."""
    for name, *values in theirs:
        loras = [value for value in values if isinstance(value, LoraConfig)]
        if loras and all(target.startswith("lin") for lora in loras for target in lora.target_modules or ["?"]):
            return [(f"{kind.__name__} {name}", *(_like(kind, value) for value in values)) for kind in KINDS]
    return None


def _like(kind: type[MolaConfig], lora: LoraConfig) -> MolaConfig:
    common = {"target_modules": lora.target_modules, "modules_to_save": lora.modules_to_save}
    return kind(**common, r=lora.r, init_lora_weights=False)


def cases(module: str, cls: str | None, names: tuple[str, ...], theirs: Sequence[Any]) -> list | None:
    """The values that take the place of PEFT's in one `parametrize`.

    Args:
        module: name of the test module.
        cls: name of the test class.
        names: the parameters' names.
        theirs: PEFT's values.

    Returns:
        One tuple per case; None for parameters that are no matter of the method.
    """
    match names:
        case ("test_name", "model_id", "config_cls", "config_kwargs"):
            return _custom()
        case ("test_name", "tuner_method", "config_cls", "config_kwargs_1", "config_kwargs_2"):
            return _active_together()
        case ("test_name", "config0", "config1") | ("test_name", "config") if cls == "TestMixedAdapterBatches":
            return _of_both_adapters(theirs)
        case ("config_class", "mandatory_kwargs"):
            return [(MolaConfig, {})]
        case ("config_cls",):
            return [(kind,) for kind in KINDS]
        case ("config_class",):
            return [(MolaConfig,)]
        case ("config_cls", "config_kwargs"):
            task_type = _TASKS.get(module) or _TASKS_OF_CLASSES.get(cls or "")
            return _with_task(task_type) if task_type else None
    return None
