"""Steps with several tokens of some request, replayed from a graph.

Every test runs on a CPU too, with graphs that run the recorded step again (fake_graphs).
"""

import pytest
import torch

from folovllm.request import SamplingParams
from folovllm.testing.driver import drain, make_requests, random_prompts
from m6_prefix.cuda_graph import StepShape
from m6_prefix.tests.graphed_engines import (
    RULES,
    Replays,
    check_changes,
    cuda_model,
    eager_engine,
    execute,
    greedy,
    make_engine,
    model,
    prompts_of,
    serve,
    tempered,
    toy_directory,
)

__all__ = ["cuda_model", "model", "toy_directory"]


PROMPT_LENS = [2, 3, 5, 17, 63, 64, 65, 127, 128, 129, 150, 180]


def test_prompts_alone_give_the_tokens_of_eager_steps(model, monkeypatch) -> None:
    """From long to short and back: rows behind a short prompt held tokens of a long one."""
    options = {"max_model_len": 190, "num_blocks": 50, "max_num_batched_tokens": 190}
    graphed, eager = make_engine(model, **options), eager_engine(model, **options)
    replays = Replays(graphed, monkeypatch)
    for num_tokens in PROMPT_LENS[::-1] + PROMPT_LENS:
        prompt = random_prompts(
            seed=num_tokens, count=1, vocab_size=199, min_len=num_tokens, max_len=num_tokens
        )
        for params in (greedy(3), tempered(3)):
            assert serve(graphed, prompt, params) == serve(eager, prompt, params)
    expected = {
        ((min(length for length in (64, 128, 190) if length >= num_tokens), 1), (num_tokens, 1))
        for num_tokens in PROMPT_LENS
    }
    assert set(replays.mixed) == expected
    assert len(replays.mixed) == 4 * len(PROMPT_LENS)


def test_prompt_that_starts_from_cached_blocks_is_replayed_as_what_is_left_of_it(
    model, monkeypatch
) -> None:
    options = {"max_model_len": 190, "num_blocks": 200, "max_num_batched_tokens": 190}
    graphed = make_engine(model, enable_prefix_caching=True, **options)
    eager = eager_engine(model, **options)
    replays = Replays(graphed, monkeypatch)
    (prompt,) = random_prompts(seed=0, count=1, vocab_size=199, min_len=150, max_len=150)
    for num_tokens in (150, 147, 150, 130):
        asked = [[*prompt[:num_tokens], 5, 6, 7]]
        for params in (greedy(3), tempered(3)):
            assert serve(graphed, asked, params) == serve(eager, asked, params)
    assert [served.num_tokens for _, served in replays.mixed] == [153, 3, 3]


@pytest.mark.parametrize("max_tokens", [0, 1, 2, 40, 10000])
def test_prompt_that_no_graph_holds_is_launched_kernel_by_kernel(
    model, monkeypatch, max_tokens
) -> None:
    graphed, eager = make_engine(model, max_graph_tokens=max_tokens), eager_engine(model)
    replays = Replays(graphed, monkeypatch)
    for num_tokens in (1, 2, 3, 40, 41):
        prompt = [list(range(7, 7 + num_tokens))]
        assert serve(graphed, prompt, greedy(4)) == serve(eager, prompt, greedy(4))
    expected = {0: [], 1: [], 2: [2], 40: [2, 3, 40], 10000: [2, 3, 40, 41]}[max_tokens]
    assert [served.num_tokens for _, served in replays.mixed] == expected


MIXED_SHAPES = [(24, 1), (24, 8), (64, 1), (64, 8), (64, 10), (80, 1), (80, 8), (80, 10)]


@pytest.mark.parametrize("shape", MIXED_SHAPES, ids=str)
def test_every_mixed_shape_and_its_neighbours_give_the_tokens_of_eager_steps(
    model, monkeypatch, shape
) -> None:
    """One prompt as long as needed, beside decodes, in steps of one more and one less of each."""
    max_tokens, max_size = (24, 8) if shape[0] == 24 else (80, 10)
    options = {"max_num_seqs": 12, "max_model_len": 90, "max_num_batched_tokens": 100}
    graphs = {"max_graph_tokens": max_tokens, "max_graph_size": max_size}
    graphed, eager = make_engine(model, **options, **graphs), eager_engine(model, **options)
    runner = graphed.model_runner
    assert runner.graphs is not None
    assert StepShape(*shape) in runner.graphs.graphs
    replays = Replays(graphed, monkeypatch)
    for num_tokens, num_requests in neighbours(*shape):
        replays.mixed.clear()
        prompts = [*prompts_of(num_requests, seed=num_requests)[1:], [9] * num_tokens]
        prompts[-1] = prompts[-1][: num_tokens - num_requests + 1]
        params = [greedy(6), tempered(6)] * num_requests
        late = {3: [num_requests - 1]}
        outputs = [serve(e, prompts, params[:num_requests], late) for e in (graphed, eager)]
        assert outputs[0] == outputs[1]
        served = StepShape(num_tokens, num_requests)
        held = runner.graphs.find(num_tokens, num_requests)
        if held is None:
            assert served not in [s for _, s in replays.mixed]
        else:
            assert (held.batch.input_ids.shape[0], len(held.batch.seq_lens)) in [
                s for s, served_ in replays.mixed if served_ == served
            ]


