"""The answers of /v1/chat/completions."""

from itertools import starmap
from typing import Any

from ..output_state import PromptState
from ..outputs import CompletionOutput, Logprob, RequestOutput
from .answers import finite, prompt_logprobs, token_text
from .protocol import ChatBody


class ChatShape:
    prefix = "chatcmpl"
    whole = "chat.completion"
    part = "chat.completion.chunk"

    def __init__(self, body: ChatBody) -> None:
        self._num_top = body.top_logprobs or 0
        self._with_token_ids = bool(body.return_token_ids)
        self.shows_output = True
        self.has_plain_deltas = not body.logprobs and not body.return_token_ids

    def choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> Any:
        message = {"role": "assistant", "content": completion.text}
        choice: dict[str, Any] = {"index": index, "message": message, **self._rest(completion)}
        if output.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(output)
        return choice

    def visible(self, completion: CompletionOutput) -> CompletionOutput:
        return completion

    def opening(self, index: int, prompt: PromptState) -> Any | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, index: int, completion: CompletionOutput) -> Any:
        return {"index": index, "delta": {"content": completion.text}, **self._rest(completion)}

    def _rest(self, completion: CompletionOutput) -> dict[str, Any]:
        rest: dict[str, Any] = {
            "logprobs": self._logprobs(completion),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if self._with_token_ids:
            rest["token_ids"] = completion.token_ids
        return rest

    def _logprobs(self, completion: CompletionOutput) -> dict[str, Any] | None:
        if completion.logprobs is None:
            return None
        content: list[dict[str, Any]] = []
        for token_id, position in zip(completion.token_ids, completion.logprobs, strict=True):
            top = sorted(position.items(), key=lambda item: item[1].rank)[: self._num_top]
            entry = _entry(token_id, position[token_id])
            entry["top_logprobs"] = list(starmap(_entry, top))
            content.append(entry)
        return {"content": content}


def _entry(token_id: int, logprob: Logprob) -> dict[str, Any]:
    text = token_text(token_id, logprob)
    data = list(text.encode())
    return {"token": text, "logprob": finite(logprob.logprob), "bytes": data}
