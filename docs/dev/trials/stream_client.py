"""Clients that stream answers of an OpenAI-compatible server, and time every token they see.

For servers whose tokenizer is `save_word_tokenizer`'s: every id below the size of the vocabulary is
a word of its own, so that a client can tell from the text of a chunk how many tokens it holds,
whether a server is kind enough to say so or not, and a conversation's text becomes the tokens again
that it was made of. The template writes a conversation's contents one behind the other: a turn of a
workload that follows another has, through /v1/chat/completions, the very prompt that `bench` makes.

Times are those of `time.perf_counter`, which all processes of a Linux machine share.
"""

import asyncio
import gc
import json
import string
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from http_load import Timing

from folovllm.workloads.workload import Workload, WorkloadRequest

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
_NUM_LETTERS = 4


@dataclass
class Answer(Timing):
    """What a client knows of one request; `token_s` has one entry per token."""

    chunk_s: list[float] = field(default_factory=list)
    """When a chunk with text came; several tokens may be in one."""
    text: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    """As the server's last chunk says."""


@dataclass(frozen=True)
class Share:
    """What one process of clients does."""

    url: str
    model: str
    chains: list[list[WorkloadRequest]]
    """Of each client: every request follows the one before it."""
    start_s: float


@dataclass(frozen=True)
class ShareResult:
    answers: list[Answer]
    processor_s: float
    """Processor time of the clients of this process, from the start to the end."""


def word(token_id: int) -> str:
    """The text of a token: a space and letters."""
    letters = []
    for _ in range(_NUM_LETTERS):
        token_id, letter = divmod(token_id, len(string.ascii_lowercase))
        letters.append(string.ascii_lowercase[letter])
    return " " + "".join(reversed(letters))


def save_word_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer with a word for every id, and a chat template that adds nothing."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabets = [string.ascii_lowercase] * _NUM_LETTERS
    words = ("Ġ" + "".join(letters) for letters in product(*alphabets))
    vocabulary = {text: token_id for token_id, text in zip(range(vocab_size), words, strict=False)}
    if len(vocabulary) < vocab_size:
        raise ValueError(f"there are {len(vocabulary)} words, fewer than {vocab_size} tokens")
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="Ġaaaa"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(str(folder))


def run_workload(pool: Pool, url: str, model: str, workload: Workload, limit_s: float) -> Any:
    """All requests, from the processes of `pool`; a list of `ShareResult`s.

    TimeoutError if that takes more than `limit_s` seconds.
    """
    num_shares = pool._processes  # type: ignore[attr-defined]
    chains = conversations(workload.requests)
    start_s = time.perf_counter() + 1.0  # shares are there, and bodies are written, by then
    shares = [Share(url, model, chains[i::num_shares], start_s) for i in range(num_shares)]
    return pool.map_async(run_share, shares, chunksize=1).get(timeout=limit_s)


def conversations(requests: Iterable[WorkloadRequest]) -> list[list[WorkloadRequest]]:
    """Requests that follow each other together, in order."""
    chain_of: dict[str, list[WorkloadRequest]] = {}
    chains: list[list[WorkloadRequest]] = []
    for request in requests:
        if request.follows is None:
            chains.append([])
            chain = chains[-1]
        else:
            chain = chain_of[request.follows]
        chain.append(request)
        chain_of[request.request_id] = chain
    return chains


def run_share(share: Share) -> ShareResult:
    gc.disable()  # a pause of the client would look like one of the server
    try:
        return asyncio.run(_run_share(share))
    finally:
        gc.enable()


async def _run_share(share: Share) -> ShareResult:
    clients = [_run_chain(share, chain) for chain in share.chains]
    tasks = [asyncio.ensure_future(client) for client in clients]
    await asyncio.sleep(0)  # up to where they wait for their time
    await asyncio.sleep(share.start_s - time.perf_counter())
    begin_s = time.process_time()
    parts = await asyncio.gather(*tasks)
    answers = [answer for part in parts for answer in part]
    return ShareResult(answers, time.process_time() - begin_s)


async def _run_chain(share: Share, chain: Sequence[WorkloadRequest]) -> list[Answer]:
    """One completion, or the turns of a chat; a turn that fails is the last one."""
    if len(chain) == 1:
        (request,) = chain
        call = _call(share, "/v1/completions", request, prompt=request.prompt_token_ids)
        due_s = share.start_s + request.arrival_s
        await asyncio.sleep(due_s - time.perf_counter())
        return [await _ask(share.url, call, request, due_s)]
    answers: list[Answer] = []
    messages: list[dict[str, str]] = []
    due_s = share.start_s + chain[0].arrival_s
    for request in chain:
        if answers:
            messages.append({"role": "assistant", "content": answers[-1].text})
            due_s = time.perf_counter() + request.arrival_s
        question = "".join(map(word, request.prompt_token_ids))
        messages.append({"role": "user", "content": question})
        call = _call(share, "/v1/chat/completions", request, messages=messages)
        await asyncio.sleep(due_s - time.perf_counter())
        answers.append(await _ask(share.url, call, request, due_s))
        if answers[-1].error is not None:
            break
    return answers


def _call(share: Share, path: str, request: WorkloadRequest, **what: Any) -> bytes:
    body = json.dumps(
        {
            "model": share.model,
            **what,
            "max_tokens": request.output_len,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {urlsplit(share.url).netloc}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def _ask(url: str, call: bytes, request: WorkloadRequest, due_s: float) -> Answer:
    answer = Answer(request.request_id, due_s, time.perf_counter())
    host, _, port = urlsplit(url).netloc.partition(":")
    try:
        transport, reader = await asyncio.get_running_loop().create_connection(
            lambda: AnswerReader(call, answer), host, int(port)
        )
        await reader.done
        transport.close()
    except OSError as error:
        answer.error = repr(error)
    num_prompt_tokens = answer.usage.get("prompt_tokens")
    if answer.error is None and len(answer.token_s) != request.output_len:
        answer.error = f"{len(answer.token_s)} tokens instead of {request.output_len}"
    elif answer.error is None and num_prompt_tokens != request.num_prompt_tokens:
        answer.error = f"a prompt of {num_prompt_tokens} instead of {request.num_prompt_tokens}"
    return answer


class AnswerReader(asyncio.Protocol):
    """Reads the events of one answer; asyncio's streams would take several times as long."""

    def __init__(self, call: bytes, answer: Answer) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._call = call
        self._answer = answer
        self._has_status = False
        self._unread = b""

    def connection_made(self, transport: Any) -> None:
        transport.write(self._call)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        # The sizes that HTTP puts between events stand in lines of their own.
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            if not self._has_status:
                self._has_status = True
                if b" 200 " not in line:
                    self._end(data.decode(errors="replace"))
            elif line.startswith(b"data: {"):
                self._read_event(json.loads(line[len(b"data: ") :]), now)
            elif line.startswith(b"data: [DONE]"):
                self._end(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._end("the connection ended before the answer")

    def _read_event(self, event: dict[str, Any], now: float) -> None:
        answer = self._answer
        if "error" in event:
            self._end(str(event["error"]))
        answer.usage = event.get("usage") or answer.usage
        for choice in event.get("choices", ()):
            text = choice["text"] if "text" in choice else choice["delta"].get("content")
            if text:
                answer.text += text
                answer.chunk_s.append(now)
                answer.token_s += [now] * text.count(" ")

    def _end(self, error: str | None) -> None:
        with suppress(asyncio.InvalidStateError):  # the first end is the one that counts
            self.done.set_result(None)
            self._answer.error = error
