"""Decode steps replayed from CUDA graphs against the same steps launched kernel by kernel.

Every test runs on a CPU too, with graphs that run the recorded step again (fake_graphs).
"""

import random

import pytest
import torch

from folovllm.request import Request
from folovllm.testing.driver import check_step, drain, make_requests, random_prompts
from m6_prefix.config import AttentionBackend, EngineConfig, PreemptionMode
from m6_prefix.cuda_graph import GraphRecorder, StepShape, decode_shapes, mixed_shapes
from m6_prefix.tests.graphed_engines import (
    SIZES,
    Replays,
    check_changes,
    cuda_model,
    eager_engine,
    execute,
    greedy,
    make_engine,
    model,
    planned_graphs,
    prompts_of,
    serve,
    size_of,
    tempered,
    toy_directory,
)
from m6_prefix.tests.invariants import check_blocks
from m6_prefix.tests.test_preemption import forks

__all__ = ["cuda_model", "model", "toy_directory"]


# What is captured


def test_captured_decode_steps_end_with_the_largest_batch() -> None:
    def sizes(max_size: int) -> list[int]:
        shapes = decode_shapes(max_size)
        assert all(shape.num_tokens == shape.num_requests for shape in shapes)
        return [shape.num_requests for shape in shapes]

    assert sizes(1) == [1]
    assert sizes(2) == [1, 2]
    assert sizes(3) == [1, 2, 3]
    assert sizes(20) == SIZES
    assert sizes(64) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
    assert sizes(65) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 65]
    assert sizes(256)[-4:] == [208, 224, 240, 256]
    for max_size in range(1, 300):
        assert sizes(max_size) == sorted(set(sizes(max_size)))
        assert sizes(max_size)[-1] == max_size


def test_captured_mixed_steps_grow_by_halves_up_to_the_longest() -> None:
    def lengths(max_tokens: int) -> list[int]:
        return [shape.num_tokens for shape in mixed_shapes(max_tokens, max_size=1)]

    assert lengths(0) == lengths(1) == []  # a prompt of one token is a decode step
    assert lengths(2) == [2]
    assert lengths(64) == [64]
    assert lengths(65) == [64, 65]
    assert lengths(300) == [64, 128, 256, 300]
    assert lengths(512) == [64, 128, 256, 384, 512]
    assert lengths(2048) == [64, 128, 256, 384, 512, 768, 1024, 1536, 2048]


def test_captured_mixed_steps_have_more_tokens_than_requests() -> None:
    assert mixed_shapes(100, 20) == [(64, 1), (64, 8), (64, 20), (100, 1), (100, 8), (100, 20)]
    assert mixed_shapes(80, 256) == [(64, 1), (64, 8), (64, 32), (80, 1), (80, 8), (80, 32)]
    assert mixed_shapes(2048, 256)[-4:] == [(2048, 1), (2048, 8), (2048, 32), (2048, 256)]
    assert mixed_shapes(8, 8) == [(8, 1)]


def test_smallest_graph_that_holds_the_step_is_found() -> None:
    graphs = planned_graphs(EngineConfig(max_num_batched_tokens=100, max_num_seqs=20))
    decodes = [graphs.find(count, count) for count in range(1, 22)]
    sizes = [1, 2, 4, 4, *[8] * 4, *[16] * 8, *[20] * 4]
    assert decodes == [*[StepShape(size, size) for size in sizes], None]
    prompts = [graphs.find(num_tokens, 1) for num_tokens in (2, 3, 20, 63, 64, 65, 100, 101)]
    assert prompts == [*[StepShape(64, 1)] * 5, *[StepShape(100, 1)] * 2, None]
    # Two prompts, and a prompt beside single tokens.
    assert graphs.find(8, 2) == graphs.find(10, 8) == StepShape(64, 8)
    assert graphs.find(10, 9) == graphs.find(64, 20) == StepShape(64, 20)
    assert graphs.find(65, 2) == StepShape(100, 8)
    assert graphs.find(65, 20) == StepShape(100, 20)
    assert graphs.find(65, 21) is graphs.find(101, 2) is None


