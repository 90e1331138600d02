"""From a model's name to a CausalLM that is ready to run."""

from pathlib import Path

import torch

from ..kernels.selection import select_kernels
from .collectives import Collectives
from .config import ModelConfig
from .linear import LinearsOf, plain_linears
from .random_weights import load_random, load_random_part
from .transformer import CausalLM
from .weights import load_safetensors, with_published_head

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer*", "*.jinja"]
"""What is fetched from a Hub repository: never pickled weights, never code."""


def load_model(
    model: str | Path,
    *,
    load_format: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
    linears: LinearsOf = plain_linears,
    collectives: Collectives | None = None,
) -> CausalLM:
    """Build the model and fill it.

    model: a local directory, a Hub id, or, with load_format "dummy", a preset's name or a
    directory with a config.json. load_format: "auto" and "safetensors" read the checkpoint,
    "dummy" draws random weights from `seed` on the device. dtype: "auto" is the checkpoint's on
    CUDA and float32 on a CPU. device: "auto" is CUDA where there is one; "cuda:1" becomes the
    process's current device, so a process serves from one device. linears: what computes the
    matrices of the layers. collectives: of the processes that hold the model together, each of
    which loads its part. ValueError or FileNotFoundError name what is wrong.
    """
    target = resolve_device(device)
    if target.index is not None:
        torch.cuda.set_device(target)  # Triton launches on the current device, wherever tensors are
    if load_format == "dummy":
        directory = Path(model)
        config = (
            ModelConfig.from_directory(directory)
            if directory.is_dir()
            else ModelConfig.preset(str(model))
        )
    elif load_format in ("auto", "safetensors"):
        directory = resolve_model_directory(model)
        config = with_published_head(ModelConfig.from_directory(directory), directory)
    else:
        raise ValueError(
            f"load_format must be 'auto', 'safetensors' or 'dummy', got {load_format!r}"
        )
    kernels, torch_dtype = select_kernels(target), resolve_dtype(dtype, config, target)
    matrices = linears(config.quantization)
    with torch.no_grad():
        causal_lm = CausalLM(config, kernels, torch_dtype, target, matrices, collectives)
        is_whole = causal_lm.collectives.ranks.size == 1
        if load_format == "dummy" and is_whole:
            load_random(causal_lm, seed)
        elif load_format == "dummy":
            load_random_part(causal_lm, config, matrices, seed)
        else:
            meta = torch.device("meta")
            whole = (
                causal_lm if is_whole else CausalLM(config, kernels, torch_dtype, meta, matrices)
            )
            load_safetensors(causal_lm, directory, whole)
    return causal_lm


def resolve_device(device: str) -> torch.device:
    """The device to run on; ValueError if it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu or cuda[:index], got {device!r}") from None
    if target.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda[:index], got {device!r}")
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {device!r} was asked for but torch sees no CUDA device; use device='cpu' or "
            f"install a CUDA build of torch"
        )
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device!r} was asked for but torch sees {torch.cuda.device_count()} CUDA "
            f"devices, numbered from 0; give a lower index"
        )
    return torch.device("cpu") if target.type == "cpu" else target


def resolve_dtype(dtype: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    name = dtype
    if dtype == "auto":
        name = config.dtype if device.type == "cuda" else "float32"
    if name not in _DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(_DTYPES)}, got {name!r}")
    return _DTYPES[name]


def resolve_model_directory(model: str | Path) -> Path:
    """A local directory as it is; anything else is taken for a Hub id and downloaded."""
    directory = Path(model)
    if directory.is_dir():
        return directory
    name = str(model)
    if directory.is_file():
        raise FileNotFoundError(_about_a_file(directory))
    if name in ModelConfig.preset_names():
        raise ValueError(
            f"{name} is a preset, a model's shape without weights; add load_format='dummy' "
            f"(--load-format dummy) for random ones, or give a directory or a Hub id"
        )
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"model directory {name} does not exist; give a directory with config.json and "
            f"*.safetensors, a Hub id such as org/name, or fetch the embedded model with "
            f"`python -m m0_infra fetch`"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:
        raise FileNotFoundError(
            f"{name} is not a local directory and could not be fetched from the Hub "
            f"({type(error).__name__}: {error}); check the name and the network, or download it "
            f"elsewhere and give the directory"
        ) from error


def _about_a_file(path: Path) -> str:
    """What to do instead of giving a single file as a model."""
    if path.suffix == ".gguf":
        return (
            f"{path} is a GGUF file, and a model here is a directory with config.json, "
            f"*.safetensors and tokenizer files; get the model in that form. (The embedded model "
            f"is converted from GGUF: `python -m m0_infra fetch`)"
        )
    return (
        f"{path} is a file, and a model is a directory with config.json, *.safetensors and "
        f"tokenizer files; give {path.parent}"
    )
