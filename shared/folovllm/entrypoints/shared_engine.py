"""One engine under all the calls of an LLM, in whatever threads they come."""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..interfaces import Engine, StepOutput
from ..request import Request
from .interrupts import interrupt_held_back
from .output_processor import OutputProcessor, ProcessedStep
from .output_state import PromptState
from .outputs import RequestOutput
from .turns import Turns


class _Call:
    """The prompts of one call that runs to its end, whoever takes the steps that finish them."""

    def __init__(self, prompts: Iterable[PromptState]) -> None:
        self.unfinished = set(prompts)
        self.finished: deque[PromptState] = deque()
        """Not reported yet."""

    def is_over(self) -> bool:
        return not self.unfinished

    def finish(self, prompt: PromptState) -> None:
        if prompt in self.unfinished:
            self.finished.append(prompt)
            self.unfinished.remove(prompt)

    def take_finished(self) -> list[PromptState]:
        # One by one: another thread may append meanwhile.
        return [self.finished.popleft() for _ in range(len(self.finished))]


class SharedEngine:
    """Several calls may be under way at once, and a step of any of them serves them all.

    To a caller that has a turn it is an engine itself, one whose steps serve the others too.
    Whatever touches the engine or the outputs happens in a turn, which one thread has at a time
    and no longer than a step (beam search: than its search). What a request's tokens are does not
    depend on who took the steps.
    """

    def __init__(self, engine: Engine, before_turn: Callable[[], None]) -> None:
        """before_turn: what a thread needs that takes a step, and another thread did not do."""
        self._engine = engine
        self._before_turn = before_turn
        self._turns = Turns()
        self._outputs = OutputProcessor()
        self._call_of: dict[PromptState, _Call] = {}
        self._dropped: deque[PromptState] = deque()
        """Prompts whose stream was thrown away; the next turn aborts them."""
        self._is_behind = False
        """Whether a step may have made tokens that were not recorded: it was broken off."""

    @contextmanager
    def turn(self, is_over: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Have the engine for the block, or find that `is_over` (see `Turns`): then False."""
        with self._turns.turn(is_over) as has_turn:
            if has_turn:
                self._before_turn()
                self._abort_dropped()
            yield has_turn

    def add_request(self, request: Request) -> None:
        """As the engine's, in a turn of the caller's, who gets the tokens from `step` alone."""
        with interrupt_held_back():
            self._engine.add_request(request)

    def abort_request(self, request_id: str) -> None:
        with interrupt_held_back():
            self._engine.abort_request(request_id)

    def has_unfinished_requests(self) -> bool:
        return self._engine.has_unfinished_requests()

    def run(
        self, prompts: Sequence[PromptState], on_finished: Callable[[Collection[PromptState]], Any]
    ) -> None:
        """Run these prompts to their end; on any exception abort what is left of them.

        on_finished: gets those of them that are finished, after every step that we wait for.
        """
        call = _Call(prompts)
        try:
            # Once per call and not per step: to change a signal's handler takes its time.
            with interrupt_held_back() as interrupt:
                with self.turn():
                    self._enqueue(prompts, call)
                while not call.is_over():
                    with self.turn(call.is_over) as has_turn:
                        if has_turn and not call.is_over():
                            self._step_for(len(call.unfinished))
                    interrupt.let_through()
                    on_finished(call.take_finished())
        except BaseException:
            self.abort(prompts)
            raise

    def start(self, prompt: PromptState) -> None:
        """Queue a prompt whose output is then asked for with `next_output`."""
        try:
            with interrupt_held_back(), self.turn():
                self._enqueue([prompt], None)
        except BaseException:
            self.abort([prompt])
            raise

    def next_output(self, prompt: PromptState, num_seen: int) -> RequestOutput:
        """The output as soon as it has more than `num_seen` tokens, or is finished."""
        with interrupt_held_back() as interrupt:
            while True:
                with self.turn():
                    if not prompt.finished and prompt.num_output_tokens <= num_seen:
                        self._step_for(1)
                    if prompt.finished or prompt.num_output_tokens > num_seen:
                        return prompt.output()
                interrupt.let_through()

    def abort(self, prompts: Sequence[PromptState]) -> None:
        """Take these prompts back, as far as they are unfinished."""
        with interrupt_held_back(), self.turn():
            self._abort(prompts)

    def drop(self, prompt: PromptState) -> None:
        """As `abort`, at once or in the next turn: waits for nobody, so a finaliser may call it."""
        self._dropped.append(prompt)
        self._turns.try_turn(self._abort_dropped)

    def reset_prefix_cache(self) -> None:
        """As the engine's, of a stage that has one; AttributeError where there is none."""
        engine: Any = self._engine
        with interrupt_held_back(), self.turn():
            engine.reset_prefix_cache()

    def step(self) -> StepOutput:
        """One step of the engine, in a turn of the caller's; everybody's tokens are recorded."""
        with interrupt_held_back():
            return self._step()

    def _step(self) -> StepOutput:
        if self._is_behind:
            self._catch_up()
        self._is_behind = True
        output = self._engine.step()
        self._finish(self._outputs.process(output, time.perf_counter()))
        self._is_behind = False
        return output

    def _catch_up(self) -> None:
        """Record what came of a step that was broken off, for whichever call it was."""
        self._finish(self._outputs.catch_up(time.perf_counter()))
        for prompt, call in list(self._call_of.items()):
            if prompt.finished:
                self._report(prompt, call)

    def _step_for(self, num_waited_for: int) -> None:
        """A step that must bring something; RuntimeError if it cannot."""
        if self._engine.has_unfinished_requests() or self._is_behind:
            self._step()
            return
        raise RuntimeError(
            f"{type(self._engine).__name__} has nothing left to run, but {num_waited_for} prompts "
            f"are unfinished: their requests were lost, or aborted behind the back of this LLM"
        )

    def _enqueue(self, prompts: Iterable[PromptState], call: _Call | None) -> None:
        for prompt in prompts:
            if call is not None:
                self._call_of[prompt] = call
            for completion in prompt.completions:
                self._engine.add_request(completion.request)
                self._outputs.add(prompt, completion)

    def _finish(self, processed: ProcessedStep) -> None:
        for request_id in processed.stopped_request_ids:
            self._engine.abort_request(request_id)
        for prompt in processed.finished_prompts:
            call = self._call_of.get(prompt)
            if call is not None:
                self._report(prompt, call)

    def _report(self, prompt: PromptState, call: _Call) -> None:
        call.finish(prompt)
        del self._call_of[prompt]

    def _abort(self, prompts: Sequence[PromptState]) -> None:
        for prompt in prompts:
            self._call_of.pop(prompt, None)
        for request_id in self._outputs.remove(prompts):
            self._engine.abort_request(request_id)

    def _abort_dropped(self) -> None:
        while self._dropped:
            self._abort([self._dropped.popleft()])