def test_chunk_behind_a_long_context_is_launched_kernel_by_kernel() -> None:
    graphs = planned_graphs(EngineConfig())
    assert graphs.find(2048, 1, num_pairs=2048 * 16384) == StepShape(2048, 1)
    assert graphs.find(2048, 1, num_pairs=2048 * 16384 + 1) is None
    assert graphs.find(1, 1, num_pairs=1_000_000) == StepShape(1, 1)


@pytest.mark.parametrize(
    "options", [{"enforce_eager": True}, {"attention_backend": AttentionBackend.TORCH}]
)
def test_nothing_is_captured_where_it_is_not_wanted_or_impossible(model, options) -> None:
    engine = make_engine(model, **options)
    assert engine.model_runner.graphs is None
    assert serve(engine, prompts_of(3), greedy(4)) == serve(
        eager_engine(model), prompts_of(3), greedy(4)
    )


def test_every_size_is_captured_and_its_cost_reported(cuda_model) -> None:
    graphs = make_engine(cuda_model).model_runner.graphs
    assert graphs is not None
    assert sorted(graphs.graphs) == sorted(decode_shapes(20) + mixed_shapes(1024, 20))
    assert graphs.capture_s > 0
    assert graphs.num_bytes > 0


def test_memory_that_torch_holds_unused_does_not_hide_what_graphs_take(cuda_model) -> None:
    """Capturing gives unused memory back to the device, which is no gain of the graphs."""
    torch.empty(1 << 30, dtype=torch.uint8, device=cuda_model.device)
    graphs = make_engine(cuda_model).model_runner.graphs
    assert graphs is not None
    assert 0 < graphs.num_bytes < 1 << 30


def test_capturing_touches_neither_cache_nor_tables(cuda_model) -> None:
    runner = eager_engine(cuda_model).model_runner
    tables = runner.block_tables
    runner.kv_cache.kv.normal_()
    tables.device.random_(0, 320)
    before, tables_before = runner.kv_cache.kv.clone(), tables.device.clone()
    runner._capture(GraphRecorder(cuda_model.device))
    assert torch.equal(runner.kv_cache.kv, before)
    assert torch.equal(tables.device[: tables.padding_row], tables_before[: tables.padding_row])


def test_memory_that_does_not_suffice_is_refused(cuda_model, monkeypatch) -> None:
    def out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(GraphRecorder, "record", out_of_memory)
    with pytest.raises(ValueError, match="graphs of up to 1024 tokens; lower .* enforce_eager"):
        make_engine(cuda_model)


# Greedy tokens


def test_every_size_and_its_neighbours_give_the_tokens_of_eager_steps(model, monkeypatch) -> None:
    graphed, eager = make_engine(model), eager_engine(model)
    replays = Replays(graphed, monkeypatch)
    neighbours = {size + offset for size in SIZES for offset in (-1, 0, 1)}
    for num_requests in sorted(neighbours & set(range(1, 21))):
        replays.decodes.clear()
        prompts = prompts_of(num_requests, seed=num_requests)
        assert serve(graphed, prompts, greedy(6)) == serve(eager, prompts, greedy(6))
        assert set(replays.decodes) == {(size_of(num_requests), num_requests)}


def test_batches_that_shrink_and_grow_give_the_tokens_of_eager_steps(model, monkeypatch) -> None:
    graphed, eager = make_engine(model), eager_engine(model)
    replays = Replays(graphed, monkeypatch)
    prompts = prompts_of(45, max_len=30)
    rng = random.Random(0)
    params = [greedy(rng.randint(2, 30)) for _ in prompts]
    later = {step: [20 + index] for index, step in enumerate(rng.sample(range(4, 90), 25))}
    outputs = [serve(engine, prompts, params, later) for engine in (graphed, eager)]
    assert outputs[0] == outputs[1]
    assert {size for size, _ in replays.decodes} == set(SIZES)
    counts = [num_requests for _, num_requests in replays.decodes]
    assert any(a < b for a, b in zip(counts, counts[1:], strict=False))
    assert any(a > b for a, b in zip(counts, counts[1:], strict=False))


