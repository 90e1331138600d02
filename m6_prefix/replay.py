"""What a prefix cache finds of a trace or a workload: scheduler and cache at work, and no model.

python -m STAGE.replay mooncake:PATH --kv-cache-tokens 2.6M
python -m STAGE.replay multi-turn:conversations=3,turns=3 --block-size 16 --draw
"""

import argparse
import math
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from folovllm.bench.arrivals import Arrivals
from folovllm.interfaces import SamplerOutput, StepOutput
from folovllm.json_files import write_json_atomically
from folovllm.request import Request, SamplingParams
from folovllm.workloads.traces import MOONCAKE_BLOCK_SIZE, TraceRow, read_mooncake
from folovllm.workloads.workload import Workload, make_workload

from .config import EngineConfig
from .kv_cache_manager import KVCacheManager
from .scheduler import Scheduler
from .trie_text import trie_text

VOCAB_SIZE = 32_000
_THOUSAND = 1000
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


class Source(Protocol):
    """Where requests come from; true while there is one."""

    num_tokens: list[int]
    """Of each request, prompt and output."""

    def __bool__(self) -> bool: ...

    def take(self) -> list[Request]:
        """The next ones, if any can come before others are finished."""

    def finish(self, request: Request) -> None:
        """What waited for this request may come now."""


class TraceSource:
    """Requests of a Mooncake trace one after the other, with prompts made of their hash ids.

    Equal ids become equal blocks of tokens. A prompt is made when it is its turn: all together
    would be 144 million tokens.
    """

    def __init__(self, rows: Sequence[TraceRow], num_output_tokens: int) -> None:
        self.rows = rows
        self.params = SamplingParams(temperature=0.0, max_tokens=num_output_tokens)
        self.num_taken = 0
        self.num_tokens = [row.input_len + num_output_tokens for row in rows]

    def __bool__(self) -> bool:
        return self.num_taken < len(self.rows)

    def take(self) -> list[Request]:
        row = self.rows[self.num_taken]
        prompt: list[int] = []
        for hash_id in row.hash_ids:
            prompt += [hash_id] * MOONCAKE_BLOCK_SIZE
        del prompt[row.input_len :]
        self.num_taken += 1
        name = f"r{self.num_taken}"
        return [Request(request_id=name, prompt_token_ids=prompt, sampling_params=self.params)]

    def finish(self, request: Request) -> None: ...


class WorkloadSource:
    """Requests of a workload, as soon as those that they follow are finished."""

    def __init__(self, workload: Workload) -> None:
        self.arrivals = Arrivals(workload, seed=0)
        self.sources = {source.request_id: source for source in workload.requests}
        self.num_tokens = [source.num_tokens for source in workload.requests]

    def __bool__(self) -> bool:
        return bool(self.arrivals)

    def take(self) -> list[Request]:
        return self.arrivals.pop_due(math.inf)

    def finish(self, request: Request) -> None:
        source = self.sources[request.request_id]
        output = request.output_token_ids
        self.arrivals.finish(source, request.prompt_token_ids, output)
        self.arrivals.start_ready(0.0)


