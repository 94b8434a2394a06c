"""An adapter folder as parts of a server's linears: read, and checked as `mola.load_model` does."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from mola.checkpoints.adapter_folder import read_tensors
from mola.errors import MolaError
from mola.integrations.vllm_server.mixture import Part, PartSettings
from mola.models.adapters import check_fits
from mola.models.meta import model_on_meta
from mola.serving.vllm_command import check_servable
from mola.tuner import MolaLinear

_PREFIX = "base_model.model."


class Adapter(NamedTuple):
    """A mixture as it is served.

    Attributes:
        parts: by the checkpoint's names of linears.
        digest: of all that compiled code depends on.
    """

    parts: dict[str, Part]
    digest: str


def read_adapter(folder: str, base_model: str, trust_remote_code: bool = False) -> Adapter:
    """Read a mixture for a base model, whose configuration alone is looked at.

    Raises:
        MolaError: see `check_servable`; also where the mixture does not fit the model.
    """
    config, tensors = check_servable(folder), read_tensors(Path(folder))
    try:
        adapted: Any = check_fits(model_on_meta(base_model, trust_remote_code), config, tensors)
    except MolaError as error:
        raise MolaError(f"`adapter` does not fit the base model: {folder!r}: {error}") from error
    parts = {}
    for name, module in adapted.named_modules():
        if isinstance(module, MolaLinear):
            own, place = module.settings["default"], name.removeprefix(_PREFIX)
            settings = PartSettings(own.num_experts, own.r, own.top_k, own.scaling, own.router)
            experts_A, experts_B = (tensors[f"{name}.{kind}"] for kind in ("mola_A", "mola_B"))
            parts[place] = Part(settings, experts_A, experts_B, tensors.get(f"{name}.mola_router"), 0)
    shapes = {name: [*part.settings, *part.experts_B.shape] for name, part in parts.items()}
    return Adapter(parts, hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest())
