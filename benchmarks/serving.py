"""What benchmarks of servers share: random adapters, and a server in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_STD = 0.3  # of the experts' B and of the routers


def save_adapter(base_model: str, folder: Path, seed: int) -> None:
    """A random mixture far enough from zero that its answers differ from the base's."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from mola import MolaConfig

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(base_model)
    layers = base.config.num_hidden_layers
    # The paper's 2-4-6-8, as far as the depth allows.
    config = MolaConfig(
        num_experts="2468" if layers >= 4 else 2, r=8, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "mola_B" in name or "mola_router" in name:
            torch.nn.init.normal_(parameter, std=_STD)
    model.save_pretrained(str(folder))


@contextmanager
def server(words: Sequence[str], environment: Mapping[str, str]) -> Iterator[tuple[str, int]]:
    """`mola serve` on a free port, its base model called "base".

    Args:
        words: further ones of the command.
        environment: what its environment has besides this one's; a token of this one is left out.

    Yields:
        Its address, and the number of its process.
    """
    command = [sys.executable, "-m", "mola.cli", "serve", "--base_name", "base", "--port", "0", *words]
    inherited = {name: value for name, value in os.environ.items() if name != "MOLA_API_KEY"}
    inherited.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, env=inherited | environment, stderr=log) as process,
    ):
        try:
            yield _address(process, log), process.pid
        finally:
            process.terminate()


def _address(process: subprocess.Popen[bytes], log: Any) -> str:
    while True:
        is_running = process.poll() is None
        log.seek(0)
        text = log.read()
        if found := re.search(r"Serving .* on (http://\S+)\n", text):
            return found[1]
        if not is_running:
            raise RuntimeError(f"the server did not start:\n{text}")
        time.sleep(0.1)
