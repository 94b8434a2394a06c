"""The pytest plugin under which PEFT's tests run: our cases for theirs, no network, listed exceptions."""

from __future__ import annotations

import contextlib
import importlib
import json
import socket
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from mola import MolaConfig
from tests.peft_suite import cases
from tests.peft_suite.lists import Lists
from tests.peft_suite.source import PACKAGE

# Checks inside PEFT's tests that skip methods PEFT does not know for something that ours can do.
_SKIPS_OF_OTHERS = {
    "testing_common": ("_skip_if_conv1d_not_supported",),
    "test_decoder_models": ("check_beft_config",),
    "test_encoder_decoder_models": ("beft_tests",),
}
# Tests of any method that skip all but LoRA, by its name.
_FOR_LORA_BY_NAME = "mixed_adapter_batches"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The file for the result."""
    parser.addoption("--suite-result", type=Path, help="write what passed and what did not as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module is imported: what they all import."""
    _forbid_network()
    pytest.register_assert_rewrite(f"{PACKAGE}.testing_common")
    utilities: Any = importlib.import_module(f"{PACKAGE}.testing_utils")
    for_others = utilities.set_init_weights_false

    def set_init_weights_false(config_cls: type, kwargs: dict[str, Any]) -> dict[str, Any]:
        if issubclass(config_cls, MolaConfig):
            return {**kwargs, "init_lora_weights": False}
        return for_others(config_cls, kwargs)

    utilities.set_init_weights_false = set_init_weights_false
    # The original goes online once per model; here all models are local.
    utilities.hub_online_once = lambda model_id: contextlib.nullcontext()
    for module, names in _SKIPS_OF_OTHERS.items():
        for name in names:
            setattr(importlib.import_module(f"{PACKAGE}.{module}"), name, lambda *args, **kwargs: None)
    config.pluginmanager.register(Suite(Lists.load(), config.getoption("--suite-result")), "mola-peft-suite")


def _forbid_network() -> None:
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise ConnectionRefusedError(f"PEFT's tests run without network; {address} was asked for")
        return connect(self, address)

    socket.socket.connect = local_only  # type: ignore[method-assign, assignment]


class Suite:
    """Chooses and changes tests as they are collected, and judges their results.

    Args:
        lists: what does not apply, and which of LoRA's tests do.
        result: file for the result as JSON; None writes none.
    """

    def __init__(self, lists: Lists, result: Path | None = None) -> None:
        self.lists = lists
        self.result = result
        self.outcomes: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.listed: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()

    # ------------------------------------------------------------------ collection

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Put our cases in the place of PEFT's."""
        cls = metafunc.cls.__name__ if metafunc.cls else None
        markers = metafunc.definition.own_markers
        for index, marker in enumerate(markers):
            if marker.name == "parametrize":
                names = _names(marker.args[0])
                ours = cases.cases(metafunc.module.__name__.rpartition(".")[2], cls, names, marker.args[1])
                if ours is not None:
                    markers[index] = pytest.mark.parametrize(names, ours).mark

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out tests that were written for one other method."""
        chosen = [item for item in items if _our_kinds(item) or self.lists.lora_test(_name(item.nodeid))]
        left_out = [item for item in items if item not in set(chosen)]
        for item in left_out:
            self.outcomes[_file(item.nodeid)]["left_out"] += 1
        config.hook.pytest_deselected(items=left_out)
        items[:] = chosen

    # ------------------------------------------------------------------ running

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        """Let our configuration take the place of LoRA's where the test names LoRA's."""
        kinds, modules = _our_kinds(item), [getattr(item, "module")]  # noqa: B009
        entry = None if kinds else self.lists.lora_test(_name(item.nodeid))
        if entry is not None:
            kinds = [getattr(cases, entry.config)]
        elif _FOR_LORA_BY_NAME in item.name:
            modules.append(importlib.import_module(f"{PACKAGE}.testing_common"))
        else:
            return (yield)
        with pytest.MonkeyPatch.context() as patch:
            for module in modules:
                patch.setattr(module, "LoraConfig", kinds[0])
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Any:
        """Turn what is listed round: it must fail, with the error that is listed."""
        report = yield
        entry = self.lists.exception(_name(item.nodeid))
        if entry is None or report.skipped or (report.passed and report.when != "call"):
            return report
        error = f"{type(call.excinfo.value).__name__}: {call.excinfo.value}" if call.excinfo else None
        if error is None and entry.kind == "rounding":
            return report
        if error is None:
            report.outcome, report.longrepr = "failed", f"Listed as not applicable, but it passes: {entry.tests}"
        elif entry.error in error or entry.error in report.longreprtext:
            self.listed[entry.tests] += 1
            report.outcome, report.wasxfail, report.listed = "skipped", entry.reason, True
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count one result per test."""
        if report.when != "call" and report.passed:
            return
        outcome = "listed" if hasattr(report, "listed") else report.outcome
        self.outcomes[_file(report.nodeid)][outcome] += 1
        if outcome == "skipped":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            self.skipped[reason.removeprefix("Skipped: ")] += 1

    def pytest_sessionfinish(self) -> None:
        """Write the result."""
        if self.result is not None:
            content = {"outcomes": self.outcomes, "listed": self.listed, "skipped": self.skipped}
            self.result.write_text(json.dumps(content), encoding="utf-8")


def _names(argnames: Any) -> tuple[str, ...]:
    listed = argnames.split(",") if isinstance(argnames, str) else argnames
    return tuple(name.strip() for name in listed)


def _name(nodeid: str) -> str:
    return nodeid.partition(f"{PACKAGE}/")[2]


def _file(nodeid: str) -> str:
    return _name(nodeid).partition("::")[0]


def _our_kinds(item: pytest.Item) -> list[type[MolaConfig]]:
    """The classes of ours in a test's case, or of which it has configurations."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    kinds = (value if isinstance(value, type) else type(value) for value in values)
    return [kind for kind in kinds if issubclass(kind, MolaConfig)]
