"""One training step of every model family in two processes gives the gradients of one process.

Each process takes half of the rows; the loss contains the routers' losses, and some experts are idle.
"""

import json
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ecosystem.families import FAMILIES, adapt, batch, build
from tests.waiting import PATIENCE

TOLERANCE = 1e-4  # float32, sums in another order
STACKED = "mixtral", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def make(family: str) -> torch.nn.Module:
    family, *stacked = family.split(" ")
    return adapt(build(family), family, top_k=1, router_aux_loss_coef=0.5, target_parameters=stacked or None).train()


def half(family: str, index: int) -> dict:
    return {name: value[2 * index : 2 * index + 2] for name, value in batch(family.split(" ")[0], rows=4).items()}


def expected(family: str) -> dict:
    """Gradients of one process: the mean over both halves."""
    model = make(family)
    for index in range(2):
        (model(**half(family, index)).loss / 2).backward()
    return gradients(model)


def gradients(model: torch.nn.Module) -> dict:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            found[name.removeprefix("module.")] = (
                gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            )
    return found


def copied(model: torch.nn.Module) -> torch.nn.Module:
    return torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def sharded(model: torch.nn.Module) -> torch.nn.Module:
    from torch.distributed.fsdp import fully_shard

    blocks = set(model.base_model.model._no_split_modules)
    for module in reversed(list(model.modules())):
        if type(module).__name__ in blocks:
            fully_shard(module)
    return fully_shard(model)


def difference(family: str, index: int, wrap) -> float:
    """Largest difference of a gradient, relative to the largest value of that gradient."""
    model = wrap(make(family))
    model(**half(family, index)).loss.backward()
    ours, theirs = gradients(model), expected(family)
    assert ours.keys() == theirs.keys()
    assert any(gradient.abs().max() > 0 for gradient in theirs.values())
    worst = 0.0
    for name, gradient in theirs.items():
        scale = gradient.abs().max().clamp(min=1e-3)
        worst = max(worst, float((ours[name] - gradient).abs().max() / scale))
    return worst


def step_of_each(index: int, wrap: str, families: list[str], target: str) -> None:
    """In each process: the difference for every family, or what went wrong."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE))
    results = {}
    for family in families:
        try:
            results[family] = difference(family, index, globals()[wrap])
        except Exception as error:  # the other families shall be tried all the same
            results[family] = f"{type(error).__name__}: {error}"
    Path(f"{target}.{index}").write_text(json.dumps(results), encoding="utf-8")
    dist.barrier()  # or one may wait for ever for the other, which has gone
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def step(processes, tmp_path_factory, request):
    """Results of a step by way and family, for the families that were selected."""
    folder = tmp_path_factory.mktemp("steps")
    selected = {item.callspec.params["family"] for item in request.session.items if item.path == request.path}
    done = {}

    def result(wrap: str, family: str) -> list:
        if wrap not in done:
            given = {"wrap": wrap, "families": sorted(selected), "target": str(folder / wrap)}
            processes.call(step_of_each, **given)
            files = [folder / f"{wrap}.{index}" for index in range(2)]
            done[wrap] = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        return [results[family] for results in done[wrap]]

    return result


def check(results: list) -> None:
    assert all(isinstance(value, float) and value < TOLERANCE for value in results), results


@pytest.mark.slow
@pytest.mark.compatibility(column="DDP")
@EVERY_FAMILY
def test_ddp(step, family):
    check(step("copied", family))


@pytest.mark.slow
@pytest.mark.compatibility(column="FSDP")
@EVERY_FAMILY
def test_fsdp(step, family):
    check(step("sharded", family))


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["copied", "sharded"])
@pytest.mark.parametrize("family", [" ".join(STACKED)])
def test_stacked_experts_of_the_base(step, wrap, family):
    check(step(wrap, family))
