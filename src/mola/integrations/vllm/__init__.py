"""vLLM's server with a mixture: the load format `mola`, see docs/vllm.md.

- `mixture`: what is added to a linear; `sharding`: which part of it a rank holds. Both need torch alone.
- `adapter`: an adapter folder, read and checked as `load_model` does.
- `places`: where a model of vLLM has the linears of a checkpoint; `loader`: the load format. These import vLLM.

vLLM finds it by the module `mola_vllm`, in every process and without importing mola.
"""

TRIED = "0.32"
"""How versions of vLLM begin with which this was tried."""
