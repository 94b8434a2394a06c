"""What the studies of skills compare a skills folder with: LoRAs in one model, their merges, a classifier of texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel

# Arguments of PEFT's `add_weighted_adapter`; `share` is the weight of each LoRA, one K-th without it.
MERGES: dict[str, dict[str, Any]] = {
    "sum": {"share": 1.0, "combination_type": "cat"},
    "mean": {"combination_type": "cat"},
    "ties": {"share": 1.0, "combination_type": "ties", "density": 0.5},
    "dare": {"share": 1.0, "combination_type": "dare_linear", "density": 0.5},  # drops at random
}


def load_loras(base_model: Any, folders: Mapping[str, Path]) -> PeftModel:
    """PEFT's model with the LoRA of each folder under its name."""
    (first, folder), *others = folders.items()
    model = PeftModel.from_pretrained(base_model, folder, adapter_name=first)
    for name, folder in others:
        model.load_adapter(folder, adapter_name=name)
    return model.eval()


def merge(model: PeftModel, names: list[str], method: str) -> PeftModel:
    """The model with all LoRAs in one, by a method of `MERGES`."""
    settings = dict(MERGES[method])
    share = settings.pop("share", 1 / len(names))
    model.add_weighted_adapter(names, [share] * len(names), "merged", **settings)
    model.set_adapter("merged")
    return model


def fit_text_classifier(texts: Iterable[tuple[str, str]]) -> Any:
    """A classifier of texts, fit on pairs of text and name: words and pairs of words, logistic regression.

    Raises:
        ImportError: scikit-learn is missing.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    classifier = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=1000))
    return classifier.fit(*zip(*texts, strict=True))
