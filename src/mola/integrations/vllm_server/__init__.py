"""vLLM's server with a mixture: the load format `mola`, see docs/vllm.md.

- `mixture`: what is added to a linear; `sharding`: which part of it a rank holds. Both need torch alone.
- `adapter`: an adapter folder, read and checked as `load_model` does.
- `places`: where a model of vLLM has the linears of a checkpoint; `loader`: the load format. These import vLLM.

vLLM finds it by the module `mola_vllm`, in every process and without importing mola.
"""

from mola.errors import MolaError

TRIED = "0.32"
"""How versions of vLLM begin with which this was tried."""


def check_version(found: str) -> None:
    """Refuse a version of vLLM whose parts may be others: before any of them is imported.

    Raises:
        MolaError: it was not tried.
    """
    if not f"{found}.".startswith(f"{TRIED}."):
        raise MolaError(
            f"`vllm` must be {TRIED}.*, with which the load format `mola` was tried: this is {found}. Install such a "
            "version, or serve the adapter with `mola serve`, without --engine vllm."
        )
