"""What has come of a prompt so far, and the outputs that a caller gets of it."""

from ..interfaces import TokenLogprobs, TokenOutput
from ..request import FinishReason, Request
from ..text.detokenizer import IncrementalDetokenizer
from ..text.tokenizer import Tokenizer
from .outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, make_logprobs
from .prompts import Prompt


class CompletionState:
    """One request of the engine and the output that has come of it so far.

    Text and log-probabilities are made when somebody looks: a step only notes its token. Where
    there are stop strings, every token is turned into text as it comes, since it may be the last.
    """

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer | None) -> None:
        params = request.sampling_params
        self.request = request
        self.finish_reason: FinishReason | None = None
        self.index = index
        """Which of the prompt's `n` completions this is."""
        tokenizer = tokenizer if params.detokenize else None
        self._tokenizer = tokenizer
        self._detokenizer = (
            None
            if tokenizer is None
            else IncrementalDetokenizer(tokenizer, request.prompt_token_ids, params)
        )
        self._is_searched = bool(params.stop_strings)
        self._token_ids: list[int] = []
        self._num_hidden_tokens = 0
        """1 behind a stop token: as in vLLM, it is part of token_ids but not of the text."""
        self._text_parts: list[str] = []
        self._num_decoded_tokens = 0
        self._is_text_complete = False
        self._raw_logprobs: list[TokenLogprobs] = []
        self._logprobs: list[dict[int, Logprob]] = []
        self._cumulative_logprob = 0.0
        self._num_taken_tokens = 0
        """Those that were handed out."""
        self._stop_reason: int | str | None = None

    @property
    def num_tokens(self) -> int:
        return len(self._token_ids)

    @property
    def num_taken_tokens(self) -> int:
        """Tokens that somebody has got to see."""
        return self._num_taken_tokens

    @property
    def has_news(self) -> bool:
        """Whether there are tokens that nobody has got to see."""
        return self._num_taken_tokens != len(self._token_ids)

    def append(self, token: TokenOutput) -> None:
        """Take the next token; sets `finish_reason` if the engine or a stop string ends here."""
        self._token_ids.append(token.token_id)
        if token.logprobs is not None:
            self._raw_logprobs.append(token.logprobs)
        if token.finish_reason is FinishReason.STOP:
            self._note_stop_token(token.token_id)
        self.finish_reason = token.finish_reason
        if self._is_searched:
            self._search(token.token_id)

    def describe_prompt(self) -> list[dict[int, Logprob] | None] | None:
        """Log-probabilities of the prompt in the form that callers get; None if there are none."""
        if not self._token_ids or self.request.sampling_params.prompt_logprobs is None:
            return None
        token_ids = self.request.prompt_token_ids[1:]
        positions = zip(self.request.prompt_logprobs, token_ids, strict=True)
        return [None, *(make_logprobs(*position, self._tokenizer) for position in positions)]

    def output(self) -> CompletionOutput:
        """A copy of the present state."""
        text = self._text()
        self._text_parts = [text]
        self._num_taken_tokens = len(self._token_ids)
        return self._output(text, first=0)

    def take_delta(self) -> CompletionOutput | None:
        """What is new since the last call, None if nothing is; at the cost of that alone.

        A completion is read by this or by `output`, not by both.
        """
        if not self.has_news:
            return None
        first = self._num_taken_tokens
        return self._output(self.take_text(), first)

    def take_text(self) -> str:
        """The text of `take_delta`, for whoever asks for nothing else."""
        num_tokens = len(self._token_ids)
        if (
            num_tokens == self._num_decoded_tokens + 1  # a stream that is read as it comes
            and self.finish_reason is None
            and not self._is_searched
            and self._detokenizer is not None
        ):
            self._num_decoded_tokens = self._num_taken_tokens = num_tokens
            return self._detokenizer.extend(self._token_ids[-1:])
        text = self._text()
        self._text_parts = []
        self._num_taken_tokens = len(self._token_ids)
        return text

    def _text(self) -> str:
        if not self._is_text_complete:
            self._decode()
        parts = self._text_parts
        return parts[0] if len(parts) == 1 else "".join(parts)

    def _output(self, text: str, first: int) -> CompletionOutput:
        """With the tokens from `first` on."""
        with_logprobs = self.request.sampling_params.logprobs is not None
        if with_logprobs:
            self._describe_logprobs()
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=self._token_ids[first:],
            cumulative_logprob=self._cumulative_logprob if with_logprobs else None,
            logprobs=self._logprobs[first:] if with_logprobs else None,
            finish_reason=None if self.finish_reason is None else self.finish_reason.value,
            stop_reason=self._stop_reason,
        )

    def _note_stop_token(self, token_id: int) -> None:
        params = self.request.sampling_params
        if token_id in (params.stop_token_ids or ()):
            self._stop_reason = token_id
        if not params.include_stop_str_in_output:
            self._num_hidden_tokens = 1

    def _search(self, token_id: int) -> None:
        """Turn one token into text, and end the request if that completes a stop string."""
        assert self._detokenizer is not None  # RequestBuilder refuses stop strings without
        if not self._num_hidden_tokens:
            self._text_parts.append(self._detokenizer.append(token_id))
        if self._detokenizer.stop_reason is not None:
            self.finish_reason = FinishReason.STOP
            self._stop_reason = self._detokenizer.stop_reason
            self._is_text_complete = True

    def _decode(self) -> None:
        """Turn the tokens since the last look into text; at the end, what was held back as well."""
        if self._detokenizer is None:
            return
        is_finished = self.finish_reason is not None
        if not self._is_searched:
            num_tokens = len(self._token_ids) - self._num_hidden_tokens
            new_ids = self._token_ids[self._num_decoded_tokens : num_tokens]
            self._text_parts.append(self._detokenizer.extend(new_ids))
            self._num_decoded_tokens = num_tokens
        if is_finished:
            self._text_parts.append(self._detokenizer.finish())
            self._is_text_complete = True

    def _describe_logprobs(self) -> None:
        """Put the log-probabilities since the last look into the form that callers get."""
        first = len(self._logprobs)
        positions = zip(self._raw_logprobs[first:], self._token_ids[first:], strict=False)
        for position, token_id in positions:
            self._cumulative_logprob += position.logprob
            self._logprobs.append(make_logprobs(position, token_id, self._tokenizer))


