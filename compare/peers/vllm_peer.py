"""vLLM through its LLMEngine: `python -m compare.peers.vllm_peer bench --workload nano`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from folovllm.interfaces import StepOutput, TokenLogprobs
from folovllm.model.config import ModelConfig
from folovllm.model.loader import resolve_device, resolve_dtype
from folovllm.model.weights import with_published_head
from folovllm.request import Request

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


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options that vLLM shares with the stages."""

    max_model_len: int = 2048
    """Longest prompt plus output, in tokens."""
    kv_cache_bytes: int | None = None
    """Memory of the KV cache; None lets vLLM take what its own default leaves."""
    max_num_seqs: int = 256
    """Most requests in a step."""
    max_num_batched_tokens: int = 8192
    """Most tokens in a step."""


class VllmEngine:
    """Translates requests and outputs; the scheduling is vLLM's."""

    def __init__(self, config: EngineConfig, engine: Any, facts: PeerModel) -> None:
        """engine: a vllm LLMEngine whose core lives in this process."""
        cache = engine.vllm_config.cache_config
        num_kv_tokens = cache.num_gpu_blocks * cache.block_size
        self.config = config
        self.scheduler = UntimedScheduler()
        self.model_runner = UntimedModelRunner(
            FixedKVCache(num_kv_tokens * facts.kv_bytes_per_token)
        )
        self._engine = engine
        self._progress = BatchProgress(num_kv_tokens)

    def add_request(self, request: Request) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        require_benchmark_request(request, self.config.max_model_len)
        self._progress.add(request)
        params = SamplingParams(
            temperature=0.0,
            max_tokens=request.max_tokens,
            ignore_eos=True,
            logprobs=request.sampling_params.logprobs,
            detokenize=False,
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


def _logprobs(token_id: int, position: Any) -> TokenLogprobs:
    """vLLM's {token id: Logprob} of one position, the likeliest first."""
    ranked = sorted(position.items(), key=lambda item: -item[1].logprob)
    chosen = position[token_id]
    top = tuple((int(other), float(entry.logprob)) for other, entry in ranked)
    return TokenLogprobs(float(chosen.logprob), int(chosen.rank or 1), top)


@contextmanager
def start(
    model: str | None, *, load_format: str, dtype: str, device: str, seed: int, config: EngineConfig
) -> Iterator[PeerLLM]:
    """Start vLLM on a checkpoint, or on the stages' dummy weights."""
    # In this process, so that its peak memory is seen; vLLM reads it when it is imported.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import EngineArgs, LLMEngine

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
        options = asdict(config)
        kv_cache_bytes = options.pop("kv_cache_bytes")
        if kv_cache_bytes is not None:
            options["kv_cache_memory_bytes"] = kv_cache_bytes
        tokenizer = load_tokenizer(folder)
        arguments = EngineArgs(
            model=str(folder),
            dtype=str(torch_dtype).removeprefix("torch."),
            seed=seed,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            disable_log_stats=True,
            **options,
        )
        engine = VllmEngine(config, LLMEngine.from_engine_args(arguments), facts)
        yield PeerLLM(engine=engine, model=facts, tokenizer=tokenizer)


if __name__ == "__main__":
    raise SystemExit(main("vllm", EngineConfig, start))
