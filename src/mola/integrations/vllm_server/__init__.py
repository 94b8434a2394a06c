"""vLLM's server with a mixture: the load format `mola`, see docs/guides/vllm.md.

- `parts` reads an adapter folder as parts of linears and slices them; `mixture` computes what is added to a linear.
  These two do not import vLLM.
- `linears` finds the linears of a checkpoint in vLLM's model; `loader` is the load format. These two import vLLM.

vLLM finds the load format through the module `mola_vllm`, which imports mola only when a model is loaded in this
format.
"""

from mola.errors import MolaError

TRIED = "0.32"
"""Version of vLLM, without its last part, with which the load format was tried."""


def check_version(found: str) -> None:
    """Raise for a different version of vLLM: its internals may differ, and wrong columns give wrong answers.

    Raises:
        MolaError: the version was not tried.
    """
    if not f"{found}.".startswith(f"{TRIED}."):
        raise MolaError(
            f"`vllm` must be {TRIED}.*, with which the load format `mola` was tried: this is {found}. Install such a "
            "version, or serve the adapter with `mola serve`, without --engine vllm."
        )
