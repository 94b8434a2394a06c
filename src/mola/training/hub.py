"""Uploading a finished run to the Hugging Face Hub: checks before training, one commit after it.

The trainer of Transformers would upload at every checkpoint, from a run folder whose files are half written then, and
with its own model card. Here one commit holds the finished run: adapter, tokenizer, model card, record and loss curve.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from mola.errors import MolaError

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

_ONLY_WHEN_PUSHED = ("hub_model_id", "hub_revision", "hub_private_repo", "hub_always_push")
_MASK = "<HUB_TOKEN>"


def check_hub_options(options: TrainingArguments) -> None:
    """Whether an upload can work at all, as far as this can be told without the network.

    Args:
        options: of a run.

    Raises:
        MolaError: the hub is switched off, there is no token, a name is wrong, or a setting would have no effect.
    """
    if not options.push_to_hub:
        for name in _ONLY_WHEN_PUSHED:
            if getattr(options, name):
                raise MolaError(
                    f"`{name}` ({getattr(options, name)!r}) counts only with `push_to_hub`. Pass --push_to_hub true as "
                    "well, or leave it out."
                )
        return
    strategy = getattr(options.hub_strategy, "value", options.hub_strategy)
    if strategy != "end" or options.hub_always_push:
        name, value = ("hub_strategy", strategy) if strategy != "end" else ("hub_always_push", True)
        raise MolaError(
            f"`{name}` cannot be {value}: a run is uploaded once, when it is finished (`hub_strategy` end). Leave it "
            "out."
        )
    if constants.HF_HUB_OFFLINE:
        raise MolaError(
            "`push_to_hub` needs the hub, which HF_HUB_OFFLINE switches off. Unset the variable, or leave "
            "`push_to_hub` out and upload the folder later."
        )
    if not _token(options):
        raise MolaError(
            "`push_to_hub` needs a token with write permission: there is none. Run `hf auth login`, set HF_TOKEN, or "
            "leave `push_to_hub` out."
        )
    try:
        validate_repo_id(wanted_repository(options))
    except HFValidationError as error:
        raise MolaError(f"`hub_model_id` must be a name such as user/model: {error}") from error


def wanted_repository(options: TrainingArguments) -> str:
    """The repository's name as asked for, by default that of the run folder."""
    return options.hub_model_id or Path(options.output_dir or "").absolute().name


def create_repository(options: TrainingArguments) -> str:
    """Make the repository, before the model is loaded; one that is there already is used.

    Args:
        options: of a run with `push_to_hub`.

    Returns:
        Its full name.

    Raises:
        MolaError: the hub cannot be reached, or refuses.
    """
    name = wanted_repository(options)
    try:
        url = HfApi(token=_token(options)).create_repo(name, private=options.hub_private_repo, exist_ok=True)
    except Exception as error:  # the client's network library differs between its versions
        raise MolaError(
            f"`push_to_hub` cannot make or use the repository {name!r} at {constants.ENDPOINT}: {_reason(error)}. "
            "Check the network, the name and the token's permissions, or leave `push_to_hub` out."
        ) from error
    return url.repo_id


def upload(folder: Path, names: Sequence[str], repository: str, options: TrainingArguments) -> str:
    """Upload files of a finished run as one commit.

    Args:
        folder: the run folder.
        names: of the files in it; nothing else is uploaded.
        repository: full name, as from `create_repository`.
        options: of the run.

    Returns:
        Address of the commit.

    Raises:
        MolaError: the hub cannot be reached, or refuses; the run folder is complete.
    """
    where = [f"--revision={options.hub_revision}"] if options.hub_revision else []
    command = ["hf", "upload", repository, str(folder), *where, *(f"--include={name}" for name in names)]
    try:
        commit: Any = HfApi(token=_token(options)).upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=list(names),
            commit_message="Adapter trained with mola",
            revision=options.hub_revision,
        )
    except KeyboardInterrupt:
        logger.warning("Not uploaded to %s. Upload the finished run with `%s`.", repository, shlex.join(command))
        raise
    except Exception as error:  # as above
        raise MolaError(
            f"`push_to_hub` could not upload to {repository!r} at {constants.ENDPOINT}: {_reason(error)}. Nothing is "
            f"lost: the finished run is in {str(folder)!r}. Upload it with `{shlex.join(command)}`."
        ) from error
    logger.info("Uploaded %d files to %s", len(names), commit.commit_url)
    return commit.commit_url


def without_token(command: Sequence[str], token: str | None) -> list[str]:
    """A command line for a record that others may read."""
    return [word.replace(token, _MASK) for word in command] if token else list(command)


def _token(options: TrainingArguments) -> str | None:
    return options.hub_token or get_token()


def _reason(error: Exception) -> str:
    """The error in one line, without a full stop."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(". ")
