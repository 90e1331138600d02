"""Rotary position embedding: inverse frequencies with the scalings of the supported families."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .rope_settings import read_rope_settings


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding (Su et al. 2021, RoFormer) and how it was stretched to longer contexts.

    `rope_type` is "default", "linear" (Chen et al. 2023), "llama3" (Llama 3.1's smooth cut) or
    "yarn" (Peng et al. 2023). "dynamic" NTK scaling only acts beyond max_position_embeddings,
    where frequencies depend on the length that a sequence has reached and no table of positions
    holds them; an engine refuses those lengths, so it reads as "default".
    """

    theta: float
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    """Context length of the training before stretching, in tokens."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    """Multiplies cos and sin (YaRN's temperature)."""
    truncate: bool = True
    """YaRN: round the corrected range to whole dimensions."""

    @classmethod
    def from_hf(cls, config: dict[str, Any], head_dim: int) -> "RopeConfig":
        """Read a config.json; ValueError for a setting that is missing, wrong or not supported."""
        settings = read_rope_settings(config)
        if head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embedding, got {head_dim}")
        partial = settings.get("partial_rotary_factor", 1.0)
        if partial != 1.0:
            raise ValueError(f"partial_rotary_factor {partial} is not supported, only 1.0")
        rope_type = settings["rope_type"]
        theta = _positive(settings, "rope_theta")
        if rope_type in ("default", "dynamic"):
            return cls(theta=theta)
        if rope_type == "linear":
            return cls(theta=theta, rope_type=rope_type, factor=_positive(settings, "factor"))
        if rope_type == "llama3":
            return cls(theta=theta, rope_type=rope_type, **_llama3_settings(settings))
        return cls(
            theta=theta,
            rope_type=rope_type,
            **_yarn_settings(settings, config["max_position_embeddings"]),
        )

    def context_len(self, max_position_embeddings: int) -> int:
        """Positions that the frequencies were stretched to, as vLLM derives them.

        A llama3 config names the stretched length as max_position_embeddings, the others do not.
        """
        if self.rope_type == "yarn":
            return int(self.original_max_position_embeddings * self.factor)
        if self.rope_type == "linear":
            return int(max_position_embeddings * self.factor)
        return max_position_embeddings

    def inverse_frequencies(self, head_dim: int) -> torch.Tensor:
        """[head_dim / 2] float32 on the CPU: radians per position of each pair of dimensions."""
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
        inv_freq = 1.0 / (self.theta**exponents)
        if self.rope_type == "linear":
            return inv_freq / self.factor
        if self.rope_type == "llama3":
            return self._llama3(inv_freq)
        if self.rope_type == "yarn":
            return self._yarn(inv_freq, head_dim)
        return inv_freq

    def _llama3(self, inv_freq: torch.Tensor) -> torch.Tensor:
        """Slow dimensions are interpolated, fast ones kept, those between are blended."""
        rotations = self.original_max_position_embeddings * inv_freq / (2 * math.pi)
        blend = (rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blend = blend.clamp(0.0, 1.0)
        return (1 - blend) * inv_freq / self.factor + blend * inv_freq

    def _yarn(self, inv_freq: torch.Tensor, head_dim: int) -> torch.Tensor:
        """As llama3, but the blend is linear in the dimension's index ("NTK by parts")."""

        def dimension_of(rotations: float) -> float:
            length = self.original_max_position_embeddings / (rotations * 2 * math.pi)
            return head_dim * math.log(length) / (2 * math.log(self.theta))

        low, high = dimension_of(self.beta_fast), dimension_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001
        index = torch.arange(head_dim // 2, dtype=torch.float32)
        interpolated = ((index - low) / (high - low)).clamp(0.0, 1.0)
        return inv_freq / self.factor * interpolated + inv_freq * (1 - interpolated)


def _llama3_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    names = ("factor", "low_freq_factor", "high_freq_factor")
    values: dict[str, Any] = {name: _positive(settings, name) for name in names}
    if values["low_freq_factor"] >= values["high_freq_factor"]:
        raise ValueError(
            f"config.json has low_freq_factor {values['low_freq_factor']}, which must be below "
            f"high_freq_factor {values['high_freq_factor']}"
        )
    return {**values, "original_max_position_embeddings": _original_len(settings)}


def _yarn_settings(settings: Mapping[str, Any], max_position_embeddings: int) -> dict[str, Any]:
    original = _original_len(settings)
    implied = max_position_embeddings / original
    factor = implied if settings["factor"] is None else _positive(settings, "factor")
    return {
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": _positive(settings, "beta_fast", 32.0),
        "beta_slow": _positive(settings, "beta_slow", 1.0),
        "attention_factor": _yarn_attention_factor(settings, factor),
        "truncate": bool(settings.get("truncate", True)),
    }


def _original_len(settings: Mapping[str, Any]) -> int:
    return int(_positive(settings, "original_max_position_embeddings"))


def _positive(settings: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A setting that must be a number above 0; 0 means the default where there is one."""
    value = settings.get(name, default)
    if default is not None and value == 0:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"config.json must have a number above 0 as {name}, got {value!r}")
    return float(value)


def _yarn_attention_factor(settings: Mapping[str, Any], factor: float) -> float:
    if settings.get("attention_factor") is not None:
        return _positive(settings, "attention_factor")

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if settings.get("mscale") and settings.get("mscale_all_dim"):
        return mscale(_positive(settings, "mscale")) / mscale(_positive(settings, "mscale_all_dim"))
    return mscale(1.0)


class RotaryTable:
    """cos and sin of every position up to `max_len`, computed once.

    cos, sin: [max_len, head_dim / 2] float32. Dimension i pairs with i + head_dim / 2 (the
    layout of the published checkpoints, not RoFormer's interleaved one).
    """

    def __init__(self, config: RopeConfig, head_dim: int, max_len: int, device: torch.device):
        positions = torch.arange(max_len, dtype=torch.float32)
        angles = torch.outer(positions, config.inverse_frequencies(head_dim))
        table = torch.cat((angles.cos(), angles.sin()), dim=-1) * config.attention_factor
        self.cos_sin = table.to(device)

    def gather(self, positions: torch.Tensor) -> torch.Tensor:
        """[num_tokens, head_dim] float32: cos in the first half of a row, sin in the second."""
        return self.cos_sin.index_select(0, positions)
