"""Options of `mola generate`."""

from dataclasses import dataclass
from typing import ClassVar

from mola.data.templates import check_template
from mola.errors import MolaError
from mola.models.options import SKILL_HELP, ModelOptions
from mola.options.fields import START, Group, check_seed, option


@dataclass
class GenerateOptions(ModelOptions):
    """Options of `mola generate`."""

    _start: ClassVar = START
    adapter: str | None = option(None, "Folder of an adapter, or a skills folder.")
    skill: str | None = option(None, SKILL_HELP)
    prompt: str | None = option(None, "Text to continue, used without a template.")
    instruction: str | None = option(None, "Instruction, put through the template.")
    input: str | None = option(None, "Context of the instruction.")

    _answer: ClassVar = Group("answer")
    template: str | None = option(
        None,
        "Prompt template for instructions. Default: the template of the training, if the folder of the adapter or "
        "of the merged model records it, else the chat template of the adapter or the base model, else alpaca.",
    )
    max_new_tokens: int = option(128, "Maximum length of the answer in tokens.")
    temperature: float | None = option(
        None, "Sampling temperature; 0 is greedy. A temperature, top_p or top_k turns sampling on."
    )
    top_p: float | None = option(None, "Sample from the most probable tokens that hold this probability.")
    top_k: int | None = option(None, "Sample from this many most probable tokens.")
    do_sample: bool | None = option(None, "Whether to sample; by default only if a sampling value is given.")
    seed: int | None = option(None, "Random seed; by default a new one each time.")
    stream: bool = option(True, "Print the text while it is generated.")

    def check(self) -> None:
        """Check what needs no model.

        Raises:
            MolaError: options contradict each other, or there is no such template.
        """
        if self.seed is not None:
            check_seed(self.seed)
        if self.prompt is not None:
            others = [name for name in ("instruction", "input", "template") if getattr(self, name) is not None]
            if others:
                raise MolaError(
                    f"`prompt` is used as it is, without `{others[0]}`: got both. Leave out one of them, or pass "
                    "the text as `instruction`."
                )
        if self.input is not None and self.instruction is None:
            raise MolaError(f"`input` needs an `instruction`: got only the input {self.input[:80]!r}.")
        if self.template is not None:
            check_template(self.template)
