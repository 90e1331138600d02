"""Rotary settings and frequencies against Transformers', for every scaling the families use."""

from copy import deepcopy
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


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
UNSCALED = {"rope_theta": 10000.0, "rope_type": "default"}


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_parameters": UNSCALED, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_parameters": UNSCALED, "rope_scaling": {"type": "yarn", "factor": 2.0}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 5e5},
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 64},
        {"rope_parameters": LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 64},
        {
            "rope_scaling": {"type": "yarn", "factor": 4.0, "finetuned": True},
            "original_max_position_embeddings": 128,
        },
        {
            "rope_scaling": {"rope_type": "yarn", "factor": None, "beta_fast": 0},
            "original_max_position_embeddings": 128,
        },
        {"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 3}},
        {"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 2}},
        {"rope_theta": 5e5, "original_max_position_embeddings": 512},
    ],
    ids=str,
)
def test_settings_in_either_place_read_as_in_transformers(settings: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    shape = {"hidden_size": 256, "num_attention_heads": 2, "max_position_embeddings": 512}
    config = {"model_type": "llama", **shape, **settings}
    embedding = LlamaRotaryEmbedding(LlamaConfig.from_dict(deepcopy(config)))
    ours = RopeConfig.from_hf(config, head_dim=128)
    torch.testing.assert_close(ours.inverse_frequencies(128), embedding.inv_freq)
    assert ours.attention_factor == pytest.approx(embedding.attention_scaling)


@pytest.mark.parametrize(
    ("scaling", "positions"),
    [
        ({}, 512),
        ({"rope_type": "dynamic", "factor": 4.0}, 512),
        ({"rope_type": "linear", "factor": 4.0}, 2048),
        ({**LLAMA3, "original_max_position_embeddings": 64}, 512),
        ({"rope_type": "yarn", "factor": 4.0}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 513}, 1282),
    ],
    ids=str,
)
def test_context_is_as_long_as_vllm_derives_it(scaling: dict[str, Any], positions: int) -> None:
    config = {"rope_scaling": scaling, "max_position_embeddings": 512}
    assert RopeConfig.from_hf(config, 64).context_len(512) == positions


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_scaling": {"type": "linear"}}, "no 'factor' in its rope_scaling, which rope_type"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "no 'factor' in its rope_parameters"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "no 'low_freq_factor'"),
        (
            {"rope_scaling": {"factor": 4.0}},
            "factor=4.0 in rope_scaling, which rope_type 'default'",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 4.0, "beta_fast": 32}},
            "beta_fast=32 in rope_scaling, which rope_type 'linear' does not have",
        ),
        ({"original_max_position_embeddings": 64}, "original_max_position_embeddings=64"),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 4.0}},
            "rope_type twice",
        ),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 1e4}, "rope_theta twice"),
        (
            {
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 4,
                    "original_max_position_embeddings": 64,
                },
                "original_max_position_embeddings": 128,
            },
            "original_max_position_embeddings twice: 64 in rope_scaling and 128 beside it",
        ),
        (
            {
                "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
                "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            },
            "both rope_scaling and rope_parameters, and they differ in rope_theta",
        ),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "above 0 as factor, got '4'"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "above 0 as factor, got -1"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "must be below high_freq_factor"),
        ({"rope_scaling": "yarn"}, "an object or null as rope_scaling, got 'yarn'"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "full_attention=.* in rope_parameters",
        ),
    ],
)
def test_no_rotary_setting_is_ignored(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeConfig.from_hf({"max_position_embeddings": 512, **settings}, head_dim=64)


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
