"""Text that shows a quantiser what the inputs of each layer look like."""

from importlib import resources
from pathlib import Path
from typing import Protocol

import torch


class Encoder(Protocol):
    def encode(self, text: str) -> list[int]: ...


def calibration_tokens(
    tokenizer: Encoder, file: Path | None, num_sequences: int, length: int
) -> torch.Tensor:
    """[num_sequences, length] int64, the beginning of a text; None: the one of this package.

    ValueError if the text is shorter than that.
    """
    text = read_calibration_text() if file is None else file.read_text(encoding="utf-8")
    token_ids = tokenizer.encode(text)
    if len(token_ids) < num_sequences * length:
        raise ValueError(
            f"the calibration text has {len(token_ids)} tokens, and {num_sequences} sequences of "
            f"{length} take {num_sequences * length}; give a longer text or ask for less"
        )
    return torch.tensor(token_ids[: num_sequences * length]).view(num_sequences, length)


def read_calibration_text() -> str:
    """This project's notes, which are ours to ship."""
    file = resources.files("folovllm").joinpath("data", "calibration.txt")
    return file.read_text(encoding="utf-8")
