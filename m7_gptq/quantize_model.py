"""Quantises a checkpoint layer after layer, and writes each when it is done.

A layer is calibrated with what the quantised layers before it produce, so that it makes up for
their errors as well. Only one layer and the activations between two are on the device at a time.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from folovllm.json_files import write_json_atomically
from folovllm.kernels.selection import select_kernels
from folovllm.model.config import ModelConfig
from folovllm.model.linear import Linear, Part
from folovllm.model.rope import RotaryTable
from folovllm.model.transformer import DecoderLayer
from folovllm.model.weights import (
    Checkpoint,
    layer_linears,
    layer_slices,
    layer_tensors,
    load_file,
    save_safetensors,
)

from .gptq import (
    Hessian,
    QuantizationConfig,
    QuantizedMatrix,
    quantize,
    relative_error,
    round_to_nearest,
)
from .packing import WORD_BITS, PackedMatrix, pack_matrix, unpack_matrix
from .quantized_linear import Scheme
from .whole_sequences import Activations, embed, run_layer

FIRST_TOKEN_WEIGHT = 32.0
"""By measurement (docs/dev/milestone_7.md); 30, 32, 300 and 512 gave much the same."""
_READ_BY_OTHERS = ("self_attn.qkv_proj",)
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_STATE_FILE = "quantization_state.json"
_COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "generation_config.json",
    "*.jinja",
    "vocab*",
    "merges.txt",
)


class Method(Enum):
    GPTQ = "gptq"
    RTN = "rtn"
    """Round to nearest: no calibration enters the weights."""

    def quantize(
        self, weight: torch.Tensor, hessian: torch.Tensor, config: QuantizationConfig
    ) -> QuantizedMatrix:
        """weight: [num_outputs, num_inputs]; hessian: [num_inputs, num_inputs]."""
        if self is Method.GPTQ:
            return quantize(weight, hessian, config)
        return round_to_nearest(weight, config)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is quantised, and how."""

    source: Path
    """Folder of an unquantised checkpoint."""
    target: Path
    """Folder to write; an interrupted run of the same job goes on where it was."""
    config: QuantizationConfig
    method: Method = Method.GPTQ
    checkpoint_format: str = "gptq"
    first_token_weight: float = FIRST_TOKEN_WEIGHT
    """How often the first token of every sequence counts in the Hessian of q, k and v. It is what
    the whole sequence attends to (an attention sink) and unlike all others: as one of hundreds its
    key is given up for theirs. 1: GPTQ as published."""
    quantize_lm_head: bool = False
    """Also the matrix of the logits, in the same way. The embedding stays as it is: where the two
    were one table, there are two of them then."""
    device: torch.device
    dtype: torch.dtype
    """Of the computation; the Hessian and what follows from it are float32 always."""

    def __post_init__(self) -> None:
        if not 0.0 < self.first_token_weight < math.inf:
            raise ValueError(
                f"first_token_weight must be positive, got {self.first_token_weight}; 1 counts the "
                f"first token of a sequence like all others"
            )


@dataclass(frozen=True)
class LayerReport:
    """One layer, done."""

    layer_idx: int
    num_layers: int
    errors: dict[str, float]
    """Matrix -> |WX - QX|² / |WX|² over the calibration inputs"""
    seconds: float


