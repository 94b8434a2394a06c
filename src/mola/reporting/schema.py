"""What the files of a run folder look like, as far as the page relies on it; other versions may write more."""

from mola.files.schema import ANYTHING, FLAG, INTEGER, NUMBER, TEXT

PLACE = {"module": TEXT, "layer_index": (INTEGER, None), "mean_gates": [NUMBER, ...]}
USE = {**PLACE, "num_tokens": NUMBER, "shares": [NUMBER], "balance": NUMBER, "dead_experts": [INTEGER]}
INTERVAL = {
    "step": INTEGER,
    "modules": [
        {
            **PLACE,
            "mean_gates": [(NUMBER, None), ...],  # None where routers gave no numbers
            "dead_experts": [INTEGER],
            "num_tokens?": INTEGER,
            **{f"{name}?": (NUMBER, None) for name in ("balance", "entropy", "drift")},
        }
    ],
}
LOSS = {"step": INTEGER, "loss?": (NUMBER, None), "eval_loss?": (NUMBER, None)}
RECORD = {
    "settings": {"base_model": TEXT, "data": ANYTHING, "task?": (TEXT, None)},
    "data_fingerprints?": {str: (TEXT, None)},
    "data?": {str: dict.fromkeys(("kept", "tokens", "trained_tokens"), INTEGER)},
    "metrics?": {str: (NUMBER, None)},
    "allocation?": {"num_experts?": INTEGER, "num_layers?": INTEGER, "base_parameters?": (INTEGER, None)},
    "machine?": {str: ANYTHING},
    "versions?": {str: ANYTHING},
    "adapter_settings?": {str: ANYTHING},
    "command?": ([TEXT], None),
    "seconds?": (NUMBER, None),
    "trainable_parameters?": (INTEGER, None),
    "steps?": (INTEGER, None),
    "status?": (TEXT, None),
    "error?": (TEXT, None),
    "best_checkpoint?": (TEXT, None),
}
SCORE = {"accuracy": NUMBER, "correct": INTEGER, "total": INTEGER, "interval_95": [NUMBER, NUMBER]}
SAMPLE = {
    "id": ANYTHING,
    "prompt": TEXT,
    "answer": (TEXT, None),
    "predicted": (TEXT, None),
    "correct": FLAG,
    "output": (TEXT, None),
}
EVALUATION = {
    **SCORE,
    "groups": {str: {str: SCORE}},
    "samples": [SAMPLE],
    "settings": {"data?": ANYTHING, "scoring?": (TEXT, None)},
    "metrics?": ({str: NUMBER}, None),
    "data_fingerprint?": (TEXT, None),
    "unanswered?": (INTEGER, None),
}
INSPECTION = {
    "usage": {str: [USE]},
    "redundancy": [ANYTHING],
    "samples": INTEGER,
    "settings": {"data?": ANYTHING},
    "examples?": ([{"id": ANYTHING, "experts": [PLACE]}], None),
    "agreement?": ({"modules": [TEXT], "cramers_v": [[(NUMBER, None)]]}, None),
    "leave_one_out?": (
        [{"layer_index": (INTEGER, None), "module?": (TEXT, None), "expert": INTEGER, "loss_change": (NUMBER, None)}],
        None,
    ),
    "leave_one_out_baseline?": ({"loss?": (NUMBER, None), "samples?": INTEGER}, None),
}
EXPORT = {
    "method": TEXT,
    "rank": INTEGER,
    "explained_by_kind": {str: NUMBER},
    "divergence": {str: NUMBER},
    "loss": {str: dict.fromkeys(("base", "mixture", "lora"), NUMBER)},
    "accuracy": {str: SCORE},
    "differences": {str: {"value": NUMBER, "questions_95": [NUMBER, NUMBER]}},
    "notes?": [TEXT],
}
PER_LAYER = {
    "num_experts": ANYTHING,
    "top_k": ANYTHING,
    "r": ANYTHING,
    "lora_alpha": NUMBER,
    "alpha_pattern?": ({str: NUMBER}, None),
}
