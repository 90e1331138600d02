"""The answers of /v1/completions."""

from typing import Any

from ..outputs import CompletionOutput, RequestOutput
from .answers import finite, prompt_logprobs, token_text
from .protocol import CompletionBody


class CompletionShape:
    prefix = "cmpl"
    whole = part = "text_completion"

    def __init__(self, body: CompletionBody, prompt_texts: list[str]) -> None:
        """prompt_texts: of every prompt, where they are to be echoed."""
        self._prompt_texts = prompt_texts
        self._n = body.n or 1
        self._with_token_ids = bool(body.return_token_ids)
        self._text_lens: dict[int, int] = {}
        """Index of a choice -> characters of its text so far, for `text_offset`."""

    def choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> Any:
        echoed = self._echo(index)
        self._text_lens[index] = len(echoed)
        choice = self._choice(index, echoed + completion.text, completion)
        if output.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(output)
        if self._with_token_ids:
            choice["prompt_token_ids"] = output.prompt_token_ids
        return choice

    def opening(self, index: int) -> Any | None:
        echoed = self._echo(index)
        self._text_lens[index] = len(echoed)
        if not self._prompt_texts:
            return None
        return {"index": index, "text": echoed, "logprobs": None, "finish_reason": None}

    def delta(self, index: int, completion: CompletionOutput) -> Any:
        return self._choice(index, completion.text, completion)

    def _echo(self, index: int) -> str:
        return self._prompt_texts[index // self._n] if self._prompt_texts else ""

    def _choice(self, index: int, text: str, completion: CompletionOutput) -> dict[str, Any]:
        choice = {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(index, completion),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if self._with_token_ids:
            choice["token_ids"] = completion.token_ids
        return choice

    def _logprobs(self, index: int, completion: CompletionOutput) -> dict[str, Any] | None:
        if completion.logprobs is None:
            return None
        positions = list(zip(completion.token_ids, completion.logprobs, strict=True))
        tokens = [token_text(token_id, position[token_id]) for token_id, position in positions]
        offsets = []
        for token in tokens:
            offsets.append(self._text_lens[index])
            self._text_lens[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [finite(position[t].logprob) for t, position in positions],
            "top_logprobs": [
                {token_text(t, logprob): finite(logprob.logprob) for t, logprob in position.items()}
                for _, position in positions
            ],
            "text_offset": offsets,
        }