@pytest.mark.parametrize("block_size", [1, 4, 5, 16, 64])
def test_request_that_reaches_max_model_len_exactly(model, monkeypatch, block_size) -> None:
    """The last column of its table is used, beside short ones and rows of padding."""
    options = {"block_size": block_size, "num_blocks": 20 * -(-64 // block_size)}
    graphed, eager = make_engine(model, **options), eager_engine(model, **options)
    replays = Replays(graphed, monkeypatch)
    prompts = [prompt * 4 for prompt in prompts_of(3, max_len=10)]
    params = [greedy(64 - len(prompts[0])), greedy(64 - len(prompts[1])), greedy(5)]
    outputs = [serve(engine, prompts, params) for engine in (graphed, eager)]
    assert outputs[0] == outputs[1]
    assert [len(tokens) for tokens in outputs[0]] == [56, 24, 5]
    assert set(replays.decodes) == {(4, 3), (2, 2), (1, 1)}


def test_batch_that_no_graph_holds_is_launched_kernel_by_kernel(model, monkeypatch) -> None:
    graphed, eager = make_engine(model, max_graph_size=4), eager_engine(model)
    replays = Replays(graphed, monkeypatch)
    prompts = prompts_of(6)
    params = [greedy(max_tokens) for max_tokens in (3, 5, 7, 9, 11, 13)]
    assert serve(graphed, prompts, params) == serve(eager, prompts, params)
    assert set(replays.decodes) == {(4, 4), (4, 3), (2, 2), (1, 1)}


def test_step_with_logprobs_of_a_prompt_is_launched_kernel_by_kernel(model, monkeypatch) -> None:
    """A graph keeps the last row of each request alone. The decodes behind it are replayed."""
    prompts = prompts_of(3)
    params = [greedy(6, prompt_logprobs=2), greedy(6), greedy(6)]
    asking = []
    for engine in (make_engine(model), eager_engine(model)):
        is_graphed = engine.model_runner.graphs is not None
        replays = Replays(engine, monkeypatch) if is_graphed else None
        requests = make_requests(prompts, params)
        drain(engine, requests)
        asking.append(requests[0])
        if replays is not None:
            assert replays.decodes == [(4, 3)] * 5
    assert asking[0].output_token_ids == asking[1].output_token_ids
    assert len(asking[0].prompt_logprobs) == len(prompts[0]) - 1
    for ours, theirs in zip(*(request.prompt_logprobs for request in asking), strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def test_prompts_of_one_token_are_a_decode_step(model, monkeypatch) -> None:
    graphed, eager = make_engine(model), eager_engine(model)
    replays = Replays(graphed, monkeypatch)
    prompts = [[5], [77], [5]]
    assert serve(graphed, prompts, greedy(6)) == serve(eager, prompts, greedy(6))
    assert set(replays.decodes) == {(4, 3)}
    assert len(replays.decodes) == 6, "the first step is replayed as well"


# What a replay writes


def test_replay_changes_no_slot_but_those_of_its_tokens(model, monkeypatch) -> None:
    """Padding has slot -1: it must not end up in the last slot, nor in anybody's."""
    engine = make_engine(model, num_blocks=80, async_scheduling=False)
    replays = Replays(engine, monkeypatch)
    runner, block_size = engine.model_runner, engine.config.block_size
    # The last request leaves after every step: the rows behind the others were its own before.
    params = [greedy(max_tokens) for max_tokens in range(9, 2, -1)]
    for request in make_requests(prompts_of(7), params):
        engine.add_request(request)
    engine.step()
    while engine.has_unfinished_requests():
        # Fresh values, or who writes the same again would not be noticed.
        free = list(engine.kv_cache_manager.pool.free_block_ids)
        runner.kv_cache.kv[:, :, free] = torch.randn_like(runner.kv_cache.kv[:, :, free])
        before = runner.kv_cache.kv.clone()
        positions = {r.request_id: r.num_tokens - 1 for r in engine.scheduler.running}
        tables = engine.kv_cache_manager.block_tables
        scheduled = engine.scheduler.schedule()
        expected = {
            tables[name][position // block_size] * block_size + position % block_size
            for name, position in positions.items()
        }
        execute(engine, scheduled)
        check_changes(runner.kv_cache.kv, before, expected)
    assert set(replays.decodes) == {(8, 7), (8, 6), (8, 5), (4, 4), (4, 3), (2, 2), (1, 1)}


def test_rows_that_are_taken_for_current_are(model) -> None:
    """Replays write last blocks alone, prompts come in between, and rows go to other requests."""
    engine = make_engine(model, max_num_seqs=6)
    runner = engine.model_runner
    later = {step: [4 + index] for index, step in enumerate(range(2, 30, 3))}
    prompts = prompts_of(4 + len(later))
    requests = make_requests(prompts, greedy(20))
    num_checks = 0
    for request in requests[:4]:
        engine.add_request(request)
    for step in range(200):
        for index in later.get(step, ()):
            engine.add_request(requests[index])
        if not engine.has_unfinished_requests():
            break
        check_step(engine, engine.step())
        for request in engine.scheduler.running:
            table = engine.kv_cache_manager.block_tables[request.request_id]
            copy = runner.block_tables.copies[request.request_id]
            assert copy.block_table is table
            assert runner.block_tables.device[copy.row, : len(table)].tolist() == table
            assert runner.block_tables.host[copy.row, : len(table)].tolist() == table
            num_checks += 1
    assert num_checks > 200
    assert all(request.num_output_tokens == 20 for request in requests)


# With everything else that an engine does


@pytest.mark.parametrize("mode", PreemptionMode)
@pytest.mark.parametrize("params", [greedy(40), tempered(40)], ids=["greedy", "random"])
def test_preempted_requests_give_the_tokens_of_eager_steps(
    model, monkeypatch, mode, params
) -> None:
    small = {"num_blocks": 16, "preemption_mode": mode, "swap_cache_tokens": 400}
    graphed = make_engine(model, **small)
    replays = Replays(graphed, monkeypatch)
    prompts = prompts_of(6)
    expected = serve(eager_engine(model), prompts, params)
    requests = make_requests(prompts, params, seeds=range(6))
    for request in requests:
        graphed.add_request(request)
    num_preemptions = num_swapped = 0
    while graphed.has_unfinished_requests():
        output = graphed.step()
        check_step(graphed, output)
        check_blocks(graphed)
        num_preemptions += output.stats.num_preemptions
        num_swapped += output.stats.num_swapped_tokens
    assert [request.output_token_ids for request in requests] == expected
    assert num_preemptions >= 4
    assert (num_swapped > 0) == (mode is PreemptionMode.SWAP)
    assert replays.decodes


@pytest.mark.parametrize("prompt_len", [1, 4, 5, 17])
@pytest.mark.parametrize("params", [greedy(12), tempered(12)], ids=["greedy", "random"])
def test_forks_give_the_tokens_of_eager_steps(model, monkeypatch, params, prompt_len) -> None:
    """Copy on write happens before a replay, and forks are single tokens beside prompts."""
    graphed, eager = make_engine(model), eager_engine(model)
    replays = Replays(graphed, monkeypatch)
    prompt = random_prompts(
        seed=1, count=1, vocab_size=199, min_len=prompt_len, max_len=prompt_len
    )[0]
    outputs = []
    for engine in (graphed, eager):
        family = forks(prompt, 4, params)
        others = make_requests(prompts_of(3, seed=2), params, ids=["x", "y", "z"])
        drain(engine, family[:1] + others[:1] + family[1:], later={3: others[1:]})
        outputs.append([request.output_token_ids for request in family + others])
    assert outputs[0] == outputs[1]
    alone = serve(eager, [prompt] * 4, params)
    assert outputs[0][:4] == alone
    assert replays.decodes


class Interrupts:
    """Ends a call with a KeyboardInterrupt now and then, in turns before and after its work."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, str]] = set()

    def into(self, monkeypatch, owner, name: str, every: int, is_counted=lambda *args: True):
        function, num_calls = getattr(owner, name), 0

        def interrupted(*args):
            nonlocal num_calls
            num_calls += is_counted(*args)
            when = {every: "before", 0: "after"}.get(num_calls % (2 * every))
            if when is None or not is_counted(*args):
                return function(*args)
            if when == "after":
                function(*args)
            self.seen.add((name, when))
            raise KeyboardInterrupt

        monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("mode", PreemptionMode)
def test_step_that_is_broken_off_can_be_repeated(model, monkeypatch, mode) -> None:
    """Behind a replay the cache has the keys and values of tokens that nobody knows of."""
    small = {"num_blocks": 18, "preemption_mode": mode, "swap_cache_tokens": 400}
    engine = make_engine(model, **small)
    prompts = prompts_of(5)
    expected = serve(eager_engine(model), prompts, tempered(20))
    runner, interrupts = engine.model_runner, Interrupts()
    interrupts.into(monkeypatch, runner, "launch", every=5)
    interrupts.into(monkeypatch, runner, "prepare_inputs", every=7)
    interrupts.into(monkeypatch, runner, "_replay", every=3)
    requests = make_requests(prompts, tempered(20), seeds=range(5))
    for request in requests:
        engine.add_request(request)
    for _ in range(1000):
        if not engine.has_unfinished_requests():
            break
        try:
            check_step(engine, engine.step())
            check_blocks(engine)
        except KeyboardInterrupt:
            continue
    assert [request.output_token_ids for request in requests] == expected
    names = ("launch", "prepare_inputs", "_replay")
    assert interrupts.seen == {(name, when) for name in names for when in ("before", "after")}


@pytest.mark.parametrize("seed", range(6))
def test_fuzz_of_arrivals_sizes_and_settings(model, seed) -> None:
    rng = random.Random(seed)
    block_size = rng.choice([1, 3, 4, 16])
    options = {
        "block_size": block_size,
        "max_num_seqs": rng.choice([1, 3, 7, 20]),
        "num_blocks": -(-64 // block_size) + rng.randrange(12),
        "max_graph_size": rng.choice([1, 2, 5, 256]),
        "max_graph_tokens": rng.choice([0, 2, 20, 512]),
        "max_num_batched_tokens": rng.choice([20, 40, 1024]),
        "max_chunk_tokens": rng.choice([None, 1, 7, block_size + 1]),
        "async_scheduling": rng.choice([True, False]),
        "preemption_mode": rng.choice(list(PreemptionMode)),
        "swap_cache_tokens": rng.choice([0, 40, 400]),
    }
    prompts = prompts_of(12, seed=seed, max_len=30)
    choices = [greedy(9), greedy(30), tempered(17), tempered(8, 0.6, top_p=0.9), greedy(5)]
    params = [rng.choice(choices) for _ in prompts]
    later: dict[int, list[int]] = {}
    for index in range(12):
        later.setdefault(rng.randrange(25), []).append(index)
    expected = serve(eager_engine(model), prompts, params)
    assert serve(make_engine(model, **options), prompts, params, later) == expected


# What it costs the host


@torch.inference_mode()
def test_preparing_a_decode_step_waits_for_nothing(cuda_model) -> None:
    engine = make_engine(cuda_model, async_scheduling=False)
    requests: list[Request] = make_requests(prompts_of(3), tempered(20), seeds=range(3))
    for request in requests:
        engine.add_request(request)
    for _ in range(3):
        engine.step()
    runner, graphs = engine.model_runner, engine.model_runner.graphs
    assert graphs is not None
    scheduled, graph = engine.scheduler.schedule(), graphs.graphs[StepShape(4, 4)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        step = runner.prepare_inputs(scheduled)
        graph.set_noise(runner.sampler.collect_noise(requests))
        graph.graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step is graph
    execute(engine, scheduled)
    drain(engine, [])
    assert [r.output_token_ids for r in requests] == serve(
        eager_engine(cuda_model), prompts_of(3), tempered(20)
    )
