"""Prompt templates: how an instruction and an optional input become the text before the answer."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, ClassVar

from mola.data.chat_turns import Segment, alpaca_chat_template, trained_segments
from mola.errors import MolaError

logger = logging.getLogger(__name__)

CHAT = "chat"  # the name that stands for the tokenizer's own template
PLAIN = "plain"  # the answer continues the prompt as written


@dataclass(frozen=True)
class Template:
    """One prompt layout.

    Attributes:
        name: the name by which a user chooses it.
        prompt_input: layout with the fields ``{instruction}`` and ``{input}``.
        prompt_no_input: layout with the field ``{instruction}``.
        has_headings: whether headings separate the parts.
    """

    adds_special_tokens: ClassVar[bool] = True  # whether the tokenizer adds its special tokens to the text
    name: str
    prompt_input: str
    prompt_no_input: str
    has_headings: bool = True

    def prompt(self, instruction: str | None, input: str | None = None) -> str:
        """The text before the answer.

        Args:
            instruction: the question or request; braces in it are plain text. None (text without a prompt, such
                as the prepared OpenOrca rows) gives the empty prompt, and is allowed only without headings.
            input: further context; None and ``""`` choose the layout without input.

        Returns:
            The prompt, ready to have the answer appended.

        Raises:
            MolaError: a field is not text, or `instruction` is None in a template that needs it.
        """
        if instruction is None and not self.has_headings and not input:
            return ""
        if not isinstance(instruction, str):
            raise MolaError(
                f"`instruction` must be text for the template `{self.name}`: got {instruction!r}. "
                "Fill it in, or use the template `meta` for text without a prompt."
            )
        if input is not None and not isinstance(input, str):
            raise MolaError(f"`input` must be text or None: got {input!r}.")
        if input:
            return self.prompt_input.format(instruction=instruction, input=input)
        return self.prompt_no_input.format(instruction=instruction)

    def segments(self, example: Mapping[str, Any]) -> list[list[Segment]]:
        """The text of an example in segments, each with whether its tokens contribute to the loss.

        Returns:
            One list of segments for each sample. The last segment is trained, and lacks the ids of `ending`.

        Raises:
            MolaError: a part of the example is not text, or the template cannot write it.
        """
        instruction, input = example["instruction"], example.get("input")
        if messages := example.get("messages"):
            if [message["role"] for message in messages] != ["user", "assistant"]:
                raise MolaError(
                    f"the template `{self.name}` writes one question with its answer, not a conversation of "
                    f"{len(messages)} messages with the roles {', '.join(each['role'] for each in messages)}. Pass the "
                    f"template {CHAT}."
                )
            instruction, input = messages[0]["content"], None
        if not isinstance(example["output"], str):
            raise MolaError(f"`output` must be text: got {example['output']!r}. Correct it.")
        return [[(self.prompt(instruction, input), False), (self.answer(example["output"]), True)]]

    @property
    def description(self) -> str:
        """The name, for the log."""
        return self.name

    @property
    def is_encoded_apart(self) -> bool:
        """Whether prompt and answer are tokenised separately."""
        return False

    def answer(self, output: str) -> str:
        """The text after a prompt that contributes to the loss."""
        return output

    def ending(self, tokenizer: Any) -> list[int]:
        """Ids that stand after a complete answer; none if the tokenizer has no end token."""
        return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


@dataclass(frozen=True)
class ChatTemplate(Template):
    """The chat template of a tokenizer.

    Instruction and input, with an empty line between them, are the user's message. The template writes the special
    tokens itself, in training as in a server.

    Attributes:
        tokenizer: the tokenizer that has the template.
        jinja: a template to use instead of the tokenizer's own; None for the tokenizer's own.
        end_token: text of the end token in the template; None for the tokenizer's own.
    """

    adds_special_tokens: ClassVar[bool] = False
    tokenizer: Any = None
    jinja: str | None = None
    end_token: str | None = None

    @property
    def description(self) -> str:
        """Where the chat template is from, for the log."""
        jinja = self.jinja or str(self.tokenizer.chat_template)
        if jinja in (alpaca_chat_template(True), alpaca_chat_template(False)):
            return "alpaca for conversations (the tokenizer has no chat template)"
        return f"{self.name} ({'of the adapter' if self.jinja else 'of the tokenizer'})"

    @cached_property
    def is_encoded_apart(self) -> bool:
        """Whether a token would contain the border between prompt and answer.

        A model that generates an answer reads the tokens of the prompt alone, so training must use the same tokens.
        """
        answered = self._conversation().removesuffix(self._after_answer)
        prompt_ids, all_ids = (
            self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (self.prompt(_QUESTION), answered)
        )
        return all_ids[: len(prompt_ids)] != prompt_ids

    def segments(self, example: Mapping[str, Any]) -> list[list[Segment]]:
        """As in `Template`; in a chat all answers are trained, see `mola.data.chat_turns`."""
        if "messages" not in example:
            return super().segments(example)
        tools = {"tools": example["tools"]} if example.get("tools") else {}

        def write(messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
            return self._write(messages, **tools, **options)

        samples = trained_segments(example["messages"], write)
        for segments in samples:
            segments[-1] = (segments[-1][0].removesuffix(self._after_answer.rstrip()), True)
        return samples

    def answer(self, output: str) -> str:
        """`lead` + output; only the output if it already begins with the lead, for example with a thought."""
        first = self.lead.split()[:1]
        return output if first and output.lstrip().startswith(first[0]) else self.lead + output

    @cached_property
    def lead(self) -> str:
        """The text that the template writes between its generation prompt and the answer.

        Some templates write a blank, others an empty thought or the name of a channel.

        Raises:
            MolaError: a conversation with an answer does not begin with the generation prompt.
        """
        prompt, conversation = self.prompt(_QUESTION), self._conversation()
        if not conversation.startswith(prompt) or _ANSWER not in conversation[len(prompt) :]:
            raise MolaError(
                f"`template` {CHAT} needs a chat template whose generation prompt is the beginning of an answer: this "
                f"template ends the prompt with {prompt[-40:]!r}, and begins answers differently. Train with TRL, see "
                "docs/guides/trl.md."
            )
        return conversation[len(prompt) :].partition(_ANSWER)[0]

    def prompt(self, instruction: str | None, input: str | None = None) -> str:
        """The conversation up to the start of the assistant's message; arguments are those of `Template.prompt`."""
        parts = [part for part in (instruction, input) if part]
        if not parts or not all(isinstance(part, str) for part in parts):
            raise MolaError(f"`instruction` must be text for the template `{CHAT}`: got {instruction!r}. Fill it in.")
        return self._write([{"role": "user", "content": "\n\n".join(parts)}], add_generation_prompt=True)

    def ending(self, tokenizer: Any) -> list[int]:
        """The token that ends a turn, if it is an added token; then the end token, if that is a different token.

        Generation always stops at the end token, and at the end of a turn only if configured to.
        """
        after = self._after_answer.lstrip()
        first = tokenizer(after, add_special_tokens=False)["input_ids"][:1] if after else []
        end_of_turn = [token for token in first if token in tokenizer.added_tokens_decoder]
        return list(dict.fromkeys([*end_of_turn, *super().ending(tokenizer)]))

    @cached_property
    def _after_answer(self) -> str:
        """What the template writes after the last answer of a conversation, such as the end of the turn."""
        return self._conversation().rpartition(_ANSWER)[2]

    def _conversation(self) -> str:
        """A question with its answer, written by the template."""
        return self._write([{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}])

    def _write(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        if self.end_token is not None:
            options["eos_token"] = self.end_token
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.jinja, tokenize=False, **options
            )
        except Exception as error:  # whatever the template raises
            raise MolaError(
                f"the chat template of the tokenizer cannot write a conversation: {error}. Pass another `template`."
            ) from error