class PromptState:
    """One prompt and its completions, one per `n`."""

    def __init__(
        self, request_id: str, prompt: Prompt, completions: list[CompletionState], arrival: float
    ) -> None:
        self.completions = completions
        self.num_output_tokens = 0
        """Of all completions together; it grows whenever there is something new to see."""
        self.num_prompt_tokens = len(prompt.token_ids)
        self.request_id = request_id
        self._prompt = prompt
        self._arrival_time = arrival
        self._first_token_time: float | None = None
        self._last_token_time: float | None = None
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @property
    def finished(self) -> bool:
        if self.completions[0].finish_reason is None:  # the usual answer, to a frequent question
            return False
        return all(completion.finish_reason is not None for completion in self.completions)

    @property
    def token_ids(self) -> list[int]:
        """Of the prompt; no copy."""
        return self._prompt.token_ids

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompt that the engine had not to compute."""
        return self.completions[0].request.num_cached_tokens or 0

    @property
    def num_taken_tokens(self) -> int:
        """Output tokens that somebody has got to see, of all completions together."""
        return sum([completion.num_taken_tokens for completion in self.completions])

    def record_token(self, now: float) -> None:
        """Note that a completion got a token at this time, in seconds."""
        self.num_output_tokens += 1
        self._last_token_time = now
        if self._first_token_time is None:
            self._first_token_time = now

    def request_of(self, request_id: str) -> Request:
        """One of this prompt's requests; StopIteration if it is none."""
        requests = (completion.request for completion in self.completions)
        return next(request for request in requests if request.request_id == request_id)

    def prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        """Per token of the prompt, None for the first; None before the first completion begins.

        And where nobody asked for them.
        """
        if self._prompt_logprobs is None:
            self._prompt_logprobs = self.completions[0].describe_prompt()
        return self._prompt_logprobs

    def output(self) -> RequestOutput:
        """A copy of the present state."""
        outputs = [completion.output() for completion in self.completions]
        known = self.prompt_logprobs()
        copy = None if known is None else list(known)
        return self._output(outputs, list(self._prompt.token_ids), copy)

    def take_delta(self) -> RequestOutput:
        """The completions of which something is new, and of these that.

        The list of the prompt's tokens is no copy; its log-probabilities come once.
        """
        deltas = [completion.take_delta() for completion in self.completions]
        outputs = [delta for delta in deltas if delta is not None]
        new = self.prompt_logprobs() if self._prompt_logprobs is None else None
        return self._output(outputs, self._prompt.token_ids, new)

    def with_news(self) -> list[CompletionState]:
        """The completions of which `take_delta` has not told all."""
        return [completion for completion in self.completions if completion.has_news]

    def _output(
        self,
        outputs: list[CompletionOutput],
        prompt_token_ids: list[int],
        prompt_logprobs: list[dict[int, Logprob] | None] | None,
    ) -> RequestOutput:
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt.text,
            prompt_token_ids=prompt_token_ids,
            outputs=outputs,
            finished=self.finished,
            metrics=RequestMetrics(
                self._arrival_time, self._first_token_time, self._last_token_time
            ),
            num_cached_tokens=self.num_cached_tokens,
            prompt_logprobs=prompt_logprobs,
        )
