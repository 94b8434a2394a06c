"""Checks the folder of a base model, without torch and Transformers."""

import os
from pathlib import Path

from mola.checkpoints.recorded_base import is_hub_id
from mola.errors import MolaError


def check_base_model(base_model: str | os.PathLike[str], gguf_file: str | None = None) -> None:
    """Check that a folder holds a base model: `config.json`, or the GGUF file if there is one. A hub id passes.

    Raises:
        MolaError: the path does not exist, is a file, or is a folder without `config.json` or the GGUF file.
    """
    name = os.fspath(base_model)
    if not name.strip():
        raise MolaError("`base_model` must name a model: got an empty text. Pass a folder or a hub id.")
    path = Path(name)
    check_exists(name)
    if os.path.isdir(path):
        _check_folder(path, gguf_file)
    elif os.path.exists(path):
        raise MolaError(f"`base_model` must be a folder or a hub id: {name!r} is a file. Pass its folder.")


def check_exists(base_model: str) -> None:
    """Raise if a base model is a path, and there is nothing at this path."""
    if not os.path.exists(base_model) and not is_hub_id(base_model):
        raise MolaError(f"`base_model` names a folder that does not exist: {base_model!r}. Check the path.")


def check_on_hub(base_model: str, gguf_file: str | None = None) -> None:
    """Raise if a model that is no folder is neither on the Hub nor in its cache.

    Transformers finds this too, but takes seconds to import, and half a minute if the Hub cannot be reached.
    """
    if os.path.exists(base_model):
        return
    import huggingface_hub as hub

    file = gguf_file or "config.json"
    if isinstance(hub.try_to_load_from_cache(base_model, file), str):
        return
    try:
        if hub.file_exists(base_model, file):
            return
        reason = f"no such folder, and no model of this name with {file} on the Hub that you may read"
    except hub.errors.HfHubHTTPError:  # such as a model that needs a consent: Transformers explains it
        return
    except Exception as error:  # of the library below huggingface_hub, which depends on its version
        reason = f"no such folder, not in the cache, and the Hub cannot be reached: {error}"
    raise no_configuration(base_model, reason)


def no_configuration(base_model: str, reason: str) -> MolaError:
    """The error for a base model whose configuration cannot be read."""
    return MolaError(
        f"`base_model` has no readable configuration: {base_model!r} ({reason}). "
        "Pass a folder with config.json, a config.json file, or a name on the hub."
    )


def _check_folder(folder: Path, gguf_file: str | None) -> None:
    gguf_files = sorted(file.name for file in folder.glob("*.gguf"))
    if gguf_file is not None:
        if not os.path.isfile(folder / gguf_file):
            raise MolaError(
                f"`gguf_file` must be a file in `base_model`: {gguf_file!r} is not in {str(folder)!r}. "
                f"GGUF files in this folder: {', '.join(gguf_files) or 'none'}."
            )
    elif not (folder / "config.json").is_file():
        cure = "Pass a folder written by save_pretrained or a hub id."
        if gguf_files:
            cure = (
                f"It has GGUF files: {', '.join(gguf_files)}. Pass one of them as well: --gguf_file {gguf_files[0]}. "
                "Commands without this option need a model that was saved as safetensors."
            )
        elif (folder / "adapter_config.json").is_file():
            cure = "It holds an adapter: pass it as `adapter`, and its base model as `base_model`."
        raise MolaError(f"`base_model` must hold a model: folder {str(folder)!r} has no config.json. {cure}")
