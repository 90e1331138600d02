"""Filling a CausalLM from published safetensors, streamed and strict."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .config import ModelConfig
from .linear import LinearLayer, Slice
from .sharding import EMBEDDING, HEAD, fill_piece, piece
from .transformer import CausalLM, DecoderLayer

_OTHER_FORMATS = (".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx")


def with_published_head(config: ModelConfig, directory: Path) -> ModelConfig:
    """The config with a head of its own, if the checkpoint brings one that is not the embedding.

    As Transformers 5 does it: where config.json ties the two, but the files hold both and they
    differ, the file is right and the config is not.
    """
    if not config.tie_word_embeddings:
        return config
    tables: list[torch.Tensor] = []
    for path in _safetensors_files(directory):
        with _open_safetensors(path) as file:
            names = {EMBEDDING, HEAD}.intersection(file.keys())
            tables += map(file.get_tensor, names)
    is_tied = len(tables) < 2 or torch.equal(*tables)
    return replace(config, tie_word_embeddings=is_tied)


def load_safetensors(model: CausalLM, directory: Path, whole: CausalLM) -> None:
    """Copy every tensor of the checkpoint into its place, one at a time.

    q, k, v and gate, up are stacked into the merged matrices on the way. A tied table may stand
    under either name. whole: the model of which this one is a part, for the shapes of its tensors;
    a part reads its piece of each. ValueError lists the names that are missing or unexpected and
    the tensors that do not fit; the model must then not be used.
    """
    shapes = {name: tensor.shape for name, tensor in published_tensors(whole).items()}
    targets = published_tensors(model)  # last: a matrix fills the targets that it named last
    missing = set(targets) - _optional_tensors(model)
    unexpected, misshapen, other_kind = [], [], []
    for stored in _stored_tensors(directory):
        name = stored.name
        if name == HEAD and model.config.tie_word_embeddings:
            name = EMBEDDING
        target = targets.get(name)
        if target is None:
            # Frequencies of the rotary embedding follow from the config.
            if not name.endswith("rotary_emb.inv_freq"):
                unexpected.append(name)
        elif shapes[name] != stored.shape:
            misshapen.append(f"{name} is {list(stored.shape)}, expected {list(shapes[name])}")
        else:
            tensor = stored.read(piece(name, stored.shape, target.shape, model.collectives.ranks))
            if _is_convertible(tensor, target):
                fill_piece(target, tensor)
            else:
                other_kind.append(f"{name} is {tensor.dtype}".replace("torch.", ""))
        missing.discard(name)
    problems = {
        "missing": ", ".join(sorted(missing)),
        "unexpected": ", ".join(unexpected),
        "wrong shape": "; ".join(misshapen),
        "of another kind (quantised, where float32, bfloat16 or float16 belongs, or not, where "
        "integers belong)": ", ".join(other_kind),
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {names}" for what, names in problems.items() if names)
        raise ValueError(
            f"the weights in {directory} do not fit its config.json "
            f"({model.config.model_type}); {listed}"
        )
    for _, member in model.named_members():
        if not isinstance(member, torch.Tensor):
            member.finish()


def _is_convertible(tensor: torch.Tensor, target: torch.Tensor) -> bool:
    if target.is_floating_point():
        return tensor.is_floating_point() and tensor.itemsize >= 2
    return tensor.dtype == target.dtype


def save_safetensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a file that is there whole or not at all; none of the tensors may share memory."""
    partial = path.with_name(f".{path.name}.partial")
    on_host = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    # The format entry is what Transformers asks for before it opens a file.
    save_file(on_host, str(partial), metadata={"format": "pt"})
    # safetensors makes files that nobody else may read; a model is often another user's to run.
    partial.chmod(0o644)
    partial.replace(path)


