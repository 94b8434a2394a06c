"""What only a GPU shows: kernels in a whole model, waiting, compiling, graphs, several processes, a quantised base."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import get_peft_model
from torch.nn.parallel import DistributedDataParallel

from mola import MolaLinear, kernels_report

from ..tuner.models import random_config, tiny_llama, token_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and `pytest -m gpu`: other runs hide it"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUTED = {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.01}


def make(*, adapters_in_float32=True, **options):
    torch.manual_seed(0)
    base, config = tiny_llama().to(torch.bfloat16), random_config(**{"num_experts": "4-8", **options})
    model = get_peft_model(base, config, autocast_adapter_dtype=adapters_in_float32)
    return model.to(DEVICE).train()


def batch(**options):
    return {name: tensor.to(DEVICE) for name, tensor in token_batch(**options).items()}


def loss_of(model, inputs):
    with torch.autocast(DEVICE, torch.bfloat16):
        return model(**inputs).loss


def gradients(model):
    return {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found, expected, tolerance=0.05):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        error = (value - expected[name]).norm()
        assert error <= tolerance * expected[name].norm() + 1e-6, name


def test_the_kernel_of_a_gpu_is_used_and_computes_what_the_others_do(force):
    # All experts: with a choice, rounding in other places would now and then give a token to others.
    model, results = make(num_experts=4, top_k=4, **ROUTED), {}
    with torch.autocast(DEVICE, torch.bfloat16):
        chosen = {choice.backend for choice in kernels_report(model)}
    assert chosen == {"triton" if torch.cuda.get_device_capability() >= (8, 0) else "dense"}
    for name in (next(iter(chosen)), "dense", "reference"):
        force(name)
        model.zero_grad()
        loss = loss_of(model, batch())
        loss.backward()
        results[name] = (loss.item(), gradients(model))
    for name in ("dense", "reference"):
        assert results[name][0] == pytest.approx(results[next(iter(chosen))][0], rel=2e-2)
        assert_close(results[name][1], results[next(iter(chosen))][1])


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.1}, ROUTED], ids=["plain", "dropout", "router_losses"])
def test_a_step_never_waits_for_the_device(options):
    model, inputs = make(**options), batch()
    model.get_base_model().set_attn_implementation("eager")  # others ask the mask whether they can do without it
    loss_of(model, inputs).backward()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_of(model, inputs).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_training_lowers_the_loss_with_dropout_and_checkpointing():
    model, inputs = make(lora_dropout=0.1, **ROUTED), batch()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(40):
        loss = loss_of(model, inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert min(losses[-5:]) < 0.95 * losses[0]


def test_generated_tokens_are_those_of_one_forward_pass():
    # All experts of a token: where one is chosen, rounding can choose another.
    model = make(adapters_in_float32=False, num_experts=4, top_k=4).eval()
    prompt = batch(rows=2)["input_ids"]
    with torch.no_grad():
        generated = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False, use_cache=True, pad_token_id=0)
        logits = model(input_ids=generated).logits[:, prompt.shape[1] - 1 : -1].float()
    best, chosen = logits.max(-1).values, logits.gather(-1, generated[:, prompt.shape[1] :, None])[..., 0]
    assert (best - chosen <= 0.02).all()  # but for ties within rounding


def test_compiled_it_is_one_graph_with_the_eager_loss():
    model, inputs = make(), batch()
    expected = loss_of(model, inputs)
    compiled = torch.compile(model, fullgraph=True)
    found = loss_of(compiled, inputs)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
    found.backward()


def test_a_cuda_graph_reads_the_weights_of_the_replay():
    model = make(adapters_in_float32=False)
    layer = next(module for module in model.modules() if isinstance(module, MolaLinear)).eval()
    x = torch.randn(1, layer.in_features, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        layer(x)  # tries the kernel, which a capture could not
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            layer(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = layer(x)
        for parameter in (layer.mola_A["default"], layer.mola_router["default"]):
            parameter.mul_(1.5)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(output, layer(x))


def _rank(rank, world, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=world)
    model = DistributedDataParallel(make(**ROUTED).cuda(rank), device_ids=[rank])
    inputs = {name: tensor.cuda(rank) for name, tensor in token_batch(seed=rank).items()}
    loss_of(model, inputs).backward()
    torch.save(gradients(model), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_ddp_over_nccl_gives_every_process_the_same_gradients(tmp_path):
    world = torch.cuda.device_count()
    mp.spawn(_rank, args=(world, 29500 + os.getpid() % 1000, str(tmp_path)), nprocs=world)
    first, *others = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world))
    assert first
    assert others
    for other in others:
        assert all(torch.equal(other[name], value) for name, value in first.items())


@pytest.mark.quant
def test_a_base_in_4_bits_trains_and_generates(tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'mola-peft[quant]'")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama(hidden_size=64, intermediate_size=128).to(torch.bfloat16).save_pretrained(tmp_path)
    packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=packed, device_map={"": DEVICE})
    model = get_peft_model(base, random_config(num_experts="4-8")).train()
    loss_of(model, batch()).backward()
    assert all(value.isfinite().all() for value in gradients(model).values())
    generated = model.eval().generate(input_ids=batch()["input_ids"], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (3, 13)


def test_copies_of_a_model_compute_the_same():
    """Packed weights belong to the weights they were packed from."""
    model = make(adapters_in_float32=False).requires_grad_(False).eval()  # of such weights packs are kept
    inputs = batch()["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=inputs).logits
        other = copy.deepcopy(model)
        torch.testing.assert_close(other(input_ids=inputs).logits, expected)
        for module in other.modules():
            if isinstance(module, MolaLinear):
                module.mola_B["default"].zero_()
        assert not torch.equal(other(input_ids=inputs).logits, expected)
        torch.testing.assert_close(model(input_ids=inputs).logits, expected)
