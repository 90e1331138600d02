"""Choices among parts of a vocabulary are those of one process that has all of it."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from folovllm.kernels.random import best_candidates, choices_of, choose_tokens
from folovllm.model.logits_parts import LogitsParts
from folovllm.model.ranks import Ranks
from folovllm.request import Request, SamplingParams
from folovllm.sampling.largest_batch import run_largest_sampling
from folovllm.sampling.sampler import Sampler

CPU = torch.device("cpu")
SEEDS = torch.tensor([0, 1, 2**32, -1, -(2**63), 2**63 - 1, 123456789012345])
NOISE = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 1e30, 1e-30]), SEEDS, torch.arange(7) * 300


class Exchange:
    """Lets threads do what processes would, and counts the numbers that each of them sends."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.sent: list[int] = []
        self._tensors: list[torch.Tensor] = [torch.empty(0)] * size
        self._barrier = Barrier(size)

    def all_of(self, rank: int, mine: torch.Tensor) -> list[torch.Tensor]:
        self._tensors[rank] = mine
        self._barrier.wait(timeout=30)
        tensors = list(self._tensors)
        self._barrier.wait(timeout=30)
        if rank == 0:
            self.sent.append(mine.numel())
        return tensors


class Rank:
    """Collectives of one of the threads."""

    def __init__(self, rank: int, exchange: Exchange) -> None:
        self.ranks, self.num_ranks = Ranks(rank, exchange.size), exchange.size
        self._exchange = exchange

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def gather_columns(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._exchange.all_of(self.ranks.rank, x), dim=1)

    def largest(self, numbers: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange.all_of(self.ranks.rank, numbers)).amax(dim=0)

    def least(self, number: int) -> int:
        raise NotImplementedError


