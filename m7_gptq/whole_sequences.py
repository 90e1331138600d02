"""The transformer over whole sequences without a cache: for calibration and perplexity."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from folovllm.model.rope import RotaryTable
from folovllm.model.transformer import CausalLM, DecoderLayer

_MOST_TOKENS = 4096
"""Computed at a time: enough for a GPU, and little memory."""


def sequences_at_a_time(length: int) -> int:
    """Of sequences of this length."""
    return max(1, _MOST_TOKENS // length)


class Activations(NamedTuple):
    """What flows between layers, of sequences of one length."""

    contribution: torch.Tensor
    """[num_sequences, length, hidden_size], what the last layer adds to the residual"""
    residual: torch.Tensor
    """Likewise, without it"""

    def batches(self) -> Iterator["Activations"]:
        """Views of as many sequences as are computed at a time."""
        size = sequences_at_a_time(self.residual.shape[1])
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
    """Mean negative log-likelihood of the sequences' tokens behind their first, in nats.

    token_ids: [num_sequences, length] int64 on the model's device. All sequences go through a layer
    at once, but only one of them at a time has logits.
    """
    activations = embed(token_ids, model.embed_tokens)
    for layer in model.layers:
        activations = run_layer(layer, model.rope, activations)
    total = torch.zeros((), dtype=torch.float64, device=token_ids.device)
    for tokens, x, residual in zip(token_ids, *activations, strict=True):
        hidden = model.kernels.add_rms_norm(
            x, residual.clone(), model.norm, model.config.rms_norm_eps
        )
        logits = model.compute_logits(hidden[:-1]).to(torch.float32)
        total += F.cross_entropy(logits, tokens[1:])
    return total.item() / len(token_ids)
