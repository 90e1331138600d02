"""Drives one engine through one workload and records what came out of every step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..interfaces import Engine, StepOutput, StepStats
from ..request import FinishReason, Request
from ..workloads.workload import Workload, WorkloadRequest
from .arrivals import Arrivals, make_request, stand_in_prompt
from .probes import Clock

_MAX_EMPTY_STEPS = 1000
"""Steps in a row that schedule nothing while requests wait, before we call the engine stuck."""


@dataclass
class RequestRecord:
    """What one request got, in the order in which it got it."""

    request: WorkloadRequest
    prompt_token_ids: Sequence[int]
    """The whole prompt, history included."""
    arrival_s: float
    """When it was due, in seconds after the start: latencies count from here."""
    token_ids: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    """Index of the step that each token came out of."""
    finish_reason: FinishReason | None = None


@dataclass
class RunRecord:
    """One run: times in seconds after its start."""

    requests: dict[str, RequestRecord] = field(default_factory=dict)
    """Those that have arrived, in that order."""
    starts_s: list[float] = field(default_factory=list)
    ends_s: list[float] = field(default_factory=list)
    stats: list[StepStats] = field(default_factory=list)

    @property
    def duration_s(self) -> float:
        """From the start to the end of the last step."""
        return self.ends_s[-1]

    def token_times_s(self, request_id: str) -> tuple[float, ...]:
        """A token is there when its step has returned."""
        return tuple(self.ends_s[step] for step in self.requests[request_id].steps)

    def add_step(self, start_s: float, end_s: float, output: StepOutput) -> None:
        step = len(self.stats)
        self.starts_s.append(start_s)
        self.ends_s.append(end_s)
        self.stats.append(output.stats)
        for token in output.tokens:
            record = self.requests[token.request_id]
            record.token_ids.append(token.token_id)
            record.steps.append(step)
            record.finish_reason = token.finish_reason


def add_named(engine: Engine, request: Request) -> None:
    """`add_request` whose ValueError says which request of the workload it was."""
    try:
        engine.add_request(request)
    except ValueError as error:
        raise ValueError(
            f"the engine refuses request {request.request_id} ({request.num_prompt_tokens} prompt "
            f"tokens, {request.max_tokens} output tokens): {error}"
        ) from error


def check_fit(engine: Engine, workload: Workload, seed: int) -> None:
    """Refuse a workload with a request that can never run, before any time is spent on it."""
    for source in workload.requests:
        try:
            add_named(engine, make_request(source, stand_in_prompt(source), seed=seed))
        except ValueError as error:
            if not source.history_len:
                raise
            raise ValueError(
                f"a conversation grows too long: {source.history_len} of the prompt tokens are "
                f"its history up to {source.follows}; {error}"
            ) from error
        engine.abort_request(source.request_id)


def run_to_end(engine: Engine, requests: Sequence[Request]) -> list[StepOutput]:
    """Submit all requests together and step until they are done; nothing is timed."""
    for request in requests:
        add_named(engine, request)
    outputs = []
    watch = StallWatch()
    while engine.has_unfinished_requests():
        outputs.append(engine.step())
        watch.check(outputs[-1])
    return outputs


def record_run(
    engine: Engine,
    workload: Workload,
    *,
    seed: int,
    clock: Clock,
    before_step: Callable[[], None],
    after_step: Callable[[], None],
) -> RunRecord:
    """Replay the workload in real time: a request is added when its arrival has come.

    One that follows another arrives when the step that gave the other's last token has returned,
    a request has been made of the answer, and the time to think is over.

    `before_step` and `after_step` are called outside the time of a step, and what they take is in
    nobody's time to the first token but of those who arrived before.
    """
    sources = {source.request_id: source for source in workload.requests}
    arrivals = Arrivals(workload, seed)
    record = RunRecord()
    watch = StallWatch()
    origin = clock.now()
    while arrivals or engine.has_unfinished_requests():
        now = clock.now() - origin
        for request in arrivals.pop_due(now):
            request_id, prompt = request.request_id, request.prompt_token_ids
            source, arrival_s = sources[request_id], request.arrival_time
            record.requests[request_id] = RequestRecord(source, prompt, arrival_s)
            add_named(engine, request)
        if not engine.has_unfinished_requests():
            clock.sleep(arrivals.next_s - now)
            continue
        before_step()
        start_s = clock.now() - origin
        output = engine.step()
        end_s = clock.now() - origin
        record.add_step(start_s, end_s, output)
        watch.check(output)
        after_step()
        for token in output.tokens:
            if token.finish_reason is not None:
                done = record.requests[token.request_id]
                arrivals.finish(done.request, done.prompt_token_ids, done.token_ids)
        arrivals.start_ready(clock.now() - origin)
    return record


class StallWatch:
    """Raises RuntimeError when an engine schedules nothing for ever."""

    def __init__(self) -> None:
        self._num_empty_steps = 0

    def check(self, output: StepOutput) -> None:
        stats = output.stats
        self._num_empty_steps = 0 if stats.num_scheduled_tokens else self._num_empty_steps + 1
        if self._num_empty_steps > _MAX_EMPTY_STEPS:
            raise RuntimeError(
                f"the engine has scheduled nothing for {_MAX_EMPTY_STEPS} steps with "
                f"{stats.num_running} requests running and {stats.num_waiting} waiting"
            )
