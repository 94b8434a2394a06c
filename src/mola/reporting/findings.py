"""Faults of a run that its folder shows. There is one rule per fault; each rule also says what to change.

The limits are far from the values of healthy runs (docs/guides/doctor.md has both). A run without findings may still be
poor.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from mola.evaluation.scoring import constant_prediction
from mola.reporting.formatting import points
from mola.reporting.learning import not_learnt
from mola.reporting.load_run import Run, step_of_weights
from mola.reporting.routing_log import LateUse

NOT_LEARNT = "not learnt"
MIN_LOSSES = 4  # smallest number of log entries that shows whether a loss has risen
_MAX_DEAD = 0.15  # share of all experts
_MAX_MODULES = 0.25  # share of modules with a fault
_SAME_CHOICE = 0.99  # share of the choices that fall on the same experts
_ALIKE = 0.9  # overlap of the subspaces that experts read, and that they write; 1 for the same subspace
_EVEN_ENTROPY = 0.99  # entropy of a router that gives all experts nearly equal probabilities; 1 is the maximum
_UNDECIDED_MARGIN = 0.02  # between the two largest gates if two experts are chosen; scaled if more are chosen
_RISE = 1.5  # ratio to the lowest training loss
_NOISE = 4  # number of standard errors
_NEAR_KL = 0.01  # nats per token
_NEAR_POINTS = 0.01  # share of questions


@dataclass(frozen=True)
class Finding:
    """A fault of a run."""

    name: str  # name of the fault
    seen: str  # what the run folder shows
    change: str  # what to change

    def __str__(self) -> str:
        return f"{self.name.capitalize()}: {self.seen} {self.change}"


def find_faults(run: Run, late: Mapping[str, LateUse]) -> list[Finding]:
    """The faults of a run, gravest first; `late` is from `mola.reporting.routing_log.read_late_use`."""
    return [found for rule in _RULES if (found := rule(run, late)) is not None]


def find_training_fault(run: Run) -> Finding | None:
    """The gravest fault that the losses of a training show, which `mola train` says at its end."""
    return _rate_too_high(run, {}) or _evaluation_gap(run, {}) or _not_learnt(run, {})


# ---------------------------------------------------------------------- losses and answers


def _failed(run: Run, late: Mapping[str, LateUse]) -> Finding | None:
    if run.record.get("status") != "failed":
        return None
    return Finding(
        "the run failed",
        str(run.record.get("error") or "run.json gives no reason."),
        "Fix this first: all other findings are about an incomplete training.",
    )


def _rate_too_high(run: Run, late: Mapping[str, LateUse]) -> Finding | None:
    losses = [loss for _, loss in run.curves.get("training", [])]
    if len(losses) < MIN_LOSSES:
        return None
    window = max(2, len(losses) // 10)
    means = [fmean(losses[start : start + window]) for start in range(len(losses) - window + 1)]
    end = means[-1]
    # Neighbouring losses differ by the noise of batches. For normal noise, the median difference is 0.95 standard
    # deviations.
    noise = median(abs(one - next_one) for one, next_one in pairwise(losses)) / 0.95
    # The first loss is compared as well, since an adapter that is trained further may begin at its lowest loss. The
    # first loss is a single entry, so its standard error is larger than that of a mean.
    lows = [(min(means), (2 / window) ** 0.5), (losses[0], (1 + 1 / window) ** 0.5)]
    risen = [low for low, spread in lows if end > _RISE * low and end > low + max(0.2, _NOISE * noise * spread)]
    if not risen:
        return None
    rate = run.record["settings"].get("learning_rate", "not recorded")
    return Finding(
        "learning rate too high",
        f"The training loss ended at {end:.4f}, after {min(risen):.4f} on the way (means over {window} log entries).",
        f"Lower --learning_rate ({rate} now) to a third, or give it more --warmup_steps.",
    )


def _evaluation_gap(run: Run, late: Mapping[str, LateUse]) -> Finding | None:
    """Compare training and evaluation loss at the step whose weights were saved.

    The training loss is the mean of the last tenth of the steps: a single loss can be that of one lucky batch.
    """
    saved_step = step_of_weights(run.record)
    evaluation = [entry for entry in run.curves.get("evaluation", []) if saved_step is None or entry[0] <= saved_step]
    if not evaluation or evaluation[-1][0] == 0:  # step 0: the untrained model
        return None
    step, eval_loss = evaluation[-1]
    curve = run.curves.get("training", [])
    # Use training losses up to that evaluation, or the first loss if there is none.
    training = [entry for entry in curve if entry[0] <= step] or curve[:1]
    end = [loss for at, loss in training if at > 0.9 * training[-1][0] or at == training[-1][0]]
    if not end or eval_loss <= max(2 * fmean(end), fmean(end) + 0.5):
        return None
    best = "--eval_strategy steps --save_strategy steps --load_best_model_at_end"
    earlier = f"Stop earlier ({best}), lower" if saved_step is None else "Lower"
    return Finding(
        "evaluation loss far above training loss",
        f"{eval_loss:.4f} at step {step}, training {fmean(end):.4f}.",
        f"{earlier} --learning_rate or the number of epochs, raise --lora_dropout, or use more data.",
    )


def _not_learnt(run: Run, late: Mapping[str, LateUse]) -> Finding | None:
    if run.record.get("status", "finished") != "finished" or _evaluation_gap(run, late) is not None:
        return None
    settings, epochs = run.record["settings"], run.record.get("metrics", {}).get("epoch", 1)
    plan = epochs, settings.get("learning_rate"), settings.get("max_steps", -1)
    found = not_learnt(run.curves.get("training", []), *plan)
    return None if found is None else Finding(NOT_LEARNT, *found)


def _constant_answer(run: Run, late: Mapping[str, LateUse]) -> Finding | None:
    after = run.accuracies.get("after")
    if after is None or (answer := constant_prediction(after["samples"])) is None:
        return None
    return Finding(
        "one answer to everything",
        f"All {after['total']} samples of {run.paths['after'].name} got {answer!r}, which is correct for "
        f"{after['accuracy']:.1%} of them.",
        "Train longer, with a different --learning_rate, or on data in which all answers are equally frequent.",
    )


# ---------------------------------------------------------------------- routers and experts


def _no_router_gradient(run: Run, late: Mapping[str, LateUse]) -> Finding | None:
    if run.adapter is None:
        return None
    top_k = {layer.layer_index: layer.top_k for layer in run.adapter.layers}
    # Layers with at least one module that has several experts; a layer's own number may differ from its modules'.
    layers = {each.layer_index for each in run.adapter.redundancy if top_k.get(each.layer_index) == 1}
    if not layers or run.adapter.config.get("router_aux_loss_coef"):
        return None
    return Finding(
        "top_k 1 without balance loss",
        f"{len(layers)} layers choose one expert per token, whose gate is always 1: their routers get no gradient, and "
        "their choices stay random.",
        "Pass --router_aux_loss_coef 1e-3, or --top_k 2.",
    )


def _collapsed_routers(run: Run, late: Mapping[str, LateUse]) -> Finding | None:
    with_choice = [use for use in late.values() if len(use.shares) > use.top_k]
    collapsed = [use for use in with_choice if sum(sorted(use.shares)[-use.top_k :]) >= _SAME_CHOICE * use.top_k]
    if not with_choice or len(collapsed) <= _MAX_MODULES * len(with_choice):
        return None
    return Finding(
        "collapsed routers",
        f"In {len(collapsed)} of {len(with_choice)} modules nearly every token chose the same experts in the last "
        "quarter.",
        f"{_balance_advice(run)}, lower --learning_rate, or add --router_jitter_noise 0.1. The parameters of experts "
        "that are never chosen are wasted.",
    )


def _dead_experts(run: Run, late: Mapping[str, LateUse]) -> Finding | None:
    shares = [share for use in late.values() for share in use.shares]
    dead = shares.count(0.0)
    if not shares or dead <= _MAX_DEAD * len(shares):
        return None
    if run.has_experts_pattern:
        fewer = "linears (`num_experts_pattern`)."
    else:
        fewer = "layers: `mola reallocate --inspection` keeps the ones that work."
    return Finding(
        "dead experts",
        f"{dead} of {len(shares)} experts were chosen by no token in the last quarter of training.",
        f"{_balance_advice(run)}, or give fewer experts to these {fewer}",
    )


def _balance_advice(run: Run) -> str:
    weight = run.record.get("adapter_settings", {}).get("router_aux_loss_coef")
    if not weight and run.adapter is not None:
        weight = run.adapter.config.get("router_aux_loss_coef")
    if weight:
        return f"Raise the weight of the balance loss (--router_aux_loss_coef, {weight} now)"
    return "Switch the balance loss on (--router_aux_loss_coef 1e-3, or more)"


def _experts_alike(run: Run, late: Mapping[str, LateUse]) -> Finding | None:
    modules = run.adapter.redundancy if run.adapter is not None else []
    alike = [each for each in modules if min(each.input_overlap, each.output_overlap) >= _ALIKE]
    if not modules or len(alike) <= _MAX_MODULES * len(modules):
        return None
    reallocate = "" if run.has_experts_pattern else ", `mola reallocate` changes this adapter"
    return Finding(
        "experts alike",
        f"In {len(alike)} of {len(modules)} modules the experts read and write the same few directions.",
        f"Use fewer experts: `mola allocate` divides a budget{reallocate}. If all experts began as copies of one "
        "expert, begin with random experts.",
    )


# ---------------------------------------------------------------------- whether a plain LoRA would do


def _lora_would_do(run: Run, late: Mapping[str, LateUse]) -> Finding | None:
    return _equal_gates(late) or _export_is_as_good(run)


def _equal_gates(late: Mapping[str, LateUse]) -> Finding | None:
    if not late:
        return None
    # Gates are near 1 / top_k, so margins are scaled to those of two chosen experts.
    scaled_margins = [use.margin * max(1.0, sum(use.shares) / 2) for use in late.values()]
    # Two copies of one expert get equal gates for the tokens of that expert, and low gates for all other tokens. In
    # this case entropy is low, and the router does tell tokens apart.
    if fmean(scaled_margins) >= _UNDECIDED_MARGIN or fmean(use.entropy for use in late.values()) < _EVEN_ENTROPY:
        return None
    return Finding(
        "a LoRA would do",
        f"The gates are nearly equal: the largest is {fmean(use.margin for use in late.values()):.4f} above the "
        "second, so routers hardly tell tokens apart.",
        "Train longer or with a higher --learning_rate if the routers are to learn. Otherwise train a LoRA of the same "
        "size (--num_experts 1 and a higher --r), which can be merged.",
    )


def is_compared(export: Mapping[str, Any]) -> bool:
    """Whether an export has measured the LoRA's accuracy, and its divergence from the mixture."""
    return "lora" in export.get("differences", {}) and _divergence(export) is not None


def _divergence(export: Mapping[str, Any]) -> float | None:
    divergence = export.get("divergence", {})
    return divergence.get("test answer", divergence.get("answer"))


def _export_is_as_good(run: Run) -> Finding | None:
    export = run.export or {}
    if not is_compared(export):
        return None
    difference, divergence = export["differences"]["lora"], _divergence(export) or 0.0
    if divergence > _NEAR_KL or difference["value"] < -_NEAR_POINTS:
        return None
    low, high = difference["questions_95"]
    return Finding(
        "a LoRA would do",
        "The plain LoRA of `mola convert --to lora` answers about as many questions correctly: its accuracy differs by "
        f"{points(difference['value'])} points (95 % {points(low)} to {points(high)}). Its KL divergence from the "
        f"mixture is {divergence:.4f} nats per answer token.",
        "Use that LoRA: it can be merged, and every server loads it. On other data routing may still help.",
    )


_RULES: tuple[Callable[[Run, Mapping[str, LateUse]], Finding | None], ...] = (
    _failed,
    _rate_too_high,
    _evaluation_gap,
    _not_learnt,
    _constant_answer,
    _no_router_gradient,
    _collapsed_routers,
    _dead_experts,
    _experts_alike,
    _lora_would_do,
)
