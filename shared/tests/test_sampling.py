"""Sampling on the CPU: every rule against a plain reference, and rows against their batch mates."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from folovllm.request import FinishReason, Request, SamplingParams, StructuredOutputsParams
from folovllm.sampling.sampler import SampledTokens, Sampler, SamplerOutput
from folovllm.sampling.token_masks import mask_of

CPU = torch.device("cpu")
BAD_WORDS = ((5,), (6, 7), (7, 7, 8))
VOCAB = 103  # not a multiple of 4: four tokens share one random counter


class OddTokens:
    """A grammar of tokens with odd ids."""

    def fill_mask(self, request, mask):
        mask[:] = mask_of(range(1, VOCAB, 2), VOCAB)


def make_request(seed=0, prompt=(1, 2, 3), output=(), eos=(), request_id="r", **params):
    request = Request(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        sampling_params=SamplingParams(**{"max_tokens": 10_000, **params}),
        eos_token_ids=frozenset(eos),
        bad_words_token_ids=BAD_WORDS if "bad_words" in params else (),
        grammar=OddTokens() if "structured_outputs" in params else None,
        seed=seed,
    )
    request.token_ids += output
    return request


def make_logits(num_rows, vocab=VOCAB, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_rows, vocab, generator=generator) * 3).to(dtype)


def run(logits, requests):
    sampler = Sampler(logits.shape[1], CPU)
    return sampler.sample(logits, sampler.prepare(requests)).to_host()


def edit(logits, requests):
    """The logits that tokens are drawn from, after every rule but temperature."""
    return Sampler(logits.shape[1], CPU).prepare(requests).edit(logits)


def kept(logits, requests):
    return torch.isfinite(edit(logits, requests)).numpy()


def ordered(row):
    """Token ids from likeliest to least likely, the lower id first among equals."""
    return sorted(range(len(row)), key=lambda i: (-row[i], i))


def reference_kept(row, temperature, top_k, top_p, min_p):
    """The filters as SamplingParams states them, in float64 with Python loops."""
    row = row.astype(np.float64)
    weights = np.exp((row - row.max()) / temperature)
    alive = [i for i in ordered(row) if weights[i] >= min_p * (1 - 1e-12)]
    if top_k > 0:
        alive = alive[:top_k]
    total, cumulative, result = sum(weights[i] for i in alive), 0.0, set()
    for i in alive:
        if top_p < 1 and result and cumulative >= top_p * total:
            break
        result.add(i)
        cumulative += weights[i]
    return result


def mixed_requests():
    """One request per feature, so that rows of a batch differ in all they can differ in."""
    settings = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.6},
        {"temperature": 0.9, "top_k": 30, "top_p": 0.8, "min_p": 0.01},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 0.0, "repetition_penalty": 1.7},
        {"temperature": 1.0, "repetition_penalty": 0.6, "presence_penalty": 1.5},
        {"temperature": 0.8, "frequency_penalty": -1.0, "top_k": VOCAB},
        {"temperature": 1.0, "logit_bias": {5: 4.0, 9: -100.0}, "logprobs": 3},
        {"temperature": 1.0, "min_tokens": 9, "stop_token_ids": [4, 8], "logprobs": 0},
        {"temperature": 0.0, "logprobs": 7, "top_k": 3, "top_p": 0.1},
    ]
    return [
        make_request(seed=1000 + i, output=[3, 7, 7, 11][: i % 5], request_id=f"r{i}", **params)
        for i, params in enumerate(settings)
    ]


# --- rows do not see their batch mates ------------------------------------------------------------


def test_each_row_of_a_mixed_batch_equals_the_row_sampled_alone():
    requests, logits = mixed_requests(), make_logits(12)
    together = run(logits, requests)
    for i, request in enumerate(requests):
        alone = run(logits[i : i + 1], [request])
        assert together.token_ids[i] == alone.token_ids[0]
        assert together.logprobs[i] == alone.logprobs[0]
        torch.testing.assert_close(
            edit(logits, requests)[i], edit(logits[i : i + 1], [request])[0], rtol=0, atol=0
        )


def test_order_of_rows_does_not_change_their_tokens():
    requests, logits = mixed_requests(), make_logits(12)
    expected = run(logits, requests)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(requests))
        shuffled = run(logits[order], [requests[i] for i in order])
        assert shuffled.token_ids == [expected.token_ids[i] for i in order]
        assert shuffled.logprobs == [expected.logprobs[i] for i in order]


@pytest.mark.parametrize("num_mates", [0, 1, 2, 15, 64])
def test_seeded_tokens_do_not_depend_on_batch_size(num_mates):
    logits = make_logits(1) / 3
    alone = [run(logits, [make_request(seed=42, output=[0] * n)]).token_ids[0] for n in range(30)]
    assert len(set(alone)) > 5, "draws at different positions must differ"
    for n in range(30):
        mates = [make_request(seed=7 * i, output=[0] * i) for i in range(num_mates)]
        batch = torch.cat([make_logits(num_mates, seed=n), logits])
        output = run(batch, [*mates, make_request(seed=42, output=[0] * n)])
        assert output.token_ids[-1] == alone[n]


def test_draw_depends_on_output_position_and_not_on_prompt_length():
    logits = make_logits(1) / 3
    for n in range(20):
        short = run(logits, [make_request(seed=3, prompt=[1], output=[0] * n)])
        long = run(logits, [make_request(seed=3, prompt=[1] * 50, output=[0] * n)])
        assert short.token_ids == long.token_ids


def test_different_seeds_draw_different_tokens():
    requests = [make_request(seed=seed) for seed in range(200)]
    assert len(set(run(torch.zeros(200, VOCAB), requests).token_ids)) > 60


def test_seeds_that_differ_only_in_high_bits_draw_different_tokens():
    requests = [make_request(seed=5 + (i << 32)) for i in range(100)]
    assert len(set(run(torch.zeros(100, VOCAB), requests).token_ids)) > 40


def test_greedy_row_is_unaffected_by_random_mates():
    logits = make_logits(3)
    requests = [make_request(), make_request(temperature=0.0), make_request(seed=1)]
    assert run(logits, requests).token_ids[1] == int(logits[1].argmax())


# --- distribution --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "vocab"),
    [
        ({"temperature": 1.0}, 10),
        ({"temperature": 0.5}, 7),
        ({"temperature": 3.0}, 33),
        ({"temperature": 1.0, "top_k": 4}, 10),
        ({"temperature": 0.8, "top_p": 0.7}, 10),
        ({"temperature": 1.0, "min_p": 0.3}, 10),
    ],
)
def test_draws_follow_the_exact_distribution(params, vocab):
    num_draws = 20_000
    logits = make_logits(1, vocab, seed=vocab) / 4
    request = make_request(**params)
    masked = edit(logits, [request])[0].double()
    expected = torch.softmax(masked / params["temperature"], dim=0).numpy() * num_draws
    # Half of the draws walk over seeds, half over positions of one seed.
    sampler = Sampler(vocab, CPU)
    tensors = sampler.prepare([request] * num_draws)
    index = torch.arange(num_draws)
    noise = dataclasses.replace(
        tensors.noise,
        seeds=torch.where(index % 2 == 0, index, 12345),
        positions=torch.where(index % 2 == 0, 6, index),
    )
    tensors = dataclasses.replace(tensors, noise=noise)
    drawn = sampler.sample(logits.expand(num_draws, -1), tensors).token_ids
    counts = np.bincount(drawn.numpy(), minlength=vocab)
    assert counts[expected == 0].sum() == 0
    alive = expected > 0
    assert alive.sum() > 1, "a single token left has no distribution to test"
    chi_square = ((counts - expected)[alive] ** 2 / expected[alive]).sum()
    degrees = alive.sum() - 1
    # Wilson-Hilferty: about 4.5 standard deviations; the seeds are fixed, so this cannot flake.
    bound = degrees * (1 - 2 / (9 * degrees) + 4.5 * math.sqrt(2 / (9 * degrees))) ** 3
    assert chi_square < bound


def test_draws_at_neighbouring_positions_are_independent():
    num_draws, vocab = 8000, 4
    sampler = Sampler(vocab, CPU)
    tensors = sampler.prepare([make_request(seed=9)] * num_draws)
    noise = dataclasses.replace(tensors.noise, positions=torch.arange(num_draws))
    tensors = dataclasses.replace(tensors, noise=noise)
    drawn = sampler.sample(torch.zeros(num_draws, vocab), tensors).token_ids
    pairs = torch.bincount(drawn[0::2] * vocab + drawn[1::2], minlength=16).double()
    assert float(((pairs - 250) ** 2 / 250).sum()) < 45  # 15 degrees of freedom, p about 1e-4


# --- filters -------------------------------------------------------------------------------------


def random_filter_settings():
    rng = np.random.default_rng(1)
    for _ in range(60):
        yield {
            "temperature": float(rng.choice([0.3, 1.0, 2.5])),
            "top_k": int(rng.choice([0, 1, 2, 17, VOCAB - 1, VOCAB, VOCAB + 5])),
            "top_p": float(rng.choice([1e-9, 0.123, 0.5, 0.937, 1.0])),
            "min_p": float(rng.choice([0.0, 0.013, 0.4, 1.0])),
        }


def test_filters_keep_what_the_reference_keeps():
    settings = list(random_filter_settings())
    logits = make_logits(len(settings), seed=2)
    mask = kept(logits, [make_request(**params) for params in settings])
    for row, params in enumerate(settings):
        expected = reference_kept(logits[row].numpy(), **params)
        assert set(np.flatnonzero(mask[row])) == expected, params


def test_filters_among_ties_keep_the_lowest_ids():
    settings = [{**params, "min_p": 0.0} for params in random_filter_settings()]
    # Few distinct values whose weights are powers of two: cumulative sums are exact.
    levels = torch.randint(0, 4, (len(settings), VOCAB), generator=torch.Generator().manual_seed(3))
    settings = [{**params, "temperature": 1.0} for params in settings]
    logits = (levels * math.log(2)).float()
    mask = kept(logits, [make_request(**params) for params in settings])
    for row, params in enumerate(settings):
        chosen = set(np.flatnonzero(mask[row]))
        ranking = ordered(logits[row].numpy())
        assert chosen == set(ranking[: len(chosen)])
        expected = reference_kept(logits[row].numpy(), **params)
        assert len(chosen) == len(expected), params


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_top_k_of_one_is_greedy_even_among_ties(dtype):
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0]] * 20, dtype=dtype)
    requests = [make_request(seed=s, prompt=[1], top_k=1) for s in range(20)]
    assert run(logits, requests).token_ids == [1] * 20


@pytest.mark.parametrize("params", [{"top_k": VOCAB}, {"top_k": VOCAB + 1}, {"top_k": -1}, {}])
def test_filters_that_are_off_edit_nothing(params):
    logits = make_logits(2)
    requests = [make_request(top_p=1.0, min_p=0.0, **params)] * 2
    assert edit(logits, requests) is logits


@pytest.mark.parametrize("top_p", [1e-300, 1e-9, 0.2])
def test_tiny_top_p_leaves_the_likeliest_token(top_p):
    logits = torch.tensor([[0.0, 3.0, 1.0, -1.0]])
    assert kept(logits, [make_request(prompt=[1], top_p=top_p)]).tolist() == [
        [False, True, False, False]
    ]


def test_top_p_keeps_the_token_that_crosses():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    for top_p, num_kept in [(0.4, 1), (0.51, 2), (0.79, 2), (0.81, 3)]:
        assert kept(logits, [make_request(prompt=[1], top_p=top_p)]).sum() == num_kept


def test_top_p_counts_only_what_top_k_left():
    # Of the two kept by top_k, the first has 0.5 / 0.8 = 0.625 of the mass.
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    requests = [make_request(prompt=[1], top_k=2, top_p=0.6)]
    assert kept(logits, requests).tolist() == [[True, False, False]]


def test_large_and_small_top_k_agree(monkeypatch):
    settings = [p for p in random_filter_settings() if 0 < p["top_k"] < VOCAB]
    requests = [make_request(**params) for params in settings]
    logits = make_logits(len(requests), seed=5)
    by_selection = kept(logits, requests)
    monkeypatch.setattr("folovllm.sampling.logits_processors._MAX_TOP_K_CANDIDATES", 0)
    assert Sampler(VOCAB, CPU).prepare(requests).few_candidates is None
    np.testing.assert_array_equal(by_selection, kept(logits, requests))


@pytest.mark.parametrize("temperature", [1e-40, 1e-6, 1e-3])
def test_temperature_near_zero_is_nearly_greedy(temperature):
    logits = make_logits(16)
    for params in ({}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 9}):
        requests = [make_request(seed=s, temperature=temperature, **params) for s in range(16)]
        assert run(logits, requests).token_ids == logits.argmax(dim=-1).tolist()


def test_huge_temperature_is_uniform():
    logits = make_logits(4000, vocab=5)
    requests = [make_request(seed=s, prompt=[1], temperature=1e300) for s in range(4000)]
    counts = np.bincount(run(logits, requests).token_ids, minlength=5)
    assert (((counts - 800) ** 2) / 800).sum() < 25  # 4 degrees of freedom, p about 5e-5


def test_filters_do_not_revive_masked_tokens():
    logits = make_logits(4)
    logits[:, 10:] = -torch.inf
    params = [{"top_k": 50}, {"top_p": 0.99}, {"min_p": 0.01}, {"temperature": 2.0}]
    for seed in range(50):
        output = run(logits, [make_request(seed=seed, **p) for p in params])
        assert max(output.token_ids) < 10


# --- Transformers as the reference ---------------------------------------------------------------

HF_CASES = [
    ({"top_k": 7}, lambda: TopKLogitsWarper(7)),
    ({"top_p": 0.83}, lambda: TopPLogitsWarper(0.83)),
    ({"min_p": 0.06}, lambda: MinPLogitsWarper(0.06)),
]


@pytest.mark.parametrize(("params", "make_warper"), HF_CASES)
def test_filters_equal_transformers(params, make_warper):
    logits = make_logits(40, vocab=500, seed=11)
    expected = make_warper()(None, logits.clone())
    torch.testing.assert_close(
        edit(logits, [make_request(**params)] * 40), expected, rtol=0, atol=0
    )


@pytest.mark.parametrize("penalty", [0.5, 1.2, 5.0])
def test_repetition_penalty_equals_transformers(penalty):
    requests = [
        make_request(
            prompt=[1, 2, 2, 50], output=[4, 4, i, 102], temperature=0.0, repetition_penalty=penalty
        )
        for i in range(20)
    ]
    logits = make_logits(20, seed=12)
    token_ids = torch.tensor([request.token_ids for request in requests])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(token_ids, logits.clone())
    torch.testing.assert_close(edit(logits, requests), expected, rtol=0, atol=0)


# --- penalties, bias, min_tokens -----------------------------------------------------------------


def test_presence_and_frequency_penalties_look_at_output_only():
    request = make_request(
        prompt=[1, 1, 2], output=[5, 5, 5, 2], presence_penalty=0.25, frequency_penalty=0.5
    )
    logits = torch.zeros(1, VOCAB)
    expected = torch.zeros(1, VOCAB)
    expected[0, 5] = -(0.25 + 3 * 0.5)
    expected[0, 2] = -(0.25 + 0.5)
    torch.testing.assert_close(edit(logits, [request]), expected, rtol=0, atol=0)


def test_penalties_of_one_row_leave_the_others_alone():
    logits = make_logits(3)
    rows = [
        make_request(temperature=0.0),
        make_request(output=[3, 4], frequency_penalty=1.0, repetition_penalty=2.0),
        make_request(output=[3, 4], temperature=0.0),
    ]
    edited = edit(logits, rows)
    torch.testing.assert_close(edited[[0, 2]], logits[[0, 2]], rtol=0, atol=0)
    changed = (edited[1] != logits[1]).nonzero().flatten().tolist()
    assert changed == [1, 2, 3, 4]


def test_repetition_penalty_comes_before_frequency_penalty_and_after_bias():
    request = make_request(
        prompt=[1],
        output=[2],
        repetition_penalty=2.0,
        frequency_penalty=1.0,
        presence_penalty=0.5,
        logit_bias={2: 3.0},
    )
    edited = edit(torch.full((1, 4), -1.0), [request])
    # (-1 + 3) / 2 - 1 - 0.5 for the output token, -1 * 2 for the prompt token.
    assert edited[0].tolist() == [-1.0, -2.0, -0.5, -1.0]


def test_recomputation_after_preemption_changes_nothing():
    params = {"repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 0.5}
    request = make_request(output=[9, 9, 4], min_tokens=3, stop_token_ids=[6], **params)
    logits = make_logits(1)
    request.num_computed_tokens = request.num_tokens - 1
    running, before = run(logits, [request]), edit(logits, [request])
    request.num_computed_tokens = 0
    assert run(logits, [request]) == running
    assert torch.equal(edit(logits, [request]), before)


def test_logit_bias_can_force_and_forbid_tokens():
    logits = make_logits(2)
    requests = [
        make_request(logit_bias={77: 1000.0}),
        make_request(temperature=0.0, logit_bias={int(logits[1].argmax()): -1e4}),
    ]
    token_ids = run(logits, requests).token_ids
    assert token_ids == [77, ordered(logits[1].numpy())[1]]


def test_bias_on_a_masked_token_keeps_it_masked():
    logits = torch.zeros(1, 4)
    logits[0, 2] = -torch.inf
    request = make_request(prompt=[1], temperature=0.0, logit_bias={2: 50.0})
    assert edit(logits, [request])[0].tolist() == [0.0, 0.0, -math.inf, 0.0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_stop_token_before_min_tokens(temperature):
    logits = torch.zeros(1, 6)
    logits[0, 2], logits[0, 4] = 60.0, 50.0
    request = make_request(
        prompt=[1],
        eos=[2],
        stop_token_ids=[4],
        min_tokens=3,
        temperature=temperature,
        logit_bias={2: 5.0, 0: 40.0},
    )
    for expected in [0, 0, 0, 2]:
        assert request.finish_reason is None
        token_id = run(logits, [request]).token_ids[0]
        assert token_id == expected
        request.append_output_token(token_id)
    assert request.finish_reason is FinishReason.STOP


def test_ignored_eos_may_be_sampled_before_min_tokens():
    logits = torch.zeros(1, 6)
    logits[0, 2] = 60.0
    request = make_request(prompt=[1], eos=[2], ignore_eos=True, min_tokens=5, temperature=0.0)
    assert run(logits, [request]).token_ids == [2]


def test_stop_ids_beyond_the_vocabulary_are_harmless():
    request = make_request(min_tokens=2, stop_token_ids=[VOCAB, 10**6, 3], temperature=0.0)
    edited = edit(torch.zeros(1, VOCAB), [request])
    assert (~torch.isfinite(edited[0])).nonzero().flatten().tolist() == [3]


# --- logprobs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_logprobs_are_of_raw_logits_whatever_the_rules(dtype):
    logits = make_logits(2, dtype=dtype)
    requests = [
        make_request(seed=4, logprobs=5, temperature=2.0, top_k=20, output=[3]),
        make_request(logprobs=VOCAB, temperature=0.0, logit_bias={8: 100.0}),
    ]
    original = logits.clone()
    output = run(logits, requests)
    assert torch.equal(logits, original)
    expected = torch.log_softmax(logits.float(), dim=-1)
    for row, num_top in enumerate([5, VOCAB]):
        logprobs, token_id = output.logprobs[row], output.token_ids[row]
        assert logprobs.logprob == pytest.approx(float(expected[row, token_id]), abs=1e-6)
        better = (logits[row] > logits[row, token_id]).sum()
        assert logprobs.rank == int(better) + 1
        ranking = ordered(logits[row].float().numpy())[:num_top]
        assert [token_id for token_id, _ in logprobs.top] == ranking
        for token_id, logprob in logprobs.top:
            assert logprob == pytest.approx(float(expected[row, token_id]), abs=1e-6)
    assert output.token_ids[1] == 8


def test_top_logprobs_of_ties_start_with_the_lowest_id():
    logits = torch.tensor([[-0.0, 0.0, -2.0, 0.0, -2.0, -1.0, -torch.inf]])
    output = run(logits, [make_request(prompt=[1], temperature=0.0, logprobs=7)])
    assert [token_id for token_id, _ in output.logprobs[0].top] == [0, 1, 3, 5, 2, 4, 6]
    assert output.token_ids == [0]
    assert output.logprobs[0].rank == 1
    assert output.logprobs[0].top[-1][1] == -math.inf


def test_only_rows_that_ask_get_logprobs():
    requests = [make_request(logprobs=n, temperature=0.0) for n in (None, 0, 3, None)]
    logprobs = run(make_logits(4), requests).logprobs
    assert logprobs[0] is None
    assert logprobs[3] is None
    assert logprobs[1].top == ()
    assert len(logprobs[2].top) == 3


# --- the plain paths, and what is refused --------------------------------------------------------


def test_greedy_takes_the_lowest_id_among_ties():
    logits = torch.tensor([[0.0, 5.0, 5.0], [7.0, 7.0, 7.0]])
    requests = [make_request(prompt=[1], temperature=0.0)] * 2
    assert run(logits, requests).token_ids == [1, 0]
    mixed = [*requests, make_request(prompt=[1])]
    assert run(torch.cat([logits, logits[:1]]), mixed).token_ids[:2] == [1, 0]


def test_plain_greedy_batch_uploads_nothing(monkeypatch):
    def forbidden(*_):
        raise AssertionError("uploaded something")

    monkeypatch.setattr("folovllm.sampling.tensors.upload", forbidden)
    filters = {"top_k": 5, "top_p": 0.5, "min_p": 0.1}  # no filter changes an argmax
    plain = Sampler(VOCAB, CPU).prepare([make_request(temperature=0.0)] * 3)
    assert plain.noise is None
    Sampler(VOCAB, CPU).prepare([make_request(temperature=0.0, **filters)] * 3)
    with pytest.raises(AssertionError, match="uploaded"):
        Sampler(VOCAB, CPU).prepare([make_request()])


def test_everything_is_uploaded_in_one_call(monkeypatch):
    from folovllm.sampling import tensors as sampling_tensors

    calls, upload = [], sampling_tensors.upload
    monkeypatch.setattr(
        sampling_tensors, "upload", lambda *args: calls.append(args) or upload(*args)
    )
    Sampler(VOCAB, CPU).prepare(mixed_requests())
    assert len(calls) == 1


def test_empty_batch_gives_an_empty_output():
    assert run(torch.empty(0, VOCAB), []) == SamplerOutput([], [])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_sampled_as_their_float32_values(dtype):
    requests, logits = mixed_requests(), make_logits(12, dtype=dtype)
    assert run(logits, requests).token_ids == run(logits.float(), requests).token_ids


def test_logits_are_never_changed():
    requests, logits = mixed_requests(), make_logits(12)
    original = logits.clone()
    run(logits, requests)
    assert torch.equal(logits, original)


@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {},
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.5},
        {"logprobs": 2},
        {"output": [1, 2], "frequency_penalty": 1.0},
    ],
)
def test_row_without_a_possible_token_is_an_error(value, params):
    logits = make_logits(3)
    logits[1] = value
    if value != value:
        logits[1, 1:] = 0.0
    with pytest.raises(RuntimeError, match=r"rows \[1\] of 3"):
        run(logits, [make_request(**params)] * 3)


def test_forbidding_every_token_is_refused_and_noticed():
    request = make_request(prompt=[1], stop_token_ids=list(range(8)), min_tokens=1)
    with pytest.raises(ValueError, match="min_tokens=1 .* forbid every token"):
        Sampler(8, CPU).validate(request)
    with pytest.raises(RuntimeError, match="no token can be chosen"):
        run(torch.zeros(1, 8), [request])


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, VOCAB])
def test_only_allowed_tokens_are_left(vocab):
    ids = [i for i in (0, 5, 31, 32, 63, vocab - 1) if i < vocab]
    logits = make_logits(3, vocab)
    mates = [make_request(), make_request(allowed_token_ids=ids), make_request()]
    assert np.flatnonzero(kept(logits, mates)[1]).tolist() == sorted(set(ids))
    assert torch.equal(edit(logits, mates)[1][ids], logits[1][ids])
    assert kept(logits, mates)[[0, 2]].all()


def test_mask_of_a_grammar_is_applied_beside_one_of_allowed_tokens():
    structured = make_request(structured_outputs=StructuredOutputsParams(regex="a"))
    mates = [make_request(allowed_token_ids=[4]), make_request(), structured]
    left = kept(make_logits(3), mates)
    assert np.flatnonzero(left[0]).tolist() == [4]
    assert left[1].all()
    assert np.flatnonzero(left[2]).tolist() == list(range(1, VOCAB, 2))


def test_bad_word_is_forbidden_where_it_would_be_complete():
    logits = make_logits(1)
    for output, forbidden in (
        ([], {5}),
        ([6], {5, 7}),
        ([6, 6], {5, 7}),
        ([7], {5}),
        ([7, 7], {5, 8}),
        ([6, 7], {5}),
    ):
        request = make_request(prompt=[1, 7], output=output, bad_words=["x"])
        assert set(np.flatnonzero(~kept(logits, [request])[0])) == forbidden


def test_settings_that_together_forbid_every_token_are_refused():
    for options in (
        {"allowed_token_ids": [5], "bad_words": ["x"]},
        {"allowed_token_ids": [2], "min_tokens": 1, "eos": [2]},
        {"allowed_token_ids": [2, 7], "min_tokens": 1, "eos": [2], "bad_words": ["x"]},
    ):
        with pytest.raises(ValueError, match="forbid every token"):
            Sampler(VOCAB, CPU).validate(make_request(**options))
    Sampler(VOCAB, CPU).validate(make_request(allowed_token_ids=[5, 6], bad_words=["x"]))


@pytest.mark.parametrize("token_id", [-1, VOCAB])
def test_allowed_token_out_of_range_is_refused(token_id):
    request = make_request(allowed_token_ids=[3, token_id])
    with pytest.raises(ValueError, match=f"allowed_token_ids names token {token_id}"):
        Sampler(VOCAB, CPU).validate(request)
    with pytest.raises(ValueError, match=f"allowed_token_ids names token {token_id}"):
        Sampler(VOCAB, CPU).prepare([request])


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range_is_refused(seed):
    request = make_request(seed=seed)
    with pytest.raises(ValueError, match="seed must be in"):
        Sampler(VOCAB, CPU).validate(request)
    with pytest.raises(ValueError, match="seed must be in"):
        Sampler(VOCAB, CPU).prepare([make_request(), request])


def test_largest_seed_is_accepted():
    run(make_logits(1), [make_request(seed=2**64 - 1)])


@pytest.mark.parametrize("token_id", [-1, VOCAB])
def test_bias_on_a_token_out_of_range_is_refused(token_id):
    request = make_request(logit_bias={token_id: 1.0})
    with pytest.raises(ValueError, match=f"logit_bias names token {token_id}"):
        Sampler(VOCAB, CPU).validate(request)
    with pytest.raises(ValueError, match=f"logit_bias names token {token_id}"):
        Sampler(VOCAB, CPU).prepare([request])


def test_bias_beyond_float32_is_refused():
    with pytest.raises(ValueError, match="exceeds float32"):
        Sampler(VOCAB, CPU).validate(make_request(logit_bias={3: 1e300}))


def test_more_logprobs_than_tokens_are_refused():
    for name in ("logprobs", "prompt_logprobs"):
        match = f": {name}={VOCAB + 1} is more than the vocabulary"
        with pytest.raises(ValueError, match=match):
            Sampler(VOCAB, CPU).validate(make_request(**{name: VOCAB + 1}))


def test_valid_requests_pass_validation():
    for request in mixed_requests():
        Sampler(VOCAB, CPU).validate(request)


def test_logits_of_another_batch_are_refused():
    sampler = Sampler(VOCAB, CPU)
    tensors = sampler.prepare([make_request()])
    for shape in [(2, VOCAB), (1, VOCAB + 1)]:
        with pytest.raises(ValueError, match="prepare"):
            sampler.sample(torch.zeros(shape), tensors)


IS_RULE = {
    "n": (3, False),
    "max_tokens": (7, False),
    "min_tokens": (4, True),
    "temperature": (0.3, False),
    "top_k": (5, True),
    "top_p": (0.9, True),
    "min_p": (0.1, True),
    "presence_penalty": (-0.5, True),
    "frequency_penalty": (0.5, True),
    "repetition_penalty": (0.9, True),
    "logit_bias": ({3: 1.0}, True),
    "seed": (11, False),
    "logprobs": (0, True),
    "stop": ("end", False),
    "stop_token_ids": ([5], False),
    "include_stop_str_in_output": (True, False),
    "ignore_eos": (True, False),
    "skip_special_tokens": (False, False),
    "prompt_logprobs": (1, False),
    "allowed_token_ids": ([3, 4], True),
    "bad_words": ("x", True),
    "structured_outputs": (StructuredOutputsParams(regex="a"), True),
    "detokenize": (False, False),
    "truncate_prompt_tokens": (2, False),
}
"""Field of SamplingParams -> a value other than its default, and whether sampling by temperature
alone, as in a captured graph, would ignore it."""


def test_every_sampling_setting_is_known_to_be_a_rule_or_none():
    """A new field has to be added above, and to has_only_temperature if it is a rule."""
    fields = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
    assert fields.keys() == IS_RULE.keys()
    assert all(fields[name] != value for name, (value, _) in IS_RULE.items())


@pytest.mark.parametrize("name", IS_RULE)
def test_setting_is_left_to_a_captured_graph_exactly_if_it_changes_no_rule(name):
    value, is_rule = IS_RULE[name]
    request, plain = (make_request(eos=[2], output=[5], **p) for p in ({name: value}, {}))
    sampler = Sampler(VOCAB, CPU)
    assert request.sampling_params.has_only_temperature is not is_rule
    assert (sampler.collect_noise([request]) is None) is is_rule
    assert (sampler.collect_noise([plain, request, plain]) is None) is is_rule
    # And that is the truth: what a batch of it prepares has more than noise.
    tensors = sampler.prepare([request])
    parts = {field.name for field in dataclasses.fields(tensors)} - {"num_rows", "noise"}
    assert any(getattr(tensors, part) for part in parts) is is_rule


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"top_k": -1},
        {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "logit_bias": {}},
        {"temperature": 0.0, "stop_token_ids": [1, 2], "min_tokens": 0, "ignore_eos": True},
    ],
)
def test_rules_that_are_switched_off_are_left_to_a_captured_graph(params):
    assert SamplingParams(**params).has_only_temperature


def test_collected_noise_is_what_prepare_uploads():
    requests = [
        make_request(seed=2**64 - 1, output=[4, 5], temperature=0.7),
        make_request(seed=3, temperature=0.0),
        make_request(seed=2**63, output=[1], temperature=1e-40),
    ]
    sampler = Sampler(VOCAB, CPU)
    temperatures, seeds, positions = sampler.collect_noise(requests)
    assert temperatures.dtype == np.float32
    assert temperatures.tolist() == pytest.approx([0.7, 0.0, 1e-30])
    assert seeds.dtype == positions.dtype == np.int64
    assert seeds.tolist() == [-1, 3, -(2**63)]
    assert positions.tolist() == [2, 0, 1]
    noise = sampler.prepare(requests).noise
    for array, tensor in zip((temperatures, seeds, positions), vars(noise).values(), strict=True):
        assert torch.equal(torch.from_numpy(array), tensor)


def test_no_noise_is_collected_for_greedy_requests():
    assert Sampler(VOCAB, CPU).collect_noise([make_request(temperature=0.0)] * 3) == []


def test_tokens_on_their_way_do_not_change_with_the_buffer_they_came_from():
    """A captured step writes its choices where the one before wrote its own."""
    choices = torch.tensor([[5, 6, 7], [1, 1, 1]])
    first = SampledTokens(choices, logprobs=None).send_to_host(num_rows=2)
    choices[0] += 10
    second = SampledTokens(choices, logprobs=None).send_to_host()
    assert first.wait() == SamplerOutput([5, 6], [None] * 2)
    assert second.wait() == SamplerOutput([15, 16, 17], [None] * 3)