_QUESTION, _ANSWER = "A question.", "An answer."  # the conversation that shows how a template writes
_ASK = "Below is an instruction that describes a task"
_ASK_INPUT = f"{_ASK}, paired with an input that provides further context"
_DO = "Write a response that appropriately completes the request."
_ASK_FR = "Ci-dessous se trouve une instruction qui décrit une tâche"
_DO_FR = "Écrivez une réponse qui complète correctement la demande."
_FIELDS = "### Instruction:\n{instruction}\n\n### Response:"
_FIELDS_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"

_TEMPLATES = {
    template.name: template
    for template in (
        Template("alpaca", f"{_ASK_INPUT}. {_DO}\n\n{_FIELDS_INPUT}\n", f"{_ASK}. {_DO}\n\n{_FIELDS}\n"),
        # Without the last line break.
        Template("alpaca_legacy", f"{_ASK_INPUT}. {_DO}\n\n{_FIELDS_INPUT}", f"{_ASK}. {_DO}\n\n{_FIELDS}"),
        Template("alpaca_short", f"{_FIELDS_INPUT}\n", f"{_FIELDS}\n"),
        Template(
            "vigogne",
            f"{_ASK_FR}, associée à une entrée qui fournit un contexte supplémentaire. {_DO_FR}\n\n"
            "### Instruction:\n{instruction}\n\n### Entrée:\n{input}\n\n### Réponse:\n",
            f"{_ASK_FR}. {_DO_FR}\n\n### Instruction:\n{{instruction}}\n\n### Réponse:\n",
        ),
        Template("meta", "{instruction}\n\n{input}\n\n", "{instruction}\n\n", has_headings=False),
        Template(PLAIN, "{instruction}\n\n{input}", "{instruction}", has_headings=False),
    )
}


def template_names() -> list[str]:
    """Names of all templates."""
    return [*_TEMPLATES, CHAT]


def check_template(name: str) -> None:
    """Raise if no template has this name."""
    if name not in ("", *template_names()):
        raise MolaError(
            f"`template` must be one of {', '.join(template_names())}: got {name!r}. Choose one of these names."
        )


def get_template(
    name: str, tokenizer: Any = None, chat_template: str | None = None, end_token: str | None = None
) -> Template:
    """The template of that name; ``""`` means `alpaca`.

    Args:
        name: one of `template_names`.
        tokenizer: needed for `chat`, which uses the tokenizer's own template.
        chat_template: a Jinja template for `chat` in place of the tokenizer's, such as one saved with an adapter.
        end_token: text of the end token in the chat template; by default the tokenizer's.

    Raises:
        MolaError: no template has this name, or the tokenizer has no chat template.
    """
    if name == CHAT:
        if chat_template is None and not getattr(tokenizer, "chat_template", None):
            raise MolaError(
                f"`template` {CHAT} needs a tokenizer with a chat template, and the base model's has none. Choose one "
                f"of {', '.join(_TEMPLATES)}."
            )
        if "strftime_now" in str(chat_template or tokenizer.chat_template):
            _warn_of_dates()
        return ChatTemplate(CHAT, "", "", tokenizer=tokenizer, jinja=chat_template, end_token=end_token)
    check_template(name)
    return _TEMPLATES[name or "alpaca"]


@cache
def _warn_of_dates() -> None:
    logger.warning("The chat template writes today's date: prompts on other days differ from those of the training.")
