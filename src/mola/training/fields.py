"""The options that `mola train` adds to Transformers' `TrainingArguments`, or gives another default.

This module imports neither torch nor Transformers, so that `--help` is quick. `mola.training.options` adds the rest.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from mola.checkpoints.recorded_base import base_model_of
from mola.models.options import Quantization
from mola.options.fields import START, Group, convert_paths, option, parse_mapping
from mola.training.option_checks import (
    check_combinations,
    check_given,
    check_skill_is_new,
    check_values,
    settle_skill,
)
from mola.training.run_folder import find_output_dir

# Defaults of the adapter. The options themselves default to None, which shows that they were not given.
ADAPTER_DEFAULTS: dict[str, Any] = {
    "num_experts": "2468",
    "r": "8",
    "top_k": "2",
    "lora_alpha": 16.0,
    "lora_dropout": 0.05,
    "target_modules": None,
    "target_parameters": None,
    "modules_to_save": None,
    "router_aux_loss_coef": 0.0,
    "router_aux_loss_reduction": "module",
    "router_z_loss_coef": 0.0,
    "router_jitter_noise": 0.0,
    "use_rslora": None,
    "init_lora_weights": None,
    "num_experts_pattern": None,
    "rank_pattern": None,
    "alpha_pattern": None,
}

# Options that change how experts are trained, but not what they compute. With `adapter` they may be changed.
TRAINING_ONLY = (
    "lora_dropout",
    "router_aux_loss_coef",
    "router_aux_loss_reduction",
    "router_z_loss_coef",
    "router_jitter_noise",
)

# Settings of a plain LoRA, besides its start.
LORA_SETTINGS = ("r", "lora_alpha", "lora_dropout", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora")
_NOT_FOR_SKILLS = ("adapter", *(name for name in ADAPTER_DEFAULTS if name not in (*LORA_SETTINGS, "init_lora_weights")))
LOGGING_STEPS = 10  # a default
SAVE_TOTAL_LIMIT = 3  # a default, until the run ends


@dataclass
class TrainFields(Quantization):
    """mola's own options of `mola train`."""

    _start: ClassVar = START
    base_model: str | None = option(None, "Folder or hub id of the base. Default: that of `adapter`.")
    data: str | None = option(None, "Data: file, folder or Hub id; see docs/guides/data.md.")
    task: str | None = option(None, "Task: its name or a YAML file. Default: by the columns.")
    output_dir: str | None = option(None, "Folder for the adapter and the run's files.", "output")
    num_experts: str | None = option(
        None,
        "Experts per module: one per group of layers (2468 or 2-4), a shape, a list, a file; 1: a LoRA. Default 2468.",
    )
    r: str | None = option(None, "Rank of each expert, one or a list. Default 8.")
    top_k: str | None = option(None, "Experts used per token, one or a list. Default 2.")
    cutoff_len: int = option(512, "Maximum length of a sample in tokens.")
    num_train_epochs: float = option(3.0, "Passes over the training data.")
    learning_rate: float = option(3e-4, "Learning rate after warm-up.")
    per_device_train_batch_size: int = option(8, "Batch size per device.", "batch_size")
    gradient_accumulation_steps: int = option(1, "Batches per optimiser step.")

    _adapter: ClassVar = Group("adapter")
    adapter: str | None = option(None, "Adapter to train further; dropout, router losses may change.")
    target_modules: str | None = option(None, "Linears, or all-linear. Default: LLaMA's seven, else PEFT's.")
    target_parameters: str | None = option(None, "The base's stacked experts, between commas: one LoRA each.")
    modules_to_save: str | None = option(None, "Modules to train in full, names between commas.")
    lora_alpha: float | None = option(None, "The update is scaled by lora_alpha / r. Default 16.")
    lora_dropout: float | None = option(None, "Dropout on the experts' input. Default 0.05.")
    router_aux_loss_coef: float | None = option(None, "Weight of the balance loss; default 0 = off.")
    router_aux_loss_reduction: str | None = option(None, "Balance loss per 'module' (default) or per 'layer'.")
    router_z_loss_coef: float | None = option(None, "Weight of the router z-loss; default 0 = off.")
    router_jitter_noise: float | None = option(None, "Relative noise on the routers' input; default 0 = off.")
    num_experts_pattern: dict[str, Any] | str | None = option(None, 'Experts by name of module: {"mlp.*": 8}.')
    rank_pattern: dict[str, Any] | str | None = option(None, "Rank by name of module.")
    alpha_pattern: dict[str, Any] | str | None = option(None, "`lora_alpha` by name of module.")
    use_rslora: bool | None = option(None, "Scale by lora_alpha / sqrt(r).", nargs="?", const=True)
    init_lora_weights: str | None = option(None, "Start: true (default), gaussian, orthogonal or principal.")
    skill: str | None = option(None, "Train a plain LoRA and add it to `into` under this name.")
    into: str | None = option(None, "Skills folder, created if missing; see docs/guides/skills.md.")
    layer: int | None = option(None, "Lowest layer of a skill. Default: that of `into`, else n / 3.")

    _data: ClassVar = Group("data")
    train_split: str = option("train", "Split to train on where the data has several.")
    eval_data: str | None = option(None, "Data to evaluate the loss on; default: the same as `data`.")
    eval_split: str = option("validation", "Split to evaluate on, if there is one.")
    validation_size: float = option(0.0, "Number or share of training samples to hold out.")
    filters: dict[str, Any] | str | None = option(None, "Keep rows with these values: {column: value, or a list}.")
    limit: int | None = option(None, "Train on this many samples only, the first ones.")
    eval_limit: int | None = option(None, "Evaluate on this many samples only, the first ones.")
    template: str | None = option(None, "Prompt template. Default: the task's, else chat, else alpaca.")
    truncation: str = option("error", "Longer samples: error, drop, left or right.")
    packing: bool = option(False, "Several samples in a row of `cutoff_len` tokens, kept apart.")
    train_on_inputs: bool = option(False, "Train on the tokens of the prompt as well.")
    add_eos_token: bool = option(True, "End every sample with the end-of-sequence token.")

    _base: ClassVar = Group("base model")
    dtype: str = option("auto", "Dtype: auto, float32, bfloat16 or float16.")
    attn_implementation: str | None = option(None, "Attention, such as sdpa, eager or flash_attention_2.")
    trust_remote_code: bool = option(False, "Run code shipped with the model.")

    _run: ClassVar = Group("run")
    max_steps: int = option(-1, "Total steps; -1: given by `num_train_epochs`.")
    warmup_steps: float = option(0.1, "Steps of warm-up, or below 1 a share of all.")
    lr_scheduler_type: str = option("linear", "Linear, cosine, ...; constant has no warm-up.")
    weight_decay: float = option(0.0, "Weight decay of the optimiser.")
    loraplus_lr_ratio: float | None = option(None, "LoRA+: learning rate of B / that of the other weights.")
    bf16: bool = option(False, "Mixed precision in bfloat16; on if the base is in it.")
    fp16: bool = option(False, "Mixed precision in float16; on if the base is in it.")
    activation_checkpointing: bool | None = option(
        None, "Less memory, more time; formerly gradient_checkpointing.", nargs="?", const=True
    )
    torch_compile: bool = option(False, "Compile (takes minutes); see docs/research/performance.md.")
    train_device: str | None = option(None, "Device: cpu, cuda or mps. Default: the best one here.", "device")
    nproc: int = option(1, "Processes on this machine, one per device.")
    seed: int = option(42, "Seed of all random numbers.")
    overwrite_output_dir: bool = option(False, "Replace an earlier run in the output folder.", "overwrite")
    resume_from_checkpoint: str | None = option(None, "Continue a stopped run: last, or a folder checkpoint-N.")
    logging_strategy: str = option("steps", "When to log: no, steps or epoch.")
    logging_steps: float = option(None, "Steps between logs; below 1: a share. Default: up to 10.")
    logging_nan_inf_filter: bool = option(False, "Hide NaN and infinite losses; if false they stop the run.")
    expert_telemetry: bool = option(True, "Record experts' use in routing.jsonl and log.")
    verbose: bool = option(False, "Also say which kernel computes each linear, and why.")
    report_to: None | str | list[str] = option("none", "Trackers between commas, such as tensorboard.")  # noqa: RUF036
    eval_strategy: str = option("epoch", "When to evaluate the loss: no, steps or epoch.")
    eval_steps: float | None = option(None, "Steps between evaluations. Default: `logging_steps`.")
    per_device_eval_batch_size: int = option(8, "Batch size per device in evaluations.")
    save_strategy: str = option("epoch", "When to save: no, steps, epoch or best.")
    save_steps: float = option(500, "Steps per checkpoint (docs/guides/training.md).")
    save_total_limit: int | None = option(None, "Checkpoints to keep; 0: all. Default: 3, after the run 1.")
    load_best_model_at_end: bool = option(True, "Keep the weights of lowest evaluation loss.")
    push_to_hub: bool = option(False, "Upload the finished run to the Hub.")
    hub_strategy: str = option("end", "Only end: the finished run is uploaded once.")

    def settle(self) -> None:
        """Set base model and run folder where other options imply them, parse mappings, and check mola's own options.

        Raises:
            MolaError: a value is out of its range, or options contradict each other.
        """
        convert_paths(self)
        settle_skill(self, _NOT_FOR_SKILLS)
        if self.adapter is not None and self.resume_from_checkpoint is None:
            self.base_model = base_model_of(self.base_model, [self.adapter])
        for name in ("filters", "num_experts_pattern", "rank_pattern", "alpha_pattern"):
            setattr(self, name, parse_mapping(name, getattr(self, name)) or None)
        check_values(self)
        check_combinations(self, [name for name in ADAPTER_DEFAULTS if name not in TRAINING_ONLY])

    def check(self) -> None:
        """`settle`, and check that the run has a base model, data and a folder of its own."""
        self.settle()
        if self.resume_from_checkpoint is None:
            check_given(self, "base_model")
        check_given(self, "data")
        if self.skill is not None:
            check_skill_is_new(self)
        find_output_dir(self)