def neighbours(num_tokens: int, num_requests: int) -> list[tuple[int, int]]:
    return [
        (num_tokens + more_tokens, num_requests + more_requests)
        for more_tokens in (-1, 0, 1)
        for more_requests in (-1, 0, 1)
        if 0 < num_requests + more_requests < num_tokens + more_tokens
    ]


def test_prompts_that_start_together_are_replayed_together(model, monkeypatch) -> None:
    graphed, eager = make_engine(model), eager_engine(model)
    replays = Replays(graphed, monkeypatch)
    prompts, params = prompts_of(4), [greedy(9)] * 4
    later = {2: [2, 3]}
    assert serve(graphed, prompts, params, later) == serve(eager, prompts, params, later)
    assert [served.num_requests for _, served in replays.mixed] == [2, 4]


def test_prompt_between_decode_steps_gives_the_tokens_of_eager_steps(model, monkeypatch) -> None:
    """One graph after the other, over the same logits and the same tables."""
    graphed, eager = make_engine(model), eager_engine(model)
    replays = Replays(graphed, monkeypatch)
    prompts = prompts_of(8, max_len=30)
    params = [greedy(20), tempered(25)] * 4
    later = {2 * index: [index] for index in range(1, 8)}
    assert serve(graphed, prompts, params, later) == serve(eager, prompts, params, later)
    assert [served.num_requests for _, served in replays.mixed] == list(range(1, 9))
    assert {size for size, _ in replays.decodes} == {1, 2, 4, 8}


LATE_LENS = [40, 63, 3, 2, 17, 8]


def test_replayed_prompt_beside_a_decode_changes_no_slots_but_theirs(model, monkeypatch) -> None:
    engine = make_engine(model, num_blocks=80, async_scheduling=False)
    replays = Replays(engine, monkeypatch)
    runner, block_size = engine.model_runner, engine.config.block_size
    (bystander,) = make_requests([[1, 2, 3]], greedy(50), ids=["bystander"])
    engine.add_request(bystander)
    for _ in range(3):
        engine.step()
    for num_tokens in LATE_LENS:
        (request,) = make_requests([[9] * num_tokens], greedy(1))
        engine.add_request(request)
        # Fresh values, or who writes the same again would not be noticed.
        free = list(engine.kv_cache_manager.pool.free_block_ids)
        runner.kv_cache.kv[:, :, free] = torch.randn_like(runner.kv_cache.kv[:, :, free])
        before = runner.kv_cache.kv.clone()
        scheduled = engine.scheduler.schedule()
        slots = set()
        for who, positions in (
            (request, range(num_tokens)),
            (bystander, [bystander.num_computed_tokens]),
        ):
            table = engine.kv_cache_manager.block_tables[who.request_id]
            slots |= {table[i // block_size] * block_size + i % block_size for i in positions}
        execute(engine, scheduled)
        check_changes(runner.kv_cache.kv, before, slots)
    assert [served for _, served in replays.mixed[1:]] == [(n + 1, 2) for n in LATE_LENS]
    drain(engine, [])
    alone = serve(eager_engine(model), [[1, 2, 3]], greedy(50))
    assert [bystander.output_token_ids] == alone


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: "-".join(rules))
def test_prompt_of_a_request_with_rules_gives_the_token_of_an_eager_step(model, rules) -> None:
    params = SamplingParams(max_tokens=6, ignore_eos=True, **rules)
    graphed, eager = make_engine(model), eager_engine(model)
    for prompt in prompts_of(3, max_len=50):
        assert serve(graphed, [prompt], params) == serve(eager, [prompt], params)
        assert serve(graphed, [prompt], greedy(2)) == serve(eager, [prompt], greedy(2))
