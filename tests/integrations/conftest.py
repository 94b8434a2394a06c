"""Environments of other trainers, see `environments`."""

import pytest

from tests.integrations import environments


@pytest.fixture(scope="session")
def venv():
    """`venv(name, requirements)`: the Python of an environment with these and this repository, made once."""
    return environments.venv


@pytest.fixture(scope="session")
def run_in():
    """`run_in(python, arguments, **environment)`: a finished process of such an environment, without a hub."""
    return environments.run_in
