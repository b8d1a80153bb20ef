"""Metrics for Prometheus, named as in other engines."""

import logging

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from engine.serving.async_engine import AsyncEngine
from engine.serving.handle import Handle

log = logging.getLogger("engine.serving")
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
STEPS = (1, 5, 10, 25, 50, 100, 250, 500, 1000)


class Metrics:
    """The metrics of one service, in a registry of its own."""

    def __init__(self, engine: AsyncEngine):
        self.registry = CollectorRegistry()
        where = {"registry": self.registry}
        running = Gauge("psunet:num_requests_running", "Requests that have started", **where)
        running.set_function(lambda: engine.requests[0])
        waiting = Gauge("psunet:num_requests_waiting", "Requests that have not started", **where)
        waiting.set_function(lambda: engine.requests[1])
        samples = Gauge("psunet:num_samples_waiting", "Samples of requests that have not started", **where)
        samples.set_function(lambda: engine.waiting)
        self.succeeded = Counter("psunet:requests_success", "Requests that were answered", **where)
        self.failed = Counter("psunet:requests_failure", "Requests that failed", ["reason"], **where)
        self.latency = Histogram("psunet:e2e_request_latency_s", "From arrival to result", buckets=SECONDS, **where)
        self.queued = Histogram("psunet:request_queue_wait_s", "Until the first step", buckets=SECONDS, **where)
        self.ran = Histogram("psunet:diffusion_exec_s", "From the first step on", buckets=SECONDS, **where)
        self.steps = Histogram("psunet:num_inference_steps", "Steps of each request", buckets=STEPS, **where)
        self.images = Counter("psunet:image_count", "Images that were made", **where)

    def count(self, handle: Handle) -> None:
        """Counts a request that is done."""
        started, reason = handle.started or handle.ended, type(handle.error).__name__
        times = started - handle.submitted, handle.ended - started
        outcome = "done" if handle.error is None else reason
        log.info(
            "request %s: %s, %d samples, waited %.2f s, ran %.2f s", handle.id, outcome, handle.request.num, *times
        )
        if handle.error is not None:
            self.failed.labels(reason).inc()
            return
        self.succeeded.inc()
        self.latency.observe(handle.ended - handle.submitted)
        self.queued.observe(times[0])
        self.ran.observe(times[1])
        self.steps.observe(handle.request.steps)
        self.images.inc(handle.request.num)

    def text(self) -> bytes:
        return generate_latest(self.registry)
