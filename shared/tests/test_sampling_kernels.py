"""Random words against published vectors, and the Triton kernels against their torch twins.

The kernels run in Triton's interpreter, which must be chosen before triton is imported: they get a
process of their own, so that this one (which may have a GPU) is left as it is.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from folovllm.kernels import random as torch_kernels

ONES = 0xFFFFFFFF
PI = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
"""First hexadecimal digits of pi: four counter words, then two key words."""
SEEDS = torch.tensor([0, 1, 2**32, -1, -(2**63), 2**63 - 1, 123456789012345])
POSITIONS = torch.tensor([0, 1, 2, 777, 2**31 - 1, 2**31, 2**32 - 1])
VOCAB_SIZES = [1, 2, 3, 4, 5, 2047, 2048, 2049, 6151]

INTERPRETED = """
import sys
import numpy as np, torch
from folovllm.kernels import fused_sampling

given = {name: torch.from_numpy(array) for name, array in np.load(sys.argv[1]).items()}
result = {}
for name, tensor in given.items():
    kind, _, case = name.partition(":")
    if kind == "words":
        result[name] = fused_sampling.random_words(given["seeds"], given["positions"], int(case))
    elif kind == "random":
        args = given["temperatures"], given["seeds"], given["positions"]
        result[name] = fused_sampling.choose_tokens(tensor, *args)
    elif kind == "greedy":
        result[name] = fused_sampling.choose_tokens(tensor)
    elif kind == "strided":
        result[name] = fused_sampling.choose_tokens(tensor[::2, :-5])
    elif kind == "transposed":
        result[name] = fused_sampling.choose_tokens(tensor.t())
    elif kind == "candidates":
        result[name] = fused_sampling.best_candidates(tensor, int(case.split()[-1]))
    elif kind == "noisy candidates":
        args = given["temperatures"], given["seeds"], given["positions"]
        result[name] = fused_sampling.best_candidates(tensor, int(case.split()[-1]), *args)
np.savez(sys.argv[2], **{name: tensor.numpy() for name, tensor in result.items()})
"""


def kernel_inputs():
    """Logits per case; cases whose name starts alike go through the same call."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "seeds": SEEDS,
        "positions": POSITIONS,
        "temperatures": torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 1e30, 1e-30]),
    }
    inputs |= {f"words:{size}": torch.zeros(0) for size in VOCAB_SIZES}
    for size in VOCAB_SIZES:
        logits = torch.randn(7, size, generator=generator) * 2
        inputs[f"random:{size}"] = inputs[f"greedy:{size}"] = logits
        inputs[f"random:half {size}"] = inputs[f"greedy:half {size}"] = logits.half()
    broken = torch.randn(7, 4099, generator=generator)
    broken[0, 4098] = broken[1, 0] = broken[2, 2048] = torch.nan
    broken[3], broken[4, 1:] = -torch.inf, -torch.inf
    broken[5, :2050] = -torch.inf
    broken[6, 9] = torch.inf
    ties = torch.randint(0, 3, (7, 4099), generator=generator).float()
    ties[1] = 0
    inputs |= {"random:broken": broken, "greedy:broken": broken, "greedy:ties": ties}
    near_zero = torch.tensor([-1e-45, -0.0, 0.0, 1e-45, -1.0, 3e38, -torch.inf])[:, None]
    for first_token in (0, 64, 75968):
        for case, logits in (("broken", broken), ("ties", ties), ("near zero", near_zero)):
            inputs[f"candidates:{case} {first_token}"] = logits
        inputs[f"candidates:halves {first_token}"] = broken.half()
        inputs[f"noisy candidates:broken {first_token}"] = broken
        inputs[f"noisy candidates:random {first_token}"] = inputs["random:half 6151"]
    inputs["strided:"] = torch.randn(6, 3001, generator=generator)
    inputs["transposed:"] = torch.randn(2500, 3, generator=generator)
    return inputs


def torch_result(name, inputs):
    kind, _, case = name.partition(":")
    if kind == "words":
        return torch_kernels.random_words(SEEDS, POSITIONS, int(case))
    if kind == "random":
        args = inputs["temperatures"], SEEDS, POSITIONS
        return torch_kernels.choose_tokens(inputs[name], *args)
    if kind == "candidates":
        return torch_kernels.best_candidates(inputs[name], int(case.split()[-1]))
    if kind == "noisy candidates":
        args = inputs["temperatures"], SEEDS, POSITIONS
        return torch_kernels.best_candidates(inputs[name], int(case.split()[-1]), *args)
    views = {"strided": lambda x: x[::2, :-5], "transposed": torch.Tensor.t}
    return torch_kernels.choose_tokens(views.get(kind, lambda x: x)(inputs[name]))


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """What the Triton kernels make of `kernel_inputs`, by case name."""
    pytest.importorskip("triton", reason="the kernels need triton")
    folder = tmp_path_factory.mktemp("interpreted")
    np.savez(folder / "in.npz", **{name: t.numpy() for name, t in kernel_inputs().items()})
    shared = Path(torch_kernels.__file__).parents[2]
    subprocess.run(
        [sys.executable, "-c", INTERPRETED, folder / "in.npz", folder / "out.npz"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(shared)},
        check=True,
        timeout=300,
    )
    with np.load(folder / "out.npz") as arrays:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def words_of(counter, key):
    counter, key = ([torch.tensor(word) for word in words] for words in (counter, key))
    return [int(word) for word in torch_kernels.philox_4x32(counter, key)]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (PI[:4], PI[4:], [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ],
)
def test_philox_gives_the_words_that_its_authors_published(counter, key, expected):
    assert words_of(counter, key) == expected


