"""Perplexity of a text: what a quantised model has lost."""

import math
from collections.abc import Callable

import torch

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
    total = len(token_ids) // window
    if num_windows is not None:
        total = min(total, num_windows)
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
