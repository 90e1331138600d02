"""What workloads are made of: requests, random tokens, and the prompts of this package."""

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Protocol

import numpy as np


class PromptEncoder(Protocol):
    """The part of a tokenizer that workloads of real text need."""

    def encode(self, text: str) -> list[int]: ...

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]]) -> list[int]: ...


@dataclass(frozen=True)
class WorkloadRequest:
    """One request: these tokens arrive then, and this many are to be produced.

    With `follows`, "then" is when another request has its last token (a closed loop). With
    `history_len` as well, the prompt begins with tokens of that request, which nobody knows
    before: its prompt and what the engine answered. Lengths are always known.
    """

    prompt_token_ids: tuple[int, ...]
    """The whole prompt, or what comes behind `history_len` tokens of history."""
    output_len: int
    """Tokens to produce; end-of-sequence tokens are ignored."""
    arrival_s: float
    """Seconds after the start of the clock, or with `follows` after the last token of that
    request (the time to think); a multiple of a microsecond."""
    request_id: str
    follows: str | None = None
    """Id of the request that must be done before this one can arrive; None: the clock decides."""
    history_len: int = 0
    """Tokens that the prompt begins with and that are not in `prompt_token_ids`: 0, or all of
    the prompt and output of the request that this one follows."""
    group: str | None = None
    """Requests with the same label, say "turn 2", also get latencies of their own in a report."""

    @property
    def num_prompt_tokens(self) -> int:
        """Of the whole prompt."""
        return self.history_len + len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and output."""
        return self.num_prompt_tokens + self.output_len


@dataclass(frozen=True)
class ChatPrompt:
    """One line of the prompts that come with this package."""

    category: str
    text: str


@dataclass(frozen=True)
class WorkloadSource:
    """What a builder may draw on."""

    tokenizer: PromptEncoder | None
    vocab_size: int | None
    seed: int

    def rng(self) -> random.Random:
        return random.Random(self.seed)

    def random_tokens(self, key: str, num_tokens: int) -> tuple[int, ...]:
        """Token ids that depend on seed, key and vocabulary only.

        SHAKE-256 and not a generator: equal keys give equal tokens whatever was drawn before,
        and no library version changes them.
        """
        if self.vocab_size is None:
            raise ValueError("this workload draws random tokens: give make_workload a vocab_size")
        stream = hashlib.shake_256(f"{self.seed}/{key}".encode()).digest(4 * num_tokens)
        return tuple((np.frombuffer(stream, dtype="<u4") % self.vocab_size).tolist())

    def require_tokenizer(self, kind: str) -> PromptEncoder:
        if self.tokenizer is None:
            raise ValueError(
                f"workload {kind!r} holds text and needs a tokenizer; use a model that has one, "
                f"or a workload of random tokens such as 'nano'"
            )
        return self.tokenizer


def numbered_request(
    index: int, prompt: tuple[int, ...], output_len: int, arrival_s: float
) -> WorkloadRequest:
    return WorkloadRequest(prompt, output_len, round(arrival_s, 6), f"r{index}")


def all_at_once(sizes: Iterable[tuple[tuple[int, ...], int]]) -> list[WorkloadRequest]:
    """(prompt, output length) pairs as requests that all arrive at the start."""
    return [
        numbered_request(i, prompt, output_len, 0.0) for i, (prompt, output_len) in enumerate(sizes)
    ]


def read_prompts() -> list[ChatPrompt]:
    """The real prompts that come with this package, in several languages and lengths."""
    lines = resources.files("folovllm").joinpath("data/prompts.jsonl").read_text(encoding="utf-8")
    return [ChatPrompt(**json.loads(line)) for line in lines.splitlines()]
