"""The folder below which clients may load adapters and skills."""

import os
from pathlib import Path

from mola.serving.responses import RequestError


class AdapterRoot:
    """The option `adapter_root` of a server; `root` is None if clients may load nothing."""

    def __init__(self, root: str | None) -> None:
        self._root = None if root is None else Path(root).resolve()

    def check_allowed(self) -> Path:
        """The folder.

        Raises:
            RequestError: 403, clients may load nothing.
        """
        if self._root is None:
            raise RequestError(
                403, "adapters cannot be loaded or unloaded here: the server was started without `--adapter_root`."
            )
        return self._root

    def folder(self, path: str) -> str:
        """The folder that a client's path leads to; links are followed.

        Raises:
            RequestError: 403, clients may load nothing; 400, the folder is not below the root.
        """
        root = self.check_allowed()
        try:
            folder = (root / path).resolve()
        except (OSError, ValueError, RuntimeError):  # null characters, links in a circle
            folder = root
        if folder == root or not folder.is_relative_to(root):
            raise wrong_folder("`lora_path` must be a folder below the server's `--adapter_root`.")
        return os.fspath(folder)


def wrong_name(message: str) -> RequestError:
    """The error for a `lora_name` that cannot be used."""
    return RequestError(400, message, param="lora_name")


def wrong_folder(message: str) -> RequestError:
    """The error for a `lora_path` that cannot be used."""
    return RequestError(400, message, param="lora_path")
