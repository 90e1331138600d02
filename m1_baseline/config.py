"""Every knob of this stage."""

from dataclasses import dataclass

from folovllm.setting_checks import check_field_types


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What an engine is built with; a value that cannot work is a ValueError."""

    max_model_len: int = 2048
    """Longest prompt plus output of one request, in tokens."""
    kv_cache_bytes: int | None = None
    """Most memory for keys and values, enough for max_model_len tokens; None sets no limit."""

    def __post_init__(self) -> None:
        check_field_types(self)
        if self.max_model_len < 1:
            raise ValueError(f"max_model_len must be at least 1, got {self.max_model_len}")
        if self.kv_cache_bytes is not None and self.kv_cache_bytes < 1:
            raise ValueError(f"kv_cache_bytes must be at least 1, got {self.kv_cache_bytes}")