def load_file(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of one file."""
    with _open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


class _StoredTensor(NamedTuple):
    """A tensor in an open file."""

    name: str
    file: Any

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.file.get_slice(self.name).get_shape())

    def read(self, part: tuple[slice, ...]) -> torch.Tensor:
        """No more than this part of it is read."""
        if all(cut == slice(None) for cut in part):
            tensor: torch.Tensor = self.file.get_tensor(self.name)
            return tensor
        cut: torch.Tensor = self.file.get_slice(self.name)[part]
        return cut


def _stored_tensors(directory: Path) -> Iterator[_StoredTensor]:
    """Of model.safetensors, or of the shards that the index names."""
    for path in _safetensors_files(directory):
        with _open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield _StoredTensor(name, file)


class Checkpoint:
    """Tensors of a published checkpoint by name, read one at a time; a context manager."""

    def __init__(self, directory: Path) -> None:
        self._paths = _safetensors_files(directory)
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> "Checkpoint":
        for path in self._paths:
            file = self._stack.enter_context(_open_safetensors(path))
            self._files |= dict.fromkeys(file.keys(), file)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def get(self, name: str) -> torch.Tensor:
        """ValueError if it is not there."""
        if name not in self._files:
            raise ValueError(f"the checkpoint has no tensor {name}; download the model again")
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    try:
        file = safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no whole safetensors file ({error}); download the model again"
        ) from error
    with file:
        yield file


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
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    if shards:
        raise FileNotFoundError(
            f"{directory} has {', '.join(shards)}, but neither model.safetensors nor {index.name}, "
            f"which says what belongs to the model; download the model again, with all its files"
        )
    found = [path.name for end in _OTHER_FORMATS for path in directory.glob(f"*{end}")]
    others = ", ".join(sorted(found)) or "no weights"
    raise FileNotFoundError(
        f"{directory} has no model.safetensors (found: {others}); this engine reads "
        f"safetensors only, because other formats can run code when they are opened or hold "
        f"weights that it does not compute with"
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
    """Name in a published checkpoint -> where in our model it belongs.

    Merged matrices have a target for each of the matrices that make them up.
    """
    targets = {EMBEDDING: model.embed_tokens, "model.norm.weight": model.norm}
    if isinstance(model.lm_head, torch.Tensor):
        if not model.config.tie_word_embeddings:
            targets[HEAD] = model.lm_head
    else:
        targets |= model.lm_head.targets(head_slices(model))
    for index, layer in enumerate(model.layers):
        prefix = f"model.layers.{index}."
        targets |= {prefix + name: tensor for name, tensor in layer_tensors(layer).items()}
    return targets


def _optional_tensors(model: CausalLM) -> set[str]:
    """Those of `published_tensors` that a checkpoint may leave out."""
    names = set()
    if not isinstance(model.lm_head, torch.Tensor):
        names |= model.lm_head.optional(head_slices(model))
    for index, layer in enumerate(model.layers):
        slices = layer_slices(layer.self_attn.config)
        for part, linear in layer_linears(layer).items():
            prefix = f"model.layers.{index}.{part.rpartition('.')[0]}."
            names |= {prefix + name for name in linear.optional(slices[part])}
    return names


def layer_tensors(layer: DecoderLayer) -> dict[str, torch.Tensor]:
    """As `published_tensors`, of one layer; names without what comes before the layer's parts."""
    attention = layer.self_attn
    targets = {
        "input_layernorm.weight": layer.input_layernorm,
        "post_attention_layernorm.weight": layer.post_attention_layernorm,
    }
    for name, norm in (("q_norm", attention.q_norm), ("k_norm", attention.k_norm)):
        if norm is not None:
            targets[f"self_attn.{name}.weight"] = norm
    for (part, linear), slices in zip(
        layer_linears(layer).items(), layer_slices(attention.config).values(), strict=True
    ):
        prefix = part.rpartition(".")[0]
        targets |= {f"{prefix}.{name}": view for name, view in linear.targets(slices).items()}
    return targets


def layer_linears(layer: DecoderLayer) -> dict[str, LinearLayer]:
    """The matrices of a layer, in the order in which data meets them."""
    return {
        "self_attn.qkv_proj": layer.self_attn.qkv_proj,
        "self_attn.o_proj": layer.self_attn.o_proj,
        "mlp.gate_up_proj": layer.mlp.gate_up_proj,
        "mlp.down_proj": layer.mlp.down_proj,
    }


def head_slices(model: CausalLM) -> tuple[Slice, ...]:
    """What a head that is a `LinearLayer` is in a checkpoint."""
    return (Slice("lm_head", len(model.embed_tokens)),)


def layer_slices(config: ModelConfig) -> dict[str, tuple[Slice, ...]]:
    """What each of `layer_linears` is in a checkpoint."""
    q_rows, kv_rows = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    return {
        "self_attn.qkv_proj": (
            Slice("q_proj", q_rows),
            Slice("k_proj", kv_rows),
            Slice("v_proj", kv_rows),
        ),
        "self_attn.o_proj": (Slice("o_proj", config.hidden_size),),
        "mlp.gate_up_proj": (
            Slice("gate_proj", config.intermediate_size),
            Slice("up_proj", config.intermediate_size),
        ),
        "mlp.down_proj": (Slice("down_proj", config.hidden_size),),
    }
