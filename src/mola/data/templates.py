"""Prompt templates: how an instruction and an optional input become the text before the answer."""

from __future__ import annotations

from dataclasses import dataclass

from mola.errors import MolaError


@dataclass(frozen=True)
class Template:
    """One prompt layout.

    Attributes:
        name: the name a user chooses it by.
        description: one line for help texts.
        prompt_input: layout with the fields ``{instruction}`` and ``{input}``.
        prompt_no_input: layout with the field ``{instruction}``.
        response_split: the text that stands right before the answer; empty if there is none.
    """

    name: str
    description: str
    prompt_input: str
    prompt_no_input: str
    response_split: str

    def prompt(self, instruction: str | None, input: str | None = None) -> str:
        """Text that stands before the answer.

        Args:
            instruction: what is asked; braces in it are plain text. None (text without a prompt, such
                as the prepared OpenOrca rows) is possible only where `response_split` is empty and
                gives the empty prompt.
            input: further context; None and ``""`` choose the layout without input.

        Returns:
            The prompt, ready to have the answer appended.

        Raises:
            MolaError: a field is not text, or `instruction` is None in a template that needs it.
        """
        if instruction is None and not self.response_split and not input:
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

    def response(self, text: str) -> str:
        """Answer part of a whole text: what stands between the first and the second `response_split`.

        Args:
            text: prompt and answer in one piece.

        Returns:
            The answer without the blanks around it; the whole text if `response_split` is empty.

        Raises:
            MolaError: `response_split` does not occur in `text`.
        """
        if not self.response_split:
            return text.strip()
        parts = text.split(self.response_split, 2)
        if len(parts) == 1:
            raise MolaError(
                f"`text` must hold {self.response_split!r} of the template `{self.name}`: got {text[:80]!r}. "
                "Pass the prompt together with the answer, or choose the template the prompt was made with."
            )
        return parts[1].strip()


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
        Template(
            name="alpaca",
            description="Alpaca prompt, a line break after the response heading",
            prompt_input=f"{_ASK_INPUT}. {_DO}\n\n{_FIELDS_INPUT}\n",
            prompt_no_input=f"{_ASK}. {_DO}\n\n{_FIELDS}\n",
            response_split="### Response:",
        ),
        Template(
            name="alpaca_legacy",
            description="Alpaca prompt without the last line break",
            prompt_input=f"{_ASK_INPUT}. {_DO}\n\n{_FIELDS_INPUT}",
            prompt_no_input=f"{_ASK}. {_DO}\n\n{_FIELDS}",
            response_split="### Response:",
        ),
        Template(
            name="alpaca_short",
            description="Alpaca prompt without its first sentence",
            prompt_input=f"{_FIELDS_INPUT}\n",
            prompt_no_input=f"{_FIELDS}\n",
            response_split="### Response:",
        ),
        Template(
            name="vigogne",
            description="Alpaca prompt in French",
            prompt_input=(
                f"{_ASK_FR}, associée à une entrée qui fournit un contexte supplémentaire. {_DO_FR}\n\n"
                "### Instruction:\n{instruction}\n\n### Entrée:\n{input}\n\n### Réponse:\n"
            ),
            prompt_no_input=f"{_ASK_FR}. {_DO_FR}\n\n### Instruction:\n{{instruction}}\n\n### Réponse:\n",
            response_split="### Réponse:",
        ),
        Template(
            name="meta",
            description="No headings: instruction, input and answer set apart by empty lines",
            prompt_input="{instruction}\n\n{input}\n\n",
            prompt_no_input="{instruction}\n\n",
            response_split="",
        ),
    )
}


def template_names() -> list[str]:
    """Names that `get_template` knows."""
    return list(_TEMPLATES)


def get_template(name: str) -> Template:
    """Template of that name; ``""`` means `alpaca`.

    Raises:
        MolaError: no template has this name.
    """
    template = _TEMPLATES.get(name or "alpaca") if isinstance(name, str) else None
    if template is None:
        raise MolaError(f"`template` must be one of {', '.join(_TEMPLATES)}: got {name!r}. Choose one of these names.")
    return template
