"""Perplexity of a text: what a quantised model has lost."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from folovllm.json_files import write_json_atomically
from folovllm.model.transformer import CausalLM

from .whole_sequences import mean_nll, sequences_at_a_time


@torch.inference_mode()
def perplexity(
    model: CausalLM,
    token_ids: list[int],
    window: int,
    num_windows: int | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """exp of the mean negative log-likelihood over windows that do not overlap.

    The protocol of the GPTQ paper: the text as one sequence of tokens, cut into whole windows, each
    computed by itself; what is left at the end is dropped. num_windows: the first so many; None is
    all. report: called with (windows done, windows). ValueError if the text is shorter than one.
    """
    if not 2 <= window <= model.config.num_positions:
        raise ValueError(
            f"window must be between 2 and the model's {model.config.num_positions} positions, "
            f"got {window}"
        )
    total = count_windows(len(token_ids), window, num_windows)
    if total < 1:
        raise ValueError(
            f"the text has {len(token_ids)} tokens, less than a window of {window}; give a longer "
            f"text or a smaller window"
        )
    tokens = torch.tensor(token_ids[: total * window], device=model.device).view(total, window)
    nll, done = 0.0, 0
    for sequences in tokens.split(sequences_at_a_time(window)):
        nll += mean_nll(model, sequences) * len(sequences)
        done += len(sequences)
        report(done, total)
    return math.exp(nll / total)


def count_windows(num_tokens: int, window: int, num_windows: int | None) -> int:
    """How many windows of a text are computed."""
    total = num_tokens // window
    return total if num_windows is None else min(total, num_windows)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What a perplexity is of: two can be compared only where all of this is equal."""

    text: str
    """Name of the file"""
    text_sha256: str
    window: int
    num_windows: int
    dtype: str


def store_perplexity(file: Path, protocol: Protocol, model: Mapping[str, Any]) -> None:
    """Add a model's perplexity to a file of them, or replace what the file has of that model.

    model: its `name`, its `quantization` (settings, or None), its `perplexity`, and what else is
    worth knowing. ValueError if the file's are of another protocol.
    """
    settings = asdict(protocol)
    stored: dict[str, Any] = {**settings, "models": []}
    if file.is_file():
        stored = json.loads(file.read_text(encoding="utf-8"))
        other = [key for key, value in settings.items() if stored.get(key) != value]
        if other:
            raise ValueError(
                f"{file} holds perplexities of another {', '.join(other)}, which cannot stand "
                f"beside this one; give another file"
            )
    identity = ("name", "quantization")
    rest = [m for m in stored["models"] if any(m[key] != model[key] for key in identity)]
    write_json_atomically(file, {**stored, "models": [*rest, dict(model)]})
