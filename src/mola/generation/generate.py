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

from mola.data.templates import CHAT, Template, check_template
from mola.errors import MolaError
from mola.generation.decoding import decoding_settings, encode_prompt, generate_text
from mola.generation.options import GenerateOptions
from mola.models.adapters import check_adapter
from mola.models.base_model import max_positions
from mola.models.from_options import check_model, model_for, tokenizer_for
from mola.models.prompts import template_for, template_of, trained_template
from mola.options.fields import check_seed

logger = logging.getLogger(__name__)


def main(options: GenerateOptions) -> int:
    """Run the command: one prompt, or lines from standard input until its end or `/exit`.

    Raises:
        MolaError: wrong options, before the model is loaded.
    """
    _check_options(options)
    if options.adapter is not None:
        check_adapter(options.adapter)
    if options.template is not None:
        check_template(options.template)
    config = check_model(options)
    tokenizer = tokenizer_for(options)
    template = template_for(_choose_template(options, tokenizer), tokenizer, options.adapter)
    prompt, prompt_template = options.prompt, None
    if options.instruction is not None:
        prompt, prompt_template = template.prompt(options.instruction, options.input), template
    if prompt is not None:  # check the prompt's length before the weights are read
        limit = max_positions(config)
        encode_prompt(tokenizer, prompt, options.max_new_tokens, limit, prompt_template is not None, prompt_template)
    model = model_for(options, options.adapter)
    # Torch starts every process with the same random state, so a different text each time needs a new seed.
    seed = torch.seed() % 2**63 if options.seed is None else options.seed
    torch.manual_seed(seed)
    if decoding_settings(**_decoding(options))["do_sample"]:
        logger.info("Random seed %d.", seed)
    if prompt is not None:
        _answer(model, tokenizer, prompt, options, prompt_template)
        return 0
    for line in _read_lines():
        try:
            _answer(model, tokenizer, template.prompt(line, ""), options, template)
        except MolaError as error:  # such as a line that is too long
            print(error, file=sys.stderr)
    return 0


def _decoding(options: GenerateOptions) -> dict[str, Any]:
    """The options that are arguments of `decoding_settings` and `generate_text`."""
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "do_sample")
    return {name: getattr(options, name) for name in names}


def _choose_template(options: GenerateOptions, tokenizer: PreTrainedTokenizerBase) -> str:
    """Name of the template: the one that the options name, else the one used in training.

    A base model alone has its chat template, if there is one, else alpaca.
    """
    if options.template is not None:
        return options.template
    if options.prompt is not None:
        return "alpaca"  # a prompt uses no template
    if options.adapter is None:
        # `mola merge` records the template that the adapter was trained with.
        recorded = trained_template(options.base_model) if os.path.isdir(options.base_model) else None
        return recorded or (CHAT if tokenizer.chat_template else "alpaca")
    found = template_of(options.adapter)
    if found is None:
        logger.warning(
            "%s does not record the prompt template of its training, so the template is alpaca. Pass `template`, or "
            "the whole text as `prompt`.",
            options.adapter,
        )
    return found or "alpaca"


def _check_options(options: GenerateOptions) -> None:
    decoding_settings(**_decoding(options))
    if options.seed is not None:
        check_seed(options.seed)
    if options.prompt is not None:
        others = [name for name in ("instruction", "input", "template") if getattr(options, name) is not None]
        if others:
            raise MolaError(
                f"`prompt` is used as it is, without `{others[0]}`: got both. Leave out one of them, or pass "
                "the text as `instruction`."
            )
    if options.input is not None and options.instruction is None:
        raise MolaError(f"`input` needs an `instruction`: got only the input {options.input[:80]!r}.")


def _answer(model: Any, tokenizer: Any, prompt: str, options: GenerateOptions, template: Template | None) -> None:
    """Generate one answer and print it. `template` is the template that wrote the prompt; None if none did."""
    streamer = None
    if options.stream:
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    text = generate_text(
        model,
        tokenizer,
        prompt,
        **_decoding(options),
        streamer=streamer,
        before_answer=template is not None,
        template=template,
    )
    if streamer is None:
        print(text)
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
