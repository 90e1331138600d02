"""Who computes the fused operations of the transformer: Triton on CUDA, plain torch elsewhere."""

from typing import Protocol

import torch


class Kernels(Protocol):
    """What the model needs from a kernel module; `reference` documents each operation."""

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor: ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor: ...

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor: ...

    def qk_norm_rope(
        self,
        qkv: torch.Tensor,
        cos_sin: torch.Tensor,
        num_heads: int,
        num_kv_heads: int,
        q_weight: torch.Tensor | None,
        k_weight: torch.Tensor | None,
        eps: float,
    ) -> None: ...

    def gated_linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor: ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor: ...

    def store_kv(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None: ...


def select_kernels(device: torch.device) -> Kernels:
    """Triton kernels on CUDA devices, plain torch anywhere else."""
    if device.type == "cuda":
        from . import fused

        return fused
    from . import reference

    return reference
