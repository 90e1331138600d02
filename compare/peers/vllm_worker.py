"""What vLLM's worker is asked for where it lives: in the process of the engine core.

vLLM makes this class a base of its worker (`worker_extension_cls`), so that its methods can be
called by name from here. Imported in that process, it needs nothing of ours.
"""

from typing import Any

import torch


class MeasuredWorker:
    """Memory of the device as torch counts it there, and which attention was chosen."""

    model_runner: Any

    def folovllm_reset_peak_memory(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def folovllm_peak_memory_bytes(self) -> int:
        """Most bytes of tensors since the reset."""
        return torch.cuda.max_memory_allocated()

    def folovllm_attention_backends(self) -> list[str]:
        """Names of the backends that compute attention in some layer."""
        groups = [group for row in self.model_runner.attn_groups for group in row]
        return sorted({str(group.backend.get_name()) for group in groups})
