"""`mola train --skill NAME --into FOLDER`: a plain LoRA on the layers from the decision on, which becomes a skill."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from mola.architecture.layer_stacks import LayerStacks
from mola.architecture.targets import resolve_target_modules
from mola.checkpoints.adapter_settings import is_skills_folder
from mola.checkpoints.skills_folder import check_layer, read_skills
from mola.errors import MolaError
from mola.models.base_model import weights_identity
from mola.models.options import QUANTIZATION_OPTIONS
from mola.skills.adding import AddResult, add
from mola.skills.options import AddOptions
from mola.training.fields import LORA_SETTINGS
from mola.training.option_checks import check_skill_is_new
from mola.tuner import MolaConfig
from mola.tuner.skills.lower_layers import decoder_layers, settled_layer

logger = logging.getLogger(__name__)


def check_into(options: Any) -> None:
    """Check that the trained LoRA can be added to the skills folder `into`, and set `layer` to that of the folder.

    Raises:
        MolaError: the name is taken, or the folder has another base model or another layer.
    """
    check_skill_is_new(options)
    if is_skills_folder(options.into):
        folder = read_skills(options.into)
        folder.check_base(options.base_model, weights_identity(options.base_model))
        options.layer = folder.layer if options.layer is None else options.layer
        check_layer(folder, options.layer)


def on_upper_layers(options: Any, mixture: MolaConfig, model: PreTrainedModel) -> MolaConfig:
    """The mixture of a skill: one expert on the linears of the layers from `options.layer` on, which is set if None.

    `model` is the base model, which may be on the meta device.

    Raises:
        MolaError: there is no such layer or no such linear, or `target_modules` is a regular expression.
    """
    layers = decoder_layers(model)
    options.layer = settled_layer(options.layer, len(layers))
    name = next(name for name, module in model.named_modules() if module is layers)
    targets, _ = resolve_target_modules(model, LayerStacks.of(model), mixture.target_modules)
    if isinstance(targets, str):
        raise MolaError(f"`target_modules` of a skill must be names between commas: got {targets!r}.")
    return replace(
        mixture,
        num_experts=1,
        target_modules=sorted({each.rpartition(".")[2] for each in targets}),
        layers_to_transform=list(range(options.layer, len(layers))),
        layers_pattern=name.rpartition(".")[2],
    )


def skill_settings(options: Any) -> dict[str, Any]:
    """The settings of the LoRA, for the run's record."""
    found = {name: options.adapter_setting(name) for name in LORA_SETTINGS}
    start = options.adapter_setting("init_lora_weights")
    return {
        **found,
        "r": int(found["r"]) if str(found["r"]).isdecimal() else found["r"],
        "use_rslora": bool(found["use_rslora"]),
        "init_lora_weights": True if start is None else start,
        "skill": options.skill,
        "layer": options.layer,
    }


def add_trained_skill(options: Any, folder: Path, model: Any) -> AddResult:
    """Add the LoRA of a finished run to the skills folder.

    Args:
        options: the run's options.
        folder: the run folder.
        model: the base model, if it is not sharded; the LoRA may still be in it. None loads it again.
    """
    result = add(
        AddOptions(
            folder=options.into,
            skills=[f"{options.skill}={folder}"],
            base_model=options.base_model,
            layer=options.layer,
            overwrite=options.overwrite_output_dir,
            trust_remote_code=options.trust_remote_code,
            dtype=options.base_dtype,
            device=str(options.device),
            **{name: getattr(options, name) for name in QUANTIZATION_OPTIONS},
        ),
        model,
    )
    logger.info("The skill %s is in %s.", options.skill, options.into)
    for line in result.moved:
        logger.info("A decision has moved: %s.", line)
    return result
