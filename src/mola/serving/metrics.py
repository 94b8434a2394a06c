"""Counters of a server, in the form that Prometheus reads."""

import functools
from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """What happened since the server's start. Rates, such as tokens per second, are Prometheus's own `rate()`."""

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        self.tokens = Counter("mola_generated_tokens", "Tokens of answers.", registry=own)
        self.prompt_tokens = Counter("mola_prompt_tokens", "Tokens of the prompts of accepted requests.", registry=own)
        self.batch_size = Gauge("mola_batch_size", "Answers being made at this moment.", registry=own)
        self._responses = Counter("mola_responses", "Everything answered, by HTTP status.", ["status"], registry=own)
        self._requests = Counter("mola_requests", "Requests that ended.", ["model", "outcome"], registry=own)
        self._first = Histogram(
            "mola_time_to_first_token_seconds", "From a request's arrival.", buckets=_SECONDS, registry=own
        )
        self._whole = Histogram("mola_request_seconds", "From arrival to the end.", buckets=_SECONDS, registry=own)
        self._now = {
            name: Gauge(f"mola_requests_{name}", f"Requests that are {name} at this moment.", registry=own)
            for name in ("running", "waiting")
        }

    def first_token(self, seconds: float) -> None:
        """An answer has its first token, so long after its request came."""
        self._first.observe(seconds)

    def request_ended(self, model: str, outcome: str, seconds: float) -> None:
        """A request that had been accepted is gone: "finished", or "unfinished" if its client left or it failed."""
        self._requests.labels(model, outcome).inc()
        self._whole.observe(seconds)

    def responded(self, status: int) -> None:
        """A request of any path was answered; 499 if its client left before."""
        self._responses.labels(str(status)).inc()

    def watch(self, counts: Callable[[], Mapping[str, int]]) -> None:
        """Where the numbers of running and waiting requests come from."""
        for name, gauge in self._now.items():
            gauge.set_function(functools.partial(_count, counts, name))

    def text(self) -> bytes:
        """Everything, in Prometheus's text format."""
        return generate_latest(self._registry)


def _count(counts: Callable[[], Mapping[str, int]], name: str) -> int:
    return counts()[name]
