"""Sampling on a CUDA device, on the shapes of real models, against the torch path."""

import pytest
import torch
import torch.nn.functional as F

from folovllm.kernels import random as torch_kernels
from folovllm.model.ranks import Ranks
from folovllm.request import Request, SamplingParams
from folovllm.sampling.sampler import Sampler

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CPU = torch.device("cpu")
VOCAB = 151936


@pytest.fixture(scope="module")
def cuda():
    return torch.device("cuda")


def rows_on(device, num_rows):
    """Seeds and positions of the rows; some of them use all their bits."""
    seeds = torch.arange(num_rows) * 0x9E3779B97F4A7C1 + 17
    seeds[::5] *= -1
    return seeds.to(device), (torch.arange(num_rows) * 31 % 2048).to(device)


def make_logits(num_rows, vocab, dtype, device, seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(num_rows, vocab, device=device, generator=generator) * 2).to(dtype)


def make_requests(num_rows, **params):
    requests = []
    for i in range(num_rows):
        request = Request(
            request_id=str(i),
            prompt_token_ids=[i + 1, 7, 8],
            sampling_params=SamplingParams(max_tokens=4096, **params),
            seed=i * 977,
        )
        request.token_ids += range(i % 50)
        requests.append(request)
    return requests


def assert_same_up_to_near_ties(logits, noise, expected, actual, tolerance=1e-4):
    """Rows may differ only where the two chosen tokens score alike."""
    differ = (expected != actual).nonzero().flatten()
    temperatures, seeds, positions = (tensor[differ] for tensor in noise)
    words = torch_kernels.random_words(seeds, positions, logits.shape[1])
    scores = logits[differ].float()
    scores += temperatures[:, None] * torch_kernels.gumbel_from_words(words)
    gap = scores.gather(1, expected[differ, None]) - scores.gather(1, actual[differ, None])
    assert (gap.abs() < tolerance).all(), f"rows {differ.tolist()} differ by {gap.flatten()}"
    assert len(differ) <= 1 + len(expected) // 100


@pytest.mark.parametrize(("num_rows", "vocab"), [(1, VOCAB), (256, VOCAB), (33, 49152), (5, 4099)])
def test_random_words_equal_torch_bit_for_bit(cuda, num_rows, vocab):
    from folovllm.kernels import fused_sampling

    actual = fused_sampling.random_words(*rows_on(cuda, num_rows), vocab).cpu()
    for rows in torch.arange(num_rows).split(32):
        seeds, positions = rows_on(CPU, num_rows)
        expected = torch_kernels.random_words(seeds[rows], positions[rows], vocab)
        assert torch.equal(actual[rows], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_rows", "vocab"), [(1, VOCAB), (256, VOCAB), (33, 49152), (5, 4099)])
def test_triton_chooses_the_tokens_that_torch_chooses(cuda, num_rows, vocab, dtype):
    from folovllm.kernels import fused_sampling

    logits = make_logits(num_rows, vocab, dtype, cuda)
    temperatures = torch.tensor([1.0, 0.0, 0.6, 2.0], device=cuda).repeat(64)[:num_rows]
    noise = (temperatures, *rows_on(cuda, num_rows))
    expected = torch_kernels.choose_tokens(logits, *noise)
    actual = fused_sampling.choose_tokens(logits, *noise)
    assert actual[1].all()
    assert_same_up_to_near_ties(logits, noise, expected[0], actual[0])
    greedy = fused_sampling.choose_tokens(logits)
    assert torch.equal(greedy[0].cpu(), logits.cpu().float().max(dim=-1).indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 4])
def test_parts_of_the_vocabulary_choose_what_the_whole_does(cuda, size, dtype):
    """In a graph, as captured steps of processes that share a model do; 4 parts are padded."""
    from folovllm.kernels import fused_sampling

    logits = make_logits(33, VOCAB, dtype, cuda)
    temperatures = torch.tensor([1.0, 0.0, 0.6], device=cuda).repeat(11)
    noise = (temperatures, *rows_on(cuda, 33))
    num_columns = Ranks(0, size).share_of_vocab(VOCAB)
    padded = F.pad(logits, (0, size * num_columns - VOCAB), value=-torch.inf)

    def choose(*noise):
        candidates = [
            fused_sampling.best_candidates(part, index * num_columns, *noise)
            for index, part in enumerate(padded.split(num_columns, dim=1))
        ]
        return torch_kernels.choices_of(torch.stack(candidates).amax(dim=0))

    for rules in ((), noise):
        expected = fused_sampling.choose_tokens(logits, *rules)
        assert torch.equal(choose(*rules), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = choose(*rules)
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)


