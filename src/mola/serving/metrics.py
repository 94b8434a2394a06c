"""Metrics of a server in Prometheus's text format."""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mola.checkpoints.skills_folder import BASE

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counts since the server's start. Rates, such as tokens per second, are Prometheus's own `rate()`.

    The outcome of a request is "finished", or "unfinished" if its client left or it failed. The status of a response is
    499 if the client left before the response was sent.
    """

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        self.generated_tokens = Counter("mola_generated_tokens", "Tokens generated in answers.", registry=own)
        self.prompt_tokens = Counter("mola_prompt_tokens", "Tokens of the prompts of accepted requests.", registry=own)
        about = "From a request's arrival to the first token of an answer."
        self.first_token = Histogram("mola_time_to_first_token_seconds", about, buckets=_SECONDS, registry=own)
        self.responses = Counter("mola_responses", "Responses, by HTTP status.", ["status"], registry=own)
        self.requests = Counter("mola_requests", "Requests that ended.", ["model", "outcome"], registry=own)
        about = "From a request's arrival to its end."
        self.request_seconds = Histogram("mola_request_seconds", about, buckets=_SECONDS, registry=own)

        self.answers = Counter("mola_answers", "Answers of a model with skills, by skill.", ["skill"], registry=own)

    def count_answers(self, skills: Iterable[str | None]) -> None:
        """Count answers by the skill that gave them; None is the base model."""
        for skill in skills:
            self.answers.labels(skill or BASE).inc()

    def watch_skills(self, num_loaded: Callable[[], int]) -> None:
        """Add a gauge that reads `num_loaded`, the number of skills in memory."""
        Gauge("mola_skills_loaded", "Skills in memory.", registry=self._registry).set_function(num_loaded)

    def watch(self, requests: Callable[[], Mapping[str, int]], num_active: Callable[[], int]) -> None:
        """Add gauges that read these functions: `requests` returns the numbers of "running" and "waiting" requests.

        `num_active` returns the number of answers in the engine.
        """
        batch = Gauge("mola_batch_size", "Answers that are being generated now.", registry=self._registry)
        batch.set_function(num_active)
        for kind in ("running", "waiting"):
            gauge = Gauge(f"mola_requests_{kind}", f"Requests that are {kind} now.", registry=self._registry)
            gauge.set_function(lambda kind=kind: requests()[kind])  # type: ignore[misc]

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)