def test_words_follow_the_documented_counter_and_key():
    words = torch_kernels.random_words(torch.tensor([5 + (9 << 32)]), torch.tensor([7]), 11)
    for token_id in range(11):
        assert int(words[0, token_id]) == words_of([token_id // 4, 7, 0, 0], [5, 9])[token_id % 4]


def test_words_of_a_token_do_not_depend_on_the_vocabulary_size():
    longest = torch_kernels.random_words(SEEDS, POSITIONS, VOCAB_SIZES[-1])
    for size in VOCAB_SIZES:
        words = torch_kernels.random_words(SEEDS, POSITIONS, size)
        assert torch.equal(words, longest[:, :size])


def test_noise_is_finite_and_has_the_gumbel_quantiles():
    extremes = torch_kernels.gumbel_from_words(torch.tensor([0, 1, 2**32 - 2, 2**32 - 1]))
    assert torch.isfinite(extremes).all()
    assert (extremes[:-1] >= extremes[1:]).all()
    quantiles = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    noise = torch_kernels.gumbel_from_words((quantiles * 2**32).long())
    expected = -torch.log(-torch.log1p(-quantiles))
    torch.testing.assert_close(noise.double(), expected, rtol=2e-6, atol=2e-6)


def test_noise_tells_the_likeliest_winners_apart():
    noise = torch_kernels.gumbel_from_words(torch.arange(100_000))
    assert (noise[:1000].diff() < 0).all()
    v = (torch.arange(100_000, dtype=torch.float64) + 0.5) * 2.0**-32
    torch.testing.assert_close(noise.double(), -torch.log(-torch.log1p(-v)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", VOCAB_SIZES)
def test_triton_random_words_equal_torch_bit_for_bit(interpreted, size):
    assert torch.equal(interpreted[f"words:{size}"], torch_result(f"words:{size}", {}))


CHOICES = [n for n in kernel_inputs() if n.split(":")[0] in ("random", "greedy", "strided")]


@pytest.mark.parametrize("name", [*CHOICES, "transposed:"])
def test_triton_chooses_the_tokens_that_torch_chooses(interpreted, name):
    expected = torch_result(name, kernel_inputs())
    assert torch.equal(interpreted[name][1], expected[1])
    valid = expected[1].bool()
    assert torch.equal(interpreted[name][0][valid], expected[0][valid])


@pytest.mark.parametrize("name", [n for n in kernel_inputs() if "candidates" in n])
def test_triton_offers_the_candidates_that_torch_offers(interpreted, name):
    """With noise their scores differ by what logarithms do."""
    expected, actual = torch_result(name, kernel_inputs()), interpreted[name]
    if "noisy" not in name:
        assert torch.equal(actual, expected)
        return
    assert torch.equal(torch_kernels.choices_of(actual), torch_kernels.choices_of(expected))
    scores = [score_of(candidates) for candidates in (actual, expected)]
    torch.testing.assert_close(*scores, rtol=1e-6, atol=1e-5, equal_nan=True)


def score_of(candidates):
    score = (candidates >> 32).to(torch.int32)
    return (score ^ ((score >> 31) & 0x7FFFFFFF)).view(torch.float32)


def test_words_of_a_run_of_tokens_are_those_of_the_whole():
    whole = torch_kernels.random_words(SEEDS, POSITIONS, 300)
    assert torch.equal(torch_kernels.random_words(SEEDS, POSITIONS, 99, 64), whole[:, 64:163])


def test_rows_with_nan_or_nothing_above_minus_infinity_are_invalid(interpreted):
    expected = [0, 0, 0, 0, 1, 1, 1]
    for name in ("random:broken", "greedy:broken"):
        token_ids, is_valid = interpreted[name]
        assert is_valid.tolist() == expected
        assert ((token_ids >= 0) & (token_ids < 4099)).all()
        assert int(token_ids[4]) == 0
        assert int(token_ids[6]) == 9


def test_ties_go_to_the_lowest_id_across_slices(interpreted):
    ties = kernel_inputs()["greedy:ties"]
    first = [int((row == row.max()).nonzero()[0]) for row in ties]
    assert interpreted["greedy:ties"][0].tolist() == first


def test_cuda_gets_the_triton_kernel_and_cpu_the_torch_one():
    pytest.importorskip("triton", reason="the kernels need triton")
    from folovllm.kernels import fused_sampling

    select = torch_kernels.select_choose_tokens
    assert select(torch.device("cpu")) is torch_kernels.choose_tokens
    assert select(torch.device("cuda")) is fused_sampling.choose_tokens
    select_best = torch_kernels.select_best_candidates
    assert select_best(torch.device("cpu")) is torch_kernels.best_candidates
    assert select_best(torch.device("cuda")) is fused_sampling.best_candidates
