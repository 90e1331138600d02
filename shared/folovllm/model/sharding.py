"""Which piece of a checkpoint's tensor belongs to a process that holds a part of the model."""

import torch

from .ranks import Ranks

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def piece(name: str, whole: torch.Size, share: torch.Size, ranks: Ranks) -> tuple[slice, ...]:
    """What a rank takes of a tensor of shape `whole`: all but in the dimension in which its share
    is smaller. Of tables with a row per token it may be less than the share."""
    cuts = []
    for num_all, num_ours in zip(whole, share, strict=True):
        if num_all == num_ours:
            cuts.append(slice(None))
        elif name == EMBEDDING or name.startswith("lm_head."):
            cuts.append(ranks.vocab_part(num_all))
        else:
            cuts.append(ranks.part(num_all, num_ours))
    return tuple(cuts)


def fill_piece(target: torch.Tensor, values: torch.Tensor) -> None:
    """Copy values to the beginning of `target`; what is behind them becomes 0."""
    if target.shape != values.shape:
        target.zero_()
        target = target[tuple(slice(0, size) for size in values.shape)]
    target.copy_(values)
