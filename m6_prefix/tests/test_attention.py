"""TorchAttention against the plain reference, the choice of a backend, and the cache's copies."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from folovllm.model.loader import load_model
from folovllm.testing.toy_models import toy_families, write_toy_model
from m6_prefix.attention import TorchAttention
from m6_prefix.attention_backends import select_attention
from m6_prefix.config import AttentionBackend, EngineConfig, PreemptionMode
from m6_prefix.kv_cache import KVCache
from m6_prefix.kv_cache_manager import BlockCopy, CopyKind
from m6_prefix.model_runner import ModelRunner
from m6_prefix.tests.mixed_steps import DEVICES, EDGE_SHARES, check_attention, make_runner
from m6_prefix.tests.test_engine_contract import BYTES_PER_TOKEN


@pytest.fixture(scope="module")
def toy_directory(tmp_path_factory) -> Path:
    return write_toy_model(toy_families()[3], tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def toy_model(toy_directory):
    """On the CPU, wherever the tests run."""
    return load_model(toy_directory, device="cpu")


@pytest.fixture(scope="module", params=DEVICES)
def placed_model(request, toy_directory):
    """On the CPU, and on a GPU if there is one."""
    return load_model(toy_directory, device=request.param, dtype="float32")


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("shares", EDGE_SHARES)
def test_attention_equals_reference_for_any_mix_of_lengths(
    placed_model, shares, block_size
) -> None:
    runner = make_runner(placed_model, block_size, attention_backend=AttentionBackend.TORCH)
    check_attention(runner.attention, runner, shares, tolerance=1e-4)


def test_what_lies_behind_the_end_of_a_table_is_never_looked_up(placed_model) -> None:
    runner = make_runner(placed_model, 4, attention_backend=AttentionBackend.TORCH)
    runner.block_tables.device.fill_(10**6)
    check_attention(runner.attention, runner, [(5, 1), (0, 17), (20, 3)], tolerance=1e-4)


@pytest.mark.parametrize("backend", [AttentionBackend.AUTO, AttentionBackend.TORCH])
def test_torch_computes_attention_on_a_cpu(toy_model, backend) -> None:
    runner = make_runner(toy_model, 16, attention_backend=backend)
    assert isinstance(runner.attention, TorchAttention)
    assert runner.graphs is None


@pytest.mark.parametrize("backend", [AttentionBackend.TRITON, AttentionBackend.FLASH_ATTN])
def test_backend_that_needs_a_gpu_is_refused_on_a_cpu(toy_model, backend) -> None:
    with pytest.raises(ValueError, match=f"{backend.value} needs a CUDA .* choose torch or auto"):
        make_runner(toy_model, 16, attention_backend=backend)


def model_on_gpu(head_dim: int) -> SimpleNamespace:
    """As much of a model as the choice of a backend looks at."""
    config = SimpleNamespace(num_heads=4, head_dim=head_dim)
    return SimpleNamespace(device=torch.device("cuda"), config=config)


@pytest.mark.parametrize("backend", [AttentionBackend.TRITON, AttentionBackend.FLASH_ATTN])
def test_head_dim_beyond_the_kernels_is_refused(toy_model, backend) -> None:
    kv_cache = make_runner(toy_model, 16).kv_cache
    config = EngineConfig(attention_backend=backend)
    with pytest.raises(ValueError, match="head_dim up to 256 and this model has 264; choose torch"):
        select_attention(config, model_on_gpu(264), kv_cache)


@pytest.mark.parametrize("backend", [AttentionBackend.AUTO, AttentionBackend.TORCH])
def test_torch_takes_any_head_dim_on_a_gpu(toy_model, backend) -> None:
    kv_cache = make_runner(toy_model, 16).kv_cache
    config = EngineConfig(attention_backend=backend)
    assert isinstance(select_attention(config, model_on_gpu(264), kv_cache), TorchAttention)


@pytest.mark.parametrize("backend", [AttentionBackend.AUTO, AttentionBackend.TRITON])
def test_triton_computes_attention_on_a_gpu(toy_model, backend) -> None:
    pytest.importorskip("triton")
    kv_cache = make_runner(toy_model, 16).kv_cache
    config = EngineConfig(attention_backend=backend)
    attention = select_attention(config, model_on_gpu(24), kv_cache)
    assert type(attention).__name__ == "TritonAttention"


def test_copies_act_as_if_one_after_the_other(placed_model) -> None:
    """Random lists of copies against a loop that performs them singly."""
    swap = {"preemption_mode": PreemptionMode.SWAP, "swap_cache_tokens": 32}
    cache = make_runner(placed_model, 4, enforce_eager=True, **swap).kv_cache
    generator = torch.Generator().manual_seed(0)
    kinds = list(CopyKind)
    for _ in range(50):
        for tensor in (cache.kv, cache.swapped):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        numbers = torch.randint(0, 6, (12, 3), generator=generator).tolist()
        copies = [BlockCopy(kinds[kind % 3], source, target) for kind, source, target in numbers]
        expected_kv, expected_swapped = perform_singly(cache, copies)
        cache.copy_blocks(copies)
        assert torch.equal(cache.kv, expected_kv)
        assert torch.equal(cache.swapped, expected_swapped)


def perform_singly(cache: KVCache, copies: list[BlockCopy]) -> tuple[torch.Tensor, torch.Tensor]:
    kv, swapped = cache.kv.clone(), cache.swapped.clone()
    for copy in copies:
        if copy.kind is CopyKind.COPY_ON_WRITE:
            kv[:, :, copy.destination] = kv[:, :, copy.source]
        elif copy.kind is CopyKind.SWAP_OUT:
            swapped[copy.destination] = kv[:, :, copy.source]
        else:
            kv[:, :, copy.destination] = swapped[copy.source]
    return kv, swapped


def test_without_kv_cache_bytes_free_memory_decides(toy_model, monkeypatch) -> None:
    monkeypatch.setattr("folovllm.memory.available_host_bytes", lambda: 8 * 80 * BYTES_PER_TOKEN)
    config = EngineConfig(max_model_len=40, block_size=4)
    assert ModelRunner(config, toy_model).kv_cache.num_tokens == 80


def test_cache_that_keeps_no_prefixes_is_no_larger_than_all_requests(toy_model) -> None:
    config = EngineConfig(
        max_model_len=40,
        block_size=16,
        max_num_seqs=2,
        kv_cache_bytes=1 << 24,
        enable_prefix_caching=False,
    )
    assert ModelRunner(config, toy_model).kv_cache.num_tokens == 2 * 48
