"""Imports mola after PEFT. Python imports this module when it starts, since `mola with` puts its folder on the path.

This module imports only what is loaded anyway, so processes that never import PEFT start as before.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
from typing import Any


class _AfterPeft:
    """Import hook that imports mola right after PEFT. Importing mola registers the method."""

    is_looking = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "peft" or self.is_looking:
            return None
        self.is_looking = True
        try:
            spec = importlib.util.find_spec(name)  # uses the other import hooks
        finally:
            self.is_looking = False
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                importlib.import_module("mola")

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _run_other_sitecustomize() -> None:
    """Run the `sitecustomize` that Python would have found without this folder: Python imports only the first one."""
    here = os.path.dirname(os.path.abspath(__file__))
    others = [each for each in sys.path if os.path.abspath(each) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    try:
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except ModuleNotFoundError as error:
        # A missing import means that the other `sitecustomize` is for a different Python.
        if error.name != "sitecustomize":
            raise


sys.meta_path.insert(0, _AfterPeft())
_run_other_sitecustomize()
