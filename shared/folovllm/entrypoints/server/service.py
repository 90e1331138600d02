"""From the body of a call to its answer: completions, chat, and what tokenizers do."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ...sampling_params import SamplingParams
from ...text.tokenizer import Tokenizer
from ..async_llm import AsyncLLM
from ..async_stream import AsyncOutputStream, QueueFullError
from ..outputs import RequestOutputKind
from ..prompts import Prompt, PromptInput, check_token_ids, split_prompts
from .answers import Answer, Shape
from .chat_shape import ChatShape
from .chunked_answer import ChunkedAnswer
from .completion_shape import CompletionShape
from .delivery import Delivery
from .errors import ApiError, invalid_value
from .event_stream import EventStream, while_connected
from .protocol import (
    Body,
    ChatBody,
    CompletionBody,
    ConversationBody,
    DetokenizeBody,
    GenerationBody,
    TokenizeBody,
    TokenizeChatBody,
)
from .settings import ServerSettings


class Service:
    """Answers calls, and knows how many are under way and whether new ones are taken."""

    def __init__(
        self, llm: AsyncLLM, model_name: str, settings: ServerSettings, defaults: SamplingParams
    ) -> None:
        """defaults: of fields that a call leaves out."""
        self.llm = llm
        self.model_name = model_name
        self.is_draining = False
        self.num_calls = 0
        """Calls that generate and have not been answered to the end."""
        self._settings = settings
        self._defaults = defaults
        # A chat goes on to the end of its turn where nobody sets a limit, a completion does not.
        has_limit = defaults.max_tokens != SamplingParams().max_tokens
        self._chat_defaults = defaults if has_limit else replace(defaults, max_tokens=None)
        self._delivery = Delivery()

    async def complete(self, request: Request, body: CompletionBody) -> Response:
        arrival_time = time.perf_counter()
        prompts = split_prompts(body.prompt)
        if not prompts:
            raise ApiError(400, "prompt is an empty list", param="prompt")
        params = self._params(body, self._defaults, len(prompts))
        # In the thread pool, as all that takes as long as a text is; ids are only passed on.
        taken: Sequence[PromptInput] = prompts
        if body.add_special_tokens is False or body.cache_salt is not None:
            taken = await asyncio.to_thread(self._take_prompts, prompts, body)
        texts = await asyncio.to_thread(self._texts, prompts) if body.echo else []
        shape = CompletionShape(body, texts, self._token_text)
        return await self._generate(request, body, taken, params, shape, arrival_time)

    async def chat(self, request: Request, body: ChatBody) -> Response:
        arrival_time = time.perf_counter()
        params = self._params(body, self._chat_defaults, 1)
        prompt = await asyncio.to_thread(self._render, body, body.cache_salt)
        shape = ChatShape(body)
        return await self._generate(request, body, [prompt], params, shape, arrival_time)

    async def tokenize(self, body: TokenizeBody | TokenizeChatBody) -> Response:
        self._check_model(body)
        tokenizer = self._tokenizer()
        if isinstance(body, TokenizeBody):
            try:
                ids = await asyncio.to_thread(
                    tokenizer.encode, body.prompt, body.add_special_tokens
                )
            except ValueError as error:
                raise ApiError(400, str(error), param="prompt") from error
        else:
            ids = (await asyncio.to_thread(self._render, body, None)).token_ids
        content = {
            "count": len(ids),
            "max_model_len": self.llm.facts.max_model_len,
            "tokens": ids,
            "token_strs": [tokenizer.token_text(i) for i in ids]
            if body.return_token_strs
            else None,
        }
        return json_response(content)

    async def detokenize(self, body: DetokenizeBody) -> Response:
        self._check_model(body)
        tokenizer = self._tokenizer()
        wrong = next((i for i in body.tokens if not 0 <= i < self.llm.facts.vocab_size), None)
        if wrong is not None:
            raise ApiError(400, f"{wrong} is no id of a token of this model", param="tokens")
        text = await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special_tokens=False)
        return json_response({"prompt": text})

    def _params(
        self, body: GenerationBody, defaults: SamplingParams, num_prompts: int
    ) -> SamplingParams:
        """Also checks what can be checked before a prompt is looked at."""
        if self.is_draining:
            raise ApiError(503, "the server is shutting down", kind="server_error")
        self._check_model(body)
        try:
            params = body.sampling_params(defaults, self._settings)
        except ValueError as error:
            raise _invalid_value(error, body) from error
        if num_prompts * params.n > self._settings.max_n:
            raise ApiError(
                400,
                f"{num_prompts} prompts with n={params.n} are more completions than the "
                f"{self._settings.max_n} that one call may ask for",
                param="prompt",
            )
        return params

    async def _generate(
        self,
        request: Request,
        body: GenerationBody,
        prompts: Sequence[PromptInput],
        params: SamplingParams,
        shape: Shape,
        arrival_time: float,
    ) -> Response:
        self.num_calls += 1
        is_streaming = False
        try:
            kind = RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY
            streams = await while_connected(
                request.receive, self._start(prompts, params, body, kind, arrival_time)
            )
            answer = Answer(shape, self.model_name, streams, params.n)
            if body.stream:
                is_streaming = True
                chunks = ChunkedAnswer(shape, streams, params.n, answer.head, body.stream_options)
                stream = EventStream(chunks, self._delivery, lambda: self._end_call(answer))
                # So that the page can say which of the engine's requests this one is.
                stream.headers["x-engine-request-id"] = streams[0].prompt.request_id
                return stream
            try:
                content = await while_connected(request.receive, answer.whole())
            finally:
                answer.close()
            return Response(content, media_type="application/json")
        finally:
            if not is_streaming:
                self.num_calls -= 1

    def _end_call(self, answer: Answer) -> None:
        answer.close()
        self.num_calls -= 1

    async def _start(
        self,
        prompts: Sequence[PromptInput],
        params: SamplingParams,
        body: GenerationBody,
        kind: RequestOutputKind,
        arrival_time: float,
    ) -> list[AsyncOutputStream]:
        try:
            return await self.llm.start(
                prompts, params,
                priority=body.priority, output_kind=kind, arrival_time=arrival_time,
            )  # fmt: skip
        except QueueFullError as error:
            raise ApiError(429, str(error), kind="rate_limit_error") from error
        except ValueError as error:
            raise _invalid_value(error, body) from error
        except ImportError as error:
            raise ApiError(400, str(error), param="structured_outputs") from error

    def _take_prompts(
        self, prompts: Sequence[PromptInput], body: CompletionBody
    ) -> Sequence[PromptInput]:
        """The prompts, with the salt and without special tokens where the body says so."""
        taken: list[Any] = list(prompts)
        if body.add_special_tokens is False:
            tokenizer = self._tokenizer()
            taken = [
                tokenizer.encode(prompt, add_special_tokens=False)
                if isinstance(prompt, str)
                else prompt
                for prompt in taken
            ]
        if body.cache_salt is None:
            return taken
        names = ["prompt" if isinstance(p, str) else "prompt_token_ids" for p in taken]
        salt = body.cache_salt
        return [{name: p, "cache_salt": salt} for name, p in zip(names, taken, strict=True)]

    def _texts(self, prompts: Sequence[Any]) -> list[str]:
        return [
            prompt if isinstance(prompt, str) else self._text(prompt, index)
            for index, prompt in enumerate(prompts)
        ]

    def _text(self, token_ids: list[int], index: int) -> str:
        """Of a prompt of ids; ApiError for one that no token has, which a tokenizer cannot take."""
        try:
            if token_ids:
                check_token_ids(f"prompt {index}", token_ids, self.llm.facts.vocab_size)
        except ValueError as error:
            raise ApiError(400, str(error), param="prompt") from error
        return self._tokenizer().decode(token_ids, skip_special_tokens=False)

    def _token_text(self, token_id: int) -> str:
        return self._tokenizer().token_text(token_id)

    def _render(self, body: ConversationBody, cache_salt: str | None) -> Prompt:
        try:
            tokenizer = self._tokenizer()
            ids = tokenizer.apply_chat_template(body.messages, body.chat_options(), cache_salt)
            return Prompt(None, ids, cache_salt)  # nobody asks for its text
        except ValueError as error:
            refusal = invalid_value(error, ConversationBody.model_fields, "messages")
            refusal.content["param"] = refusal.content["param"] or "messages"
            raise refusal from error

    def _tokenizer(self) -> Tokenizer:
        if self.llm.tokenizer is None:
            raise ApiError(400, "this model has no tokenizer; give token ids", param="prompt")
        return self.llm.tokenizer

    def _check_model(self, body: Body) -> None:
        if body.model not in (None, self.model_name):
            raise ApiError(
                404,
                f"there is no model {body.model!r} here; this server has {self.model_name!r}",
                kind="not_found_error",
                param="model",
                code="model_not_found",
            )


def _invalid_value(error: ValueError, body: GenerationBody) -> ApiError:
    return invalid_value(error, type(body).model_fields, body.prompt_field)


def json_response(content: Any) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
