"""Turns a SchedulerOutput into tensors, runs the model, samples."""

from collections.abc import Sequence
from functools import partial

import torch

from folovllm.memory import largest_prompts, profile_kv_cache_bytes
from folovllm.model.config import kv_bytes_per_token
from folovllm.model.transformer import CausalLM
from folovllm.request import Request, SamplingParams
from folovllm.sampling.largest_batch import run_largest_sampling
from folovllm.sampling.prompt_logprobs import compute_prompt_logprobs, find_prompt_rows
from folovllm.sampling.sampler import SampledTokens, Sampler, TokensOnTheWay
from folovllm.sampling.tensors import Noise
from folovllm.transfer import upload

from .attention import AttentionMetadata, TorchAttention
from .attention_backends import select_attention
from .block_tables import BlockTables
from .config import EngineConfig
from .cuda_graph import GraphRecorder, StepGraph, StepGraphs, decode_shapes, mixed_shapes
from .input_batch import InputBatch, gather_batch
from .kv_cache import KVCache
from .scheduler import ScheduledRequest, SchedulerOutput


class ModelRunner:
    """Owns the model and the KV cache tensors, and copies of the block tables on the device."""

    def __init__(self, config: EngineConfig, model: CausalLM) -> None:
        self.config = config
        self.model = model
        self.sampler = Sampler(model.config.vocab_size, model.device, model.logits_parts)
        self.graphs: StepGraphs | None = None
        num_bytes = config.kv_cache_bytes
        if num_bytes is None:
            num_bytes = profile_kv_cache_bytes(
                model, config.gpu_memory_utilization, self._run_largest_step
            )
        self._use_cache(num_bytes)
        # The reference asks the device for lengths, which a captured step cannot.
        can_capture = not isinstance(self.attention, TorchAttention)
        if model.device.type == "cuda" and can_capture and not config.enforce_eager:
            self.graphs = self._capture(GraphRecorder(model.device))

    @torch.inference_mode()
    def launch(self, scheduler_output: SchedulerOutput) -> TokensOnTheWay:
        """Queue one step on the device; one token per scheduled request will come, in their order.

        What a chunk that is not the last of its prompt brings is no token, but nobody looks at it.
        """
        self.kv_cache.copy_blocks(scheduler_output.block_copies)
        requests = [s.request for s in scheduler_output.scheduled]
        step = self.prepare_inputs(scheduler_output)
        if isinstance(step, StepGraph):
            return self._replay(step, requests)
        hidden = self._compute_hidden(step)
        logits = self._compute_logits(step, hidden)
        prompt_logprobs = compute_prompt_logprobs(
            scheduler_output.scheduled, hidden, self.model.compute_all_logits
        )
        # Behind the launches: the device computes while the host collects the sampling rules.
        sampled = self.sampler.sample(logits, self.sampler.prepare(requests))
        self.last_tokens.index_copy_(0, step.table_rows, sampled.token_ids)
        return sampled.send_to_host(prompt_logprobs=prompt_logprobs)

    def wait_for_device(self) -> None:
        """Return when all that was launched is done, and pinned memory may be written again."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def prepare_inputs(
        self, scheduler_output: SchedulerOutput
    ) -> InputBatch[torch.Tensor] | StepGraph:
        """Gather what the model reads, on the host, and upload it in one copy.

        Rows of the block tables that must be copied whole travel before it. A small step lands in
        the buffers of the captured graph of its shape, which is returned, if there is one.
        """
        scheduled = scheduler_output.scheduled
        batch = gather_batch(scheduled, self.block_tables, self.config.block_size)
        num_pairs = batch.max_query_len * batch.max_seq_len
        graph = None
        if self.graphs is not None and not find_prompt_rows(scheduled):
            graph = self.graphs.find(len(batch.input_ids), len(scheduled), num_pairs)
        if graph is not None:
            graph.fill(batch)
            return graph
        return InputBatch._make([*upload(batch.columns, self.model.device), *batch[8:]])

    def _compute_hidden(self, batch: InputBatch[torch.Tensor]) -> torch.Tensor:
        """[num_tokens, hidden_size], of every token of the step."""
        tables = self.block_tables.device
        tables.view(-1).index_copy_(0, batch.table_entries, batch.last_block_ids)
        metadata = AttentionMetadata(
            cu_seqlens_q=batch.cu_seqlens_q,
            seq_lens=batch.seq_lens,
            block_tables=tables.index_select(0, batch.table_rows),
            slot_mapping=batch.slot_mapping,
            min_query_len=batch.min_query_len,
            max_query_len=batch.max_query_len,
            max_seq_len=batch.max_seq_len,
        )
        self.attention.start_step(metadata)
        attend = partial(self.attention.forward, metadata)
        return self.model(self.token_table[batch.input_ids], batch.positions, attend)

    def _compute_logits(
        self,
        batch: InputBatch[torch.Tensor],
        hidden: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[num_requests, vocab_size], of each request's last token; into `out` if given."""
        if batch.max_query_len > 1:
            hidden = hidden.index_select(0, batch.cu_seqlens_q[1:] - 1)
        return self.model.compute_logits(hidden, out)

    def _replay(self, graph: StepGraph, requests: Sequence[Request]) -> TokensOnTheWay:
        num_requests = len(requests)
        noise = self.sampler.collect_noise(requests)
        if noise is not None:
            graph.set_noise(noise)
            graph.graph.replay()
            return SampledTokens(graph.choices, logprobs=None).send_to_host(num_requests)
        # Rules beyond temperature depend on the requests' histories: they run behind the graph.
        graph.graph.replay()
        sampling = self.sampler.prepare(requests)
        sampled = self.sampler.sample(graph.logits[:num_requests], sampling)
        rows = graph.batch.table_rows[:num_requests]
        self.last_tokens.index_copy_(0, rows, sampled.token_ids)
        return sampled.send_to_host()

    @torch.inference_mode()
    def _capture(self, recorder: GraphRecorder) -> StepGraphs:
        config = self.config
        max_size = min(config.max_graph_size, config.max_num_seqs)
        max_tokens = min(config.max_graph_tokens, config.max_num_batched_tokens)
        shapes = decode_shapes(max_size) + mixed_shapes(max_tokens, max_size)
        choose_tokens = self.sampler.choose_tokens

        def run_step(
            batch: InputBatch[torch.Tensor], noise: Noise, logits: torch.Tensor
        ) -> torch.Tensor:
            self._compute_logits(batch, self._compute_hidden(batch), logits)
            choices = choose_tokens(logits, noise.temperatures, noise.seeds, noise.positions)
            self.last_tokens.index_copy_(0, batch.table_rows, choices[0])
            return choices

        num_columns, model = self.sampler.num_columns, self.model
        logits = torch.empty((max_size, num_columns), dtype=model.dtype, device=model.device)
        return StepGraphs(shapes, self.block_tables, logits, run_step, recorder)

    def _use_cache(self, num_bytes: int) -> None:
        self.kv_cache = KVCache(self.config, self.model, num_bytes)
        self.attention = select_attention(self.config, self.model, self.kv_cache)
        num_columns = -(-self.config.max_model_len // self.config.block_size)
        device = self.model.device
        self.block_tables = BlockTables(self.config.max_num_seqs, num_columns, device)
        # Every token id stands for itself, and behind them is the token that was sampled last for
        # each row of the block tables: one lookup, which negative indices reach from the end.
        vocab_size, num_rows = self.model.config.vocab_size, len(self.block_tables.host)
        self.token_table = torch.arange(vocab_size + num_rows, device=device)
        self.last_tokens = self.token_table[vocab_size:].zero_()

    def _run_largest_step(self) -> None:
        """Compute the prompts that fill a step, in a cache of their size, and sample."""
        for num_requests, prompt_len in largest_prompts(self.config):
            num_blocks = -(-self.config.max_model_len // self.config.block_size)
            block_bytes = self.config.block_size * kv_bytes_per_token(
                self.model.config, self.model.dtype
            )
            self._use_cache(num_requests * num_blocks * block_bytes)
            params = SamplingParams(max_tokens=1, temperature=0.0)
            scheduled = tuple(
                ScheduledRequest(
                    Request(
                        request_id=f"profile-{index}",
                        prompt_token_ids=[0] * prompt_len,
                        sampling_params=params,
                    ),
                    prompt_len,
                    range(index * num_blocks, (index + 1) * num_blocks),
                )
                for index in range(num_requests)
            )
            self.launch(SchedulerOutput(scheduled=scheduled, block_copies=())).wait()
        run_largest_sampling(self.sampler, self.config.max_num_seqs, self.model.dtype)
