"""Reads a Llama-family GGUF file as the tensors and config fields of a published checkpoint."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import torch

_LAYER_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
)
_TOP_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
)


class GGUFCheckpoint:
    """One GGUF file, opened by memory map; tensors are dequantised one at a time when asked for.

    ValueError if the file is no GGUF or holds another architecture than `llama`: the tensor names
    and the order of the q and k rows below are those that llama.cpp writes for that one.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._reader = gguf.GGUFReader(path)
        except ValueError as error:
            raise ValueError(f"{path} cannot be read as GGUF ({error}); fetch it again") from error
        architecture = self.get("general.architecture")
        if architecture != "llama":
            raise ValueError(
                f"{path} holds architecture {architecture!r}; only 'llama' can be converted here"
            )
        self.path = path

    def find(self, key: str) -> Any | None:
        """The value of a metadata key, or None where the file does not have it."""
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

    def get(self, key: str) -> Any:
        """The value of a metadata key; ValueError where the file does not have it."""
        value = self.find(key)
        if value is None:
            raise ValueError(f"the GGUF file has no metadata key {key!r}; it is not convertible")
        return value

    @property
    def has_output_weight(self) -> bool:
        """Whether the output projection is a tensor of its own (else it is the embedding)."""
        return any(tensor.name == "output.weight" for tensor in self._reader.tensors)

    def config(self) -> dict[str, Any]:
        """The `config.json` fields of a Llama model, as published checkpoints write them."""
        num_heads = self.get("llama.attention.head_count")
        hidden_size = self.get("llama.embedding_length")
        return {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": self.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.get("tokenizer.ggml.eos_token_id"),
            "head_dim": self.find("llama.attention.key_length") or hidden_size // num_heads,
            "hidden_act": "silu",
            "hidden_size": hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.get("llama.feed_forward_length"),
            "max_position_embeddings": self.get("llama.context_length"),
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": num_heads,
            "num_hidden_layers": self.get("llama.block_count"),
            "num_key_value_heads": self.get("llama.attention.head_count_kv"),
            "pad_token_id": self.get("tokenizer.ggml.padding_token_id"),
            "pretraining_tp": 1,
            # Stored in 32 bits, where 1e-5 is 9.999999747378752e-06: seven digits give it back.
            "rms_norm_eps": float(f"{self.get('llama.attention.layer_norm_rms_epsilon'):.6e}"),
            "rope_scaling": None,
            "rope_theta": self.get("llama.rope.freq_base"),
            "tie_word_embeddings": not self.has_output_weight,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": len(self.get("tokenizer.ggml.tokens")),
        }

    def iter_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (published name, weight) as bfloat16; a linear weight is [out, in].

        ValueError, listing them, for tensors missing or unknown.
        """
        names = {tensor.name: _published_name(tensor.name) for tensor in self._reader.tensors}
        self._check_names(names)
        for tensor in self._reader.tensors:
            array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            weight = torch.from_numpy(np.array(array, dtype=np.float32))
            if tensor.name.endswith("attn_q.weight"):
                weight = unpermute_rotary_rows(weight, self.get("llama.attention.head_count"))
            elif tensor.name.endswith("attn_k.weight"):
                weight = unpermute_rotary_rows(weight, self.get("llama.attention.head_count_kv"))
            published = names[tensor.name]
            assert published is not None
            yield published, weight.to(torch.bfloat16).contiguous()

    def _check_names(self, names: Mapping[str, str | None]) -> None:
        layers = range(self.get("llama.block_count"))
        expected = {f"blk.{layer}.{name}.weight" for layer in layers for name in _LAYER_NAMES}
        expected |= {"token_embd.weight", "output_norm.weight"}
        missing = sorted(expected - names.keys())
        unknown = sorted(name for name, published in names.items() if published is None)
        if missing or unknown:
            raise ValueError(
                f"{self.path} does not hold a plain Llama model: missing tensors {missing}, "
                f"unknown tensors {unknown}"
            )


def unpermute_rotary_rows(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo llama.cpp's row order of a q or k projection.

    weight: [num_heads * head_dim, hidden_size]. GGUF interleaves the two halves of each head, so
    that rotary pairs are neighbours (rows 0, 1 rotate together); published checkpoints keep the
    halves apart (rows 0 and head_dim / 2 rotate together). Returns the same shape.
    """
    head_dim = weight.shape[0] // num_heads
    pairs = weight.view(num_heads, head_dim // 2, 2, -1)
    return pairs.transpose(1, 2).reshape(weight.shape)


def _published_name(name: str) -> str | None:
    """The name in a published Llama checkpoint, or None if it has no such tensor."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match name.split("."):
        case ["blk", layer, part, "weight"] if part in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"
    return None
