"""`mola generate`: one answer, or a loop that reads one instruction per line.

Standard output holds only the generated text.
"""

import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from mola.checkpoints.adapter_settings import is_skills_folder
from mola.data.templates import CHAT, Template
from mola.errors import MolaError
from mola.generation.batching.skills import Skills
from mola.generation.decoding import decoding_settings, encode_prompt, generate_text
from mola.generation.options import GenerateOptions
from mola.models.base_model import max_positions
from mola.models.from_options import adapter_alone, adapter_for, check_model, model_for, tokenizer_for
from mola.models.prompts import template_for, template_of, trained_template

logger = logging.getLogger(__name__)


def main(options: GenerateOptions) -> int:
    """Run the command: one prompt, or lines from standard input until its end or `/exit`.

    Raises:
        MolaError: wrong options, before the model is loaded.
    """
    options.check()
    decoding_settings(**_decoding(options))
    config = check_model(options)
    adapter = adapter_for(options)
    prompts = _Prompts(options, tokenizer_for(options))
    reads_lines = options.prompt is None and options.instruction is None
    template = prompts.template(adapter_alone(adapter))
    if not reads_lines:  # check the prompt's length before the weights are read
        prompts.encode(*prompts.write(template), max_positions(config))
    model = model_for(options, adapter)
    # Torch starts every process with the same random state, so a different text each time needs a new seed.
    seed = torch.seed() % 2**63 if options.seed is None else options.seed
    torch.manual_seed(seed)
    if decoding_settings(**_decoding(options))["do_sample"]:
        logger.info("Random seed %d.", seed)
    for line in _read_lines() if reads_lines else [None]:
        try:
            _answer(model, prompts, adapter, line)
        except MolaError as error:  # such as a line that is too long
            if not reads_lines:
                raise
            print(error, file=sys.stderr)
    return 0


def _decoding(options: GenerateOptions) -> dict[str, Any]:
    """The options that are arguments of `decoding_settings` and `generate_text`."""
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "do_sample")
    return {name: getattr(options, name) for name in names}


class _Prompts:
    """Writes prompts for the adapter that answers."""

    def __init__(self, options: GenerateOptions, tokenizer: PreTrainedTokenizerBase) -> None:
        self.options, self.tokenizer = options, tokenizer
        self._templates: dict[str | None, Template] = {}

    def template(self, adapter: str | None) -> Template:
        """The template that the options name, else the one that the adapter was trained with.

        A base model alone has its chat template, if there is one, else alpaca.
        """
        if adapter not in self._templates:
            self._templates[adapter] = template_for(self._template_name(adapter), self.tokenizer, adapter)
        return self._templates[adapter]

    def _template_name(self, adapter: str | None) -> str:
        if self.options.template is not None:
            return self.options.template
        if self.options.prompt is not None:
            return "alpaca"  # a prompt uses no template
        if adapter is None:
            base = self.options.base_model
            # `mola merge` records the template that the adapter was trained with.
            recorded = trained_template(base) if os.path.isdir(base) else None
            return recorded or (CHAT if self.tokenizer.chat_template else "alpaca")
        found = template_of(adapter)
        if found is None:
            logger.warning(
                "%s does not record the prompt template of its training, so the template is alpaca. Pass `template`, "
                "or the whole text as `prompt`.",
                adapter,
            )
        return found or "alpaca"

    def write(self, template: Template, line: str | None = None) -> tuple[str, Template | None]:
        """The text of a prompt, and the template that wrote it; None if none did."""
        if self.options.prompt is not None:
            return self.options.prompt, None
        return template.prompt(self.options.instruction if line is None else line, self.options.input), template

    def encode(self, text: str, template: Template | None, limit: int | None = None) -> list[int]:
        """The token ids of a prompt, whose answer must fit into `limit` positions."""
        return encode_prompt(self.tokenizer, text, self.options.max_new_tokens, limit, template is not None, template)


def _answer(model: Any, prompts: _Prompts, adapter: str | None, line: str | None) -> None:
    """Generate one answer and print it; of a skills folder, the skill that knows the prompt answers."""
    if adapter is None or not is_skills_folder(adapter):
        _print_answer(model, prompts, *prompts.write(prompts.template(adapter), line))
        return
    skills = Skills(model)
    text, template = prompts.write(prompts.template(None), line)
    (name,) = skills.decide([prompts.encode(text, template)])
    if name is None:
        logger.info("No skill knows this prompt: the base model answers.")
    else:
        logger.info("%s answers.", name)
        text, template = prompts.write(prompts.template(os.path.join(adapter, name)), line)
    with skills.activate([name], True):
        _print_answer(model, prompts, text, template)


def _print_answer(model: Any, prompts: _Prompts, text: str, template: Template | None) -> None:
    streamer = None
    if prompts.options.stream:
        streamer = TextStreamer(prompts.tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = generate_text(
        model,
        prompts.tokenizer,
        text,
        **_decoding(prompts.options),
        streamer=streamer,
        before_answer=template is not None,
        template=template,
    )
    if streamer is None:
        print(answer)
    sys.stdout.flush()


def _read_lines() -> Iterator[str]:
    """Instructions from standard input, without blank lines."""
    is_interactive = sys.stdin.isatty()
    if is_interactive:
        print("One instruction per line; /exit or Ctrl-D ends.", file=sys.stderr)
    while True:
        if is_interactive:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/exit":
            return
        if line.strip():
            yield line.strip()
