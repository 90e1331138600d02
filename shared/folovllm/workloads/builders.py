"""How each kind of workload draws its requests: random lengths, real prompts, replayed traces."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from . import traces
from .conversations import multi_turn
from .options import LenRange, WorkloadOptions
from .prefixes import few_shot, prefix_hit, shared_prefix
from .source import WorkloadRequest, WorkloadSource, all_at_once, numbered_request, read_prompts

WorkloadBuilder = Callable[[WorkloadOptions, WorkloadSource], list[WorkloadRequest]]


def workload_builders() -> dict[str, WorkloadBuilder]:
    """The function behind each kind of workload, by the name that specs use."""
    return {
        "nano": _nano,
        "fixed": _fixed,
        "poisson": _poisson,
        "long-arrival": _long_arrival,
        "shared-prefix": shared_prefix,
        "few-shot": few_shot,
        "prefix-hit": prefix_hit,
        "multi-turn": multi_turn,
        "chat": _chat,
        "azure": _azure,
        "mooncake": _mooncake,
        "sharegpt": _sharegpt,
    }


def _nano(options: WorkloadOptions, source: WorkloadSource) -> list[WorkloadRequest]:
    """The benchmark of nano-vllm (bench.py): its draws, in its order."""
    options.finish()
    rng = source.rng()
    prompts = [
        tuple(rng.randint(0, 10000) for _ in range(rng.randint(100, 1024))) for _ in range(256)
    ]
    return all_at_once((prompt, rng.randint(100, 1024)) for prompt in prompts)


def _fixed(options: WorkloadOptions, source: WorkloadSource) -> list[WorkloadRequest]:
    batch, input_len = options.integer("batch", 8), options.integer("input", 512)
    output_len = options.integer("output", 128)
    options.finish()
    return all_at_once((source.random_tokens(f"{i}", input_len), output_len) for i in range(batch))


def _poisson(options: WorkloadOptions, source: WorkloadSource) -> list[WorkloadRequest]:
    """Independent arrivals: exponential gaps with mean 1/rate seconds."""
    rate, num = options.positive_number("rate", 4.0), options.integer("num", 64)
    input_range = options.len_range("input", LenRange(100, 1024))
    output_range = options.len_range("output", LenRange(100, 1024))
    options.finish()
    rng, arrival_s, requests = source.rng(), 0.0, []
    for i in range(num):
        prompt = source.random_tokens(f"{i}", input_range.draw(rng))
        requests.append(numbered_request(i, prompt, output_range.draw(rng), arrival_s))
        arrival_s += rng.expovariate(rate)
    return requests


def _long_arrival(options: WorkloadOptions, source: WorkloadSource) -> list[WorkloadRequest]:
    """Some requests decode, then one with a long prompt arrives: who waits, and for how long?"""
    decoders, input_len = options.integer("decoders", 16), options.integer("input", 128)
    output_len, prompt_len = options.integer("output", 600), options.integer("prompt", 16384)
    prompt_output_len = options.integer("prompt_output", 16)
    at_s = options.positive_number("at", 0.5)
    options.finish()
    prompts = [source.random_tokens(f"{i}", input_len) for i in range(decoders)]
    requests = all_at_once((prompt, output_len) for prompt in prompts)
    late_prompt = source.random_tokens("late", prompt_len)
    return [*requests, numbered_request(decoders, late_prompt, prompt_output_len, at_s)]


def _chat(options: WorkloadOptions, source: WorkloadSource) -> list[WorkloadRequest]:
    """Real prompts in a shuffled order; more than there are start over from the first."""
    tokenizer = source.require_tokenizer("chat")
    prompts = read_prompts()
    num = options.integer("num", len(prompts))
    min_output, max_output = options.integer("min_output", 16), options.integer("max_output", 128)
    options.finish()
    if min_output > max_output:
        raise ValueError(f"chat: min_output ({min_output}) is above max_output ({max_output})")
    options.values["num_distinct_prompts"] = min(num, len(prompts))
    rng = source.rng()
    rng.shuffle(prompts)
    encoded = [
        tuple(tokenizer.apply_chat_template([{"role": "user", "content": prompt.text}]))
        for prompt in prompts[:num]
    ]
    return all_at_once(
        (encoded[i % len(encoded)], rng.randint(min_output, max_output)) for i in range(num)
    )


def _azure(options: WorkloadOptions, source: WorkloadSource) -> list[WorkloadRequest]:
    rows = _replay(options, traces.read_azure(options.path()))
    return [
        numbered_request(
            i, source.random_tokens(f"{i}", row.input_len), row.output_len, row.arrival_s
        )
        for i, row in enumerate(rows)
    ]


def _mooncake(options: WorkloadOptions, source: WorkloadSource) -> list[WorkloadRequest]:
    """Equal hash ids become equal blocks of tokens, so that prefixes repeat as in the trace."""
    rows = traces.read_mooncake(options.path())
    slot_s = options.positive_number("slot", 3.0)
    rows = traces.spread_arrivals(rows, slot_s, _uniform(source.rng()))
    blocks: dict[int, tuple[int, ...]] = {}
    requests = []
    for i, row in enumerate(_replay(options, rows)):
        for hash_id in row.hash_ids:
            if hash_id not in blocks:
                key, size = f"block {hash_id}", traces.MOONCAKE_BLOCK_SIZE
                blocks[hash_id] = source.random_tokens(key, size)
        tokens = [token for hash_id in row.hash_ids for token in blocks[hash_id]]
        prompt = tuple(tokens[: row.input_len])
        requests.append(numbered_request(i, prompt, row.output_len, row.arrival_s))
    return requests


def _sharegpt(options: WorkloadOptions, source: WorkloadSource) -> list[WorkloadRequest]:
    """The first question of each conversation, and as many tokens as its answer has."""
    tokenizer = source.require_tokenizer("sharegpt")
    conversations, num_without_exchange = traces.read_sharegpt(options.path())
    encoded = [(tokenizer.encode(c.prompt), tokenizer.encode(c.answer)) for c in conversations]
    rows = [traces.TraceRow(0.0, len(p), len(a), prompt_token_ids=tuple(p)) for p, a in encoded]
    selected = _select(options, rows)
    options.values["num_dropped_without_exchange"] = num_without_exchange
    return all_at_once((row.prompt_token_ids, row.output_len) for row in selected)


def _replay(
    options: WorkloadOptions, rows: Sequence[traces.TraceRow]
) -> tuple[traces.TraceRow, ...]:
    """Select rows, and let time pass `speed` times as fast."""
    speed = options.positive_number("speed", 1.0)
    return tuple(replace(row, arrival_s=row.arrival_s / speed) for row in _select(options, rows))


def _select(
    options: WorkloadOptions, rows: Sequence[traces.TraceRow]
) -> tuple[traces.TraceRow, ...]:
    """Apply `num`, `max_input` and `max_output`; what was dropped goes into the parameters."""
    selection = traces.select_rows(
        rows,
        num=options.optional_integer("num"),
        max_input=options.optional_integer("max_input"),
        max_output=options.optional_integer("max_output"),
    )
    options.finish()
    options.values.update(selection.report)
    return selection.rows


def _uniform(rng: random.Random) -> Iterator[float]:
    while True:
        yield rng.random()
