"""Parity with numbers recorded from the paper's research code (random 4-layer LLaMA, float32)."""

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mola.checkpoints.published import read_published
from mola.tuner.layer import MolaLinear

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def fixture():
    numbers = load_file(GOLDEN / "case_a" / "fixture.safetensors")
    settings = json.loads((GOLDEN / "case_a" / "fixture.json").read_text())
    return numbers, settings


def load(settings, **options):
    base = AutoModelForCausalLM.from_pretrained(GOLDEN / "base_tiny", dtype=torch.float32, attn_implementation="eager")
    config, state_dict = read_published(GOLDEN / "case_a", settings["top_k"])
    for name, value in {"base_model_name_or_path": None, **options}.items():
        setattr(config, name, value)
    model = get_peft_model(base, config)
    set_peft_model_state_dict(model, state_dict)
    return model


BALANCE = {"router_aux_loss_coef": 1e-3, "router_aux_loss_reduction": "layer"}


def batch(numbers, prefix=""):
    return {name: numbers[prefix + name] for name in ("input_ids", "attention_mask", "labels")}


def tensor_of(model, key):
    """The model's parameter (or gradient source) that corresponds to a key of the research code."""
    module_name, _, rest = key.removeprefix("base_model.model.").partition(".lora_")
    if not rest:
        module_name = key.removeprefix("base_model.model.").removesuffix(".router.router.weight")
        return model.base_model.model.get_submodule(module_name).mola_router["default"], None, False
    module = model.base_model.model.get_submodule(module_name)
    part, expert = rest.removesuffix(".weight").split("_")
    parameter = module.mola_A if part == "A" else module.mola_B
    return parameter["default"], int(expert), part == "B"


def pick(tensor, expert, transpose):
    tensor = tensor if expert is None else tensor[expert]
    return tensor.t() if transpose else tensor


def test_config_is_read_from_the_checkpoint(fixture):
    _, settings = fixture
    config, _ = read_published(GOLDEN / "case_a", settings["top_k"])
    assert config.num_experts == settings["number_experts"]
    assert config.r == settings["r"]
    assert config.lora_alpha == settings["lora_alpha"]


def test_logits_and_hidden_states(fixture):
    numbers, settings = fixture
    model = load(settings).eval()
    inputs = batch(numbers)
    output = model(**inputs, output_hidden_states=True)
    torch.testing.assert_close(output.logits, numbers["logits"], **TOLERANCE)
    torch.testing.assert_close(output.loss, numbers["task_loss"], **TOLERANCE)
    for i, hidden in enumerate(output.hidden_states):
        torch.testing.assert_close(hidden, numbers[f"hidden.{i}"], **TOLERANCE)


def test_every_module_on_a_given_input(fixture):
    numbers, settings = fixture
    model = load(settings).eval().base_model.model.model
    checked = 0
    for name, module in model.named_modules():
        if isinstance(module, MolaLinear):
            x = numbers["linear.x_hidden" if module.in_features == 64 else "linear.x_inter"]
            torch.testing.assert_close(module(x), numbers[f"linear.{name}.out"], **TOLERANCE)
            logits = module.router_logits("default", x)
            torch.testing.assert_close(logits, numbers[f"linear.{name}.router_logits"], **TOLERANCE)
            checked += 1
    assert checked == 28


def test_router_logits_and_probabilities_in_the_model(fixture):
    numbers, settings = fixture
    model = load(settings).eval()
    seen = {}
    for name, module in model.base_model.model.model.named_modules():
        if isinstance(module, MolaLinear):
            module.register_forward_hook(
                lambda m, args, _, name=name: seen.update({name: m.router_logits("default", args[0])})
            )
    model(**batch(numbers))
    for name, logits in seen.items():
        torch.testing.assert_close(logits, numbers[f"router.{name}.logits"], **TOLERANCE)
        if f"router.{name}.probs" in numbers:
            torch.testing.assert_close(logits.softmax(-1), numbers[f"router.{name}.probs"], **TOLERANCE)
    assert len(seen) == 28


@pytest.mark.parametrize("prefix", ["", "leftpad."])
def test_balance_loss(fixture, prefix):
    numbers, settings = fixture
    model = load(settings, **BALANCE).train()
    output = model(**batch(numbers, prefix))
    torch.testing.assert_close(model.get_balance_loss(), numbers[prefix + "balance_raw"], **TOLERANCE)
    torch.testing.assert_close(output.loss, numbers[prefix + "total_loss"], **TOLERANCE)
    if prefix:
        torch.testing.assert_close(output.logits, numbers["leftpad.logits"], **TOLERANCE)


@pytest.mark.parametrize("kind", ["task", "total"])
def test_gradients(fixture, kind):
    numbers, settings = fixture
    model = load(settings, **(BALANCE if kind == "total" else {})).train()
    model(**batch(numbers)).loss.backward()
    keys = [key for key in numbers if key.startswith(f"grad.{kind}.")]
    assert len(keys) == 20
    for key in keys:
        parameter, expert, transpose = tensor_of(model, key.removeprefix(f"grad.{kind}."))
        torch.testing.assert_close(pick(parameter.grad, expert, transpose), numbers[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["task", "total"])
def test_five_adamw_steps(fixture, kind):
    numbers, settings = fixture
    model = load(settings, **(BALANCE if kind == "total" else {})).train()
    keys = [key for key in numbers if key.startswith(f"train.{kind}.")]
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses = adamw_losses(model, parameters, batch(numbers), settings)
    for key in keys:
        if ".param." in key:
            parameter, expert, transpose = tensor_of(model, key.partition(".param.")[2])
            torch.testing.assert_close(pick(parameter, expert, transpose).detach(), numbers[key], **TOLERANCE)
    torch.testing.assert_close(torch.stack(losses), numbers[f"train.{kind}.losses"], **TOLERANCE)


def adamw_losses(model, parameters, inputs, settings):
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        losses.append(loss.detach())
        loss.backward()
        optimizer.step()
    losses.append(model(**inputs).loss.detach())
    return losses


def test_greedy_decoding(fixture):
    numbers, settings = fixture
    model = load(settings).eval()
    ids = numbers["generate.input_ids"]
    output = model.generate(
        input_ids=ids,
        attention_mask=(ids != 0).long(),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=2,
        pad_token_id=0,
    )
    assert torch.equal(output, numbers["generate.output_ids"])
