"""What a step of a model must compute and move at least, on any device."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .config import ModelConfig, kv_bytes_per_token

if TYPE_CHECKING:
    from .transformer import CausalLM


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """What one step must compute and move whatever the implementation."""

    num_tokens: int
    """Tokens that go through the model."""
    num_logits_rows: int
    """Tokens that are projected to the vocabulary: one per request that gets a token."""
    num_cached_tokens_read: int
    """Tokens computed in earlier steps that this step's queries attend to, over all requests."""
    num_attention_pairs: int
    """Pairs of a query and a key it may see, over all requests."""


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """Bytes and floating point operations of a model: its lower bound on any device.

    Every weight and every cached key and value that a step needs is read once, and every new
    one is written once; activations are free. Weights cost 2 FLOPs per token and parameter.
    """

    num_layer_parameters: int
    """All but the embedding table and the output projection."""
    num_logits_parameters: int
    """Of the output projection (vocab_size · hidden_size, or this process's rows), tied or not."""
    weight_bytes_read: int
    """Per step; an embedding table that is not tied is only looked up and does not count."""
    kv_bytes_per_token: int
    attention_flops_per_pair: int
    """4 · layers · heads · head_dim: one multiply-add each for the score and for the value."""

    def step_bytes(self, work: StepWork) -> int:
        num_kv_tokens = work.num_cached_tokens_read + work.num_tokens
        return self.weight_bytes_read + self.kv_bytes_per_token * num_kv_tokens

    def step_flops(self, work: StepWork) -> int:
        linear = self.num_layer_parameters * work.num_tokens
        logits = self.num_logits_parameters * work.num_logits_rows
        attention = self.attention_flops_per_pair * work.num_attention_pairs
        return 2 * (linear + logits) + attention


def model_cost(model: "CausalLM") -> ModelCost:
    """Of several processes, what each of them computes and moves."""
    config, ranks = model.config, model.collectives.ranks
    table = ranks.share_of_vocab(config.vocab_size) * config.hidden_size
    num_tables = 1 if config.tie_word_embeddings else 2
    return ModelCost(
        num_layer_parameters=model.num_parameters - num_tables * table,
        num_logits_parameters=table,
        weight_bytes_read=model.num_parameter_bytes
        - (num_tables - 1) * table * model.dtype.itemsize,
        kv_bytes_per_token=kv_bytes_per_token(config, model.dtype),
        attention_flops_per_pair=_attention_flops_per_pair(config),
    )


def _attention_flops_per_pair(config: ModelConfig) -> int:
    """A query-key pair costs a multiply-add per element for the score and one for the value."""
    return 4 * config.num_layers * config.num_heads * config.head_dim
