"""Turns a SchedulerOutput into tensors, runs the model, samples."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from folovllm.interfaces import SamplerOutput
from folovllm.memory import largest_prompts, profile_kv_cache_bytes
from folovllm.model.config import kv_bytes_per_token
from folovllm.model.transformer import CausalLM
from folovllm.request import Request, SamplingParams
from folovllm.sampling.largest_batch import run_largest_sampling
from folovllm.sampling.prompt_logprobs import compute_prompt_logprobs
from folovllm.sampling.sampler import Sampler
from folovllm.transfer import upload

from .attention import Attention, AttentionMetadata
from .config import EngineConfig
from .kv_cache import KVCache
from .scheduler import ScheduledRequest, SchedulerOutput

_SEQ_LEN_MULTIPLE = 16
"""Tokens; attention's padded length is a multiple of this."""

_MAX_IDLE_QUERIES = 8
"""Per request. On an H200, gathering a request's cache took as long as eight idle decode rows."""


@dataclass(frozen=True)
class InputBatch:
    """The tokens of one step, packed end to end."""

    input_ids: torch.Tensor
    """[num_tokens] int64"""
    positions: torch.Tensor
    """[num_tokens] int64, each token's index in its own sequence"""
    logits_indices: torch.Tensor
    """[num_requests] int64, each request's last row in the packed batch"""
    attention: AttentionMetadata


