"""Flags of the research code's two training scripts, with the same names and the same effective defaults.

None stands for the default in the help text, so that an adapter's own value is used if a flag is not given.
"""

from dataclasses import dataclass
from typing import ClassVar

from mola.options.fields import option

WARMUP_STEPS = 100
WARMUP_SHARE = 0.1
BALANCE_COEF = 1e-3


@dataclass
class SharedOptions:
    """Flags that both training scripts have; the defaults are those of `mola_training.py`."""

    template_flag: ClassVar[str]

    base_model: str = option("NousResearch/Llama-2-7b-hf", "Folder or hub id of the base model.")
    data_path: str = option(
        "./sampled_data/sampled_scienceqa_train_all.hf",
        "Prepared training data: a folder written by `save_to_disk`, or a JSON, JSON lines, CSV or parquet file.",
    )
    output_dir: str = option("./sampled_scienceqa_256r_8mbs_no8bit_1", "Folder for the adapter and the run's files.")
    batch_size: int = option(128, "Samples per optimiser step over all processes; a multiple of micro_batch_size.")
    micro_batch_size: int = option(8, "Batch size per process.")
    num_epochs: float = option(1, "Passes over the data.")
    learning_rate: float = option(3e-4, "Learning rate after warm-up; it decays linearly to 0.")
    cutoff_len: int = option(256, "Maximum sequence length in tokens; see truncation.")
    val_set_size: float = option(
        2, "Samples (or a share below 1) of the split `train` to hold out and evaluate the loss on; 0 = no evaluation."
    )
    lora_r: str | None = option(None, "Rank of each expert: one number, or one per layer between commas. Default 8.")
    lora_alpha: float | None = option(None, "The update is scaled by lora_alpha / lora_r. Default 16.")
    lora_dropout: float | None = option(None, "Dropout on the experts' input. Default 0.05.")
    lora_target_modules: str | None = option(
        None,
        "Names of the linears to adapt, between commas. Default: the seven of LLaMA, also fused, where they exist, "
        "else PEFT's choice for the architecture.",
    )
    number_experts: str | None = option(
        None,
        "Experts per layer: one number, one per layer between commas, or digits over equal groups of layers. "
        "Default 2468: on 32 layers 8 times 2, 8 times 4, 8 times 6, 8 times 8.",
    )
    top_k: str | None = option(
        None,
        "Experts used per token: one number, or one per layer between commas. Default 2; needed to start from an "
        "adapter of the research code, whose files do not hold it.",
    )
    train_on_inputs: bool = option(True, "Let the prompt's tokens contribute to the loss as well.")
    add_eos_token: bool = option(True, "End every sample with the end-of-sequence token.")
    group_by_length: bool = option(False, "Put samples of similar length into one batch.")
    wandb_project: str = option("", "Report to this project of Weights & Biases.")
    wandb_run_name: str = option("", "Name of the run in Weights & Biases.")
    wandb_watch: str = option("", "What Weights & Biases watches: false, gradients or all.")
    wandb_log_model: str = option("", "What to upload to Weights & Biases: false, end or checkpoint.")
    resume_from_checkpoint: str | None = option(
        None,
        "A checkpoint-N folder: resume that run with its optimiser and schedule. An adapter folder, of mola or of the "
        "research code: start a new run from its experts. 'last': resume from the newest checkpoint in output_dir.",
    )
    obalance: bool = option(
        False,
        f"Add {BALANCE_COEF:g} times the balance loss, pooled per layer and summed over layers, padding counted.",
    )

    # Not in the research code.
    warmup_steps: float | None = option(
        None,
        f"Steps of warm-up; a number below 1 is a share of all steps. Default: {WARMUP_STEPS} as in the research code, "
        f"but at most {WARMUP_SHARE:.0%}% of the run.",
    )
    truncation: str = option(
        "left", "What to do with samples longer than cutoff_len: error, drop, left (cut the prompt) or right."
    )
    save_steps: int = option(200, "Steps between evaluations, each with a checkpoint; the last 3 checkpoints are kept.")
    seed: int = option(42, "Random seed of everything.")
    dtype: str = option("auto", "Dtype of the frozen base: auto, float32, bfloat16 or float16.")
    overwrite_output_dir: bool = option(False, "Replace an earlier run in the output folder.")
    trust_remote_code: bool = option(False, "Run code shipped with the model.")

    @property
    def template(self) -> str:
        """Prompt template; the two scripts have different flags for it."""
        return str(getattr(self, self.template_flag))


@dataclass
class ResearchTrainOptions(SharedOptions):
    """Flags of `mola_training.py`."""

    template_flag = "prompt_template_name"
    prompt_template_name: str = option("alpaca", "Prompt template.")


@dataclass
class ResearchInstructionOptions(SharedOptions):
    """Flags of `mola_training_instruction.py`."""

    template_flag = "prompt_template_name_meta"
    data_path: str = option(
        "./meta_moe_50k.hf", "Prepared training data, as `preparation_instruction_data.py` writes it."
    )
    output_dir: str = option("./meta_moe_llm2_3ep_2468", "Folder for the adapter and the run's files.")
    num_epochs: float = option(3, "Passes over the data.")
    val_set_size: float = option(
        100,
        "Samples (or a share below 1) of the split `train` to hold out and evaluate the loss on; 0 = no evaluation.",
    )
    load_in_8bit: bool = option(False, "Quantise the base to 8 bits while it loads; needs bitsandbytes.")
    prompt_template_name_meta: str = option("meta", "Prompt template; meta: the text itself, without a prompt.")
    obalance: bool = option(
        True, f"Add {BALANCE_COEF:g} times the balance loss, pooled per layer and summed over layers, padding counted."
    )
    truncation: str = option("right", "What to do with texts longer than cutoff_len: error, drop, left or right.")
