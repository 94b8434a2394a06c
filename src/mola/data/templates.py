"""Prompt templates: how an instruction and an optional input become the text before the answer."""

from dataclasses import dataclass

from mola.errors import MolaError


@dataclass(frozen=True)
class Template:
    """One prompt layout.

    Attributes:
        name: the name a user chooses it by.
        prompt_input: layout with the fields ``{instruction}`` and ``{input}``.
        prompt_no_input: layout with the field ``{instruction}``.
        has_headings: whether headings set the parts apart.
    """

    name: str
    prompt_input: str
    prompt_no_input: str
    has_headings: bool = True

    def prompt(self, instruction: str | None, input: str | None = None) -> str:
        """Text that stands before the answer.

        Args:
            instruction: what is asked; braces in it are plain text. None (text without a prompt, such
                as the prepared OpenOrca rows) is possible only without headings and gives the empty prompt.
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
