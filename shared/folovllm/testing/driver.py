"""Driving an engine in tests: requests in bulk, and invariants checked after every step."""

import random
from collections.abc import Iterable, Mapping, Sequence

from ..interfaces import Engine, StepOutput, TokenOutput
from ..request import Request, RequestStatus, SamplingParams

_MAX_STEPS = 5000
"""Far more than any test needs: beyond it the engine hangs."""


def random_prompts(
    *, seed: int, count: int, vocab_size: int, max_len: int, min_len: int = 1
) -> list[list[int]]:
    """`count` prompts of random token ids; the lengths 1 and max_len are always among them."""
    rng = random.Random(seed)
    lengths = [min_len, max_len] + [rng.randint(min_len, max_len) for _ in range(count)]
    return [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths[:count]]


def make_requests(
    prompts: Sequence[list[int]],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    ids: Sequence[str] | None = None,
    seeds: Iterable[int] | None = None,
    eos_token_ids: frozenset[int] = frozenset(),
) -> list[Request]:
    """One request per prompt; ids are r0, r1, … and seeds 0 unless given."""
    all_params = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    ids = ids or [f"r{index}" for index in range(len(prompts))]
    seeds = seeds or [0] * len(prompts)
    return [
        Request(
            request_id=request_id,
            prompt_token_ids=list(prompt),
            sampling_params=sampling_params,
            seed=seed,
            eos_token_ids=eos_token_ids,
        )
        for request_id, prompt, sampling_params, seed in zip(
            ids, prompts, all_params, seeds, strict=True
        )
    ]


def drain(
    engine: Engine,
    requests: Iterable[Request],
    later: Mapping[int, Sequence[Request]] | None = None,
    aborts: Mapping[int, str] | None = None,
) -> list[TokenOutput]:
    """Run until nothing is left, checking every step; return all tokens in order.

    `later` adds requests, and `aborts` drops one, before the step of that number.
    """
    later, aborts = dict(later or {}), dict(aborts or {})
    for request in requests:
        engine.add_request(request)
    tokens: list[TokenOutput] = []
    for step in range(_MAX_STEPS):
        for request in later.pop(step, ()):
            engine.add_request(request)
        if step in aborts:
            engine.abort_request(aborts.pop(step))
        if engine.has_unfinished_requests():
            output = engine.step()
            check_step(engine, output)
            tokens.extend(output.tokens)
        elif not later:
            check_idle(engine)
            return tokens
    raise AssertionError(f"the engine still has work after {_MAX_STEPS} steps")


def check_step(engine: Engine, output: StepOutput) -> None:
    """Invariants of any stage after any step."""
    stats = output.stats
    assert 0 <= stats.num_kv_tokens_live <= stats.num_kv_tokens_reserved
    assert stats.num_kv_tokens_reserved <= stats.num_kv_tokens_capacity
    assert len(output.tokens) <= stats.num_scheduled_requests <= stats.num_running
    assert stats.num_scheduled_tokens >= stats.num_scheduled_requests
    if stats.num_running + stats.num_waiting:
        assert stats.num_scheduled_tokens > 0, "requests wait and nothing was computed"
    ids = [token.request_id for token in output.tokens]
    assert len(set(ids)) == len(ids)
    scheduler = engine.scheduler  # type: ignore[attr-defined]
    for request in scheduler.running:
        assert request.status is RequestStatus.RUNNING
        assert request.num_tokens - request.num_computed_tokens >= 1
    assert {r.request_id for r in scheduler.running} <= set(scheduler.requests)


def check_idle(engine: Engine) -> None:
    """Nothing is held once nothing is left to do."""
    assert not engine.has_unfinished_requests()
    assert not engine.scheduler.running  # type: ignore[attr-defined]
    assert not engine.scheduler.waiting  # type: ignore[attr-defined]
    assert not getattr(engine.scheduler, "swapped", ())  # type: ignore[attr-defined]
    manager = engine.kv_cache_manager  # type: ignore[attr-defined]
    assert manager.num_reserved_tokens == 0
    if hasattr(manager, "swap_pool"):
        assert manager.swap_pool.num_used_blocks == 0, "host memory is held for nobody"
