"""Workloads whose prompts begin alike: what a prefix cache is measured on."""

from .options import LenRange, WorkloadOptions
from .source import WorkloadRequest, WorkloadSource, all_at_once


def shared_prefix(options: WorkloadOptions, source: WorkloadSource) -> list[WorkloadRequest]:
    """Request i starts with the prefix of group i modulo groups, and goes on alone."""
    groups, num = options.integer("groups", 4), options.integer("num", 32)
    prefix_len = options.integer("prefix", 512)
    suffix_range = options.len_range("suffix", LenRange(32, 128))
    output_range = options.len_range("output", LenRange(32, 128))
    options.finish()
    rng = source.rng()
    prefixes = [source.random_tokens(f"prefix {group}", prefix_len) for group in range(groups)]
    return all_at_once(
        (
            prefixes[i % groups] + source.random_tokens(f"suffix {i}", suffix_range.draw(rng)),
            output_range.draw(rng),
        )
        for i in range(num)
    )


def few_shot(options: WorkloadOptions, source: WorkloadSource) -> list[WorkloadRequest]:
    """Every request has the same examples first and a question of its own behind them."""
    num_examples, num = options.integer("examples", 8), options.integer("num", 64)
    example_range = options.len_range("example", LenRange(64, 128))
    question_range = options.len_range("question", LenRange(16, 64))
    output_range = options.len_range("output", LenRange(8, 32))
    options.finish()
    rng = source.rng()
    examples: tuple[int, ...] = ()
    for i in range(num_examples):
        examples += source.random_tokens(f"example {i}", example_range.draw(rng))
    return all_at_once(
        (
            examples + source.random_tokens(f"question {i}", question_range.draw(rng)),
            output_range.draw(rng),
        )
        for i in range(num)
    )


def prefix_hit(options: WorkloadOptions, source: WorkloadSource) -> list[WorkloadRequest]:
    """One request at a time: a cold one, then one per share of `cached` that begins like it.

    `num` times, with other tokens every time. Each request arrives when the one before it is
    done, so that it waits for nobody: its TTFT is what the rest of its prompt takes.
    """
    prompt_len, num = options.integer("prompt", 8192), options.integer("num", 6)
    shares = options.shares("cached", "0.9")
    output_len = options.integer("output", 4)
    options.finish()
    cached_lens = {f"hit {100 * share:.12g}%": round(share * prompt_len) for share in shares}
    if not all(0 < cached_len < prompt_len for cached_len in cached_lens.values()):
        raise ValueError(
            f"workload {options.spec!r}: a hit shares some of the {prompt_len} tokens of a prompt "
            f"and not all, but cached comes to {list(cached_lens.values())} tokens; give a longer "
            f"prompt or other shares"
        )
    requests: list[WorkloadRequest] = []
    for i in range(num):
        cold = source.random_tokens(f"cold {i}", prompt_len)
        prompts = {"cold": cold}
        for group, cached_len in cached_lens.items():
            own = source.random_tokens(f"{group} {i}", prompt_len - cached_len)
            prompts[group] = cold[:cached_len] + own
        for group, prompt in prompts.items():
            requests.append(
                WorkloadRequest(
                    prompt_token_ids=prompt,
                    output_len=output_len,
                    arrival_s=0.0,
                    request_id=f"r{len(requests)}",
                    follows=requests[-1].request_id if requests else None,
                    group=group,
                )
            )
    return requests
