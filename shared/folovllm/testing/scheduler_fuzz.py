"""Runs of a scheduler in which everything happens at random times, from a fixed seed."""

import random
from contextlib import AbstractContextManager

from ..request import Request, SamplingParams
from .line_interrupts import LineInterrupt
from .scheduler_driver import MAX_STEPS, SchedulerDriver
from .symbolic_cache import VOCAB_SIZE


class SchedulerFuzz:
    """One run: arrivals, forks, aborts and interrupts at random times."""

    def __init__(
        self, rng: random.Random, driver: SchedulerDriver, max_model_len: int, files: list[str]
    ) -> None:
        self.rng = rng
        self.driver = driver
        self.max_model_len = max_model_len
        self.files = files
        self.num_to_come = rng.randint(1, 14)
        self.arrival_rate = rng.choice([0.3, 0.95])
        self.max_prompt_len = rng.choice([3, max_model_len - 1])
        self.num_interrupts = rng.choice([0, 0, 3])
        self.abort_rate = rng.choice([0.0, 0.1])

    def run(self) -> None:
        for _ in range(MAX_STEPS):
            while self.num_to_come and self.rng.random() < self.arrival_rate:
                self.num_to_come -= 1
                self.driver.add(self._draw_request())
            self._abort_somebody()
            if self.driver.scheduler.has_unfinished_requests():
                self.driver.step(self._draw_interrupt(), self._while_it_runs)
            elif not self.num_to_come:
                return self.driver.check_end()
        raise AssertionError(f"the scheduler still has work after {MAX_STEPS} steps")

    def _draw_request(self) -> Request:
        rng = self.rng
        num_earlier = len(self.driver.requests)
        prompt_len = rng.randint(1, min(self.max_prompt_len, self.max_model_len - 1))
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(prompt_len)]
        parent = None
        if num_earlier and rng.random() < 0.5:
            parent = rng.choice(self.driver.requests[-4:])
            # A completion of the same prompt, or a beam that goes on where its parent is.
            prompt = rng.choice([parent.prompt_token_ids, parent.token_ids])
            if len(prompt) >= self.max_model_len:
                prompt = parent.prompt_token_ids
        max_tokens = rng.randint(1, min(self.max_model_len - len(prompt), 25))
        stops = rng.sample(range(VOCAB_SIZE), rng.choice([0, 3]))
        return Request(
            request_id=f"r{num_earlier}",
            prompt_token_ids=list(prompt),
            sampling_params=SamplingParams(max_tokens=max_tokens),
            eos_token_ids=frozenset(stops),
            seed=rng.randrange(100),
            priority=rng.randrange(3),
            fork_of=parent,
        )

    def _draw_interrupt(self) -> AbstractContextManager[None] | None:
        if self.num_interrupts and self.rng.random() < 0.2:
            self.num_interrupts -= 1
            return LineInterrupt(self.files, self.rng.randint(1, 150))
        return None

    def _while_it_runs(self) -> None:
        self._abort_somebody()
        if self.num_interrupts and self.rng.random() < 0.1:
            self.num_interrupts -= 1
            raise KeyboardInterrupt

    def _abort_somebody(self) -> None:
        if self.driver.requests and self.rng.random() < self.abort_rate:
            request = self.rng.choice(self.driver.requests)
            self.driver.abort(request)
            self.driver.abort(request)
