"""What a benchmark runs before the clock starts: the warm-up and the correctness gate."""

from typing import Any

from ..model.transformer import CausalLM
from ..request import Request
from ..workloads.workload import Workload
from .arrivals import make_request, stand_in_prompt
from .probes import Clock
from .recorder import run_to_end

_SHORT_PROMPT_LEN = 8


def warm_up(
    engine: Any, model: CausalLM, workload: Workload, num_tokens: int, seed: int, clock: Clock
) -> dict[str, Any]:
    """Run prompts as long and a batch as wide as the workload's, for a few tokens each.

    The longest prompt comes first. Further prompts keep their length while they fit into one
    step's token budget on CUDA, where sizes matter to kernels and allocator; all others are cut
    to a few tokens. Prompts are reversed, so that nothing cached here matches a real prefix; of one
    that continues a conversation, other tokens stand for the history.
    """
    by_len = sorted(workload.requests, key=lambda r: r.num_prompt_tokens, reverse=True)
    sources = by_len[: getattr(engine.config, "max_num_seqs", 1)]
    longest = sources[0].num_prompt_tokens
    on_cuda = model.device.type == "cuda"
    budget = getattr(engine.config, "max_num_batched_tokens", longest) if on_cuda else longest
    requests: list[Request] = []
    num_input_tokens = 0
    for source in sources:
        prompt = stand_in_prompt(source)[::-1]
        if requests and num_input_tokens + len(prompt) > budget:
            prompt = prompt[:_SHORT_PROMPT_LEN]
        num_input_tokens += len(prompt)
        max_tokens = min(num_tokens, source.output_len)
        requests.append(
            make_request(source, prompt, seed=seed, max_tokens=max_tokens, id_prefix="warmup-")
        )
    start = clock.now()
    outputs = run_to_end(engine, requests)
    return {
        "num_requests": len(requests),
        "num_input_tokens": num_input_tokens,
        "num_output_tokens": sum(len(output.tokens) for output in outputs),
        "longest_prompt_len": longest,
        "duration_s": clock.now() - start,
    }


def run_gate(
    engine: Any, workload: Workload, num_requests: int, num_tokens: int, seed: int
) -> dict[str, Any]:
    """Greedy tokens of the first requests, and how far ahead of the runner-up each was.

    All of them run together, also those that wait for another one in the workload; those whose
    prompt holds what another one answered are left out, since engines may answer differently.

    top2_gaps: log-probability of the likeliest token less that of the second. Where it is small,
    rounding may decide, and stages may differ without being wrong.
    """
    # Also those that a slow stage will not be timed on: every stage answers the same ones.
    limit = engine.config.max_model_len
    sources = [
        source
        for source in workload.uncut_requests or workload.requests
        if not source.history_len
        and source.num_prompt_tokens + min(num_tokens, source.output_len) <= limit
    ][:num_requests]
    requests = [
        make_request(
            source,
            source.prompt_token_ids,
            seed=seed,
            max_tokens=min(num_tokens, source.output_len),
            logprobs=2,
            id_prefix="gate-",
        )
        for source in sources
    ]
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    gaps: dict[str, list[float]] = {request.request_id: [] for request in requests}
    for output in run_to_end(engine, requests):
        for token in output.tokens:
            if token.logprobs is None or len(token.logprobs.top) < 2:
                raise RuntimeError(f"request {token.request_id} got no top-2 log-probabilities")
            (_, first), (_, second) = token.logprobs.top[:2]
            tokens[token.request_id].append(token.token_id)
            gaps[token.request_id].append(first - second)
    return {"tokens": list(tokens.values()), "top2_gaps": list(gaps.values())}
