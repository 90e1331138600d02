"""Beam search over any stage's engine: every beam is a request that forks from its parent.

A round runs one token of every beam, asking for log-probabilities; the best continuations become
the beams of the next round. A child names its parent in `fork_of`, so a stage with shared blocks
computes one new token per beam and copies only the blocks that differ; a stage without computes
the beam again. The scores and the rule for stopping are those of Transformers' beam search.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

from ..interfaces import Engine, StepOutput, TokenOutput
from ..request import Request, SamplingParams
from .prompts import Prompt


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """How many beams, how long, and how sequences of unequal length are compared."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    length_penalty: float = 1.0
    """Scores are divided by (output tokens)^length_penalty: above 0 favours long outputs."""

    def __post_init__(self) -> None:
        for name in ("beam_width", "max_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


@dataclass(frozen=True)
class BeamSearchSequence:
    """One result; `tokens` begins with the prompt, as in vLLM."""

    tokens: list[int]
    cum_logprob: float
    text: str | None
    """Of the whole sequence; None without a tokenizer."""


@dataclass(frozen=True)
class BeamSearchOutput:
    """The `beam_width` best sequences of one prompt, best first."""

    sequences: list[BeamSearchSequence]


@dataclass(frozen=True)
class Beam:
    """A sequence that is still growing."""

    token_ids: list[int]
    cum_logprob: float
    parent: Request | None
    """The request whose keys and values cover all but the last token."""
    cache_salt: str | None


@dataclass(frozen=True)
class FinishedBeam:
    token_ids: list[int]
    cum_logprob: float
    score: float


@dataclass
class BeamSearch:
    """The search of one prompt: what grows, and the best of what has ended."""

    params: BeamSearchParams
    num_prompt_tokens: int
    eos_token_ids: frozenset[int]
    running: list[Beam]
    finished: list[FinishedBeam] = field(default_factory=list)

    def advance(self, outputs: Sequence[tuple[Beam, Request, TokenOutput]]) -> None:
        """Replace the running beams by their best continuations; empty them when all is said.

        `outputs` has, per running beam, the request that computed it and what came out.
        """
        width = self.params.beam_width
        candidates = []
        for beam, request, output in outputs:
            assert output.logprobs is not None
            for token_id, logprob in output.logprobs.top:
                candidates.append((beam.cum_logprob + logprob, beam, request, token_id))
        candidates.sort(key=lambda candidate: candidate[0], reverse=True)
        self.running = []
        # Twice the width: even if the first half all end, the other half can go on.
        for rank, (cum_logprob, beam, request, token_id) in enumerate(candidates[: 2 * width]):
            token_ids = [*beam.token_ids, token_id]
            num_output_tokens = len(token_ids) - self.num_prompt_tokens
            if token_id in self.eos_token_ids or num_output_tokens == self.params.max_tokens:
                if rank < width:
                    score = cum_logprob / num_output_tokens**self.params.length_penalty
                    self.finished.append(FinishedBeam(token_ids, cum_logprob, score))
            elif len(self.running) < width:
                self.running.append(Beam(token_ids, cum_logprob, request, beam.cache_salt))
        self.finished.sort(key=lambda beam: beam.score, reverse=True)
        del self.finished[width:]
        if not self._can_improve():
            self.running = []

    def _can_improve(self) -> bool:
        """Whether the best running beam, as long as it is now, would still make the list."""
        if not self.running or len(self.finished) < self.params.beam_width:
            return bool(self.running)
        best = self.running[0]
        num_output_tokens = len(best.token_ids) - self.num_prompt_tokens
        score = best.cum_logprob / num_output_tokens**self.params.length_penalty
        return score > self.finished[-1].score


def search_beams(
    engine: Engine,
    step: Callable[[], StepOutput],
    prompts: Sequence[Prompt],
    params: BeamSearchParams,
    eos_token_ids: frozenset[int],
    max_model_len: int,
) -> list[BeamSearch]:
    """Search all prompts side by side and return them finished, in order.

    `step` runs one step of `engine` and may serve others along with us. ValueError if a prompt
    leaves no room for `max_tokens`. Whatever happens, no request of ours stays in the engine.
    """
    for index, prompt in enumerate(prompts):
        num_prompt_tokens = len(prompt.token_ids)
        if num_prompt_tokens + params.max_tokens > max_model_len:
            raise ValueError(
                f"prompt {index} has {num_prompt_tokens} tokens, and max_tokens "
                f"{params.max_tokens} more exceed max_model_len={max_model_len}; shorten the "
                f"prompt, lower max_tokens or raise max_model_len"
            )
    eos_token_ids = frozenset() if params.ignore_eos else eos_token_ids
    searches = [
        BeamSearch(
            params,
            len(prompt.token_ids),
            eos_token_ids,
            [Beam(list(prompt.token_ids), 0.0, None, prompt.cache_salt)],
        )
        for prompt in prompts
    ]
    numbers = count()
    held: list[Request] = []
    try:
        while any(search.running for search in searches):
            parents = held
            owned = [
                (search, beam, _make_request(beam, params, max_model_len, next(numbers)))
                for search in searches
                for beam in search.running
            ]
            held = parents + [request for _, _, request in owned]
            first_tokens = _run_round(engine, step, [request for _, _, request in owned])
            _abort(engine, parents)
            held = held[len(parents) :]
            for search in searches:
                mine = [
                    (beam, request, first_tokens[request.request_id])
                    for owner, beam, request in owned
                    if owner is search
                ]
                if mine:
                    search.advance(mine)
    finally:
        _abort(engine, held)
    return searches


def _make_request(beam: Beam, params: BeamSearchParams, max_model_len: int, number: int) -> Request:
    # One token more than is looked at keeps the request, and its cache, alive for its children.
    max_tokens = min(2, max_model_len - len(beam.token_ids))
    return Request(
        request_id=f"beam-{number}",
        prompt_token_ids=beam.token_ids,
        sampling_params=SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            logprobs=2 * params.beam_width,
            ignore_eos=True,
        ),
        fork_of=beam.parent,
        cache_salt=beam.cache_salt,
        is_steered=True,
    )


def _run_round(
    engine: Engine, step: Callable[[], StepOutput], requests: Sequence[Request]
) -> dict[str, TokenOutput]:
    """Run until every request has its first token; returns them by request id."""
    for request in requests:
        engine.add_request(request)
    missing = {request.request_id for request in requests}
    first_tokens: dict[str, TokenOutput] = {}
    while missing:
        for token in step().tokens:
            if token.request_id in missing:
                missing.remove(token.request_id)
                first_tokens[token.request_id] = token
    return first_tokens


def _abort(engine: Engine, requests: Sequence[Request]) -> None:
    for request in requests:
        engine.abort_request(request.request_id)
