"""Random numbers from a seed in the place of a checkpoint."""

from collections.abc import Iterable
from typing import Any

import torch

from .config import ModelConfig
from .linear import INITIAL_STD, Linear, Linears
from .sharding import EMBEDDING, HEAD, fill_piece, piece
from .transformer import CausalLM, DecoderLayer, named_members
from .weights import layer_tensors, published_tensors


def load_random(model: CausalLM, seed: int) -> None:
    """Fill the parameters on their device from `seed`; norms are 1 and biases 0."""
    generator = torch.Generator(device=model.device).manual_seed(seed)
    _fill(model.named_members(), generator)


def load_random_part(model: CausalLM, config: ModelConfig, linears: Linears, seed: int) -> None:
    """This rank's part of what `load_random` makes of the whole model, of which one layer at a time
    is there. config: of the whole model.

    Matrices of another format than `Linear` cannot be cut like that, and every rank draws its own:
    together they are as large and as fast as the whole model, and another one.
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    if linears.of_layers is not Linear:
        _fill(model.named_members(), generator.manual_seed(seed + model.collectives.ranks.rank))
        return
    like = torch.empty(0, dtype=model.dtype, device=model.device)
    targets, ranks = published_tensors(model), model.collectives.ranks

    def take(name: str, whole: torch.Tensor) -> None:
        target = targets[name]
        fill_piece(target, whole[piece(name, whole.shape, target.shape, ranks)])

    def draw_table(name: str) -> None:
        table = like.new_empty(config.vocab_size, config.hidden_size)
        take(name, table.normal_(0.0, INITIAL_STD, generator=generator))

    draw_table(EMBEDDING)
    for index in range(config.num_layers):
        layer = DecoderLayer(config, index, model.kernels, like, linears.of_layers)
        _fill(named_members(layer), generator)
        for name, tensor in layer_tensors(layer).items():
            take(f"model.layers.{index}.{name}", tensor)
    model.norm.fill_(1.0)
    if HEAD in targets:
        draw_table(HEAD)


def _fill(members: Iterable[tuple[str, Any]], generator: torch.Generator) -> None:
    for name, member in members:
        if not isinstance(member, torch.Tensor):
            member.randomize(generator)
        elif name.endswith("norm"):
            member.fill_(1.0)
        else:
            member.normal_(0.0, INITIAL_STD, generator=generator)