class _Recorder(Part):
    """Stands in for a matrix and adds its inputs to a Hessian."""

    def __init__(self, linear: Linear, weights: torch.Tensor | None) -> None:
        """weights: [length] float32, how often a token of a sequence counts; None: once."""
        self.linear, self.weights = linear, weights
        self.hessian = Hessian(linear.weight.shape[1], linear.weight.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self._record(x)
        return self.linear(x)

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        self._record(x)
        return self.linear.gated(x)

    def _record(self, x: torch.Tensor) -> None:
        weights = self.weights
        self.hessian.add(x, None if weights is None else weights.repeat(len(x) // len(weights)))


@torch.inference_mode()
def quantize_checkpoint(
    job: Job, token_ids: torch.Tensor, report: Callable[[LayerReport], None]
) -> list[LayerReport]:
    """Write the quantised checkpoint; returns the report of every layer, also of earlier runs.

    token_ids: [num_sequences, length] int64, the calibration text. ValueError if the checkpoint is
    quantised already, or the target is that of another job.
    """
    config = ModelConfig.from_directory(job.source)
    if config.quantization is not None:
        raise ValueError(f"{job.source} is quantised already; give the checkpoint it was made from")
    if job.quantize_lm_head and config.vocab_size * job.config.bits % WORD_BITS:
        raise ValueError(
            f"the head of {job.source} has {config.vocab_size} outputs, whose zero points do not "
            f"fill words of {job.config.bits} bits; quantise without quantize_lm_head"
        )
    state = _State(job, token_ids)
    with Checkpoint(job.source) as checkpoint:
        embedding = checkpoint.get(_EMBEDDING)
        activations = embed(token_ids.to(job.device), embedding.to(job.device, job.dtype))
        rope = RotaryTable(config.rope, config.head_dim, token_ids.shape[1], job.device)
        like = torch.empty(0, dtype=job.dtype, device=job.device)
        kernels = select_kernels(job.device)
        for layer_idx in range(config.num_layers):
            start = time.perf_counter()
            layer = DecoderLayer(config, layer_idx, kernels, like)
            prefix = f"model.layers.{layer_idx}."
            for name, tensor in layer_tensors(layer).items():
                tensor.copy_(checkpoint.get(prefix + name))
            file = job.target / f"layer-{layer_idx:05}.safetensors"
            if layer_idx < len(state.reports):
                _restore(layer, load_file(file), prefix, job)
            else:
                tensors, errors = _quantize_layer(layer, rope, activations, job)
                kept = {
                    prefix + name: checkpoint.get(prefix + name)
                    for name in layer_tensors(layer)
                    if not _is_matrix(name)
                }
                save_safetensors({**{prefix + n: t for n, t in tensors.items()}, **kept}, file)
                seconds = time.perf_counter() - start
                state.add(LayerReport(layer_idx, config.num_layers, errors, seconds))
                report(state.reports[-1])
            run_in_place(layer, rope, activations)
        rest = {
            name: checkpoint.get(name)
            for name in checkpoint.names
            if not name.startswith("model.layers.")
        }
        if job.quantize_lm_head:
            rest |= _quantize_head(config, rest, activations, job)
            rest.pop(_HEAD, None)
        save_safetensors(rest, job.target / "rest.safetensors")
    _write_index(job)
    state.remove()
    return state.reports


def _quantize_head(
    config: ModelConfig, tensors: dict[str, torch.Tensor], activations: Activations, job: Job
) -> dict[str, torch.Tensor]:
    """The packed head by its published names; tensors: those of the checkpoint beside layers."""
    norm = tensors["model.norm.weight"].to(job.device, job.dtype)
    kernels = select_kernels(job.device)
    hessian = Hessian(config.hidden_size, job.device)
    for x, residual in activations.batches():
        x, residual = (part.reshape(-1, config.hidden_size) for part in (x, residual))
        hessian.add(kernels.add_rms_norm(x, residual.clone(), norm, config.rms_norm_eps))
    weight = tensors.get(_HEAD, tensors[_EMBEDDING]).to(job.device, torch.float32)
    matrix = job.method.quantize(weight, hessian.matrix, job.config)
    packed = pack_matrix(matrix, job.config.bits, job.checkpoint_format)
    return {f"lm_head.{key}": value for key, value in packed._asdict().items()}


def record_hessians(
    layer: DecoderLayer,
    rope: RotaryTable,
    activations: Activations,
    first_token_weight: float = 1.0,
) -> dict[str, torch.Tensor]:
    """Matrix of the layer -> Hessian of what it is multiplied with, [num_inputs, num_inputs].

    first_token_weight: see `Job`.
    """
    linears = plain_linears(layer)
    # Only what makes keys and values: every later token reads those of the first.
    weights = torch.ones(activations.residual.shape[1], device=activations.residual.device)
    weights[0] = first_token_weight
    recorders = {
        name: _Recorder(linear, weights if name in _READ_BY_OTHERS else None)
        for name, linear in linears.items()
    }
    _replace(layer, recorders)
    for batch in activations.batches():
        run_layer(layer, rope, batch)
    _replace(layer, linears)
    return {name: recorder.hessian.matrix for name, recorder in recorders.items()}


def _quantize_layer(
    layer: DecoderLayer, rope: RotaryTable, activations: Activations, job: Job
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The layer's packed matrices by their published names, and errors; mutates its weights."""
    hessians = record_hessians(layer, rope, activations, job.first_token_weight)
    tensors: dict[str, torch.Tensor] = {}
    errors: dict[str, float] = {}
    for name, linear in plain_linears(layer).items():
        matrix = job.method.quantize(linear.weight, hessians[name], job.config)
        errors[name] = relative_error(linear.weight, matrix, hessians[name])
        linear.weight.copy_(matrix.dequantize())
        tensors |= _packed_tensors(layer, name, matrix, job)
    return tensors, errors


def _packed_tensors(
    layer: DecoderLayer, name: str, matrix: QuantizedMatrix, job: Job
) -> dict[str, torch.Tensor]:
    """A matrix of the layer as a checkpoint has it: in parts, each with tensors of its own."""
    tensors: dict[str, torch.Tensor] = {}
    for path, rows in _published_rows(layer, name):
        own = QuantizedMatrix(
            matrix.q[rows], matrix.scales[:, rows], matrix.zeros[:, rows], matrix.g_idx
        )
        packed = pack_matrix(own, job.config.bits, job.checkpoint_format)
        # Copies: what shares memory cannot stand in one file.
        tensors |= {f"{path}.{key}": value.clone() for key, value in packed._asdict().items()}
    return tensors


def _restore(layer: DecoderLayer, tensors: dict[str, torch.Tensor], prefix: str, job: Job) -> None:
    """Put the weights that an earlier run quantised into the layer."""
    for name, linear in plain_linears(layer).items():
        for path, rows in _published_rows(layer, name):
            parts = (tensors[f"{prefix}{path}.{key}"] for key in PackedMatrix._fields)
            matrix = unpack_matrix(PackedMatrix(*parts), job.config.bits, job.checkpoint_format)
            linear.weight[rows].copy_(matrix.dequantize())


def _published_rows(layer: DecoderLayer, name: str) -> Iterator[tuple[str, slice]]:
    """The matrices that a checkpoint has for one of the layer's: their names, and their rows."""
    start = 0
    for part, num_outputs in layer_slices(layer.self_attn.config)[name]:
        yield f"{name.rpartition('.')[0]}.{part}", slice(start, start + num_outputs)
        start += num_outputs


def run_in_place(layer: DecoderLayer, rope: RotaryTable, activations: Activations) -> None:
    """Replace what goes into the layer by what comes out."""
    for batch in activations.batches():
        for target, result in zip(batch, run_layer(layer, rope, batch), strict=True):
            target.copy_(result)


def plain_linears(layer: DecoderLayer) -> dict[str, Linear]:
    """Matrix of the layer -> where its weights are."""
    linears = layer_linears(layer)
    return {name: linear for name, linear in linears.items() if isinstance(linear, Linear)}


def _replace(layer: DecoderLayer, linears: dict[str, Any]) -> None:
    for name, linear in linears.items():
        part, _, attribute = name.partition(".")
        setattr(getattr(layer, part), attribute, linear)


def _is_matrix(name: str) -> bool:
    return name.endswith("_proj.weight")


class _State:
    """Which layers of a job are done; kept in the target until all are."""

    def __init__(self, job: Job, token_ids: torch.Tensor) -> None:
        self.file = job.target / _STATE_FILE
        self.settings = {
            "source": job.source.name,
            "source_config": (job.source / "config.json").read_text(encoding="utf-8"),
            "method": job.method.value,
            "checkpoint_format": job.checkpoint_format,
            "dtype": str(job.dtype),
            "quantize_lm_head": job.quantize_lm_head,
            "first_token_weight": job.first_token_weight,
            "config": asdict(job.config),
            "calibration": hashlib.sha256(token_ids.numpy().tobytes()).hexdigest(),
        }
        self.reports: list[LayerReport] = []
        job.target.mkdir(parents=True, exist_ok=True)
        if self.file.is_file():
            content = json.loads(self.file.read_text(encoding="utf-8"))
            if content["settings"] != self.settings:
                raise ValueError(
                    f"{job.target} holds an unfinished run with other settings; give another "
                    f"output folder, or remove that one"
                )
            self.reports = [LayerReport(**report) for report in content["reports"]]
        elif any(job.target.iterdir()):
            raise ValueError(f"{job.target} is not empty; give another output folder")

    def add(self, report: LayerReport) -> None:
        self.reports.append(report)
        reports = [asdict(report) for report in self.reports]
        write_json_atomically(self.file, {"settings": self.settings, "reports": reports})

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)


def _write_index(job: Job) -> None:
    """What makes the folder a checkpoint, last of all: index, configs, tokenizer."""
    weight_map, num_bytes = {}, 0
    for file in sorted(job.target.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            weight_map[name] = file.name
            num_bytes += tensor.nbytes
    _copy_companions(job.source, job.target)
    settings = {
        **{name: value for name, value in asdict(job.config).items() if name != "mse"},
        "checkpoint_format": job.checkpoint_format,
        "lm_head": job.quantize_lm_head,
        "true_sequential": False,
    }
    write_json_atomically(job.target / "quantize_config.json", settings)
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    write_json_atomically(job.target / "model.safetensors.index.json", index)
    config = json.loads((job.source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq", **settings}
    if job.quantize_lm_head:
        config["tie_word_embeddings"] = False
    write_json_atomically(job.target / "config.json", config)


@torch.inference_mode()
def dequantize_checkpoint(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Write the checkpoint that the quantised one stands for: what it must compute like.

    ValueError if `source` is not quantised, or `target` holds anything.
    """
    config = ModelConfig.from_directory(source)
    if config.quantization is None:
        raise ValueError(f"{source} is not quantised; there is nothing to write out")
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty; give another output folder")
    scheme = Scheme.from_checkpoint(config.quantization)
    head_scheme = Scheme.of_head(config.quantization) or scheme
    target.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    with Checkpoint(source) as checkpoint:
        for name in checkpoint.names:
            stem, _, kind = name.rpartition(".")
            if kind == "qweight":
                parts = (checkpoint.get(f"{stem}.{key}") for key in PackedMatrix._fields)
                own = head_scheme if stem == "lm_head" else scheme
                matrix = unpack_matrix(PackedMatrix(*parts), own.config.bits, own.checkpoint_format)
                tensors[f"{stem}.weight"] = matrix.dequantize().to(dtype)
            elif kind not in PackedMatrix._fields:
                tensors[name] = checkpoint.get(name).to(dtype)
    save_safetensors(tensors, target / "model.safetensors")
    _copy_companions(source, target)
    published = json.loads((source / "config.json").read_text(encoding="utf-8"))
    del published["quantization_config"]
    published["torch_dtype"] = str(dtype).removeprefix("torch.")
    write_json_atomically(target / "config.json", published)


def _copy_companions(source: Path, target: Path) -> None:
    """Tokenizer and what else belongs to a checkpoint."""
    for pattern in _COPIED:
        for path in source.glob(pattern):
            shutil.copyfile(path, target / path.name)
