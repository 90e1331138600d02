"""Shares of a model: together they are the whole, and nothing is in two but what must be."""

from dataclasses import replace

import pytest
import torch

from folovllm.model.config import ModelConfig
from folovllm.model.ranks import ALONE, Ranks
from folovllm.model.sharding import fill_piece, piece

QWEN = ModelConfig.preset("qwen3-8b")


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32])
def test_heads_and_columns_are_shared_out_and_key_heads_repeated(size: int) -> None:
    share = Ranks(0, size).share_of_model(QWEN)
    assert share.num_heads * size == QWEN.num_heads
    assert share.intermediate_size * size == QWEN.intermediate_size
    assert share.num_kv_heads == max(1, QWEN.num_kv_heads // size)
    assert share.hidden_size == QWEN.hidden_size
    assert share.vocab_size == QWEN.vocab_size


@pytest.mark.parametrize(
    ("size", "shape", "message"),
    [
        (3, {}, "=3 does not divide this model's 32 attention heads"),
        (8, {"intermediate_size": 100}, "=8 does not divide this model's 100 MLP columns"),
        (6, {"num_heads": 24, "num_kv_heads": 8}, "=6 and this model's 8 key/value heads"),
    ],
)
def test_what_does_not_divide_is_refused(size: int, shape: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ranks(0, size).share_of_model(replace(QWEN, **shape))


@pytest.mark.parametrize("vocab_size", [1, 63, 64, 199, 49152, 151936])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_token_is_at_home_in_one_rank(vocab_size: int, size: int) -> None:
    parts = [Ranks(rank, size).vocab_part(vocab_size) for rank in range(size)]
    tokens = [token for part in parts for token in range(part.start, part.stop)]
    assert tokens == list(range(vocab_size))
    share = Ranks(0, size).share_of_vocab(vocab_size)
    assert all(part.start == min(rank * share, vocab_size) for rank, part in enumerate(parts))
    assert size == 1 or share % 64 == 0


@pytest.mark.parametrize(("num_parts", "size"), [(8, 8), (2, 8), (1, 4), (4, 4)])
def test_neighbours_have_the_same_key_head_where_heads_are_fewer(num_parts, size) -> None:
    parts = [Ranks(rank, size).part(num_parts * 16, 16) for rank in range(size)]
    assert [part.start for part in parts] == [rank * num_parts // size * 16 for rank in range(size)]
    assert {part.stop - part.start for part in parts} == {16}


def test_pieces_of_a_tensor_are_the_tensor() -> None:
    whole = torch.arange(24).view(4, 6)
    pieces = [whole[piece("x", whole.shape, torch.Size((4, 2)), Ranks(r, 3))] for r in range(3)]
    assert torch.equal(torch.cat(pieces, dim=1), whole)
    assert piece("x", whole.shape, whole.shape, ALONE) == (slice(None), slice(None))


def test_rows_of_no_token_are_zero() -> None:
    table, share = torch.ones(70, 2), torch.full((64, 2), 7.0)
    name = "model.embed_tokens.weight"
    fill_piece(share, table[piece(name, table.shape, share.shape, Ranks(1, 2))])
    assert share.sum() == 6 * 2
