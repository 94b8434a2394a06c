"""Model families on packed weights: training, saving and loading, generating."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from mola import MolaError, load_model
from mola.models.quantization import prepare_for_training
from tests.ecosystem.families import FAMILIES, GENERATING, adapt, auto_class, batch, build, layers, logits
from tests.quantised.models import KINDS, packed_layers, quantised

pytestmark = [
    pytest.mark.quant,
    pytest.mark.usefixtures("bitsandbytes"),
    # Of Transformers and PEFT about what they will rename.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

# Their linears are of a class of their own, which Transformers does not pack.
NOT_PACKED = ("falcon",)


@pytest.mark.compatibility(column="quantised")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in ("llama", "gpt2") else pytest.mark.slow)
        for name in FAMILIES
        if name not in NOT_PACKED
    ],
)
def test_family(family, kind, tmp_path):
    build(family).save_pretrained(tmp_path / "base")
    base = load(tmp_path / "base", kind, family)
    packed = packed_layers(base)
    model = adapt(base, family, lora_dropout=0.0)
    on_packed = [layer for name, layer in layers(model).items() if name in packed]
    assert len(on_packed) == len(layers(model)) > 0

    losses = train(model, family, steps=8)
    assert losses[-1] < losses[0]
    expected = logits(model, family)
    model.save_pretrained(tmp_path / "adapter")
    assert all(
        ".mola_" in name or "score" in name or "classifier" in name
        for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    )
    again = PeftModel.from_pretrained(load(tmp_path / "base", kind, family), tmp_path / "adapter")
    assert torch.equal(logits(again, family), expected)
    if family in GENERATING:
        inputs = {name: value for name, value in batch(family).items() if name != "labels"}
        assert again.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape[0] == 2


def load(folder, kind, family):
    """Packed, ready for training."""
    # A new head is trained in full, so it must not be packed.
    kept = ["classifier"] if family == "token-classifier" else None
    return prepare_for_training(quantised(folder, kind, auto_class=auto_class(family), llm_int8_skip_modules=kept))


@pytest.mark.parametrize("family", NOT_PACKED)
def test_models_that_would_stay_as_they_are_are_refused(family, tmp_path):
    build(family).save_pretrained(tmp_path)
    with pytest.raises(MolaError, match="`base_model`.*cannot be quantised"):
        load_model(tmp_path, quantization=KINDS["nf4"], dtype="float32", device="cpu")


def train(model, family, steps):
    """Losses; only adapters and new heads have gradients."""
    model.train()
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("mola_" in name or "modules_to_save" in name for name, _ in trained)
    optimizer = torch.optim.AdamW([parameter for _, parameter in trained], lr=5e-3)
    losses = []
    for _ in range(steps):
        loss = model(**batch(family)).loss
        loss.backward()
        assert [name for name, parameter in trained if parameter.grad is None] == []
        assert not any(parameter.grad is not None for parameter in model.parameters() if not parameter.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("family", ["mixtral"])
def test_experts_in_stacks_take_no_more_memory_than_before(family, tmp_path):
    """Nothing packs them: in float32 they would be larger than in the unquantised model."""
    build(family).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    base = quantised(tmp_path / "base", "nf4", torch.bfloat16)
    stacks = {name: parameter for name, parameter in base.named_parameters() if parameter.dim() == 3}
    assert stacks
    model = adapt(prepare_for_training(base), family, lora_dropout=0.0)
    assert {parameter.dtype for parameter in stacks.values()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in stacks.values())
    assert base.model.norm.weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        losses = train(model, family, steps=8)
    assert losses[-1] < losses[0]
