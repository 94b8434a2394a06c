"""The messages when a package is missing."""

import subprocess
import sys

import pytest

# Makes an interpreter in which these packages seem not to be installed.
WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, *args):
        return None if name.partition(".")[0] in ("bitsandbytes", "gguf") else super().find_spec(name, *args)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
from mola.cli import main

base, stored = sys.argv[1:]
for flags in (["--load_in_8bit"], ["--load_in_4bit"], ["--gguf_file=a.gguf"]):
    assert main(["generate", f"--base_model={base}", "--prompt=a", *flags]) == 2
assert main(["generate", f"--base_model={stored}", "--prompt=a"]) == 2
assert main(["generate", f"--base_model={base}", "--prompt=a", "--max_new_tokens=1"]) == 0
"""


@pytest.mark.slow
def test_missing_packages_name_the_extra(blocks_dir, no_weights, tmp_path):
    stored = tmp_path / "stored"
    stored.mkdir()
    text = (no_weights / "config.json").read_text(encoding="utf-8").strip()
    settings = ', "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": true}}'
    (stored / "config.json").write_text(text.removesuffix("}") + settings, encoding="utf-8")
    arguments = [sys.executable, "-c", WITHOUT, str(blocks_dir), str(stored)]
    process = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    lines = [line for line in process.stderr.splitlines() if "error:" in line]
    options = ("load_in_8bit", "load_in_4bit", "gguf_file", "base_model")
    cures = *["pip install 'mola-peft[quant]'"] * 2, "GGUF", "pip install 'mola-peft[quant]'"
    for line, option, cure in zip(lines, options, cures, strict=True):
        assert f"`{option}`" in line
        assert cure in line
