"""The base model of an adapter or of a skills folder, as its settings record it."""

import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

from mola.checkpoints.adapter_settings import adapter_settings, is_skills_folder, skills_settings
from mola.errors import MolaError

logger = logging.getLogger(__name__)

_HUB_ID = r"[\w-][\w.-]*(/[\w-][\w.-]*)?"


def is_hub_id(base_model: str) -> bool:
    """Whether a text can be a model on the Hub: `name` or `owner/name`; anything else can only be meant as a path."""
    return re.fullmatch(_HUB_ID, base_model) is not None and not base_model.endswith(".json")


def lasting_name(base_model: str) -> str:
    """What to record for a base model: the absolute path of a folder, which holds in every working directory."""
    return os.path.abspath(base_model) if os.path.isdir(base_model) else base_model


def base_model_of(base_model: str | os.PathLike[str] | None, adapters: Iterable[str | os.PathLike[str]]) -> str:
    """The base model that is meant: `base_model` if it is given, else the one that the adapters were trained on.

    Raises:
        MolaError: it is not given, and there is no adapter, an adapter does not record its base model, the recorded
            folder does not exist here, or the adapters record different ones.
    """
    if base_model is not None:
        return os.fspath(base_model)
    recorded = {os.fspath(adapter): _recorded_base(adapter) for adapter in adapters}
    if not recorded:
        raise MolaError(
            "`base_model` must name a model: pass --base_model with a folder or a hub id. Only an adapter that is "
            "given records its base model."
        )
    if len({os.path.realpath(base) for base in recorded.values()}) > 1:
        pairs = ", ".join(f"{adapter!r} on {base!r}" for adapter, base in recorded.items())
        raise MolaError(f"`base_model` must be given, since the adapters were trained on different models: {pairs}.")
    return next(iter(recorded.values()))


def _recorded_base(adapter: str | os.PathLike[str]) -> str:
    name = os.fspath(adapter)
    if is_skills_folder(adapter):
        settings = {"base_model_name_or_path": skills_settings(adapter).get("base_model")}
    else:
        settings = adapter_settings(adapter)
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not base:
        raise MolaError(f"`base_model` must be given: {name!r} does not record which model it was trained on.")
    base = str(base)
    if os.path.isdir(base):
        return base
    if not is_hub_id(base):
        raise MolaError(
            f"`base_model` must be given: {name!r} was trained on {base!r}, and there is no such folder here. Pass "
            "--base_model with its new place."
        )
    if revision not in (None, "main"):
        raise MolaError(
            f"`base_model` must be given: {name!r} was trained on revision {revision!r} of {base}. Run `hf download "
            f"{base} --revision {revision} --local-dir DIR`, and pass --base_model DIR."
        )
    logger.info("%s was trained on %s, which is no folder here: it is looked up on the Hub.", name, base)
    return base


def is_recorded_base(base_model: str | os.PathLike[str], recorded: str | None) -> bool:
    """Whether `base_model` may be the model that an adapter records; True if the adapter records none.

    Folders that both exist are compared by their resolved paths. Otherwise the names are compared, since a folder may
    have been moved.
    """
    if not recorded:
        return True
    if os.path.isdir(recorded) and os.path.isdir(base_model):
        return os.path.realpath(recorded) == os.path.realpath(base_model)
    return model_name(recorded) == model_name(base_model)


def model_name(base_model: str | os.PathLike[str]) -> str:
    """The last part of a path or hub id, which still names the model when folders move.

    In the cache of the Hub (`models--owner--name/snapshots/<commit>`) the name comes from before the commit.
    """
    path = Path(base_model)
    is_commit = path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--")
    return path.parent.parent.name.rpartition("--")[2] if is_commit else path.name
