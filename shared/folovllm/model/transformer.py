"""The decoder-only transformer of the Llama, Mistral, Qwen2 and Qwen3 families, read in one go.

Tokens of all requests are packed end to end: linear layers, norms and the MLP work on
[num_tokens, hidden_size] and know nothing of requests. Attention is the one hole in the model:
it calls `attend(layer_idx, q, k, v)`, which the stage binds to its KV cache.

The parts are plain classes, not nn.Modules: there is nothing to train, and the look-ups and hooks
of several hundred modules and parameters are host time in every eager step.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from ..interfaces import AttendFn
from ..kernels.selection import Kernels
from .collectives import Alone, Collectives
from .config import ModelConfig
from .linear import PLAIN, Linear, LinearFactory, Linears, Part
from .logits_parts import LogitsParts
from .parallel_linear import input_parallel
from .rope import RotaryTable


class Attention(Part):
    """Projections, QK-norm and RoPE around the stage's attention.

    The three input projections are one matrix (q heads, then k, then v): one launch that reads
    the activations once.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer_idx: int,
        kernels: Kernels,
        like: torch.Tensor,
        linear: LinearFactory,
        output_linear: LinearFactory,
    ) -> None:
        self.config, self.layer_idx, self.kernels = config, layer_idx, kernels
        num_all_heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv_proj = linear(
            config.hidden_size,
            num_all_heads * config.head_dim,
            config.qkv_bias,
            kernels,
            like,
        )
        self.o_proj = output_linear(
            config.num_heads * config.head_dim,
            config.hidden_size,
            config.o_bias,
            kernels,
            like,
        )
        self.q_norm = like.new_empty(config.head_dim) if config.qk_norm else None
        self.k_norm = like.new_empty(config.head_dim) if config.qk_norm else None

    def __call__(self, x: torch.Tensor, cos_sin: torch.Tensor, attend: AttendFn) -> torch.Tensor:
        """x, result: [num_tokens, hidden_size]; cos_sin: [num_tokens, head_dim]."""
        config = self.config
        qkv = self.qkv_proj(x)
        self.kernels.qk_norm_rope(
            qkv,
            cos_sin,
            config.num_heads,
            config.num_kv_heads,
            self.q_norm,
            self.k_norm,
            config.rms_norm_eps,
        )
        heads = qkv.view(x.shape[0], -1, config.head_dim)
        q, k, v = heads.split((config.num_heads, config.num_kv_heads, config.num_kv_heads), dim=1)
        attended = attend(self.layer_idx, q, k, v)
        return self.o_proj(attended.reshape(x.shape[0], -1))


