"""vLLM as its users run it: `python -m compare.peers.vllm_peer bench --workload nano`.

The engine is that of vLLM's class LLM with its defaults: the engine core in a process of its own,
scheduling ahead of the device, prefix caching on. Timings per token come from a run that takes
every token as it comes; the rates of a workload that arrives at once are those of `LLM.generate`.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from folovllm.interfaces import StepOutput, TokenLogprobs
from folovllm.model.config import ModelConfig
from folovllm.model.loader import resolve_device, resolve_dtype
from folovllm.model.weights import with_published_head
from folovllm.request import Request
from folovllm.workloads.workload import WorkloadRequest

from .batch_progress import BatchProgress
from .checkpoint import checkpoint, count_parameters
from .peer import (
    FixedKVCache,
    PeerLLM,
    PeerModel,
    UntimedModelRunner,
    UntimedScheduler,
    load_tokenizer,
    main,
    require_benchmark_request,
)
from .vllm_settings import describe_settings

WORKER_EXTENSION = "compare.peers.vllm_worker.MeasuredWorker"
_RESET_ATTEMPTS = 100
_RESET_INTERVAL_S = 0.05
"""The core may still be freeing the blocks of requests whose last token is here already."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options that vLLM shares with the stages; None is vLLM's own default on this device."""

    max_model_len: int = 2048
    """Longest prompt plus output, in tokens."""
    kv_cache_bytes: int | None = None
    """Memory of the KV cache; None lets vLLM take what its own default leaves."""
    max_num_seqs: int | None = None
    """Most requests in a step."""
    max_num_batched_tokens: int | None = None
    """Most tokens in a step."""


