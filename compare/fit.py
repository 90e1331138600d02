"""`--kv-cache-bytes fit`: as much KV cache as the workloads need, known from runs with plenty."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .ledger import fit_tokens

FIT = "fit"


def without_fit(words: Sequence[str]) -> tuple[list[str], bool]:
    """The words of a command line less `--kv-cache-bytes fit`, and whether that was among them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--kv-cache-bytes")
    known, rest = parser.parse_known_args(list(words))
    is_fitted = known.kv_cache_bytes == FIT
    return (rest if is_fitted else list(words)), is_fitted


def fit_bytes(
    arguments: argparse.Namespace,
    config_class: type[Any],
    to: Path,
    engine: str,
    specs: Sequence[str],
) -> int:
    """What the largest of these workloads needs of the KV cache, in bytes of this model.

    arguments: of the engine's `bench`; config_class: its EngineConfig, for what was not given.
    Runs under `to` may be of another model: the same lengths take the same number of tokens.
    """
    from folovllm.entrypoints.llm import DEFAULT_MODEL
    from folovllm.model.config import ModelConfig, kv_bytes_per_token
    from folovllm.model.loader import resolve_device, resolve_dtype, resolve_model_directory

    max_model_len = getattr(arguments, "max_model_len", config_class.max_model_len)
    block_size = getattr(arguments, "block_size", getattr(config_class, "block_size", 1))
    num_blocks = -(-fit_tokens(to, engine, specs, max_model_len) // block_size)
    model = str(arguments.model or DEFAULT_MODEL)
    if arguments.load_format == "dummy" and not Path(model).is_dir():
        config = ModelConfig.preset(model)
    else:
        config = ModelConfig.from_directory(resolve_model_directory(model))
    dtype = resolve_dtype(arguments.dtype, config, resolve_device(arguments.device))
    return num_blocks * block_size * kv_bytes_per_token(config, dtype)
