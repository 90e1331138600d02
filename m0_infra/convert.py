"""Writes a GGUF file as a published checkpoint folder: safetensors, tokenizer and config."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from .gguf_tokenizer import build_tokenizer, tokenizer_config
from .gguf_weights import GGUFCheckpoint


def convert_gguf(gguf_path: Path, directory: Path) -> None:
    """Write the model in `gguf_path` into the existing, empty `directory`.

    Weights are dequantised and stored in bfloat16, the type the model was published in. Writes
    config.json, generation_config.json, model.safetensors, tokenizer.json and
    tokenizer_config.json. ValueError if the file is not a Llama model with a known tokenizer; a
    failure leaves an unfinished folder, which is the caller's to remove.
    """
    checkpoint = GGUFCheckpoint(gguf_path)
    config = checkpoint.config()
    build_tokenizer(checkpoint).save(str(directory / "tokenizer.json"))
    _write_json(directory / "tokenizer_config.json", tokenizer_config(checkpoint))
    _write_json(directory / "config.json", config)
    generation = {f"{role}_token_id": config[f"{role}_token_id"] for role in ("bos", "eos", "pad")}
    _write_json(directory / "generation_config.json", generation)
    # The format entry is what Transformers asks for before it opens a file.
    weights = dict(checkpoint.iter_weights())
    save_file(weights, str(directory / "model.safetensors"), metadata={"format": "pt"})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
