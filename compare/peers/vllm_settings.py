"""What a result says about the vLLM that was measured, as vLLM itself tells it."""

import os
from typing import Any

_SETTINGS = {
    "async_scheduling": "scheduler_config.async_scheduling",
    "max_num_batched_tokens": "scheduler_config.max_num_batched_tokens",
    "max_num_seqs": "scheduler_config.max_num_seqs",
    "enable_chunked_prefill": "scheduler_config.enable_chunked_prefill",
    "enable_prefix_caching": "cache_config.enable_prefix_caching",
    "block_size": "cache_config.block_size",
    "num_kv_blocks": "cache_config.num_gpu_blocks",
    "kv_cache_dtype": "cache_config.cache_dtype",
    "gpu_memory_utilization": "cache_config.gpu_memory_utilization",
    "kv_cache_memory_bytes": "cache_config.kv_cache_memory_bytes",
    "max_model_len": "model_config.max_model_len",
    "enforce_eager": "model_config.enforce_eager",
    "compilation_mode": "compilation_config.mode",
    "cudagraph_mode": "compilation_config.cudagraph_mode",
    "use_v2_model_runner": "use_v2_model_runner",
}
"""Name in the result -> where vLLM's configuration holds it."""


def describe_settings(engine: Any, attention_backends: list[list[str]] | None) -> dict[str, Any]:
    """Version, where the core runs, settings after vLLM filled in its defaults.

    engine: a vllm LLMEngine. attention_backends: of every worker; None where they did not tell.
    A setting that this version does not have is None.
    """
    import vllm

    core = type(engine.engine_core).__name__
    backends = {name for names in attention_backends or [] for name in names}
    return {
        "version": getattr(vllm, "__version__", None),
        "core_in_own_process": core != "InprocClient",
        "core_client": core,
        **{name: _lookup(engine.vllm_config, path) for name, path in _SETTINGS.items()},
        "attention_backends": sorted(backends) or None,
        "prefix_cache_before_a_timed_run": "empty",
        "sampling": {"temperature": 0.0, "ignore_eos": True, "detokenize": False},
        "environment": _environment(),
    }


def _lookup(settings: Any, path: str) -> Any:
    """A plain value: numbers and truth values as they are, enums by name, the rest in words."""
    for name in path.split("."):
        settings = getattr(settings, name, None)
    if settings is None or isinstance(settings, bool | int | float | str):
        return getattr(settings, "name", settings)
    return getattr(settings, "name", str(settings))


def _environment() -> dict[str, str]:
    """The variables that vLLM reads, less those that name places on this machine."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith("VLLM_") and os.sep not in value
    }
