"""Steps that are launched before the tokens of the step before are known."""

from collections import deque
from typing import NamedTuple

from folovllm.interfaces import StepOutput, StepStats
from folovllm.sampling.sampler import TokensOnTheWay

from .model_runner import ModelRunner
from .scheduler import Scheduler, SchedulerOutput


class StepInFlight(NamedTuple):
    """A step that was launched and whose tokens have not been read."""

    scheduler_output: SchedulerOutput
    stats: StepStats
    tokens: TokensOnTheWay


class StepPipeline:
    """Schedules and launches `num_ahead` steps more before it reads the tokens of one.

    The device then finds its next step when it has done one, and the host plans, reads and reports
    meanwhile. The scheduler needs no token for that, only their number: a sampled token stays on
    the device, where the next step finds it. With num_ahead = 0 this is the plain loop of schedule,
    execute, update.
    """

    def __init__(self, scheduler: Scheduler, model_runner: ModelRunner, num_ahead: int) -> None:
        self.scheduler = scheduler
        self.model_runner = model_runner
        self.num_ahead = num_ahead
        self.in_flight: deque[StepInFlight] = deque()

    def step(self) -> StepOutput:
        """Launch what may be launched; return the tokens of the oldest step, once they are here."""
        if self.scheduler.has_lost_requests():
            self.start_over()  # with the steps in flight, whose tokens would come twice
        while len(self.in_flight) <= self.num_ahead and self._launch():
            pass
        if not self.in_flight:
            return StepOutput((), self.scheduler.advance(self.scheduler.schedule()))
        scheduler_output, stats, tokens = self.in_flight[0]
        output = self.scheduler.update(scheduler_output, tokens.wait(), stats)
        # In one line: an interrupt comes before, and the tokens go back, or when they are reported.
        return StepOutput(output.tokens, self.in_flight.popleft().stats)

    def _launch(self) -> bool:
        """Launch the next step; False if there is none, or if it needs tokens that are not here."""
        if not self.scheduler.has_unfinished_requests() or self.scheduler.needs_pending_tokens():
            return False
        scheduler_output = self.scheduler.schedule()
        if not scheduler_output.scheduled:  # everybody gave way to one whose last token is pending
            self.model_runner.kv_cache.copy_blocks(scheduler_output.block_copies)
            return False
        tokens = self.model_runner.launch(scheduler_output)
        stats = self.scheduler.advance(scheduler_output)
        self.in_flight.append(StepInFlight(scheduler_output, stats, tokens))
        return True

    def start_over(self) -> None:
        """Forget all steps in flight, also one of which some tokens were recorded, not reported."""
        oldest = self.in_flight[0].scheduler_output if self.in_flight else None
        self.scheduler.start_over(oldest)
        self.in_flight.clear()  # behind it: if Ctrl-C comes again before, the next step starts over
        self.model_runner.wait_for_device()
