"""The transformer over whole sequences without a cache: for calibration and perplexity."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from folovllm.model.rope import RotaryTable
from folovllm.model.transformer import CausalLM, DecoderLayer

_MOST_TOKENS = 4096
"""Computed at a time."""


class Activations(NamedTuple):
    """What flows between layers, of sequences of one length."""

    contribution: torch.Tensor
    """[num_sequences, length, hidden_size], what the last layer adds to the residual"""
    residual: torch.Tensor
    """Likewise, without it"""

    def batches(self) -> Iterator["Activations"]:
        """Views of as many sequences as are computed at a time."""
        size = max(1, _MOST_TOKENS // self.residual.shape[1])
        parts = zip(self.contribution.split(size), self.residual.split(size), strict=True)
        yield from map(Activations._make, parts)


def embed(token_ids: torch.Tensor, table: torch.Tensor) -> Activations:
    """token_ids: [num_sequences, length] int64; table: [vocab_size, hidden_size]."""
    residual = F.embedding(token_ids, table)
    return Activations(torch.zeros_like(residual), residual)


def run_layer(layer: DecoderLayer, rope: RotaryTable, batch: Activations) -> Activations:
    """What comes out of a layer; leaves what goes in as it is."""
    num_sequences, length, hidden_size = batch.residual.shape
    positions = torch.arange(length, device=batch.residual.device).repeat(num_sequences)

    def attend(layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(0, (num_sequences, length)).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    residual = batch.residual.reshape(-1, hidden_size).clone()
    x = batch.contribution.reshape(-1, hidden_size)
    contribution = layer(x, residual, rope.gather(positions), attend)
    shape = batch.residual.shape
    return Activations(contribution.view(shape), residual.view(shape))


def mean_nll(model: CausalLM, token_ids: torch.Tensor) -> float:
    """Mean negative log-likelihood of a sequence's tokens behind its first, in nats.

    token_ids: [length] int64 on the model's device.
    """
    activations = embed(token_ids[None], model.embed_tokens)
    for layer in model.layers:
        activations = run_layer(layer, model.rope, activations)
    hidden = model.kernels.add_rms_norm(
        activations.contribution[0],
        activations.residual[0].clone(),
        model.norm,
        model.config.rms_norm_eps,
    )
    logits = model.compute_logits(hidden[:-1])
    return F.cross_entropy(logits.to(torch.float32), token_ids[1:]).item()
