"""Seeded request lists, identified by a sha256: what every stage is measured on."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from .builders import workload_builders
from .options import WorkloadOptions
from .source import ChatPrompt, PromptEncoder, WorkloadRequest, WorkloadSource, read_prompts

__all__ = [
    "ChatPrompt",
    "PromptEncoder",
    "Workload",
    "WorkloadRequest",
    "make_workload",
    "read_prompts",
]


@dataclass(frozen=True)
class Workload:
    """Requests in order of arrival, as far as that is known beforehand.

    ValueError for a request that follows one which does not stand before it, so that a head of
    the list never lacks what its requests follow, or that continues a part of it only.
    """

    name: str
    requests: tuple[WorkloadRequest, ...]
    parameters: dict[str, Any] = field(default_factory=dict)
    """Every option with its value, and the number of requests that were dropped and why."""
    num_requests_before_cut: int | None = None
    """Requests before a head was taken (`head`, or `num` of a trace); None if none was."""
    spec: str = ""
    """The text it was made from."""
    uncut_requests: tuple[WorkloadRequest, ...] = field(default=(), repr=False)
    """All of them, where `head` took the first: for checks that need the same ones everywhere."""

    def __post_init__(self) -> None:
        earlier: dict[str, WorkloadRequest] = {}
        for request in self.requests:
            _check_follows(request, earlier)
            earlier[request.request_id] = request

    @cached_property
    def sha256(self) -> str:
        """Of all prompts, output lengths, arrivals and who follows whom.

        Ids, groups, name and parameters do not count.
        """
        digest = hashlib.sha256()
        index_of = {request.request_id: index for index, request in enumerate(self.requests)}
        for request in self.requests:
            num_tokens = len(request.prompt_token_ids)
            header = f"{num_tokens} {request.output_len} {request.arrival_s:.6f}"
            if request.follows is not None:
                header += f" follows {index_of[request.follows]} {request.history_len}"
            digest.update(f"{header}\n".encode())
            digest.update(np.asarray(request.prompt_token_ids, dtype="<i4").tobytes())
        return digest.hexdigest()

    @property
    def num_input_tokens(self) -> int:
        """Of whole prompts: what is asked again as history counts again."""
        return sum(request.num_prompt_tokens for request in self.requests)

    @property
    def num_output_tokens(self) -> int:
        return sum(request.output_len for request in self.requests)

    @property
    def is_open_loop(self) -> bool:
        """Whether the clock alone decides when requests arrive."""
        return all(request.follows is None for request in self.requests)

    @property
    def arrives_at_once(self) -> bool:
        """Whether all requests are there at the start."""
        return self.is_open_loop and not any(request.arrival_s for request in self.requests)

    def head(self, num_requests: int) -> "Workload":
        """The first `num_requests`; `num_requests_before_cut` then says how many there were.

        A conversation may be cut off after any turn, never before one that is kept.
        """
        if not 1 <= num_requests <= len(self.requests):
            raise ValueError(
                f"cannot take the first {num_requests} requests of {self.name}: "
                f"it has {len(self.requests)}"
            )
        if num_requests == len(self.requests):
            return self
        return replace(
            self,
            requests=self.requests[:num_requests],
            num_requests_before_cut=self.num_requests_before_cut or len(self.requests),
            uncut_requests=self.uncut_requests or self.requests,
        )


def make_workload(
    spec: str,
    *,
    tokenizer: PromptEncoder | None = None,
    vocab_size: int | None = None,
    seed: int = 0,
) -> Workload:
    """Make the workload that `spec` names; the same arguments give the same sha256 anywhere.

    Specs: `nano`, `fixed:batch=8,input=512,output=128`, `poisson:rate=4,num=64`,
    `long-arrival:decoders=16,prompt=16384,at=0.5`, `shared-prefix:groups=4`,
    `few-shot:examples=8,num=64`, `prefix-hit:prompt=8192,cached=0.5/0.9`,
    `multi-turn:conversations=64,turns=8,think=0`, `chat`, each with an optional count first
    (`nano:8`) that cuts it to its first requests; `azure:PATH`, `mooncake:PATH`, `sharegpt:PATH`,
    `multi-turn:PATH`. ValueError for an unknown kind, option or value, and where a tokenizer or
    vocab_size is needed and missing.
    """
    options = WorkloadOptions.parse(spec)
    builders = workload_builders()
    if options.kind not in builders:
        raise ValueError(f"unknown workload {spec!r}; there are {', '.join(sorted(builders))}")
    head = None if _reads_file(options) else options.head()
    requests = builders[options.kind](options, WorkloadSource(tokenizer, vocab_size, seed))
    if not requests:
        raise ValueError(f"workload {spec!r} has no requests left; dropped: {options.values}")
    parameters = {**options.values, "seed": seed}
    num_cut = options.values.get("num_after_head", 0)
    num_before_cut = len(requests) + num_cut if num_cut else None
    workload = Workload(options.name, tuple(requests), parameters, num_before_cut, spec)
    _check_vocabulary(workload, vocab_size)
    return workload if head is None else workload.head(head)


def _reads_file(options: WorkloadOptions) -> bool:
    if options.kind == "multi-turn":
        return options.optional_path() is not None
    return options.kind in ("azure", "mooncake", "sharegpt")


def _check_follows(request: WorkloadRequest, earlier: Mapping[str, WorkloadRequest]) -> None:
    if request.follows is None:
        if request.history_len:
            raise ValueError(
                f"request {request.request_id} has history_len {request.history_len} and follows "
                f"no request; name the one that it continues in `follows`"
            )
        return
    before = earlier.get(request.follows)
    if before is None:
        raise ValueError(
            f"request {request.request_id} follows {request.follows!r}, which is none of the "
            f"requests before it; put that one first"
        )
    if request.history_len not in (0, before.num_tokens):
        raise ValueError(
            f"request {request.request_id} has history_len {request.history_len}, but "
            f"{before.request_id} has {before.num_tokens} tokens of prompt and output; continue "
            f"all of them or none"
        )


def _check_vocabulary(workload: Workload, vocab_size: int | None) -> None:
    if vocab_size is None:
        return
    largest = max(max(request.prompt_token_ids) for request in workload.requests)
    if largest >= vocab_size:
        raise ValueError(
            f"workload {workload.spec!r} has token id {largest} but the model's vocab_size is "
            f"{vocab_size}; use a model with a larger vocabulary or another workload"
        )
