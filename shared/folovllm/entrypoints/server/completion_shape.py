"""The answers of /v1/completions."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..output_state import PromptState
from ..outputs import CompletionOutput, Logprob, RequestOutput
from .answers import finite, prompt_logprobs, token_text
from .protocol import CompletionBody


class CompletionShape:
    prefix = "cmpl"
    whole = part = "text_completion"

    def __init__(
        self,
        body: CompletionBody,
        prompt_texts: list[str],
        text_of_token: Callable[[int], str],
    ) -> None:
        """prompt_texts: of every prompt, where they are to be echoed."""
        self._prompt_texts = prompt_texts
        self._text_of_token = text_of_token
        self._n = body.n or 1
        self._with_token_ids = bool(body.return_token_ids)
        self._with_prompt_logprobs = body.prompt_logprobs is not None
        self._echoes_logprobs = bool(body.echo) and body.logprobs is not None
        self.shows_output = not body.echoes_only
        self.has_plain_deltas = (
            self.shows_output and body.logprobs is None and not body.return_token_ids
        )
        self._text_lens: dict[int, int] = {}
        """Index of a choice -> characters of its text so far, for `text_offset`."""

    def visible(self, completion: CompletionOutput) -> CompletionOutput:
        if self.shows_output:
            return completion
        logprobs = None if completion.logprobs is None else completion.logprobs[:0]
        return replace(
            completion, text="", token_ids=[], logprobs=logprobs, finish_reason="length",
            stop_reason=None,
        )  # fmt: skip

    def choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> Any:
        echoed = self._echo(index)
        before = self._echoed_logprobs(index, output.prompt_token_ids, output.prompt_logprobs)
        choice = self._choice(index, echoed + completion.text, completion)
        if before is not None:
            behind = choice["logprobs"]
            choice["logprobs"] = {name: before[name] + behind[name] for name in before}
        if self._with_prompt_logprobs:
            choice["prompt_logprobs"] = prompt_logprobs(output)
        if self._with_token_ids:
            choice["prompt_token_ids"] = output.prompt_token_ids
        return choice

    def opening(self, index: int, prompt: PromptState) -> Any | None:
        echoed = self._echo(index)
        logprobs = self._echoed_logprobs(index, prompt.token_ids, prompt.prompt_logprobs())
        if not self._prompt_texts:
            return None
        return {"index": index, "text": echoed, "logprobs": logprobs, "finish_reason": None}

    def delta(self, index: int, completion: CompletionOutput) -> Any:
        return self._choice(index, completion.text, completion)

    def _echo(self, index: int) -> str:
        """The prompt's text if it is to be echoed; offsets of a choice begin behind it."""
        echoed = self._prompt_texts[index // self._n] if self._prompt_texts else ""
        self._text_lens[index] = len(echoed)
        return echoed

    def _choice(self, index: int, text: str, completion: CompletionOutput) -> dict[str, Any]:
        logprobs = completion.logprobs
        choice = {
            "index": index,
            "text": text,
            "logprobs": None
            if logprobs is None
            else self._logprobs(index, completion.token_ids, logprobs),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if self._with_token_ids:
            choice["token_ids"] = completion.token_ids
        return choice

    def _echoed_logprobs(
        self,
        index: int,
        token_ids: Sequence[int],
        positions: Sequence[dict[int, Logprob] | None] | None,
    ) -> dict[str, list[Any]] | None:
        """Of the prompt's tokens, where they are to be echoed; offsets go on behind them.

        RuntimeError if they are not known yet: a prompt's first completion begins first.
        """
        if not self._echoes_logprobs:
            return None
        if positions is None:
            raise RuntimeError("a completion has begun before its prompt's log-probabilities came")
        self._text_lens[index] = 0
        return self._logprobs(index, token_ids, positions)

    def _logprobs(
        self,
        index: int,
        token_ids: Sequence[int],
        positions: Sequence[dict[int, Logprob] | None],
    ) -> dict[str, list[Any]]:
        """A prompt's first token has no position: nothing stands before it."""
        tokens: list[str] = []
        offsets: list[int] = []
        chosen: list[float | None] = []
        top: list[dict[str, float] | None] = []
        for token_id, position in zip(token_ids, positions, strict=True):
            if position is None:
                tokens.append(self._text_of_token(token_id))
                chosen.append(None)
                top.append(None)
            else:
                tokens.append(token_text(token_id, position[token_id]))
                chosen.append(finite(position[token_id].logprob))
                top.append({token_text(t, p): finite(p.logprob) for t, p in position.items()})
            offsets.append(self._text_lens[index])
            self._text_lens[index] += len(tokens[-1])
        return {
            "tokens": tokens,
            "token_logprobs": chosen,
            "top_logprobs": top,
            "text_offset": offsets,
        }