class ModelRunner:
    """Owns the model and the KV cache tensors; keeps no state about requests."""

    def __init__(self, config: EngineConfig, model: CausalLM) -> None:
        self.config = config
        self.model = model
        self.sampler = Sampler(model.config.vocab_size, model.device, model.logits_parts)
        num_bytes = config.kv_cache_bytes
        if num_bytes is None:
            num_bytes = profile_kv_cache_bytes(
                model, config.gpu_memory_utilization, self._run_largest_step
            )
        self._use_cache(num_bytes)

    @torch.inference_mode()
    def execute(self, scheduler_output: SchedulerOutput) -> SamplerOutput:
        """Run one step; return one token per scheduled request, in their order."""
        if not scheduler_output.scheduled:
            return SamplerOutput(token_ids=[], logprobs=[])
        batch = self.prepare_inputs(scheduler_output)
        attend = partial(self.attention.forward, batch.attention)
        hidden = self.model(batch.input_ids, batch.positions, attend)
        logits = self.model.compute_logits(hidden[batch.logits_indices])
        prompt_logprobs = compute_prompt_logprobs(
            scheduler_output.scheduled, hidden, self.model.compute_all_logits
        )
        # Behind the launches: the device computes while the host collects the sampling rules.
        sampling = self.sampler.prepare([s.request for s in scheduler_output.scheduled])
        return self.sampler.sample(logits, sampling).to_host(prompt_logprobs)

    def prepare_inputs(self, scheduler_output: SchedulerOutput) -> InputBatch:
        """Gather what the model reads, on the host, and upload it in one copy.

        Costs O(num_requests) Python and O(num_tokens) numpy.
        """
        scheduled = scheduler_output.scheduled
        starts = np.array([s.request.num_computed_tokens for s in scheduled], dtype=np.int64)
        query_lens = np.array([s.num_scheduled_tokens for s in scheduled], dtype=np.int64)
        slots = np.array([s.slot for s in scheduled], dtype=np.int64)
        token_ids: list[int] = []
        for s, start in zip(scheduled, starts.tolist(), strict=True):
            token_ids += s.request.token_ids[start : start + s.num_scheduled_tokens]
        # query_lens [2, 3] -> ends [2, 5], offsets in the own request [0, 1, 0, 1, 2]
        ends = np.cumsum(query_lens)
        offsets = np.arange(ends[-1]) - np.repeat(ends - query_lens, query_lens)
        positions = np.repeat(starts, query_lens) + offsets
        slot_mapping = np.repeat(slots * self.config.max_model_len, query_lens) + positions

        max_query_len = int(query_lens.max())
        view = contiguous_slots(slots, max_query_len)
        rows = np.arange(len(slots)) if view is None else slots - view.start
        num_rows = len(slots) if view is None else view.stop - view.start
        packed_to_padded = np.repeat(rows * max_query_len, query_lens) + offsets
        padded_to_packed = np.zeros(num_rows * max_query_len, dtype=np.int64)
        padded_to_packed[packed_to_padded] = np.arange(ends[-1])
        # Padding queries sit at position 0 and see one key: never an empty softmax.
        query_positions = np.zeros(num_rows * max_query_len, dtype=np.int64)
        query_positions[packed_to_padded] = positions
        host_arrays = (
            np.array(token_ids, dtype=np.int64),
            positions,
            ends - 1,
            slot_mapping,
            slots,
            packed_to_padded,
            padded_to_packed,
            query_positions.reshape(num_rows, 1, max_query_len, 1),
        )
        return self._upload(host_arrays, view, int((starts + query_lens).max()))

    def _upload(
        self, host_arrays: tuple[np.ndarray, ...], view: slice | None, max_seq_len: int
    ) -> InputBatch:
        device = self.model.device
        # Matrix kernels that load 16 bytes at a time need rows of scores that start aligned:
        # an odd length costs more than the masked keys that round it up.
        padded_seq_len = -(-max_seq_len // _SEQ_LEN_MULTIPLE) * _SEQ_LEN_MULTIPLE
        padded_seq_len = min(padded_seq_len, self.config.max_model_len)
        (
            input_ids,
            positions,
            logits_indices,
            slot_mapping,
            slots,
            packed_to_padded,
            padded_to_packed,
            query_positions,
        ) = upload(host_arrays, device)
        attention = AttentionMetadata(
            slot_mapping=slot_mapping,
            rows=slots if view is None else view,
            packed_to_padded=packed_to_padded,
            padded_to_packed=padded_to_packed,
            is_hidden=torch.arange(padded_seq_len, device=device) > query_positions,
        )
        return InputBatch(input_ids, positions, logits_indices, attention)

    def _use_cache(self, num_bytes: int) -> None:
        self.kv_cache = KVCache(self.config, self.model, num_bytes)
        self.attention = Attention(self.kv_cache, self.model.kernels)

    def _run_largest_step(self) -> None:
        """Compute the prompts that fill a step, in a cache of their size, and sample."""
        for num_slots, prompt_len in largest_prompts(self.config):
            token_bytes = kv_bytes_per_token(self.model.config, self.model.dtype)
            self._use_cache(num_slots * self.config.max_model_len * token_bytes)
            params = SamplingParams(max_tokens=1, temperature=0.0)
            requests = [
                Request(
                    request_id=f"profile-{slot}",
                    prompt_token_ids=[0] * prompt_len,
                    sampling_params=params,
                )
                for slot in range(num_slots)
            ]
            scheduled = (ScheduledRequest(r, prompt_len, slot) for slot, r in enumerate(requests))
            self.execute(SchedulerOutput(scheduled=tuple(scheduled)))
        run_largest_sampling(self.sampler, self.config.max_num_seqs, self.model.dtype)


def contiguous_slots(slots: np.ndarray, max_query_len: int) -> slice | None:
    """The slice of cache slots that attention reads as a view, or None to gather them.

    A view copies nothing, but slots inside it that this step does not use are computed and
    thrown away; gathering copies the keys and values of every request, in every layer. A view is
    taken while its idle rows hold at most _MAX_IDLE_QUERIES padded queries per request.
    """
    first, end = int(slots.min()), int(slots.max()) + 1
    num_idle_rows = end - first - len(slots)
    is_worth_it = num_idle_rows * max_query_len <= _MAX_IDLE_QUERIES * len(slots)
    return slice(first, end) if is_worth_it else None
