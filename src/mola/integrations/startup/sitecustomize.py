"""Python imports this when it starts, where `mola with` put its folder on the path: mola follows PEFT.

Nothing is imported here that is not loaded anyway: processes that never import PEFT notice nothing.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
from typing import Any


class _AfterPeft:
    """Imports mola as soon as PEFT has been, which registers the method."""

    is_looking = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "peft" or self.is_looking:
            return None
        self.is_looking = True
        try:
            spec = importlib.util.find_spec(name)  # by everybody else
        finally:
            self.is_looking = False
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                importlib.import_module("mola")

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _run_the_other() -> None:
    """Python imports one module of this name: the one that it would have found without this folder."""
    here = os.path.dirname(os.path.abspath(__file__))
    others = [each for each in sys.path if os.path.abspath(each) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    try:
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except ModuleNotFoundError as error:  # its way of saying that it is not for this Python
        if error.name != "sitecustomize":
            raise


sys.meta_path.insert(0, _AfterPeft())
_run_the_other()