class Replay:
    """Runs every request of a source to its end; sampled tokens are drawn from a seed."""

    def __init__(self, config: EngineConfig, num_kv_tokens: int) -> None:
        self.manager = KVCacheManager(config, num_kv_tokens)
        self.scheduler = Scheduler(config, self.manager)
        self.block_size = config.block_size
        self.rng = random.Random(0)
        self.counts: Counter[str] = Counter()
        self.finish_times_s: list[float] = []
        """Of each request: seconds in scheduler and cache until then."""
        self.seconds = 0.0

    def steps(self, source: Source) -> Iterator[None]:
        """Run, and stop after every step for who wants to look."""
        unfinished: dict[str, Request] = {}
        while source or unfinished:
            arrived = source.take() if source and not self.scheduler.waiting else []
            unfinished |= {request.request_id: request for request in arrived}
            start = time.perf_counter()
            output = self._step(arrived)
            self.seconds += time.perf_counter() - start
            for token in output.tokens:
                if token.finish_reason is not None:
                    request = unfinished.pop(token.request_id)
                    self._count(request)
                    source.finish(request)
            self.counts["num_preemptions"] += output.stats.num_preemptions
            self.counts["num_evicted_blocks"] += output.stats.num_evicted_blocks or 0
            yield

    def _step(self, arrived: Sequence[Request]) -> StepOutput:
        for request in arrived:
            self.scheduler.add_request(request)
        step = self.scheduler.schedule()
        stats = self.scheduler.advance(step)
        token_ids = [self.rng.randrange(VOCAB_SIZE) for _ in step.scheduled]
        sampled = SamplerOutput(token_ids, [None] * len(token_ids))
        return self.scheduler.update(step, sampled, stats)

    def _count(self, request: Request) -> None:
        num_found_tokens = request.num_cached_tokens or 0
        self.finish_times_s.append(self.seconds)
        self.counts["num_requests"] += 1
        self.counts["num_prompt_tokens"] += request.num_prompt_tokens
        self.counts["num_found_tokens"] += num_found_tokens
        num_blocks = -(-request.num_prompt_tokens // self.block_size)
        self.counts["num_prompt_blocks"] += num_blocks
        # Of a prompt that is found whole, a token is left to compute, and no block to find.
        is_whole = num_found_tokens == request.num_prompt_tokens - 1
        num_found_blocks = num_found_tokens // self.block_size
        self.counts["num_found_blocks"] += num_blocks if is_whole else num_found_blocks

    def report(self) -> dict[str, Any]:
        """What was found and what it took, for JSON."""
        counts, times = self.counts, self.finish_times_s
        ends = [*range(_THOUSAND, len(times), _THOUSAND), len(times)]
        starts = [0, *ends[:-1]]
        return {
            **counts,
            "hit_rate_tokens": counts["num_found_tokens"] / counts["num_prompt_tokens"],
            "hit_rate_blocks": counts["num_found_blocks"] / counts["num_prompt_blocks"],
            "num_cached_blocks": len(self.manager.prefix_cache.nodes),
            "num_blocks": self.manager.pool.num_blocks,
            "block_size": self.block_size,
            "seconds": self.seconds,
            "us_per_request_by_thousand": [
                round(1e6 * (times[end - 1] - (times[start - 1] if start else 0)) / (end - start))
                for start, end in zip(starts, ends, strict=True)
            ],
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT,
        }


def make_source(spec: str, num: int | None, num_output_tokens: int) -> Source:
    """ValueError as of `make_workload`, which makes all but Mooncake's."""
    kind, _, path = spec.partition(":")
    if kind == "mooncake":
        return TraceSource(read_mooncake(path)[:num], num_output_tokens)
    workload = make_workload(spec, vocab_size=VOCAB_SIZE)
    return WorkloadSource(workload if num is None else workload.head(num))


def make_config(source: Source, block_size: int, max_num_seqs: int) -> EngineConfig:
    """Whole prompts in one step, of as many requests at once as may run."""
    longest = max(source.num_tokens)
    return EngineConfig(
        max_model_len=longest,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=longest * max_num_seqs,
    )


def num_kv_tokens(text: str, source: Source, block_size: int) -> int:
    """Of `2.6M`, `500k`, or `inf`: then every block of every request has a place of its own."""
    if text == "inf":
        return sum(-(-num_tokens // block_size) * block_size for num_tokens in source.num_tokens)
    unit = {"k": 10**3, "M": 10**6}.get(text[-1:], 1)
    num_tokens = round(float(text.rstrip("kM")) * unit)
    if num_tokens // block_size < -(-max(source.num_tokens) // block_size):
        raise ValueError(
            f"a cache of {num_tokens} tokens cannot hold the longest request, which has "
            f"{max(source.num_tokens)}; raise --kv-cache-tokens, or replay another workload"
        )
    return num_tokens


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay what the command line names; prints what was found, writes it as JSON if asked."""
    options = _parse(arguments)
    try:
        source = make_source(options.spec, options.num, options.output_tokens)
        num_tokens = num_kv_tokens(options.kv_cache_tokens, source, options.block_size)
        config = make_config(source, options.block_size, options.max_num_seqs)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    replay, drawing = Replay(config, num_tokens), ""
    for _ in replay.steps(source):
        if options.draw and not drawing and not source and not replay.scheduler.waiting:
            # Every prompt has begun, and those that are running hold their blocks.
            drawing = trie_text(replay.manager.prefix_cache, replay.manager.pool.ref_counts)
    report = {"spec": options.spec, **replay.report()}
    if options.draw:
        print(drawing)
    for name, value in report.items():
        print(f"{name:<28}{value}")
    if options.output is not None:
        write_json_atomically(options.output, report)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.replay", description=__doc__)
    add = parser.add_argument
    add("spec", help="mooncake:PATH, or any workload: few-shot, multi-turn:conversations=4, …")
    add("--num", type=int, help="only the first requests")
    add("--kv-cache-tokens", default="inf", help="2.6M, 500k; inf evicts nothing (default)")
    add("--block-size", type=int, default=16, help="tokens per block (default 16)")
    add("--max-num-seqs", type=int, default=1, help="requests running at once (default 1)")
    add("--output-tokens", type=int, default=1, help="of each request of a trace (default 1)")
    add("--output", type=Path, help="write the numbers to this JSON file")
    add("--draw", action="store_true", help="print the trie: for small workloads")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
