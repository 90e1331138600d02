"""From an engine's tokens to the outputs of the prompts that asked for them."""

from collections.abc import Iterable
from typing import NamedTuple

from ..interfaces import StepOutput, TokenOutput
from ..request import FinishReason
from .output_state import CompletionState, PromptState


class ProcessedStep(NamedTuple):
    """What a step's tokens ended."""

    stopped_request_ids: list[str]
    """Ended by a stop string, so that the engine does not know yet: abort them."""
    finished_prompts: list[PromptState]


class OutputProcessor:
    """Knows every prompt that is in the engine and hands each token to the right one.

    Several calls may be under way at once (streams that are read in turns): whoever runs a step
    gets tokens for all of them.
    """

    def __init__(self) -> None:
        self._active: dict[str, tuple[PromptState, CompletionState]] = {}

    def add(self, prompt: PromptState, completion: CompletionState) -> None:
        self._active[completion.request.request_id] = (prompt, completion)

    def remove(self, prompts: Iterable[PromptState]) -> list[str]:
        """Forget these prompts; returns the ids of their requests that had not finished."""
        return [
            completion.request.request_id
            for prompt in prompts
            for completion in prompt.completions
            if self._active.pop(completion.request.request_id, None) is not None
        ]

    def process(self, step_output: StepOutput, now: float) -> ProcessedStep:
        """Record a step's tokens, which came at `now` (seconds); forget finished requests.

        Tokens of requests that are not ours are left alone.
        """
        return self._record(step_output.tokens, now)

    def _record(self, tokens: Iterable[TokenOutput], now: float) -> ProcessedStep:
        stopped = []
        finished = []
        for token in tokens:
            found = self._active.get(token.request_id)
            if found is None:
                continue
            prompt, completion = found
            completion.append(token)
            prompt.record_token(now)
            if completion.finish_reason is not None:
                del self._active[token.request_id]
                if token.finish_reason is None:
                    stopped.append(token.request_id)
                if prompt.finished:
                    finished.append(prompt)
        return ProcessedStep(stopped, finished)

    def catch_up(self, now: float) -> ProcessedStep:
        """Record the tokens that requests got in a step that was broken off before it told us.

        Their log-probabilities are lost: a request that asked for them ends as aborted.
        """
        lost = []
        unreported = []
        for prompt, completion in list(self._active.values()):
            request = completion.request
            token_ids = request.output_token_ids[completion.num_tokens :]
            if token_ids and request.sampling_params.logprobs is not None:
                completion.finish_reason = FinishReason.ABORT
                del self._active[request.request_id]
                lost.append((request.request_id, prompt))
                continue
            reasons = [None] * (len(token_ids) - 1) + [request.finish_reason]
            unreported += [
                TokenOutput(request.request_id, token_id, reason, None)
                for token_id, reason in zip(token_ids, reasons, strict=False)
            ]
        processed = self._record(unreported, now)
        return ProcessedStep(
            processed.stopped_request_ids + [request_id for request_id, _ in lost],
            processed.finished_prompts + [prompt for _, prompt in lost if prompt.finished],
        )
