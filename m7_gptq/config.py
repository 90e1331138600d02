"""Every knob of this stage."""

from dataclasses import dataclass
from enum import Enum

from folovllm.setting_checks import check_field_types


class SchedulingPolicy(Enum):
    """Which waiting request is admitted next, and which running one gives way."""

    FCFS = "fcfs"
    PRIORITY = "priority"


class PreemptionMode(Enum):
    """What becomes of the keys and values of a request that has to make room."""

    RECOMPUTE = "recompute"
    SWAP = "swap"


class ChunkPolicy(Enum):
    """What limits the tokens of a prompt in one step, beside max_num_batched_tokens."""

    FIXED = "fixed"
    DYNAMIC = "dynamic"


class AttentionBackend(Enum):
    """Who computes attention."""

    AUTO = "auto"
    TRITON = "triton"
    FLASH_ATTN = "flash_attn"
    TORCH = "torch"


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What an engine is built with; a value that cannot work is a ValueError."""

    max_model_len: int = 2048
    """Longest prompt plus output of one request, in tokens."""
    kv_cache_bytes: int | None = None
    """Memory for keys and values, whence the number of blocks; None takes what is free."""
    gpu_memory_utilization: float = 0.9
    """Part of a GPU's memory that this process may fill when kv_cache_bytes is None (a CPU run then
    takes an eighth of what is available). CUDA graphs come on top: leave them a few hundred MiB."""
    block_size: int = 16
    """Tokens per block of KV cache."""
    enable_prefix_caching: bool = True
    """Keep the blocks of finished requests until their room is needed, and start a request from
    those that hold the beginning of its prompt."""
    max_num_seqs: int = 256
    """Most requests running at once."""
    max_num_batched_tokens: int = 2048
    """Most tokens in one step; longer prompts are computed in chunks beside everybody's decodes."""
    chunk_policy: ChunkPolicy = ChunkPolicy.FIXED
    """dynamic sizes chunks so that a step takes at most target_step_ms, by what steps of several
    kinds took at start-up."""
    target_step_ms: float | None = None
    """Goal of chunk_policy dynamic, in milliseconds."""
    max_chunk_tokens: int | None = None
    """Most tokens of one prompt in one step; None: as many as the step has room for."""
    async_scheduling: bool = True
    """Plan and launch the next step while the device still runs the one before."""
    scheduling_policy: SchedulingPolicy = SchedulingPolicy.FCFS
    preemption_mode: PreemptionMode = PreemptionMode.RECOMPUTE
    swap_cache_tokens: int = 1 << 16
    """Tokens whose keys and values fit in host memory; used with PreemptionMode.SWAP only."""
    attention_backend: AttentionBackend = AttentionBackend.AUTO
    """triton is this stage's own, flash_attn the installed package (FlashAttention-3's, else
    FlashAttention-2's), torch the reference; auto is triton where it can serve and else torch."""
    enforce_eager: bool = False
    """Launch every kernel of a small step by itself instead of replaying a CUDA graph."""
    max_graph_size: int = 256
    """Most requests in a decode step that is replayed from a CUDA graph."""
    max_graph_tokens: int = 2048
    """Most tokens in a step with prompts that is replayed from a CUDA graph; 0 for none."""

    def __post_init__(self) -> None:
        check_field_types(self)
        if self.max_model_len < 1:
            raise ValueError(f"max_model_len must be at least 1, got {self.max_model_len}")
        if self.kv_cache_bytes is not None and self.kv_cache_bytes < 1:
            raise ValueError(f"kv_cache_bytes must be at least 1, got {self.kv_cache_bytes}")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ValueError(
                f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}"
            )
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")
        if self.max_num_seqs < 1:
            raise ValueError(f"max_num_seqs must be at least 1, got {self.max_num_seqs}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}): every running request gets a token per step; "
                f"lower max_num_seqs or raise max_num_batched_tokens"
            )
        if self.swap_cache_tokens < 0:
            raise ValueError(f"swap_cache_tokens must be at least 0, got {self.swap_cache_tokens}")
        if self.max_graph_size < 1:
            raise ValueError(f"max_graph_size must be at least 1, got {self.max_graph_size}")
        is_dynamic = self.chunk_policy is ChunkPolicy.DYNAMIC
        if is_dynamic != (self.target_step_ms is not None):
            raise ValueError(
                f"chunk_policy {self.chunk_policy.value} with target_step_ms "
                f"{self.target_step_ms}: dynamic chunks need a goal, and fixed ones follow none; "
                f"set both or neither"
            )
        if self.target_step_ms is not None and self.target_step_ms <= 0:
            raise ValueError(f"target_step_ms must be above 0, got {self.target_step_ms}")
        if self.max_graph_tokens < 0:
            raise ValueError(f"max_graph_tokens must be at least 0, got {self.max_graph_tokens}")
        if self.max_chunk_tokens is not None and self.max_chunk_tokens < 1:
            raise ValueError(f"max_chunk_tokens must be at least 1, got {self.max_chunk_tokens}")

    @property
    def num_swap_blocks(self) -> int:
        is_swapping = self.preemption_mode is PreemptionMode.SWAP
        return self.swap_cache_tokens // self.block_size if is_swapping else 0
