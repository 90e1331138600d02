"""Turns a SchedulerOutput into tensors, runs the model, samples."""

from dataclasses import dataclass

import numpy as np
import torch

from folovllm.interfaces import SamplerOutput
from folovllm.model.transformer import CausalLM
from folovllm.sampling.prompt_logprobs import compute_prompt_logprobs
from folovllm.sampling.sampler import Sampler
from folovllm.transfer import upload

from .attention import Attention
from .config import EngineConfig
from .kv_cache import KVCache
from .scheduler import SchedulerOutput


@dataclass(frozen=True)
class InputBatch:
    """The tokens of one step, packed end to end."""

    input_ids: torch.Tensor
    """[num_tokens] int64"""
    positions: torch.Tensor
    """[num_tokens] int64, each token's index in its own sequence"""
    logits_indices: torch.Tensor
    """[num_requests] int64, each request's last row in the packed batch"""


class ModelRunner:
    """Owns the model and the KV cache tensors; keeps no state about requests."""

    def __init__(self, config: EngineConfig, model: CausalLM) -> None:
        self.config = config
        self.model = model
        self.kv_cache = KVCache(config, model)
        self.attention = Attention(self.kv_cache)
        self.sampler = Sampler(model.config.vocab_size, model.device, model.logits_parts)

    @torch.inference_mode()
    def execute(self, scheduler_output: SchedulerOutput) -> SamplerOutput:
        """Run one step; return one token per scheduled request, in their order."""
        if not scheduler_output.scheduled:
            return SamplerOutput(token_ids=[], logprobs=[])
        batch = self.prepare_inputs(scheduler_output)
        hidden = self.model(batch.input_ids, batch.positions, self.attention.forward)
        logits = self.model.compute_logits(hidden[batch.logits_indices])
        prompt_logprobs = compute_prompt_logprobs(
            scheduler_output.scheduled, hidden, self.model.compute_all_logits
        )
        # Behind the launches: the device computes while the host collects the sampling rules.
        sampling = self.sampler.prepare([s.request for s in scheduler_output.scheduled])
        return self.sampler.sample(logits, sampling).to_host(prompt_logprobs)

    def prepare_inputs(self, scheduler_output: SchedulerOutput) -> InputBatch:
        """Gather what the model reads, on the host, and upload it in one copy."""
        (scheduled,) = scheduler_output.scheduled
        start = scheduled.request.num_computed_tokens
        end = start + scheduled.num_scheduled_tokens
        if start == 0:
            self.kv_cache.clear()
        input_ids, positions, logits_indices = upload(
            (
                np.array(scheduled.request.token_ids[start:end], dtype=np.int64),
                np.arange(start, end, dtype=np.int64),
                np.array([end - start - 1], dtype=np.int64),
            ),
            self.model.device,
        )
        return InputBatch(input_ids, positions, logits_indices)
