"""Inverse frequencies against Transformers', for every scaling the families use."""

from typing import Any

import pytest
import torch

from folovllm.model.rope import RopeConfig, RotaryTable

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "beta_fast": 16,
        "beta_slow": 2,
        "truncate": False,
    },
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_frequencies_equal_transformers(scaling: dict[str, Any]) -> None:
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    hf_config = Qwen3Config(
        head_dim=128,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": 1e6, **scaling},
    )
    embedding = Qwen3RotaryEmbedding(hf_config)
    positions = torch.tensor([0, 1, 31, 4097, 131071])
    cos, sin = embedding(torch.zeros(1, 1, dtype=torch.float32), positions[None])
    config = RopeConfig.from_hf(hf_config.to_dict(), head_dim=128)
    torch.testing.assert_close(config.inverse_frequencies(128), embedding.inv_freq)
    ours_cos, ours_sin = (
        RotaryTable(config, 128, 131072, torch.device("cpu")).gather(positions).chunk(2, dim=-1)
    )
    # A unit in the last place of a blended frequency turns the last position by some 3e-5 rad.
    torch.testing.assert_close(ours_cos, cos[0, :, :64], rtol=0, atol=1e-4)
    torch.testing.assert_close(ours_sin, sin[0, :, :64], rtol=0, atol=1e-4)


def test_old_and_new_spelling_of_the_config_agree() -> None:
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}}
    assert RopeConfig.from_hf(old, 64) == RopeConfig.from_hf(new, 64)


def test_dynamic_scaling_is_default_within_the_trained_context() -> None:
    config = {"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    assert RopeConfig.from_hf(config, 64) == RopeConfig(theta=1e4)


@pytest.mark.parametrize(
    ("config", "head_dim", "message"),
    [
        ({"rope_scaling": {"rope_type": "longrope"}, "max_position_embeddings": 8}, 64, "longrope"),
        ({"partial_rotary_factor": 0.5}, 64, "partial_rotary_factor 0.5"),
        ({}, 63, "head_dim must be even"),
    ],
)
def test_what_we_would_compute_wrongly_is_refused(
    config: dict[str, Any], head_dim: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RopeConfig.from_hf(config, head_dim)
