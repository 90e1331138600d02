"""Attention by the official flash-attn package, in its third or second version, if installed.

FlashAttention-3 (Shah et al. 2024) is the module `flash_attn_interface`, FlashAttention-2 (Dao
2023) is `flash_attn`. Both read paged caches in place.
"""

from functools import partial
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.nn.functional as F

_FA2_BLOCK_SIZE = 256
"""FlashAttention-2 takes multiples of this as block size."""


class PagedAttendFn(Protocol):
    """Causal attention of a packed batch over blocks of keys and values that are all stored."""

    def __call__(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        cu_seqlens_q: torch.Tensor,
        seq_lens: torch.Tensor,
        block_tables: torch.Tensor,
        max_query_len: int,
    ) -> torch.Tensor:
        """Return a tensor like q; the last query of a request sees all of its seq_len tokens.

        q: [num_tokens, num_heads, head_dim]; keys, values: [num_blocks, block_size, num_kv_heads,
        head_dim]; cu_seqlens_q: [num_requests + 1] int32; seq_lens: [num_requests] int32;
        block_tables: [num_requests, max_num_blocks] int32.
        """


def load_flash_attn(dtype: torch.dtype, block_size: int) -> PagedAttendFn:
    """The newest version that is installed; ValueError if none is, or if it cannot serve."""
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"attention_backend flash_attn computes in float16 or bfloat16 and the model is in "
            f"{str(dtype).removeprefix('torch.')}; choose triton, or another dtype"
        )
    interface = flash_attn_3()
    if interface is not None:
        return partial(attend_version_3, interface)
    package = _flash_attn_2()
    if package is None:
        raise ValueError(
            "attention_backend flash_attn needs FlashAttention-3 (module flash_attn_interface) or "
            "FlashAttention-2 (`pip install flash-attn`), and neither is installed; install one, "
            "or choose triton"
        )
    if block_size % _FA2_BLOCK_SIZE:
        raise ValueError(
            f"FlashAttention-2 reads blocks of a multiple of {_FA2_BLOCK_SIZE} tokens and "
            f"block_size is {block_size}; set block_size={_FA2_BLOCK_SIZE}, or choose triton"
        )
    return partial(attend_version_2, package)


def flash_attn_3() -> ModuleType | None:
    """The module of FlashAttention-3, if it is installed."""
    try:
        import flash_attn_interface
    except ImportError:
        return None
    return flash_attn_interface


def _flash_attn_2() -> ModuleType | None:
    try:
        import flash_attn
    except ImportError:
        return None
    return flash_attn


def attend_version_3(
    interface: Any,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    max_query_len: int,
) -> torch.Tensor:
    """See PagedAttendFn; one call for any mix of lengths."""
    out: torch.Tensor = interface.flash_attn_with_kvcache(
        q,
        keys,
        values,
        cache_seqlens=seq_lens,
        page_table=block_tables,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_query_len,
        causal=True,
        # 0: as many as the package thinks best. Long queries fill the device by themselves.
        num_splits=0 if max_query_len == 1 else 1,
    )
    return out


def attend_version_2(
    package: Any,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    max_query_len: int,
) -> torch.Tensor:
    """See PagedAttendFn; one call for single queries, another for anything else."""
    out: torch.Tensor
    if max_query_len == 1:
        out = package.flash_attn_with_kvcache(
            q[:, None],
            keys,
            values,
            cache_seqlens=seq_lens,
            block_table=block_tables,
            causal=True,
        )
        return out[:, 0]
    seq_ends = seq_lens.cumsum(0, dtype=torch.int32)
    out = package.flash_attn_varlen_func(
        q,
        keys,
        values,
        cu_seqlens_q,
        F.pad(seq_ends, (1, 0)),
        max_query_len,
        block_tables.shape[1] * keys.shape[1],
        causal=True,
        block_table=block_tables,
    )
    return out