class VllmEngine:
    """Translates requests and outputs; the scheduling is vLLM's."""

    def __init__(self, config: EngineConfig, llm: Any, facts: PeerModel) -> None:
        """llm: a vllm LLM. Its engine is stepped as `LLM.generate` does, which waits in every
        step for what the core sends next; a request is passed on between two steps."""
        self._llm, self._engine = llm, llm.llm_engine
        settings = self._engine.vllm_config
        cache, scheduler = settings.cache_config, settings.scheduler_config
        num_kv_tokens = cache.num_gpu_blocks * cache.block_size
        self.config = replace(
            config,
            max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
        )
        self.scheduler = UntimedScheduler()
        self.model_runner = UntimedModelRunner(
            FixedKVCache(num_kv_tokens * facts.kv_bytes_per_token)
        )
        self._progress = BatchProgress(num_kv_tokens)

    def add_request(self, request: Request) -> None:
        from vllm.sampling_params import RequestOutputKind

        require_benchmark_request(request, self.config.max_model_len)
        self._progress.add(request)
        params = _greedy(
            request.max_tokens,
            logprobs=request.sampling_params.logprobs,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt = {"prompt_token_ids": request.prompt_token_ids}
        self._engine.add_request(request.request_id, prompt, params)

    def abort_request(self, request_id: str) -> None:
        if self._progress.drop(request_id):
            self._engine.abort_request([request_id])

    def has_unfinished_requests(self) -> bool:
        return len(self._progress) > 0

    def step(self) -> StepOutput:
        new_tokens = []
        for output in self._engine.step():
            completion = output.outputs[0]
            positions = completion.logprobs or [None] * len(completion.token_ids)
            for token_id, position in zip(completion.token_ids, positions, strict=True):
                logprobs = None if position is None else _logprobs(token_id, position)
                new_tokens.append((output.request_id, int(token_id), logprobs))
        return self._progress.advance(new_tokens)

    def reset_prefix_cache(self) -> None:
        """Forget the prompts of gate and earlier runs, which a timed run asks again.

        RuntimeError if vLLM does not: what it would then be timed on is not the workload.
        """
        for _ in range(_RESET_ATTEMPTS):
            if self._engine.reset_prefix_cache():
                return
            time.sleep(_RESET_INTERVAL_S)
        raise RuntimeError(
            "vLLM did not empty its prefix cache although no request is running; prompts that it "
            "has seen would be found there"
        )

    def generate(self, sources: Sequence[WorkloadRequest]) -> float:
        """Seconds that `LLM.generate` takes for all of these, its caller's view.

        RuntimeError if it gives another number of tokens than was asked for.
        """
        self.reset_prefix_cache()
        prompts = [{"prompt_token_ids": list(source.prompt_token_ids)} for source in sources]
        params = [_greedy(source.output_len) for source in sources]
        start = time.perf_counter()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        duration_s = time.perf_counter() - start
        num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        if num_tokens != sum(source.output_len for source in sources):
            raise RuntimeError(f"LLM.generate gave {num_tokens} tokens, not those asked for")
        return duration_s


class CoreMemory:
    """Peak memory of the engine core, asked for where it is; None if it cannot be asked."""

    def __init__(self, collective_rpc: Callable[[str], Any]) -> None:
        self._ask = collective_rpc

    def reset(self) -> None:
        self._ask("folovllm_reset_peak_memory")

    def peak_bytes(self) -> int | None:
        peaks = self._ask("folovllm_peak_memory_bytes")
        return None if peaks is None else sum(peaks)


def _greedy(max_tokens: int, **options: Any) -> Any:
    """vLLM's settings for what a stage is asked for: greedy, to the full length, no text."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, **options
    )


def _logprobs(token_id: int, position: Any) -> TokenLogprobs:
    """vLLM's {token id: Logprob} of one position, the likeliest first."""
    ranked = sorted(position.items(), key=lambda item: -item[1].logprob)
    chosen = position[token_id]
    top = tuple((int(other), float(entry.logprob)) for other, entry in ranked)
    return TokenLogprobs(float(chosen.logprob), int(chosen.rank or 1), top)


def _asker(llm: Any) -> Callable[[str], Any]:
    """Calls a method of the worker by name; None where it fails."""

    def ask(method: str) -> Any:
        try:
            return llm.collective_rpc(method)
        except Exception as error:  # whatever crosses the border of the process
            print(f"vLLM's worker did not answer {method}: {error!r}", file=sys.stderr)
            return None

    return ask


@contextmanager
def start(
    model: str | None, *, load_format: str, dtype: str, device: str, seed: int, config: EngineConfig
) -> Iterator[PeerLLM]:
    """Start vLLM on a checkpoint, or on the stages' dummy weights."""
    from vllm import LLM

    target = resolve_device(device)
    if target.type != "cuda":
        raise ValueError(f"the vLLM peer runs on CUDA only, got device {str(target)!r}")
    with checkpoint(
        model, load_format=load_format, dtype=dtype, device=device, seed=seed
    ) as folder:
        model_config = with_published_head(ModelConfig.from_directory(folder), folder)
        torch_dtype = resolve_dtype(dtype, model_config, target)
        facts = PeerModel(
            config=model_config,
            device=target,
            dtype=torch_dtype,
            num_parameters=count_parameters(folder, model_config),
        )
        tokenizer = load_tokenizer(folder)
        llm = LLM(
            model=str(folder),
            dtype=str(torch_dtype).removeprefix("torch."),
            seed=seed,
            skip_tokenizer_init=True,  # token ids in, token ids out
            worker_extension_cls=WORKER_EXTENSION,
            **_given(config),
        )
        ask = _asker(llm)
        engine = VllmEngine(config, llm, facts)
        try:
            yield PeerLLM(
                engine=engine,
                model=facts,
                tokenizer=tokenizer,
                memory=CoreMemory(ask),
                generate=engine.generate,
                settings=describe_settings(llm.llm_engine, ask("folovllm_attention_backends")),
            )
        finally:
            llm.llm_engine.engine_core.shutdown()


def _given(config: EngineConfig) -> dict[str, Any]:
    """The options that are not left to vLLM, under its names."""
    options = {name: value for name, value in asdict(config).items() if value is not None}
    if "kv_cache_bytes" in options:
        options["kv_cache_memory_bytes"] = options.pop("kv_cache_bytes")
    return options


if __name__ == "__main__":
    raise SystemExit(main("vllm", EngineConfig, start))
