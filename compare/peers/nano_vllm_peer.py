"""nano-vllm through its LLMEngine: `python -m compare.peers.nano_vllm_peer bench --workload nano`.

nano-vllm has neither greedy decoding nor log-probabilities: a temperature near zero stands for
greedy, and the gate says that its tokens are not compared.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
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

NEARLY_GREEDY = 1e-5
"""Divides logits so far apart that only exact ties are left to chance."""
NOT_COMPARABLE = "nano-vllm reports no log-probabilities and has no greedy decoding"


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options that nano-vllm shares with the stages."""

    max_model_len: int = 2048
    """Longest prompt plus output, in tokens."""
    max_num_seqs: int = 256
    """Most requests in a step."""
    max_num_batched_tokens: int = 8192
    """Most tokens in a step."""


class NanoVllmEngine:
    """Translates requests and reads new tokens off nano-vllm's sequences after each step."""

    def __init__(self, config: EngineConfig, engine: Any, facts: PeerModel) -> None:
        """engine: a nanovllm LLM."""
        cache = engine.model_runner.kv_cache
        self.config = config
        self.scheduler = UntimedScheduler()
        self.model_runner = UntimedModelRunner(FixedKVCache(cache.numel() * cache.element_size()))
        self._engine = engine
        self._progress = BatchProgress(cache.numel() * cache.element_size()
                                       // facts.kv_bytes_per_token)  # fmt: skip
        self._sequences: dict[str, Any] = {}
        self._num_seen: dict[str, int] = {}

    def add_request(self, request: Request) -> None:
        from nanovllm import SamplingParams

        require_benchmark_request(request, self.config.max_model_len)
        self._progress.add(request)
        params = SamplingParams(
            temperature=NEARLY_GREEDY, max_tokens=request.max_tokens, ignore_eos=True
        )
        self._engine.add_request(list(request.prompt_token_ids), params)
        # It gives no handle, but it appends to its queue.
        self._sequences[request.request_id] = self._engine.scheduler.waiting[-1]
        self._num_seen[request.request_id] = 0

    def abort_request(self, request_id: str) -> None:
        """nano-vllm cannot abort: only a request that never ran can be taken back."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return
        if sequence not in self._engine.scheduler.waiting:
            raise RuntimeError(f"nano-vllm cannot abort request {request_id}: it is running")
        self._engine.scheduler.waiting.remove(sequence)
        self._forget(request_id)
        self._progress.drop(request_id)

    def has_unfinished_requests(self) -> bool:
        return len(self._progress) > 0

    def step(self) -> StepOutput:
        self._engine.step()
        new_tokens = []
        for request_id, sequence in list(self._sequences.items()):
            num_tokens = sequence.num_completion_tokens
            first_new = sequence.num_prompt_tokens + self._num_seen[request_id]
            new_tokens += [
                (request_id, int(token_id), _unknown_logprobs(int(token_id)))
                for token_id in sequence.token_ids[first_new:]
            ]
            self._num_seen[request_id] = num_tokens
            if sequence.is_finished:
                self._forget(request_id)
        return self._progress.advance(new_tokens)

    def reset_prefix_cache(self) -> None:
        """Forget the prompts of gate and earlier runs, which a timed run asks again.

        nano-vllm has no call for this: blocks are found by their hash, so no hash may be known.
        RuntimeError if this version keeps them elsewhere.
        """
        block_manager = self._engine.scheduler.block_manager
        if not isinstance(getattr(block_manager, "hash_to_block_id", None), dict):
            raise RuntimeError(
                "this nano-vllm does not keep its prefix cache in block_manager.hash_to_block_id; "
                "prompts of the gate would be found in the timed run"
            )
        block_manager.hash_to_block_id.clear()

    def _forget(self, request_id: str) -> None:
        del self._sequences[request_id]
        del self._num_seen[request_id]


@contextmanager
def start(
    model: str | None, *, load_format: str, dtype: str, device: str, seed: int, config: EngineConfig
) -> Iterator[PeerLLM]:
    """Start nano-vllm on a checkpoint, or on the stages' dummy weights."""
    from nanovllm import LLM

    target = resolve_device(device)
    if target.type != "cuda":
        raise ValueError(f"nano-vllm runs on CUDA only, got device {str(target)!r}")
    with checkpoint(
        model, load_format=load_format, dtype=dtype, device=device, seed=seed
    ) as folder:
        model_config = with_published_head(ModelConfig.from_directory(folder), folder)
        tokenizer = load_tokenizer(folder)
        if tokenizer is None:
            _write_tokenizer(folder)
        facts = PeerModel(
            config=model_config,
            device=target,
            dtype=resolve_dtype(dtype, model_config, target),
            num_parameters=count_parameters(folder, model_config),
        )
        engine = NanoVllmEngine(config, LLM(str(folder), **asdict(config)), facts)
        yield PeerLLM(engine=engine, model=facts, tokenizer=tokenizer)


def _unknown_logprobs(token_id: int) -> TokenLogprobs:
    """What the benchmark's gate run asks for; `main` drops that gate and says why."""
    return TokenLogprobs(math.nan, 0, ((token_id, math.nan), (token_id, math.nan)))


def _write_tokenizer(folder: Path) -> None:
    """A tokenizer of one word: nano-vllm wants one, though it gets and returns token ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({"<eos>": 0}, unk_token="<eos>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


if __name__ == "__main__":
    raise SystemExit(main("nano_vllm", EngineConfig, start, gate_not_comparable=NOT_COMPARABLE))
