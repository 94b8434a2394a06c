"""`python -m benchmarks.gpu_step`: one training step of a small mixture, in which nothing may wait for the GPU.

PyTorch raises if an operator waits, and the profiler counts the kernels.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from peft import get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from mola import MolaConfig, kernels_report


def build(device: str) -> Any:
    """A model of four layers with 8 experts in each linear and a bfloat16 base, on a device."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 4}
    # With `sdpa` Transformers checks whether the mask is needed, which waits for the GPU.
    config = LlamaConfig(**shape, vocab_size=256, pad_token_id=0, attn_implementation="eager")
    base = LlamaForCausalLM(config).bfloat16()
    config = MolaConfig(num_experts=8, r=8, lora_dropout=0.05, router_aux_loss_coef=1e-3, task_type="CAUSAL_LM")
    return get_peft_model(base, config).to(device).train()


def main(arguments: list[str] | None = None) -> int:
    """Print what ran as JSON; the exit code is 1 if a GPU that can run the kernel `triton` did not run it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_step", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the command")
    options = parser.parse_args(arguments)
    is_gpu = options.device.startswith("cuda")
    model = build(options.device)
    ids = torch.randint(3, 256, (2, 32), device=options.device)

    def step() -> None:
        with torch.autocast(options.device, torch.bfloat16):
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        loss.backward()

    step()  # the first step compiles the kernels and compares them with the reference
    if is_gpu:
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        if is_gpu:
            torch.cuda.set_sync_debug_mode("default")
    with profile(activities=[ProfilerActivity.CUDA if is_gpu else ProfilerActivity.CPU]) as profiled:
        step()
    events = [event for event in profiled.events() if not is_gpu or event.device_type.name == "CUDA"]
    with torch.autocast(options.device, torch.bfloat16):
        choices = kernels_report(model)
    print(json.dumps({"kernels": [str(each) for each in choices], "events": len(events), "linears": 28}, indent=2))
    is_new = is_gpu and torch.cuda.get_device_capability() >= (8, 0)
    return 1 if is_new and any(each.backend != "triton" for each in choices) else 0


if __name__ == "__main__":
    sys.exit(main())
