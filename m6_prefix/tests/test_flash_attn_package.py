"""The flash-attn packages as a backend, driven with stand-ins of the packages' signatures."""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from folovllm.kernels.flash_attn_package import (
    attend_version_2,
    attend_version_3,
    load_flash_attn,
)
from folovllm.kernels.reference import causal_attention
from folovllm.model.loader import load_model
from folovllm.testing.toy_models import toy_families, write_toy_model
from m6_prefix.attention_backends import PackageAttention, select_attention
from m6_prefix.config import AttentionBackend, EngineConfig
from m6_prefix.tests.mixed_steps import EDGE_SHARES, check_attention, make_runner, needs_cuda

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
    attention = PackageAttention(runner.kv_cache, partial(attend_version_3, package))
    check_attention(attention, runner, shares, tolerance=2e-3)
    # The package splits contexts of single queries; with long ones the device is full anyway.
    assert package.num_splits == [0 if max(n for _, n in shares) == 1 else 1]


@pytest.mark.parametrize("block_size", [256, 512])
@pytest.mark.parametrize("shares", MIXED_SHARES)
def test_flash_attention_2_equals_reference(half_model, shares, block_size) -> None:
    runner = make_runner(half_model, block_size)
    package = FlashAttention2Package()
    attention = PackageAttention(runner.kv_cache, partial(attend_version_2, package))
    check_attention(attention, runner, shares, tolerance=2e-3)
    assert package.calls == ["kvcache" if max(n for _, n in shares) == 1 else "varlen"]


def function_of(bound: Any) -> Any:
    """What a loaded function does, without the package that it is bound to."""
    return bound.func


def test_newest_package_that_is_installed_is_taken(installed) -> None:
    packages = {FA3: FlashAttention3Package(), FA2: FlashAttention2Package()}
    installed(**packages)
    assert function_of(load_flash_attn(torch.float16, 256)) is attend_version_3
    installed(**{FA2: packages[FA2]})
    assert function_of(load_flash_attn(torch.float16, 256)) is attend_version_2


def test_package_serves_where_the_config_names_it(half_model, installed) -> None:
    installed(**{FA3: FlashAttention3Package()})
    config = EngineConfig(attention_backend=AttentionBackend.FLASH_ATTN)
    model = SimpleNamespace(device=torch.device("cuda"), config=half_model.config)
    attention = select_attention(config, model, make_runner(half_model, 16).kv_cache)
    assert isinstance(attention, PackageAttention)
    assert function_of(attention.attend) is attend_version_3


def test_missing_package_is_refused(installed) -> None:
    with pytest.raises(ValueError, match="pip install flash-attn.*neither.*choose triton"):
        load_flash_attn(torch.float16, 16)


def test_dtype_that_the_package_cannot_compute_is_refused(installed) -> None:
    installed(**{FA3: FlashAttention3Package()})
    with pytest.raises(ValueError, match="float16 or bfloat16 and the model is in float32; choose"):
        load_flash_attn(torch.float32, 16)


def test_block_size_that_version_2_cannot_read_is_refused(installed) -> None:
    installed(**{FA2: FlashAttention2Package()})
    with pytest.raises(ValueError, match="block_size is 16; set block_size=256, or choose triton"):
        load_flash_attn(torch.float16, 16)


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_cuda) for name in (FA3, FA2)])
@pytest.mark.parametrize("shares", MIXED_SHARES)
def test_real_package_equals_reference(toy_directory, name, shares) -> None:
    package = pytest.importorskip(name, exc_type=ImportError)
    model = load_model(toy_directory, device="cuda", dtype="bfloat16")
    runner = make_runner(model, 256, enforce_eager=True)
    attend = partial({FA3: attend_version_3, FA2: attend_version_2}[name], package)
    attention = PackageAttention(runner.kv_cache, attend)
    check_attention(attention, runner, shares, tolerance=1.6e-2)
