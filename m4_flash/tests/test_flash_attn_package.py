"""The adapters to the flash-attn packages, driven with stand-ins of the packages' signatures."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from folovllm.kernels.reference import causal_attention
from folovllm.model.loader import load_model
from folovllm.testing.toy_models import toy_families, write_toy_model
from m4_flash.attention import select_attention
from m4_flash.config import AttentionBackend, EngineConfig
from m4_flash.flash_attn_package import FlashAttention2, FlashAttention3, make_flash_attn
from m4_flash.tests.mixed_steps import EDGE_SHARES, check_attention, make_runner, needs_cuda

FA3, FA2 = "flash_attn_interface", "flash_attn"
MIXED_SHARES = [*EDGE_SHARES, [(39, 1), (0, 40), (0, 1)]]


@pytest.fixture(scope="module")
def toy_directory(tmp_path_factory) -> Path:
    return write_toy_model(toy_families()[3], tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def half_model(toy_directory):
    return load_model(toy_directory, device="cpu", dtype="float16")


def attend_paged(
    queries: list[torch.Tensor],
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
) -> torch.Tensor:
    """What all functions compute, once their arguments are what the packages take.

    Causal, the last query at the last key; a request without keys gets zeros.
    """
    assert k_cache.dtype == v_cache.dtype == queries[0].dtype == torch.float16
    assert k_cache.shape == v_cache.shape
    assert k_cache.stride(-1) == v_cache.stride(-1) == block_table.stride(-1) == 1
    assert seq_lens.dtype == block_table.dtype == torch.int32
    assert len(seq_lens) == len(block_table) == len(queries)
    block_size = k_cache.shape[1]
    out = []
    for part, seq_len, table in zip(queries, seq_lens.tolist(), block_table, strict=True):
        blocks = table[: -(-seq_len // block_size)].long()
        keys, values = (cache[blocks].flatten(0, 1)[:seq_len] for cache in (k_cache, v_cache))
        out.append(causal_attention(part, keys, values) if seq_len else torch.zeros_like(part))
    return torch.cat(out)


def split_queries(q: torch.Tensor, cu_seqlens: torch.Tensor, max_len: int) -> list[torch.Tensor]:
    """q: [total_q, num_heads, head_dim]; cu_seqlens: [num_requests + 1] int32."""
    assert q.dim() == 3
    assert q.stride(-1) == 1
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.is_contiguous()
    lens = cu_seqlens.diff().tolist()
    assert cu_seqlens[0] == 0
    assert isinstance(max_len, int)
    assert max(lens) <= max_len
    return list(q.split(lens))


class FlashAttention3Package:
    """Stands in for the module `flash_attn_interface`."""

    def __init__(self) -> None:
        self.num_splits: list[int] = []

    def flash_attn_with_kvcache(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        k: Any = None,
        v: Any = None,
        qv: Any = None,
        rotary_cos: Any = None,
        rotary_sin: Any = None,
        cache_seqlens: Any = None,
        cache_batch_idx: Any = None,
        cache_leftpad: Any = None,
        page_table: Any = None,
        cu_seqlens_q: Any = None,
        cu_seqlens_k_new: Any = None,
        max_seqlen_q: Any = None,
        rotary_seqlens: Any = None,
        q_descale: Any = None,
        k_descale: Any = None,
        v_descale: Any = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        attention_chunk: int = 0,
        softcap: float = 0.0,
        rotary_interleaved: bool = True,
        scheduler_metadata: Any = None,
        num_splits: int = 0,
        pack_gqa: Any = None,
        sm_margin: int = 0,
        return_softmax_lse: bool = False,
    ) -> torch.Tensor:
        assert causal
        self.num_splits.append(num_splits)
        queries = split_queries(q, cu_seqlens_q, max_seqlen_q)
        return attend_paged(queries, k_cache, v_cache, cache_seqlens, page_table)


class FlashAttention2Package:
    """Stands in for the module `flash_attn`, whose blocks have a multiple of 256 tokens."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def flash_attn_with_kvcache(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        k: Any = None,
        v: Any = None,
        rotary_cos: Any = None,
        rotary_sin: Any = None,
        cache_seqlens: Any = None,
        cache_batch_idx: Any = None,
        cache_leftpad: Any = None,
        block_table: Any = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        rotary_interleaved: bool = True,
        alibi_slopes: Any = None,
        num_splits: int = 0,
        return_softmax_lse: bool = False,
    ) -> torch.Tensor:
        """q: [num_requests, query_len, num_heads, head_dim], and so is the result."""
        self.calls.append("kvcache")
        assert causal
        assert q.dim() == 4
        assert q.stride(-1) == 1
        assert k_cache.shape[1] % 256 == 0
        out = attend_paged(list(q), k_cache, v_cache, cache_seqlens, block_table)
        return out.view(q.shape)

    def flash_attn_varlen_func(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Any = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        block_table: Any = None,
    ) -> torch.Tensor:
        self.calls.append("varlen")
        assert causal
        assert k.shape[1] % 256 == 0
        assert cu_seqlens_k.dtype == torch.int32
        assert cu_seqlens_k.shape == cu_seqlens_q.shape
        assert cu_seqlens_k[0] == 0
        seq_lens = cu_seqlens_k.diff()
        assert isinstance(max_seqlen_k, int)
        assert seq_lens.max() <= max_seqlen_k
        queries = split_queries(q, cu_seqlens_q, max_seqlen_q)
        return attend_paged(queries, k, v, seq_lens.to(torch.int32), block_table)


