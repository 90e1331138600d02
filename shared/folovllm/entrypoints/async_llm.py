"""The asynchronous interface: an engine in a process of its own, `async for` over its outputs."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Self

from ..request import SamplingParams
from ..text.tokenizer import Tokenizer
from .async_engine import AsyncEngine
from .async_stream import AsyncOutputStream, QueueFullError
from .core_messages import (
    MeasureRoofline,
    Pause,
    ResetPrefixCache,
    Resume,
    Snapshot,
    StepOnce,
    Unwatch,
    Watch,
)
from .default_sampling import default_sampling_params
from .engine_observer import EngineObserver
from .llm import LLM, no_prefixes
from .outputs import RequestOutput, RequestOutputKind
from .prompts import Prompt, PromptInput, parse_prompt
from .request_builder import RequestBuilder

_MAX_TOKENS_AT_ONCE = 8192
"""To look at so many ids takes a millisecond."""


class AsyncLLM:
    """A model behind one stage's engine, which runs in a process of its own.

        async with AsyncLLM(LLM, "models/SmolLM2-135M-Instruct", max_model_len=1024) as llm:
            async for output in llm.generate("Hello", SamplingParams(max_tokens=8), "request-0"):
                print(output.outputs[0].text)

    Prompts become tokens and tokens become text here, in the process of the event loop, so that no
    step waits for it; the engine gets and gives token ids. Requests get the tokens that `LLM` would
    have given them. All of it belongs to the event loop that it was entered in.
    """

    def __init__(
        self,
        llm_class: type[LLM],
        model: str | Path | None = None,
        *,
        max_queue_len: int | None = None,
        step_timeout_s: float | None = None,
        observers: Sequence[EngineObserver] = (),
        **llm_options: Any,
    ) -> None:
        """llm_class: a stage's LLM, of which `llm_options` are the arguments.

        max_queue_len: most requests that may wait for their first step; None sets no limit.
        step_timeout_s: the engine is taken for dead, and ended, when a step takes longer; None
        lets it hang for ever.
        """
        self._llm_class = llm_class
        self._model = model
        self._llm_options = llm_options
        self._max_queue_len = max_queue_len
        self._engine = AsyncEngine(observers, step_timeout_s)

    async def __aenter__(self) -> Self:
        """Start the engine and wait until it is ready; errors are those of `LLM.__init__`."""
        self.facts = await self._engine.start(self._llm_class, self._model, self._llm_options)
        try:
            path = self.facts.tokenizer_path
            self.tokenizer = None if path is None else await asyncio.to_thread(Tokenizer, path)
        except BaseException:
            await self._engine.stop()
            raise
        self._requests = RequestBuilder(
            tokenizer=self.tokenizer,
            vocab_size=self.facts.vocab_size,
            max_model_len=self.facts.max_model_len,
            eos_token_ids=self.facts.eos_token_ids,
            seed=self.facts.seed,
            scheduling_policy=self.facts.scheduling_policy,
        )
        return self

    async def __aexit__(self, *exception: object) -> None:
        """End the engine; requests that are under way are lost."""
        await self._engine.stop()

    @property
    def num_queued(self) -> int:
        """Requests that wait for their first step."""
        return self._engine.num_queued

    @property
    def num_unfinished(self) -> int:
        return self._engine.num_unfinished

    @property
    def died(self) -> asyncio.Event:
        """Set when the engine's process has ended, or hangs."""
        return self._engine.died

    @property
    def death(self) -> str | None:
        """What is known of why it ended; None while it has not."""
        return self._engine.death

    @property
    def process_id(self) -> int:
        """Of the engine's process."""
        return self._engine.process_id

    async def generate(
        self,
        prompt: PromptInput,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int | None = None,
        output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE,
    ) -> AsyncIterator[RequestOutput]:
        """Complete one prompt; yields an output whenever there is something new.

        request_id: what the outputs are called; priority: as in `LLM.generate`. ValueError, at the
        first output, for what cannot work. Leaving the loop, or being cancelled in it, aborts.
        """
        names = None if request_id is None else [request_id]
        (stream,) = await self.start(
            [prompt], sampling_params, names, priority=priority, output_kind=output_kind
        )
        try:
            async for output in stream:
                yield output
        finally:
            stream.close()

    async def start(
        self,
        prompts: Sequence[PromptInput],
        sampling_params: SamplingParams | None = None,
        request_ids: Sequence[str] | None = None,
        *,
        priority: int | None = None,
        output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE,
        arrival_time: float | None = None,
    ) -> list[AsyncOutputStream]:
        """Queue prompts; when this returns, the engine has accepted all of them.

        arrival_time: since when latencies count, on the clock of `time.perf_counter`; None is now,
        before the prompts become tokens.

        ValueError if one of them cannot run, QueueFullError if they are too many; then none runs.
        Every stream must be read to its end or closed.
        """
        arrived = time.perf_counter() if arrival_time is None else arrival_time
        self._engine.check_alive()
        self._check_queue(len(prompts))
        if _are_read_at_once(prompts):
            parsed = self._parse(prompts)
        else:
            parsed = await asyncio.to_thread(self._parse, prompts)
        params = sampling_params or self.get_default_sampling_params()
        priorities = None if priority is None else [priority] * len(prompts)
        if params.structured_outputs is None:
            states = self._requests.build(parsed, params, priorities, arrived)
        else:  # to read a schema takes a moment
            build = self._requests.build
            states = await asyncio.to_thread(build, parsed, params, priorities, arrived)
        self._engine.check_alive()
        self._check_queue(params.n * len(prompts))
        streams = [AsyncOutputStream(state, output_kind, self._engine) for state in states]
        await self._engine.submit(streams)
        for state, name in zip(states, request_ids or (), strict=request_ids is not None):
            state.request_id = name
        return streams

    def get_default_sampling_params(self) -> SamplingParams:
        """As `LLM`'s: what the model's generation_config.json suggests."""
        return default_sampling_params(self.facts.model_path)

    def reset_prefix_cache(self) -> None:
        """As `LLM`'s, before the next step; ValueError in stages that keep no prefixes."""
        if not self.facts.keeps_prefixes:
            raise no_prefixes(self._llm_class)
        self._engine.send(ResetPrefixCache())

    def watch(self, on_snapshot: Callable[[Snapshot], None]) -> None:
        """Hand snapshots of the engine at work to this callable, until `unwatch`.

        Of an engine that is not paused at most ten per second. ValueError if it is no stage's.
        """
        if not self.facts.can_be_watched:
            raise ValueError("this engine has no scheduler of a stage that could be watched")
        self._engine.on_snapshot = on_snapshot
        self._engine.send(Watch())

    def measure_roofline(self) -> None:
        """Let snapshots say how long a step must take; the engine measures it before it goes on."""
        self._engine.send(MeasureRoofline())

    def unwatch(self) -> None:
        self._engine.on_snapshot = None
        self._engine.send(Unwatch())

    def pause(self) -> None:
        """Let the engine do no step but those of `step_once`; requests come and go as ever."""
        self._engine.send(Pause())

    def step_once(self) -> None:
        """One step of a paused engine; nothing happens if it is not paused or nothing waits."""
        self._engine.send(StepOnce())

    def resume(self) -> None:
        self._engine.send(Resume())

    def check_alive(self) -> None:
        """EngineDeadError if the engine's process has ended."""
        self._engine.check_alive()

    def _check_queue(self, num_new: int) -> None:
        limit = self._max_queue_len
        if limit is not None and self.num_queued + num_new > limit:
            raise QueueFullError(
                f"{self.num_queued} requests are waiting and {limit} may wait at most, so that "
                f"{num_new} more cannot be taken; try again later"
            )

    def _parse(self, prompts: Sequence[PromptInput]) -> list[Prompt]:
        vocab_size = self.facts.vocab_size
        return [
            parse_prompt(prompt, index, self.tokenizer, vocab_size)
            for index, prompt in enumerate(prompts)
        ]


def _are_read_at_once(prompts: Sequence[PromptInput]) -> bool:
    """Whether they are few tokens: to have a thread look at them would take longer than to look.

    Whoever wants the interpreter while another thread has it waits for up to 5 ms.
    """
    num_tokens = 0
    for prompt in prompts:
        ids = prompt.token_ids if isinstance(prompt, Prompt) else prompt
        if isinstance(ids, str) or not isinstance(ids, Sequence):
            return False
        num_tokens += len(ids)
    return num_tokens <= _MAX_TOKENS_AT_ONCE
