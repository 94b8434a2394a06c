"""Metrics of a server in Prometheus's text format."""

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counts since the server's start. Rates, such as tokens per second, are Prometheus's own `rate()`."""

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        self.generated_tokens = Counter("mola_generated_tokens", "Tokens generated in answers.", registry=own)
        self.prompt_tokens = Counter("mola_prompt_tokens", "Tokens of the prompts of accepted requests.", registry=own)
        self.first_token = Histogram(
            "mola_time_to_first_token_seconds",
            "From a request's arrival to the first token of an answer.",
            buckets=_SECONDS,
            registry=own,
        )
        self._responses = Counter("mola_responses", "Responses, by HTTP status.", ["status"], registry=own)
        self._requests = Counter("mola_requests", "Requests that ended.", ["model", "outcome"], registry=own)
        self._request_seconds = Histogram(
            "mola_request_seconds", "From a request's arrival to its end.", buckets=_SECONDS, registry=own
        )

    def request_ended(self, model: str, outcome: str, seconds: float) -> None:
        """Count an accepted request: "finished", or "unfinished" if its client left or it failed."""
        self._requests.labels(model, outcome).inc()
        self._request_seconds.observe(seconds)

    def count_response(self, status: int) -> None:
        """Count a response on any path; status 499 means that the client left before the response was sent."""
        self._responses.labels(str(status)).inc()

    def watch(self, requests: Callable[[], Mapping[str, int]], num_active: Callable[[], int]) -> None:
        """Add gauges that read these functions: `requests` returns the numbers of "running" and "waiting" requests.

        `num_active` returns the number of answers in the engine.
        """
        batch = Gauge("mola_batch_size", "Answers that are being generated now.", registry=self._registry)
        batch.set_function(num_active)
        running = Gauge("mola_requests_running", "Requests that are running now.", registry=self._registry)
        running.set_function(lambda: requests()["running"])
        waiting = Gauge("mola_requests_waiting", "Requests that are waiting now.", registry=self._registry)
        waiting.set_function(lambda: requests()["waiting"])

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)
