"""Filling a CausalLM: published safetensors, streamed and strict, or random numbers from a seed."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .transformer import CausalLM

_INITIAL_STD = 0.02
"""Standard deviation of random weights; what the published models were initialised with."""


def load_safetensors(model: CausalLM, directory: Path) -> None:
    """Copy every tensor of the checkpoint into its place, one at a time.

    q, k, v and gate, up are stacked into the merged matrices on the way. ValueError lists the
    names that are missing or unexpected and the shapes that do not fit; the model must then not
    be used.
    """
    targets = published_tensors(model)
    missing, unexpected, misshapen = set(targets), [], []
    for name, tensor in iter_safetensors(directory):
        target = targets.get(name)
        if target is None:
            if not _is_redundant(name, model):
                unexpected.append(name)
        elif target.shape != tensor.shape:
            misshapen.append(f"{name} is {list(tensor.shape)}, expected {list(target.shape)}")
        else:
            target.copy_(tensor)
        missing.discard(name)
    problems = []
    if missing:
        problems.append(f"missing: {', '.join(sorted(missing))}")
    if unexpected:
        problems.append(f"unexpected: {', '.join(sorted(unexpected))}")
    if misshapen:
        problems.append(f"wrong shape: {'; '.join(misshapen)}")
    if problems:
        raise ValueError(
            f"the weights in {directory} do not fit its config.json "
            f"({model.config.model_type}); " + "; ".join(problems)
        )


def load_random(model: CausalLM, seed: int) -> None:
    """Fill the parameters on their device from `seed`; norms are 1 and biases 0."""
    generator = torch.Generator(device=model.device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("norm"):
            parameter.fill_(1.0)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.normal_(0.0, _INITIAL_STD, generator=generator)


def iter_safetensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) from model.safetensors or from the shards that the index names."""
    for path in _safetensors_files(directory):
        try:
            file = safe_open(path, framework="pt", device="cpu")
        except SafetensorError as error:
            raise ValueError(
                f"{path} is no whole safetensors file ({error}); download the model again"
            ) from error
        with file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield name, file.get_tensor(name)


def _safetensors_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = _shard_names(index)
        paths = [directory / name for name in names]
        absent = [path.name for path in paths if not path.exists()]
        if absent:
            raise FileNotFoundError(
                f"{index} names shards that are not there: {', '.join(absent)}; "
                f"download the model again"
            )
        return paths
    if (directory / "model.safetensors").exists():
        return [directory / "model.safetensors"]
    others = sorted(path.name for path in directory.glob("*.bin")) or ["no weights"]
    raise FileNotFoundError(
        f"{directory} has no model.safetensors (found: {', '.join(others)}); this engine reads "
        f"safetensors only, because other formats can run code when they are opened"
    )


def _shard_names(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} must be a JSON object with a weight_map of tensor names to files "
            f"({type(error).__name__}: {error}); download the model again"
        ) from error


def published_tensors(model: CausalLM) -> dict[str, torch.Tensor]:
    """Name in a published checkpoint -> the view of our parameter that it fills."""
    config = model.config
    q_rows = config.num_heads * config.head_dim
    kv_rows = config.num_kv_heads * config.head_dim
    splits = {
        "qkv_proj": (("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows)),
        "gate_up_proj": tuple(
            (name, config.intermediate_size) for name in ("gate_proj", "up_proj")
        ),
    }
    targets: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        prefix = "" if name == "lm_head" else "model."
        suffix = "" if name.endswith((".weight", ".bias")) else ".weight"
        merged = next((merged for merged in splits if f".{merged}." in name), None)
        if merged is None:
            targets[prefix + name + suffix] = parameter
            continue
        start = 0
        for part, num_rows in splits[merged]:
            view = parameter[start : start + num_rows]
            targets[prefix + name.replace(merged, part) + suffix] = view
            start += num_rows
    return targets


def _is_redundant(name: str, model: CausalLM) -> bool:
    """Tensors that some checkpoints carry and that we compute or share instead."""
    is_tied_head = name == "lm_head.weight" and model.config.tie_word_embeddings
    return is_tied_head or name.endswith("rotary_emb.inv_freq")
