"""Sampling inside a graph, and rules that run behind it.

Every test runs on a CPU too, with graphs that run the recorded step again (fake_graphs).
"""

import pytest

from folovllm.request import SamplingParams
from folovllm.testing.driver import drain, make_requests
from m6_prefix.tests.graphed_engines import (
    RULES,
    Replays,
    cuda_model,
    eager_engine,
    greedy,
    make_engine,
    model,
    prompts_of,
    serve,
    tempered,
    toy_directory,
)

__all__ = ["cuda_model", "model", "toy_directory"]


def test_temperature_inside_the_graph_gives_the_tokens_of_eager_steps(model, monkeypatch) -> None:
    graphed, eager = make_engine(model), eager_engine(model)
    replays = Replays(graphed, monkeypatch)
    prompts = prompts_of(11)
    params = [
        greedy(12) if index % 3 == 0 else tempered(12 + index, temperature=0.5 + index / 10)
        for index in range(11)
    ]
    outputs = [serve(engine, prompts, params) for engine in (graphed, eager)]
    assert outputs[0] == outputs[1]
    assert outputs[0] != serve(eager, prompts, greedy(12)), "nothing was random"
    assert {size for size, _ in replays.decodes} == {1, 2, 4, 8, 16}


def test_greedy_batch_behind_a_random_one_is_greedy(model) -> None:
    """The same graph, in whose buffers the noise of the batch before still is."""
    graphed, eager = make_engine(model), eager_engine(model)
    prompts = prompts_of(3)
    for params in (tempered(8), greedy(8), greedy(8), tempered(8, 1.3), greedy(8)):
        assert serve(graphed, prompts, params) == serve(eager, prompts, params)


def test_random_request_whose_batch_shrinks_keeps_its_own_noise(model) -> None:
    """Rows move up as requests finish, and padding behind them keeps what it held."""
    graphed, eager = make_engine(model), eager_engine(model)
    prompts = prompts_of(4)
    params = [tempered(2), greedy(4), tempered(6, 0.7), tempered(9, 1.5)]
    assert serve(graphed, prompts, params) == serve(eager, prompts, params)
    assert serve(graphed, prompts[:1], greedy(9)) == serve(eager, prompts[:1], greedy(9))


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: "-".join(rules))
def test_rules_outside_the_graph_give_the_tokens_of_eager_steps(model, monkeypatch, rules) -> None:
    graphed, eager = make_engine(model), eager_engine(model)
    replays = Replays(graphed, monkeypatch)
    prompts, ruled = prompts_of(3), SamplingParams(max_tokens=10, ignore_eos=True, **rules)
    # By itself, and beside a plain and a random request, which then leave the graph as well.
    for params in ([ruled] * 3, [ruled, greedy(12), tempered(14)], [greedy(5)] * 3):
        outputs = []
        for engine in (graphed, eager):
            requests = make_requests(prompts, params, seeds=range(3))
            outputs.append(drain(engine, requests))
        for actual, expected in zip(*outputs, strict=True):
            assert actual[:3] == expected[:3]
            assert (actual.logprobs is None) == (expected.logprobs is None)
            if actual.logprobs is not None and expected.logprobs is not None:
                assert actual.logprobs.rank == expected.logprobs.rank
                assert actual.logprobs.logprob == pytest.approx(expected.logprobs.logprob, abs=1e-3)
                assert [i for i, _ in actual.logprobs.top] == [i for i, _ in expected.logprobs.top]
    assert {(4, 3), (2, 2), (1, 1)} >= set(replays.decodes) >= {(4, 3)}


def test_tokens_do_not_depend_on_batch_mates_whose_rules_leave_the_graph(model) -> None:
    """The same request inside the graph, behind it, and in a batch that changes over in between."""
    prompts = prompts_of(3)
    ruled = SamplingParams(max_tokens=5, ignore_eos=True, temperature=1.0, top_p=0.9)
    for own in (greedy(12), tempered(12)):
        alone = serve(make_engine(model), prompts[:1], own)
        mixed = serve(make_engine(model), prompts, [own, ruled, ruled])
        assert mixed[:1] == alone
