"""What can be shared out, and on which devices: said before any process starts."""

from pathlib import Path
from typing import Any

import torch

from ..model.config import ModelConfig
from ..model.ranks import Ranks
from ..setting_checks import is_int


def check_tensor_parallelism(size: Any, model: str | Path, config: Any) -> None:
    """ValueError if this model cannot be shared out among so many processes.

    config: the stage's EngineConfig.
    """
    if not is_int(size) or size < 1:
        raise ValueError(f"tensor_parallel_size must be a whole number of at least 1, got {size!r}")
    is_directory = Path(model).is_dir()
    of_model = ModelConfig.from_directory(model) if is_directory else ModelConfig.preset(str(model))
    Ranks(0, size).share_of_model(of_model)
    if getattr(config, "target_step_ms", None) is not None:
        raise ValueError(
            "target_step_ms measures steps, and processes that share a model would measure "
            "different ones; give max_chunk_tokens, or tensor_parallel_size=1"
        )


def device_of_rank(device: str, ranks: Ranks) -> str:
    """Rank 1 of "cuda" is on "cuda:1"; a CPU is for all. ValueError if devices are too few."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if device not in ("auto", "cuda"):
        raise ValueError(
            f"device {device!r} is one device, and tensor_parallel_size={ranks.size} needs "
            f"{ranks.size}; give 'cuda', and name devices with CUDA_VISIBLE_DEVICES"
        )
    if torch.cuda.device_count() < ranks.size:
        raise ValueError(
            f"tensor_parallel_size={ranks.size} needs as many CUDA devices, and torch sees "
            f"{torch.cuda.device_count()}; lower it, or give device='cpu'"
        )
    return f"cuda:{ranks.rank}"
