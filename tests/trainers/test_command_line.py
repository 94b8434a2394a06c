"""What `trl sft` can and cannot do with mola."""

from peft import LoraConfig


def test_flags_of_trl_make_a_lora(trl):
    """`--use_peft` has no other method to choose; with mola one writes the few lines of docs/trainers.md."""
    assert type(trl.get_peft_config(trl.ModelConfig(use_peft=True))) is LoraConfig
