"""What PEFT's `LoraConfig` has and `MolaConfig` does not, and why. docs/lora-fields.md is the table of all of them."""

from __future__ import annotations

_LEARNED_START = (
    "it moves a part of the base weight into the adapter, or chooses ranks, for one update that is always there; "
    "with routed experts no part is. `init_lora_weights` 'principal' or 'orthogonal' starts experts apart."
)
LORA_ONLY = {
    "use_dora": (
        "DoRA divides by the norm of the adapted weight, and a mixture has another weight for every token: the norms "
        "would cost more than the layer. Use LoRA for DoRA."
    ),
    "lora_bias": (
        "it is for LoRAs extracted from other models, whose update has a bias. `bias` 'mola_only' trains those of the "
        "adapted linears."
    ),
    "fan_in_fan_out": "the layout of a weight is read off its class. Leave it out.",
    "loftq_config": _LEARNED_START,
    "eva_config": _LEARNED_START,
    "corda_config": _LEARNED_START,
    "lora_ga_config": _LEARNED_START,
    "kasa_config": _LEARNED_START,
    "megatron_config": "the parallel linears of Megatron are not adapted.",
    "megatron_core": "the parallel linears of Megatron are not adapted.",
    "use_qalora": "it pools the input of a LoRA over groups of a quantised weight. Leave it out.",
    "qalora_group_size": "it belongs to `use_qalora`. Leave it out.",
    "velora_config": "it compresses what LoRA's own backward pass stores; that of mola stores other tensors.",
    "alora_invocation_tokens": "it switches one LoRA on from a token on; here a router chooses for every token.",
    "arrow_config": "it routes between trained LoRAs without training; mola's routers are trained.",
    "use_bdlora": "it splits LoRA's matrices into blocks for tensor parallelism. Leave it out.",
    "monteclora_config": "it samples LoRA's weights in training. Leave it out.",
    "runtime_config": "it moves the matrices of DoRA between devices. Leave it out.",
}