@pytest.fixture
def installed(monkeypatch):
    """Call it with the packages that shall be there; no other can be imported."""

    def install(**packages: Any) -> None:
        for name in (FA3, FA2):
            monkeypatch.setitem(sys.modules, name, packages.get(name))

    install()
    return install


@pytest.mark.parametrize("block_size", [1, 16, 256])
@pytest.mark.parametrize("shares", MIXED_SHARES)
def test_flash_attention_3_equals_reference(half_model, shares, block_size) -> None:
    runner = make_runner(half_model, block_size)
    package = FlashAttention3Package()
    attention = FlashAttention3(package, runner.kv_cache)
    check_attention(attention, runner, shares, tolerance=2e-3)
    # The package splits contexts of single queries; with long ones the device is full anyway.
    assert package.num_splits == [0 if max(n for _, n in shares) == 1 else 1]


@pytest.mark.parametrize("block_size", [256, 512])
@pytest.mark.parametrize("shares", MIXED_SHARES)
def test_flash_attention_2_equals_reference(half_model, shares, block_size) -> None:
    runner = make_runner(half_model, block_size)
    package = FlashAttention2Package()
    attention = FlashAttention2(package, runner.kv_cache)
    check_attention(attention, runner, shares, tolerance=2e-3)
    assert package.calls == ["kvcache" if max(n for _, n in shares) == 1 else "varlen"]


def test_newest_package_that_is_installed_is_taken(half_model, installed) -> None:
    config = EngineConfig(block_size=256)
    kv_cache = make_runner(half_model, 256).kv_cache
    packages = {FA3: FlashAttention3Package(), FA2: FlashAttention2Package()}
    installed(**packages)
    assert isinstance(make_flash_attn(config, kv_cache), FlashAttention3)
    installed(**{FA2: packages[FA2]})
    assert isinstance(make_flash_attn(config, kv_cache), FlashAttention2)


def test_package_serves_where_the_config_names_it(half_model, installed) -> None:
    installed(**{FA3: FlashAttention3Package()})
    config = EngineConfig(attention_backend=AttentionBackend.FLASH_ATTN)
    model = SimpleNamespace(device=torch.device("cuda"), config=half_model.config)
    attention = select_attention(config, model, make_runner(half_model, 16).kv_cache)
    assert isinstance(attention, FlashAttention3)


def test_missing_package_is_refused(half_model, installed) -> None:
    kv_cache = make_runner(half_model, 16).kv_cache
    with pytest.raises(ValueError, match="pip install flash-attn.*neither.*choose triton"):
        make_flash_attn(EngineConfig(), kv_cache)


def test_dtype_that_the_package_cannot_compute_is_refused(toy_directory, installed) -> None:
    installed(**{FA3: FlashAttention3Package()})
    kv_cache = make_runner(load_model(toy_directory, device="cpu"), 16).kv_cache
    with pytest.raises(ValueError, match="float16 or bfloat16 and the model is in float32; choose"):
        make_flash_attn(EngineConfig(), kv_cache)


def test_block_size_that_version_2_cannot_read_is_refused(half_model, installed) -> None:
    installed(**{FA2: FlashAttention2Package()})
    kv_cache = make_runner(half_model, 16).kv_cache
    with pytest.raises(ValueError, match="block_size is 16; set block_size=256, or choose triton"):
        make_flash_attn(EngineConfig(block_size=16), kv_cache)


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_cuda) for name in (FA3, FA2)])
@pytest.mark.parametrize("shares", MIXED_SHARES)
def test_real_package_equals_reference(toy_directory, name, shares) -> None:
    package = pytest.importorskip(name, exc_type=ImportError)
    model = load_model(toy_directory, device="cuda", dtype="bfloat16")
    runner = make_runner(model, 256, enforce_eager=True)
    adapter = {FA3: FlashAttention3, FA2: FlashAttention2}[name]
    check_attention(adapter(package, runner.kv_cache), runner, shares, tolerance=1.6e-2)
