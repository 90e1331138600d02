"""An engine on the interpreted kernels: the same tokens as Transformers and as the reference."""

import os

import pytest
import torch

from folovllm.model.loader import load_model
from folovllm.request import SamplingParams
from folovllm.testing.driver import drain, make_requests, random_prompts
from folovllm.testing.engine_contract import toy_directory, toy_model
from folovllm.testing.toy_models import reference_greedy, toy_families
from m6_prefix.config import AttentionBackend, EngineConfig
from m6_prefix.engine import LLMEngine

pytest.importorskip("triton")

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1 before start", allow_module_level=True)

from m6_prefix.flash_attention import TritonAttention  # noqa: E402

__all__ = ["toy_directory", "toy_model"]

DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")
FAMILIES = toy_families() if HAS_CUDA else toy_families()[:1]
"""In the interpreter one is enough: m4_flash has them all, and the kernels are the same."""


@pytest.mark.no_cover
@pytest.mark.parametrize("toy_directory", FAMILIES, ids=lambda f: f.name, indirect=True)
@pytest.mark.parametrize("max_num_seqs", [5])
def test_engine_on_the_kernels_equals_transformers(toy_directory, max_num_seqs) -> None:
    """End to end in the interpreter: prompts, decodes, and both in one step through forks."""
    model = load_model(toy_directory, device=DEVICE.type, dtype="float32")
    config = EngineConfig(max_model_len=64, max_num_seqs=max_num_seqs, kv_cache_bytes=1 << 20)
    engine = LLMEngine(config, model)
    runner = engine.model_runner
    if not HAS_CUDA:
        runner.attention = TritonAttention(runner.kv_cache, model.config.num_heads, max_num_seqs)
    # One by one, two are enough: one token and the longest.
    num_prompts = min(max_num_seqs + 1, 5)
    prompts = random_prompts(seed=1, count=num_prompts, vocab_size=199, max_len=40)
    expected = reference_greedy(toy_directory, prompts, max_tokens=5)
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    requests = make_requests(prompts, params)
    drain(engine, requests[:3], later={2: requests[3:]})
    assert [request.output_token_ids for request in requests] == expected


def engine_of(model, backend: AttentionBackend) -> LLMEngine:
    config = EngineConfig(
        max_model_len=64,
        max_num_seqs=6,
        block_size=4,
        kv_cache_bytes=1 << 20,
        attention_backend=backend,
        enforce_eager=True,
    )
    engine = LLMEngine(config, model)
    engine.model_runner.kv_cache.kv.fill_(float("nan"))
    return engine


@pytest.mark.no_cover
def test_forks_next_to_prompts_launch_both_kernels_and_keep_their_tokens(
    toy_model, monkeypatch
) -> None:
    """Forks compute one token of their prompt, in the step in which others compute all of it."""
    engine, reference = (engine_of(toy_model, AttentionBackend(name)) for name in ("auto", "torch"))
    runner = engine.model_runner
    attention = TritonAttention(runner.kv_cache, toy_model.config.num_heads, max_num_requests=6)
    monkeypatch.setattr(runner, "attention", attention)
    query_lens: set[tuple[int, int]] = set()

    def forward(metadata, *args):
        query_lens.add((metadata.min_query_len, metadata.max_query_len))
        return TritonAttention.forward(attention, metadata, *args)

    monkeypatch.setattr(attention, "forward", forward)
    short, long, other = random_prompts(seed=3, count=3, vocab_size=199, min_len=3, max_len=18)
    params = SamplingParams(temperature=1.0, max_tokens=4, ignore_eos=True)
    outputs = []
    for served in (engine, reference):
        requests = make_requests([long] * 4 + [short, other], params, seeds=range(6))
        for fork in requests[1:4]:
            fork.fork_of = requests[0]
        drain(served, requests[:4], later={1: requests[4:]})
        outputs.append([request.output_token_ids for request in requests])
    assert outputs[0] == outputs[1]
    # A prompt alone; forks beside prompts; everybody decodes.
    assert query_lens == {(18, 18), (1, max(3, len(other))), (1, 1)}
