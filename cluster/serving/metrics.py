"""What Prometheus is told: vLLM's names where it has them, with our prefix. Requests are observed as they go; what the
engine counts anyway is read when somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from runtime.engine.loop import EngineLoop
from runtime.errors import FieldError
from runtime.request import Request, StepOutput

if TYPE_CHECKING:
    from runtime.engine.engine import Engine  # which compiles when it is imported for the first time

PREFIX = "outrider_"
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10)
LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640, 2560)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 50000, 200000)
PER_STEP = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20)

Opened = Callable[[], "tuple[Engine, EngineLoop] | None"]


class Metrics:
    """Lives on the event loop."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, opened: Opened) -> None:
        """`opened`: the engine and its loop, once there are."""
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(opened))
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token.", SHORT + (30, 60))
        self._gaps = self._histogram("inter_token_latency_seconds", "Between two steps that gave tokens.", SHORT)
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds", "(Whole time - time to first token) / (tokens - 1).", SHORT
        )
        self._whole = self._histogram("e2e_request_latency_seconds", "Arrival to last token.", LONG)
        self._queue = self._histogram("request_queue_time_seconds", "Arrival to a cache slot.", LONG)
        self._prompts = self._histogram("request_prompt_tokens", "Tokens of prompts.", TOKENS)
        self._answers = self._histogram("request_generation_tokens", "Tokens of answers.", TOKENS)
        self._per_step = self._histogram("tokens_per_step", "Tokens that a step gave a request.", PER_STEP)
        self._num_prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._num_cached = self._counter("prefix_cache_hits", "Tokens of prompts that were in the cache.")
        self._num_new = self._counter("generation_tokens", "Tokens of answers.")
        self._calls = self._counter("calls", "Calls that are over, by status.", ("door", "method", "status"))
        self._refused = self._counter("requests_refused", "Calls that were refused for what they asked.", ("reason",))

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, what, buckets=buckets, registry=self._registry)

    def _counter(self, name: str, what: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(PREFIX + name, what, labels, registry=self._registry)

    def admit(self, requests: Iterable[Request], num_tokens: int) -> None:
        """Requests have been taken in, whose prompts have so many tokens."""
        self._num_prompt.inc(num_tokens)
        for request in requests:
            self._prompts.observe(len(request.prompt_ids))

    def take(self, output: StepOutput, gap_s: float | None) -> None:
        """A step has given tokens, this long after the one before of the same answer."""
        count, usage = len(output.token_ids), output.usage
        if count:
            self._num_new.inc(count)
            self._per_step.observe(count)
            if gap_s is not None:
                self._gaps.observe(gap_s)
            else:
                self._ttft.observe(usage.ttft_s)
                self._queue.observe(usage.queue_s)
                self._num_cached.inc(usage.num_reused_tokens)
        if output.finish_reason is not None and usage.num_new_tokens:
            self._whole.observe(usage.latency_s)
            self._answers.observe(usage.num_new_tokens)
            if usage.num_new_tokens > 1:
                self._per_token.observe((usage.latency_s - usage.ttft_s) / (usage.num_new_tokens - 1))

    def end(self, door: str, method: str, status: str) -> None:
        """A call is over."""
        self._calls.labels(door, method, status).inc()

    def refuse(self, error: Exception) -> None:
        """A call was refused. The reason is the kind of error, or what is used up."""
        is_limit = isinstance(error, FieldError) and error.field.startswith(("scheduler.", "server."))
        self._refused.labels(error.field if is_limit and isinstance(error, FieldError) else type(error).__name__).inc()

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self._registry)


class EngineCollector(Collector):
    """What the engine counts by itself."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened

    def collect(self) -> Iterator[Metric]:
        opened = self._opened()
        yield _gauge("up", "Whether the engine can answer.", float(opened is not None and opened[1].failed is None))
        if opened is None:
            return
        engine, loop = opened
        live, stats = loop.stats, engine.stats
        yield _gauge("num_requests_running", "Sequences that decode.", live.num_running)
        yield _gauge("num_requests_waiting", "Requests that wait for a slot.", live.num_waiting)
        yield _gauge("num_sessions", "Conversations that are open.", live.num_sessions)
        yield _gauge("kv_cache_usage_perc", "Share of the cache that is in use; 1 is all.", engine.cache_share)
        finished = CounterMetricFamily(PREFIX + "requests_finished", "Answers, by how they ended.", labels=["reason"])
        for reason, count in live.outcomes.items():
            finished.add_metric([str(reason)], count)
        yield finished
        yield CounterMetricFamily(PREFIX + "engine_steps", "Steps.", value=stats.num_steps)
        yield CounterMetricFamily(PREFIX + "engine_rows", "Rows of all steps.", value=stats.num_rows)
        seconds = CounterMetricFamily(PREFIX + "engine_seconds", "Where steps' time went.", labels=["phase"])
        for phase, value in list(stats.seconds.items()):
            seconds.add_metric([phase], value)
        yield seconds
        yield _gauge("mesh_replicas", "Replicas that share the rows of a step.", stats.num_replicas)
        yield CounterMetricFamily(PREFIX + "workers_lost", "Workers that died or were given up.", value=stats.num_lost)
        yield CounterMetricFamily(PREFIX + "rereads", "Times that all caches were lost.", value=stats.num_rereads)
        yield from _guesses(engine)


def _guesses(engine: Engine) -> Iterator[Metric]:
    """Candidates of lookahead, in speculative decoding's names."""
    tally = engine.knowledge.tally
    depths = [tuple(pair) for pair in tally.depths]
    drafted, accepted = (sum(pair[column] for pair in depths) for column in (0, 1))
    name = f"{PREFIX}spec_decode_num"
    yield CounterMetricFamily(f"{name}_draft_tokens", "Candidates that were run.", value=drafted)
    yield CounterMetricFamily(f"{name}_accepted_tokens", "Candidates that were accepted.", value=accepted)
    for kind, what, column in (("draft", "run", 0), ("accepted", "accepted", 1)):
        at = CounterMetricFamily(
            f"{name}_{kind}_tokens_per_pos", f"Candidates {what}, by depth in the tree.", labels=["position"]
        )
        for position, pair in enumerate(depths):
            at.add_metric([str(position)], pair[column])
        yield at
    for kind, what, column in (("proposed", "run", 0), ("accepted", "accepted", 1)):
        by = CounterMetricFamily(
            f"{PREFIX}source_{kind}_rows", f"Candidates {what}, by who proposed them.", labels=["source"]
        )
        for source, counts in tally.sources.items():
            by.add_metric([source], counts[column])
        yield by


def _gauge(name: str, what: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, what, value=value)