class MLP(Part):
    """down(silu(gate(x)) * up(x)), gate and up as one matrix."""

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels,
        like: torch.Tensor,
        linear: LinearFactory,
        output_linear: LinearFactory,
    ) -> None:
        size = config.intermediate_size
        self.gate_up_proj = linear(config.hidden_size, 2 * size, config.mlp_bias, kernels, like)
        self.down_proj = output_linear(size, config.hidden_size, config.mlp_bias, kernels, like)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x, result: [num_tokens, hidden_size]."""
        return self.down_proj(self.gate_up_proj.gated(x))


class DecoderLayer(Part):
    """Attention and MLP, each behind an RMSNorm, each added to the residual stream."""

    def __init__(
        self,
        config: ModelConfig,
        layer_idx: int,
        kernels: Kernels,
        like: torch.Tensor,
        linear: LinearFactory = Linear,
        output_linear: LinearFactory | None = None,
    ) -> None:
        """output_linear: makes the matrices whose outputs are added to the residual stream, and
        which are given what this process computed; None: `linear`."""
        output_linear = output_linear or linear
        self.kernels, self.eps = kernels, config.rms_norm_eps
        self.input_layernorm = like.new_empty(config.hidden_size)
        self.self_attn = Attention(config, layer_idx, kernels, like, linear, output_linear)
        self.post_attention_layernorm = like.new_empty(config.hidden_size)
        self.mlp = MLP(config, kernels, like, linear, output_linear)

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor, cos_sin: torch.Tensor, attend: AttendFn
    ) -> torch.Tensor:
        """Return this layer's last contribution; the next norm adds it to the residual.

        x: [num_tokens, hidden_size], what the layer before contributed. Mutates `residual`.
        """
        normed = self.kernels.add_rms_norm(x, residual, self.input_layernorm, self.eps)
        x = self.self_attn(normed, cos_sin, attend)
        normed = self.kernels.add_rms_norm(x, residual, self.post_attention_layernorm, self.eps)
        return self.mlp(normed)


class CausalLM:
    """Token ids in, hidden states and logits out. Parameters start uninitialised.

    Built in `dtype` on `device`; `kernels` must be able to run there. Where several processes
    hold the model together, this is one's part of it, `config` is the shape of that part, and all
    of them must make the same calls.
    """

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels,
        dtype: torch.dtype,
        device: torch.device,
        linears: Linears = PLAIN,
        collectives: Collectives | None = None,
    ) -> None:
        like = torch.empty(0, dtype=dtype, device=device)
        self.collectives = Alone() if collectives is None else collectives
        ranks = self.collectives.ranks
        config = ranks.share_of_model(config)
        if linears.of_head is not None:  # a head in another format than the embedding
            config = replace(config, tie_word_embeddings=False)
        self.config, self.kernels, self.dtype, self.device = config, kernels, dtype, device
        self.vocab_part = ranks.vocab_part(config.vocab_size)
        """The tokens whose embeddings and logits are computed here."""
        self.logits_parts: LogitsParts | None = None
        """Of several processes: how those of all become one."""
        if ranks.size > 1:
            self.logits_parts = LogitsParts(config.vocab_size, device, self.collectives)
        table = ranks.share_of_vocab(config.vocab_size), config.hidden_size
        self.embed_tokens = like.new_empty(table)
        output_linear = input_parallel(linears.of_layers, self.collectives)
        self.layers = [
            DecoderLayer(config, layer_idx, kernels, like, linears.of_layers, output_linear)
            for layer_idx in range(config.num_layers)
        ]
        self.norm = like.new_empty(config.hidden_size)
        self.lm_head = self._head(like, linears.of_head)
        """[vocab_size, hidden_size], or a LinearLayer; of several processes each one's rows"""
        self.rope = RotaryTable(config.rope, config.head_dim, config.num_positions, device)

    def _head(self, like: torch.Tensor, linear: LinearFactory | None) -> Any:
        shape = self.embed_tokens.shape
        if linear is not None:
            return linear(shape[1], shape[0], False, self.kernels, like)
        return self.embed_tokens if self.config.tie_word_embeddings else like.new_empty(shape)

    def __call__(
        self, input_ids: torch.Tensor, positions: torch.Tensor, attend: AttendFn
    ) -> torch.Tensor:
        """input_ids, positions: [num_tokens] int64; result: [num_tokens, hidden_size], normed."""
        cos_sin = self.rope.gather(positions)
        residual = self._embed(input_ids)
        # The first norm adds the contribution of "the layer before", which is nothing.
        x = torch.zeros_like(residual)
        for layer in self.layers:
            x = layer(x, residual, cos_sin, attend)
        return self.kernels.add_rms_norm(x, residual, self.norm, self.config.rms_norm_eps)

    def _embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size]; of several processes each looks its own tokens up."""
        if self.collectives.ranks.size == 1:
            return F.embedding(input_ids, self.embed_tokens)
        first, end = self.vocab_part.start, self.vocab_part.stop
        is_ours = (input_ids >= first) & (input_ids < end)
        rows = F.embedding((input_ids - first) * is_ours, self.embed_tokens)
        return self.collectives.all_reduce(rows.mul_(is_ours[:, None]))

    def compute_logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """hidden: [num_rows, hidden_size]; result: [num_rows, vocab_size] in the model's dtype.

        Of several processes each one's part, [num_rows, logits_parts.num_columns]. The result is
        written to `out` if that is given, a tensor of its shape.
        """
        if isinstance(self.lm_head, torch.Tensor):
            logits = torch.mm(hidden, self.lm_head.t(), out=out)
        else:
            logits = self.lm_head(hidden)
            logits = logits if out is None else out.copy_(logits)
        num_tokens = self.vocab_part.stop - self.vocab_part.start
        if num_tokens < logits.shape[1]:
            logits[:, num_tokens:] = -torch.inf  # of no token: never the largest
        return logits

    def compute_all_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_rows, vocab_size] in each process."""
        logits = self.compute_logits(hidden)
        return logits if self.logits_parts is None else self.logits_parts.gather(logits)

    def named_members(self) -> Iterator[tuple[str, Any]]:
        """(dotted name, tensor or LinearLayer), in order; tied embeddings come once."""
        seen = set()
        for name, member in named_members(self):
            if id(member) not in seen:
                seen.add(id(member))
                yield name, member

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(dotted name, tensor) of all that is stored, in order."""
        for name, member in self.named_members():
            if isinstance(member, torch.Tensor):
                yield name, member
            else:
                yield from _named_tensors(member, f"{name}.")

    @property
    def num_parameters(self) -> int:
        """Numbers that the model has, however they are stored."""
        return sum(
            member.numel() if isinstance(member, torch.Tensor) else member.num_parameters
            for _, member in self.named_members()
        )

    @property
    def num_parameter_bytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self.named_parameters())


def named_members(part: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors and matrices that a part of the model and its parts hold."""
    for name, member in _attributes(part):
        if isinstance(member, torch.Tensor) or hasattr(member, "randomize"):
            yield f"{prefix}{name}", member
        elif isinstance(member, list | Part):
            yield from named_members(member, f"{prefix}{name}.")


def _named_tensors(part: object, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a matrix, in it or in what it is made of."""
    for name, member in _attributes(part):
        if isinstance(member, torch.Tensor):
            yield f"{prefix}{name}", member
        elif isinstance(member, tuple | Part):
            yield from _named_tensors(member, f"{prefix}{name}.")


def _attributes(part: object) -> Iterator[tuple[str, Any]]:
    """By name, or by index."""
    if isinstance(part, list | tuple):
        yield from ((str(index), member) for index, member in enumerate(part))
    else:
        yield from vars(part).items()
