"""What is wrong with a run, as far as its folder shows it: one rule per fault, each with what to change.

Bounds are far from what healthy runs show (docs/doctor.md has both), so silence is no proof of health.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from mola.evaluation.scoring import constant_prediction
from mola.reporting.formatting import points
from mola.reporting.late_use import LateUse
from mola.reporting.load_run import Run, step_of_weights

FEWEST_LOSSES = 4  # log entries that say whether a loss has risen
_DEAD = 0.15  # of all experts
_COLLAPSED = 0.25  # of the modules whose routers have a choice
_SAME = 0.99  # of the choices that the same experts get
_ALIKE = 0.9  # overlap of what experts read, and of what they write: 1 for the same subspace
_EVEN = 0.99  # entropy of a router that tells nothing apart, of 1
_UNDECIDED = 0.02  # margin between the two largest gates of two; of more, whose gates are smaller, less
_RISE = 1.5  # of the lowest training loss
_NOISE = 4  # standard errors
_NEAR_KL, _NEAR_POINTS = 0.01, 0.01  # nats per token, and share of questions


@dataclass(frozen=True)
class Finding:
    """A fault: its name, what was seen, what to change."""

    name: str
    seen: str
    change: str


def findings(run: Run, late: Mapping[str, LateUse]) -> list[Finding]:
    """What is wrong with a run; `late` is what its routers did at the end, see `read_late_use`."""
    return [found for rule in _RULES if (found := rule(run, late)) is not None]


def is_far_above(eval_loss: float, train_loss: float) -> bool:
    """Whether an evaluation loss is more than twice the training loss, and more than 0.5 nats above it."""
    return eval_loss > max(2 * train_loss, train_loss + 0.5)


def _failed(run: Run, late: Mapping[str, LateUse]) -> Finding | None:
    if run.record.get("status") != "failed":
        return None
    return Finding(
        "the run failed",
        str(run.record.get("error") or "run.json does not say why."),
        "Mend that first: what else is said here is about a part of the training.",
    )


def _dead_experts(run: Run, late: Mapping[str, LateUse]) -> Finding | None:
    shares = [share for use in late.values() for share in use.shares]
    dead = shares.count(0.0)
    if not shares or dead <= _DEAD * len(shares):
        return None
    return Finding(
        "dead experts",
        f"{dead} of {len(shares)} experts were chosen by no token in the last quarter of training.",
        f"{_balance_advice(run)}, or give fewer experts to these "
        + (
            "linears (`num_experts_pattern`)."
            if _by_module(run)
            else "layers: `mola reallocate --inspection` keeps the ones that work."
        ),
    )


def _by_module(run: Run) -> bool:
    """Whether linears have numbers of their own, which `mola reallocate` does not change."""
    return bool(run.adapter is not None and run.adapter.config.get("num_experts_pattern"))


def _balance_advice(run: Run) -> str:
    weight = run.record.get("adapter_settings", {}).get("router_aux_loss_coef")
    if not weight and run.adapter is not None:
        weight = run.adapter.config.get("router_aux_loss_coef")
    if weight:
        return f"Raise the weight of the balance loss (--router_aux_loss_coef, {weight} now)"
    return "Switch the balance loss on (--router_aux_loss_coef 1e-3, or more)"


def _collapsed_routers(run: Run, late: Mapping[str, LateUse]) -> Finding | None:
    free = [use for use in late.values() if len(use.shares) > use.top_k]
    collapsed = [use for use in free if sum(sorted(use.shares)[-use.top_k :]) >= _SAME * use.top_k]
    if not free or len(collapsed) <= _COLLAPSED * len(free):
        return None
    return Finding(
        "collapsed routers",
        f"In {len(collapsed)} of {len(free)} modules nearly every token chose the same experts in the last quarter.",
        f"{_balance_advice(run)}, lower --learning_rate, or add --router_jitter_noise 0.1; a router that has no "
        "choice to make costs parameters for nothing.",
    )


def _no_gradient(run: Run, late: Mapping[str, LateUse]) -> Finding | None:
    if run.adapter is None:
        return None
    top_k = {layer.layer_index: layer.top_k for layer in run.adapter.layers}
    # Of modules with several experts: a layer's own number may be another.
    alone = {each.layer_index for each in run.adapter.redundancy if top_k.get(each.layer_index) == 1}
    if not alone or run.adapter.config.get("router_aux_loss_coef"):
        return None
    return Finding(
        "top_k 1 without balance loss",
        f"{len(alone)} layers choose one expert per token, whose gate is 1 whatever the router says: routers learn "
        "nothing, and their choices stay random.",
        "Pass --router_aux_loss_coef 1e-3, or --top_k 2.",
    )


def _evaluation_gap(run: Run, late: Mapping[str, LateUse]) -> Finding | None:
    """Of the weights that were saved, as `mola train` says it."""
    kept = step_of_weights(run.record)
    evaluation = [entry for entry in run.curves.get("evaluation", []) if kept is None or entry[0] <= kept]
    if not evaluation or evaluation[-1][0] == 0:  # of the untrained model
        return None
    curve = run.curves.get("training", [])
    # What was learnt after that evaluation is not in it. Weights may be from before the first entry.
    training = [entry for entry in curve if entry[0] <= evaluation[-1][0]] or curve[:1]
    if not training or not is_far_above(evaluation[-1][1], last_mean(training)):
        return None
    best = "--eval_strategy steps --save_strategy steps --load_best_model_at_end"
    earlier = f"End earlier ({best}), lower" if kept is None else "Lower"
    return Finding(
        "evaluation loss far above training loss",
        f"{evaluation[-1][1]:.4f} at step {evaluation[-1][0]}, training {last_mean(training):.4f}.",
        f"{earlier} --learning_rate or the number of epochs, raise --lora_dropout, or take more data.",
    )


def _rate_too_high(run: Run, late: Mapping[str, LateUse]) -> Finding | None:
    losses = [loss for _, loss in run.curves.get("training", [])]
    if len(losses) < FEWEST_LOSSES:
        return None
    window = max(2, len(losses) // 10)
    means = [fmean(losses[start : start + window]) for start in range(len(losses) - window + 1)]
    end = means[-1]
    # Neighbours differ by the noise of batches: with normal noise by 0.95 standard deviations, as a median.
    noise = median(abs(one - next_one) for one, next_one in pairwise(losses)) / 0.95
    # One that is trained on may begin low: with a single entry, which varies more than a mean.
    lows = [(min(means), (2 / window) ** 0.5), (losses[0], (1 + 1 / window) ** 0.5)]
    risen = [low for low, spread in lows if end > _RISE * low and end > low + max(0.2, _NOISE * noise * spread)]
    if not risen:
        return None
    return Finding(
        "learning rate too high",
        f"The training loss ended at {end:.4f}, after {min(risen):.4f} on the way (means over {window} log entries).",
        f"Lower --learning_rate ({run.record['settings'].get('learning_rate', 'not recorded')} now) to a third, or "
        "give it more --warmup_steps.",
    )


def _one_answer(run: Run, late: Mapping[str, LateUse]) -> Finding | None:
    if run.after is None or (answer := constant_prediction(run.after["samples"])) is None:
        return None
    return Finding(
        "one answer to everything",
        f"All {run.after['total']} samples of {run.paths['after'].name} got {answer!r}, which is right for "
        f"{run.after['accuracy']:.1%} of them.",
        "Train longer, with another --learning_rate, or on data in which other answers are as frequent.",
    )


def _experts_alike(run: Run, late: Mapping[str, LateUse]) -> Finding | None:
    modules = run.adapter.redundancy if run.adapter is not None else []
    alike = [each for each in modules if min(each.input_overlap, each.output_overlap) >= _ALIKE]
    if not modules or len(alike) <= _COLLAPSED * len(modules):
        return None
    return Finding(
        "experts alike",
        f"In {len(alike)} of {len(modules)} modules the experts read and write the same few directions.",
        "Fewer experts do the same: `mola allocate` divides a budget"
        + ("" if _by_module(run) else ", `mola reallocate` changes this adapter")
        + ". Where all began as one, begin with random ones.",
    )


def _lora_would_do(run: Run, late: Mapping[str, LateUse]) -> Finding | None:
    return _undecided(late) or _exported(run)


def _undecided(late: Mapping[str, LateUse]) -> Finding | None:
    margins = [use.margin for use in late.values()]
    # With gates that are all alike a choice of few experts is random; with all experts it is none.
    if not margins or fmean(use.margin * max(1.0, sum(use.shares) / 2) for use in late.values()) >= _UNDECIDED:
        return None
    if fmean(use.entropy for use in late.values()) < _EVEN:  # twins share their tokens, which others do not get
        return None
    return Finding(
        "a LoRA would do",
        f"The gates are all but equal: the largest is {fmean(margins):.4f} above the second, so tokens are told apart "
        "by next to nothing.",
        "Train longer or with a higher --learning_rate if the routers are to learn; else train a LoRA of the same size "
        "(--num_experts 1 and a higher --r), which can be merged.",
    )


def is_compared(export: Mapping[str, Any]) -> bool:
    """Whether an export tells how the LoRA answers, and how far from the mixture it is."""
    return "lora" in export.get("differences", {}) and _distance(export) is not None


def _distance(export: Mapping[str, Any]) -> float | None:
    divergence = export.get("divergence", {})
    return divergence.get("test answer", divergence.get("answer"))


def _exported(run: Run) -> Finding | None:
    export = run.export or {}
    if not is_compared(export):
        return None
    less, distance = export["differences"]["lora"], _distance(export) or 0.0
    if distance > _NEAR_KL or less["value"] < -_NEAR_POINTS:
        return None
    low, high = less["questions_95"]
    return Finding(
        "a LoRA would do",
        f"The plain LoRA of `mola convert --to lora` answers as many questions, {points(less['value'])} points "
        f"(95 % {points(low)} to {points(high)}), {distance:.4f} nats per answer token from the mixture.",
        "Use that LoRA: it merges, and every server knows it. On other data routing may still be worth something.",
    )


def last_mean(curve: Sequence[tuple[float, float]]) -> float:
    """Mean of the entries in the last tenth of the steps: the last one alone can be one lucky batch."""
    return fmean(loss for step, loss in curve if step > 0.9 * curve[-1][0] or step == curve[-1][0])


_RULES: tuple[Callable[[Run, Mapping[str, LateUse]], Finding | None], ...] = (
    _failed,
    _rate_too_high,
    _evaluation_gap,
    _one_answer,
    _no_gradient,
    _collapsed_routers,
    _dead_experts,
    _experts_alike,
    _lora_would_do,
)


def describe(found: Sequence[Finding]) -> Iterator[str]:
    """Lines for people."""
    for number, each in enumerate(found, 1):
        yield f"{number}. {each.name}"
        yield f"   {each.seen}"
        yield f"   {each.change}"
