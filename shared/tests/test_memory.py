"""The KV cache's share of the memory, with a CUDA device that only has numbers."""

from types import SimpleNamespace

import pytest
import torch

from folovllm.memory import largest_prompts, profile_kv_cache_bytes
from folovllm.model.collectives import Alone

CUDA = torch.device("cuda")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A device of 1000 bytes: others use 100, we reserve 300 and had 250 in use at the peak."""
    calls: list[str] = []
    fakes = {
        "reset_peak_memory_stats": lambda device: calls.append("reset"),
        "synchronize": lambda device: calls.append("wait"),
        "max_memory_allocated": lambda device: 250,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device: (600, 1000),
        "memory_reserved": lambda device: 300,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return calls


def on(device: torch.device) -> SimpleNamespace:
    return SimpleNamespace(device=device, collectives=Alone())


def test_cache_gets_what_others_and_the_largest_step_leave(steps: list[str]) -> None:
    assert profile_kv_cache_bytes(on(CUDA), 0.9, lambda: steps.append("step")) == 900 - 100 - 250
    assert steps == ["reset", "step", "wait"]


def test_nothing_left_is_refused_with_what_to_change(steps: list[str]) -> None:
    with pytest.raises(ValueError, match=r"100 used by other .* less 250 .*; raise gpu_memory_ut"):
        profile_kv_cache_bytes(on(CUDA), 0.35, lambda: None)


def test_cpu_takes_an_eighth_of_the_available_memory_and_runs_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("folovllm.memory.available_host_bytes", lambda: 8000)
    num_bytes = profile_kv_cache_bytes(on(torch.device("cpu")), 0.9, lambda: pytest.fail("ran"))
    assert num_bytes == 1000


def test_largest_sampling_runs_the_rules_that_take_memory() -> None:
    from folovllm.sampling.largest_batch import run_largest_sampling
    from folovllm.sampling.sampler import Sampler

    seen = {}

    class Spy(Sampler):
        def sample(self, logits, tensors):
            seen["shape"], seen["rules"] = tuple(logits.shape), tensors
            return super().sample(logits, tensors)

    run_largest_sampling(Spy(31, torch.device("cpu")), 40, torch.bfloat16)
    assert seen["shape"] == (40, 31)
    run_largest_sampling(Spy(31, torch.device("cpu")), 3, torch.bfloat16)  # as for a prompt's rows
    assert seen["shape"] == (32, 31)
    assert seen["rules"].all_candidates is not None
    assert seen["rules"].repetition is not None
    assert seen["rules"].logprobs is not None


@pytest.mark.parametrize(
    ("budget", "max_model_len", "max_num_seqs", "expected"),
    [
        (8192, 5000, 256, {(1, 5000), (2, 4096)}),
        (8192, 2048, 256, {(4, 2048)}),
        (8192, 8192, 256, {(1, 8192)}),
        (100, 64, 256, {(1, 64), (2, 50)}),
        (8192, 16, 256, {(256, 16)}),
        (8192, 5000, 1, {(1, 5000), (1, 4096)}),
        (2048, 17408, 256, {(1, 2048)}),
    ],
)
def test_largest_prompts_use_the_budget_up(budget, max_model_len, max_num_seqs, expected) -> None:
    """A step of 8,192 tokens can come though no prompt is longer than 5,000."""
    limits = SimpleNamespace(
        max_num_batched_tokens=budget, max_model_len=max_model_len, max_num_seqs=max_num_seqs
    )
    assert largest_prompts(limits) == expected