def test_tokens_do_not_depend_on_batch_size_or_order(cuda):
    from folovllm.kernels import fused_sampling

    logits = make_logits(64, VOCAB, torch.bfloat16, cuda)
    noise = (torch.ones(64, device=cuda), *rows_on(cuda, 64))
    together = fused_sampling.choose_tokens(logits, *noise)[0]
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1)).to(cuda)
    shuffled = fused_sampling.choose_tokens(logits[order], *(tensor[order] for tensor in noise))
    assert torch.equal(shuffled[0], together[order])
    for i in (0, 31, 63):
        rows = slice(i, i + 1)
        alone = fused_sampling.choose_tokens(logits[rows], *(tensor[rows] for tensor in noise))
        assert torch.equal(alone[0], together[rows])


RULES = [
    {"temperature": 0.0},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.05, "top_k": 5000},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "logprobs": 5},
    {"temperature": 0.9, "presence_penalty": 1.0, "logit_bias": {3: 5.0}, "min_tokens": 30},
]


@pytest.mark.parametrize("params", RULES)
def test_every_rule_edits_like_the_cpu(cuda, params):
    requests = make_requests(6, stop_token_ids=[9, 10], **params)
    logits = make_logits(6, VOCAB, torch.float32, cuda)
    actual = Sampler(VOCAB, cuda).prepare(requests).edit(logits).cpu()
    expected = Sampler(VOCAB, CPU).prepare(requests).edit(logits.cpu())
    both = torch.isfinite(actual) & torch.isfinite(expected)
    torch.testing.assert_close(actual[both], expected[both], rtol=1e-6, atol=1e-5)
    # Rounding may move a cumulative sum across top_p, by a token or two in a long row.
    num_kept = (torch.isfinite(actual).sum(-1), torch.isfinite(expected).sum(-1))
    assert ((num_kept[0] - num_kept[1]).abs() <= 1 + num_kept[1] // 1000).all()


def test_logprobs_equal_the_cpu(cuda):
    requests = make_requests(8, temperature=0.0, logprobs=5)
    logits = make_logits(8, VOCAB, torch.bfloat16, cuda)
    outputs = []
    for device in (cuda, CPU):
        sampler = Sampler(VOCAB, device)
        outputs.append(sampler.sample(logits.to(device), sampler.prepare(requests)).to_host())
    assert outputs[0].token_ids == outputs[1].token_ids
    for actual, expected in zip(outputs[0].logprobs, outputs[1].logprobs, strict=True):
        assert actual.rank == expected.rank == 1
        assert [i for i, _ in actual.top] == [i for i, _ in expected.top]
        pairs = zip(actual.top, expected.top, strict=True)
        assert all(abs(a - b) < 1e-4 for (_, a), (_, b) in pairs)


@pytest.mark.parametrize("params", RULES)
def test_sampling_does_not_wait_for_the_device(cuda, params):
    requests = make_requests(6, stop_token_ids=[9, 10], **params)
    sampler, logits = Sampler(VOCAB, cuda), make_logits(6, VOCAB, torch.bfloat16, cuda)
    sampler.sample(logits, sampler.prepare(requests)).to_host()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampled = sampler.sample(logits, sampler.prepare(requests))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(sampled.to_host().token_ids) == 6


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_plain_sampling_can_be_captured_in_a_graph(cuda, temperature):
    sampler, logits = Sampler(VOCAB, cuda), make_logits(8, VOCAB, torch.bfloat16, cuda)
    tensors = sampler.prepare(make_requests(8, temperature=temperature))
    sampler.sample(logits, tensors)  # compiles the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sampler.sample(logits, tensors)
    for seed in (1, 2):
        logits.copy_(make_logits(8, VOCAB, torch.bfloat16, cuda, seed))
        if tensors.noise is not None:
            tensors.noise.positions.fill_(seed)
        graph.replay()
        expected = sampler.sample(logits, tensors).to_host()
        assert captured.to_host() == expected
