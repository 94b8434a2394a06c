"""Kinds of modules: short where that is clear."""

from mola.architecture.kinds import kinds_of


def test_kinds():
    attention = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    assert set(kinds_of([*attention, "model.layers.0.mlp.up_proj"]).values()) == {"q_proj", "up_proj"}
    experts = [f"model.layers.{layer}.experts.{expert}.up" for layer in (0, 1) for expert in (0, 1)]
    assert kinds_of(experts)[experts[1]] == "experts.1.up"
    assert kinds_of(["lm_head"]) == {"lm_head": "lm_head"}


def test_two_modules_of_one_name_in_a_layer():
    kinds = ["attn.c_attn", "attn.c_proj", "mlp.c_proj"]
    names = [f"transformer.h.{layer}.{kind}" for layer in (0, 1) for kind in kinds]
    assert list(kinds_of(names).values()) == kinds * 2
