"""vLLM's server with a mixture: the load format `mola`, see docs/vllm.md.

- `parts`: an adapter folder as parts of linears, and their slices; `mixture`: what is added to a linear. No vLLM.
- `linears`: finds the linears of a checkpoint in a model of vLLM; `loader`: the load format. These import vLLM.

vLLM finds the load format by the module `mola_vllm`, which imports mola only when a model is loaded in it.
"""

from mola.errors import MolaError

TRIED = "0.32"
"""Version of vLLM, up to its last part, with which this was tried."""


def check_version(found: str) -> None:
    """Raise for another version of vLLM: its internals may differ, and wrong columns give wrong answers.

    Raises:
        MolaError: the version was not tried.
    """
    if not f"{found}.".startswith(f"{TRIED}."):
        raise MolaError(
            f"`vllm` must be {TRIED}.*, with which the load format `mola` was tried: this is {found}. Install such a "
            "version, or serve the adapter with `mola serve`, without --engine vllm."
        )
