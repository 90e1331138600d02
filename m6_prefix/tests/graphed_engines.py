"""Engines with and without graphs side by side, and what they replayed: for the tests of both.

On a CPU graphs are fakes that run the recorded step again.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from folovllm.model.config import kv_bytes_per_token
from folovllm.model.loader import load_model
from folovllm.model.transformer import CausalLM
from folovllm.request import SamplingParams
from folovllm.testing.driver import drain, make_requests, random_prompts
from folovllm.testing.fake_graphs import FakeGraphRecorder
from folovllm.testing.toy_models import toy_families, write_toy_model
from m6_prefix.config import AttentionBackend, EngineConfig
from m6_prefix.cuda_graph import StepGraphs, StepShape, decode_shapes, mixed_shapes
from m6_prefix.engine import LLMEngine
from m6_prefix.scheduler import SchedulerOutput
from m6_prefix.tests.mixed_steps import DEVICES, needs_cuda

SIZES = [1, 2, 4, 8, 16, 20]
"""Requests in the decode steps that are captured for max_num_seqs 20."""
RULES = [
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.2, "top_k": 5},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.0, "repetition_penalty": 1.5},
    {"temperature": 0.8, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"temperature": 0.0, "logit_bias": {7: 3.0, 8: -3.0}},
    {"temperature": 0.0, "min_tokens": 6, "stop_token_ids": list(range(100))},
    {"temperature": 0.9, "logprobs": 3},
]
"""Rules that no graph follows."""


@pytest.fixture(scope="module")
def toy_directory(tmp_path_factory) -> Path:
    return write_toy_model(toy_families()[3], tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module", params=DEVICES)
def model(request, toy_directory) -> CausalLM:
    """float32: a batch of another size rounds differently, which bfloat16 would show in tokens."""
    return load_model(toy_directory, device=request.param, dtype="float32")


@pytest.fixture(scope="module", params=[pytest.param("cuda", marks=needs_cuda)])
def cuda_model(request, toy_directory) -> CausalLM:
    return load_model(toy_directory, device=request.param, dtype="float32")


def make_engine(model: CausalLM, num_blocks: int = 320, **options) -> LLMEngine:
    """An engine whose cache is full of NaN; by default no request ever has to give way."""
    block_size = options.setdefault("block_size", 4)
    config = EngineConfig(
        **{
            "max_model_len": 64,
            "max_num_seqs": 20,
            "max_num_batched_tokens": 1024,
            "enable_prefix_caching": False,  # or prompts that come again are another shape
            "kv_cache_bytes": num_blocks
            * block_size
            * kv_bytes_per_token(model.config, model.dtype),
            **options,
        }
    )
    engine = LLMEngine(config, model)
    runner = engine.model_runner
    is_wanted = not config.enforce_eager and config.attention_backend is AttentionBackend.AUTO
    if model.device.type == "cpu" and is_wanted:
        runner.graphs = runner._capture(FakeGraphRecorder())
    runner.kv_cache.kv.fill_(float("nan"))
    return engine


def eager_engine(model: CausalLM, **options) -> LLMEngine:
    return make_engine(model, enforce_eager=True, **options)


def planned_graphs(config: EngineConfig) -> StepGraphs:
    """What is captured for this config, without capturing it, which needs no GPU."""
    graphs = StepGraphs.__new__(StepGraphs)
    max_size = min(config.max_graph_size, config.max_num_seqs)
    graphs._decode_shapes = decode_shapes(max_size)
    max_tokens = min(config.max_graph_tokens, config.max_num_batched_tokens)
    graphs._mixed_shapes = sorted(mixed_shapes(max_tokens, max_size))
    graphs.graphs = {shape: shape for shape in graphs._decode_shapes + graphs._mixed_shapes}
    return graphs


class Replays:
    """What an engine replays from graphs."""

    def __init__(self, engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.decodes: list[tuple[int, int]] = []
        """(requests that the graph holds, requests that it served) per step"""
        self.mixed: list[tuple[StepShape, StepShape]] = []
        """(what the graph holds, what it served) per step with several tokens of a request"""
        runner = engine.model_runner
        replay, prepare_inputs = runner._replay, runner.prepare_inputs
        assert runner.graphs is not None
        served = StepShape(0, 0)

        def record(shape: StepShape) -> None:
            if shape.num_tokens == shape.num_requests:
                self.decodes.append((shape.num_requests, served.num_requests))
            else:
                self.mixed.append((shape, served))

        def recorded_inputs(scheduler_output):
            nonlocal served
            num_tokens = sum(s.num_scheduled_tokens for s in scheduler_output.scheduled)
            served = StepShape(num_tokens, len(scheduler_output.scheduled))
            return prepare_inputs(scheduler_output)

        def recorded_replay(graph, requests):
            record(StepShape(len(graph.batch.input_ids), len(graph.batch.seq_lens)))
            return replay(graph, requests)

        monkeypatch.setattr(runner, "prepare_inputs", recorded_inputs)
        monkeypatch.setattr(runner, "_replay", recorded_replay)


def execute(engine: LLMEngine, scheduled: SchedulerOutput) -> None:
    """Compute a step that was scheduled, and record its tokens."""
    tokens = engine.model_runner.launch(scheduled)
    stats = engine.scheduler.advance(scheduled)
    engine.scheduler.update(scheduled, tokens.wait(), stats)


def size_of(num_requests: int) -> int:
    return min(size for size in SIZES if size >= num_requests)


def greedy(max_tokens: int, **options) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **options)


def tempered(max_tokens: int, temperature: float = 1.0, **options) -> SamplingParams:
    return SamplingParams(
        temperature=temperature, max_tokens=max_tokens, ignore_eos=True, **options
    )


def serve(
    engine: LLMEngine,
    prompts: Sequence[list[int]],
    params: SamplingParams | Sequence[SamplingParams],
    later: dict[int, Sequence[int]] | None = None,
) -> list[list[int]]:
    """Output tokens per prompt; later: step -> indices of the prompts that arrive then."""
    requests = make_requests(prompts, params, seeds=range(len(prompts)))
    late = {step: [requests[i] for i in indices] for step, indices in (later or {}).items()}
    is_late = {request.request_id for group in late.values() for request in group}
    drain(engine, [r for r in requests if r.request_id not in is_late], later=late)
    return [request.output_token_ids for request in requests]


def prompts_of(num_requests: int, seed: int = 0, max_len: int = 20) -> list[list[int]]:
    return random_prompts(seed=seed, count=num_requests, vocab_size=199, min_len=2, max_len=max_len)


def check_changes(after: torch.Tensor, before: torch.Tensor, slots: set[int]) -> None:
    """Of the keys and values of every layer exactly these slots changed, compared as bits."""
    bits = (after.view(torch.int32) != before.view(torch.int32)).flatten(-2).any(-1)
    for changed in bits.flatten(2).flatten(0, 1):  # [num_slots], of one layer's keys or values
        assert set(changed.nonzero().flatten().tolist()) == slots
