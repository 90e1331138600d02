"""In the process of an engine: when it may step, and what of its steps is told to a watcher."""

import time
from collections.abc import Callable
from typing import Any

from ...interfaces import Engine, StepOutput
from ..core_messages import Pause, PlannedStep, Resume, Snapshot, StepOnce, Unwatch, Watch
from .engine_view import view_engine
from .roofline import Roofline, measure_roofline
from .scheduler_watch import SchedulerWatch
from .step_facts import Plan
from .step_story import tell_step

INTERVAL_S = 0.1
"""Between two snapshots of an engine that is not paused."""


class EngineWatch:
    """Steps an engine, and makes a snapshot of some steps if somebody watches.

    Of an engine that runs, a step is recorded when INTERVAL_S have passed since the last one: the
    others cost a look at the clock. Of a paused one every step is. Without a watcher the engine is
    stepped as if this class were not there.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.perf_counter) -> None:
        self.is_watched = False
        self.is_paused = False
        self._engine = engine
        self._clock = clock
        self._scheduler: Any = getattr(engine, "scheduler", None)
        self._watch = None if self._scheduler is None else SchedulerWatch(self._scheduler)
        self._num_steps = 0
        self._num_owed = 0
        """Steps that a paused engine was asked for and has not done."""
        self._has_news = False
        """Whether something has happened since the last snapshot."""
        self._last_s = float("-inf")
        self._plans: list[Plan] = []
        self._story: list[str] = []
        self._step_s: float | None = None
        self._roofline: Roofline | None = None

    @property
    def can_watch(self) -> bool:
        """Whether this engine has the scheduler that stages have."""
        return self._watch is not None

    @property
    def may_step(self) -> bool:
        return not self.is_paused or self._num_owed > 0

    @property
    def has_story(self) -> bool:
        """Whether the last step was recorded and has not been told."""
        return self.is_watched and bool(self._story)

    @property
    def has_news(self) -> bool:
        return self.is_watched and self._has_news

    def act_on(self, message: Watch | Unwatch | Pause | Resume | StepOnce) -> None:
        match message:
            case Watch():
                self.is_watched = self.can_watch
            case Unwatch():
                self.is_watched = False
            case Pause():
                self.is_paused = True
            case Resume():
                self.is_paused, self._num_owed = False, 0
            case StepOnce():
                self._owe_step()

    def measure_roofline(self) -> None:
        """What this machine can do at most, and with it how long steps must take."""
        engine: Any = self._engine
        self._roofline = measure_roofline(engine.model_runner.model)

    def _owe_step(self) -> None:
        if not self.is_paused:
            return
        if self._engine.has_unfinished_requests():
            self._num_owed += 1
        else:
            self._plans, self._step_s = [], None
            self._story = ["Nothing to do: no request is unfinished."]

    def note_change(self) -> None:
        """A message was acted on, between two steps."""
        self._has_news = True

    def step(self) -> StepOutput:
        """One step of the engine; `has_story` says whether it was recorded."""
        self._num_steps += 1
        self._num_owed = max(self._num_owed - 1, 0)
        if not self.is_watched or self._watch is None:
            return self._engine.step()
        self._has_news = True
        start_s = self._clock()
        if not self.is_paused and start_s - self._last_s < INTERVAL_S:
            return self._engine.step()
        pipeline = getattr(self._engine, "pipeline", None)
        num_in_flight = 0 if pipeline is None else len(pipeline.in_flight)
        with self._watch.recording(self._num_steps - 1, num_in_flight):
            output = self._engine.step()
        self._step_s = self._clock() - start_s
        self._last_s = start_s
        self._plans, outcomes = self._watch.take()
        self._story = tell_step(self._plans, outcomes)
        return output

    def take_snapshot(self) -> Snapshot:
        """How it stands now, with what the last recorded step did if that is news."""
        snapshot = Snapshot(
            num_steps=self._num_steps,
            is_paused=self.is_paused,
            view=view_engine(self._scheduler),
            planned=[PlannedStep(plan.number, list(plan.shares)) for plan in self._plans],
            story=self._story,
            step_s=self._step_s,
            least_s=self._least_s(),
        )
        self._plans, self._story, self._step_s, self._has_news = [], [], None, False
        return snapshot

    def _least_s(self) -> float | None:
        """Of the last step, where it can be told which one that was."""
        if self._roofline is None or len(self._plans) != 1 or not self._plans[0].shares:
            return None
        return self._roofline.least_s(self._plans[0])
