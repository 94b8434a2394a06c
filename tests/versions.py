"""Marks for what needs a newer version of a library than the lowest one that mola takes."""

import importlib.metadata

import pytest
from packaging.version import Version


def has(package, version):
    """Whether a package is installed in this version or a newer one."""
    return Version(importlib.metadata.version(package)) >= Version(version)


def needs(package, version, reason):
    """Skips a test below a version, and says why."""
    return pytest.mark.skipif(not has(package, version), reason=f"needs {package} {version}: {reason}")