def part_of(logits: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """As `CausalLM.compute_logits` leaves it."""
    vocab_size = logits.shape[1]
    part = logits.new_full((len(logits), ranks.share_of_vocab(vocab_size)), -torch.inf)
    ours = logits[:, ranks.vocab_part(vocab_size)]
    part[:, : ours.shape[1]] = ours
    return part


def on_all_ranks(
    logits: torch.Tensor, size: int, run: Callable[[LogitsParts, torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, Sequence[int]]:
    """What all ranks get, which must be the same, and how many numbers each sent, by exchange."""
    exchange = Exchange(size)

    def run_rank(rank: int) -> torch.Tensor:
        parts = LogitsParts(logits.shape[1], CPU, Rank(rank, exchange))
        return run(parts, part_of(logits, Ranks(rank, size)))

    with ThreadPoolExecutor(size) as threads:
        first, *others = threads.map(run_rank, range(size))
    assert all(torch.equal(first, other) for other in others)
    return first, exchange.sent


def assert_same_choices(logits: torch.Tensor, size: int, *noise: torch.Tensor) -> None:
    before = logits.clone()
    choices, sent = on_all_ranks(
        logits, size, lambda parts, part: parts.choose_tokens(part, *noise)
    )
    assert sent == [len(logits)]
    torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)
    expected = choose_tokens(logits, *noise)
    assert torch.equal(choices[1], expected[1])
    valid = expected[1].bool()
    assert torch.equal(choices[0][valid], expected[0][valid])
    assert ((choices[0] >= 0) & (choices[0] < logits.shape[1])).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("vocab_size", [1, 63, 64, 65, 100, 199, 513])
def test_choices_are_those_of_one_process(vocab_size: int, size: int, dtype: torch.dtype) -> None:
    """Of 1 token and 4 ranks three have none; bfloat16 has many equal logits."""
    logits = torch.randn(7, vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    for shift in (0.0, -50.0, 50.0):
        assert_same_choices((logits + shift).to(dtype), size)
        assert_same_choices((logits + shift).to(dtype), size, *NOISE)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_equal_tokens_of_several_ranks_go_to_the_lowest_id(size: int) -> None:
    logits = torch.randint(0, 3, (7, 199), generator=torch.Generator().manual_seed(0)).float()
    logits[0] = 0
    logits[1] = -0.0
    logits[1, 150:] = 0.0  # equal to -0
    logits[2, :] = -3.0
    assert_same_choices(logits, size)
    assert_same_choices(logits, size, torch.zeros(7), *NOISE[1:])
    choices, _ = on_all_ranks(logits, size, LogitsParts.choose_tokens)
    assert choices[0, :3].tolist() == [0, 0, 0]


@pytest.mark.parametrize("noise", [(), NOISE], ids=["greedy", "random"])
def test_broken_rows_are_invalid_on_every_rank(noise) -> None:
    logits = torch.randn(7, 199, generator=torch.Generator().manual_seed(0))
    logits[0, 198] = logits[1, 0] = torch.nan  # of one rank alone
    logits[2, 100] = -torch.nan
    logits[3] = -torch.inf
    logits[4, :190] = -torch.inf
    logits[5, 70:] = -torch.inf
    logits[6, [9, 150]] = torch.inf
    assert choose_tokens(logits, *noise)[1].tolist() == [0, 0, 0, 0, 1, 1, 1]
    for size in (2, 3, 4):
        assert_same_choices(logits, size, *noise)


def test_candidates_are_in_the_order_of_scores_and_then_of_ids() -> None:
    scores = [-torch.inf, -3e38, -1.0, -1e-45, 0.0, 1e-45, 1.0, 3e38, torch.inf, torch.nan]
    rows = torch.tensor(scores)[:, None]
    low, high = (best_candidates(rows, first_token) for first_token in (64, 151_872))
    ordered = torch.stack((high, low), dim=1)[:-1].flatten()
    assert (ordered.diff() > 0).all()
    assert low[-1] == high[-1] > ordered[-1]
    assert choices_of(low[:-1]).tolist() == [[64] * 9, [0] + [1] * 8]
    assert choices_of(high[1:-1])[0].tolist() == [151_872] * 8
    assert int(choices_of(low[-1:])[1]) == 0


def make_request(name: str, **params) -> Request:
    request = Request(
        request_id=name,
        prompt_token_ids=[1, 2, 3],
        sampling_params=SamplingParams(max_tokens=9, **params),
        seed=len(name),
    )
    request.token_ids += [150, 7]
    return request


GREEDY, RANDOM = {"temperature": 0.0}, {"temperature": 0.8}


@pytest.mark.parametrize(
    ("rules", "gathers"),
    [
        ([GREEDY, GREEDY], False),
        ([GREEDY, RANDOM], False),
        ([RANDOM, {"temperature": 1.0, "top_k": 9999}], False),  # of a vocabulary of 199
        ([GREEDY, {"temperature": 0.9, "top_p": 0.9}], True),
        ([GREEDY, {"temperature": 0.9, "top_k": 3}], True),
        ([GREEDY, {"temperature": 0.9, "min_p": 0.1}], True),
        ([RANDOM, {"temperature": 0.0, "logprobs": 0}], True),
        ([RANDOM, {"temperature": 0.0, "repetition_penalty": 1.3}], True),
        ([RANDOM, {"temperature": 0.0, "presence_penalty": 1.3}], True),
        ([RANDOM, {"temperature": 0.0, "logit_bias": {150: 9.0}}], True),
        ([RANDOM, {"temperature": 0.0, "allowed_token_ids": [180, 190]}], True),
        ([RANDOM, {"temperature": 0.0, "min_tokens": 4, "stop_token_ids": [5]}], True),
    ],
)
def test_all_logits_travel_for_rules_that_look_at_them_and_for_no_others(rules, gathers) -> None:
    requests = [make_request(str(index), **params) for index, params in enumerate(rules)]
    logits = torch.randn(2, 199, generator=torch.Generator().manual_seed(0)) * 3
    alone = Sampler(199, CPU)
    expected = alone.sample(logits, alone.prepare(requests)).to_host()

    def sample(parts: LogitsParts, part: torch.Tensor) -> torch.Tensor:
        sampler = Sampler(199, CPU, parts)
        sampled = sampler.sample(part, sampler.prepare(requests))
        output = sampled.to_host()
        assert output.logprobs == expected.logprobs
        return sampled.choices

    choices, sent = on_all_ranks(logits, 2, sample)
    assert choices[0].tolist() == expected.token_ids
    assert sent == [2 * 128 if gathers else 2]


def test_profiling_gathers_the_largest_batch() -> None:
    """It stands for rules that need all logits, so their memory counts."""

    def run(parts: LogitsParts, part: torch.Tensor) -> torch.Tensor:
        run_largest_sampling(Sampler(199, CPU, parts), 40, torch.bfloat16)
        return part[:0]

    _, sent = on_all_ranks(torch.zeros(1, 199), 2, run)
    assert sent == [40 * 128]


def test_logits_of_another_width_are_refused() -> None:
    sampler = Sampler(199, CPU, LogitsParts(199, CPU, Rank(0, Exchange(2))))
    assert sampler.num_columns == 128
    with pytest.raises(ValueError, match="1 rows over 128 tokens"):
        sampler.sample(torch.zeros(1, 199), sampler.prepare([make_request("a", **GREEDY)]))
