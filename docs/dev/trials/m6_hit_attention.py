"""Attention of a chunk behind a cached prefix: tiles of 64 and 128 rows, more or fewer splits.

    PYTHONPATH=.:shared python docs/dev/trials/m6_hit_attention.py --output FILE.json

Every variant is m4_flash's prompt kernel, the same in all later stages, with other tiles and other
numbers of programs; "as chosen" is what the stage does in a step that is launched, "in a graph"
what it does in one that was captured and knows no lengths. Each is compared with the reference.
To time kernels of another commit, put its m4_flash before this one on PYTHONPATH.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from m4_splits import HEAD_DIM, NUM_HEADS, Cache, expected_rows, make_step

from folovllm.hardware import describe_environment
from m4_flash import flash_attention
from m4_flash.attention import AttentionMetadata
from m4_flash.flash_attention import TritonAttention
from m4_flash.tests.benchmark_attention import DEVICE, time_layers

MIXES = {
    "82 behind 8,110": [(8110, 82)],
    "128 behind 8,064": [(8064, 128)],
    "256 behind 8,000": [(8000, 256)],
    "512 behind 7,680": [(7680, 512)],
    "819 behind 7,373": [(7373, 819)],
    "1,024 behind 15,000": [(15000, 1024)],
    "2,048 behind 6,144": [(6144, 2048)],
    "2,048 behind 14,336": [(14336, 2048)],
    "4 of 200 behind 4,000": [(4000, 200)] * 4,
}


@dataclass(frozen=True)
class Variant:
    """Tiles and how many of them are to be busy at a time, per head; None: as the stage chooses."""

    name: str
    is_large: bool | None = None
    waves: float = 1.0
    """Of as many programs as have room at a time."""
    num_warps: int | None = None
    num_stages: int | None = None
    max_registers: int | None = None
    keys: int | None = None
    programs_per_multiprocessor: int = 2


VARIANTS = (
    Variant("as chosen"),
    Variant("in a graph", is_large=False),
    Variant("64 rows, half a wave", is_large=False, waves=0.5),
    Variant("64 rows, two waves", is_large=False, waves=2),
    Variant("64 rows, three waves", is_large=False, waves=3),
    Variant("128 rows, one wave", is_large=True, max_registers=128),
    Variant("128 rows, two waves", is_large=True, waves=2, max_registers=128),
    Variant("128 rows, three waves", is_large=True, waves=3, max_registers=128),
    Variant(
        "128 rows, alone on a multiprocessor",
        is_large=True,
        num_stages=3,
        programs_per_multiprocessor=1,
    ),
    Variant(
        "128 rows, alone, two waves",
        is_large=True,
        waves=2,
        num_stages=3,
        programs_per_multiprocessor=1,
    ),
    Variant(
        "128 rows, 128 keys, alone, two waves",
        is_large=True,
        waves=2,
        keys=128,
        num_stages=2,
        programs_per_multiprocessor=1,
    ),
)


def apply(variant: Variant, attention: TritonAttention) -> None:
    if variant.is_large is None:
        return
    tiles = attention.large_tiles if variant.is_large else attention.small_tiles
    tiles = replace_tiles(tiles, variant)
    attention.small_tiles = attention.large_tiles = tiles
    places = attention.num_programs // 3 * variant.programs_per_multiprocessor
    attention.tiles_per_head = -(-int(places * variant.waves) // attention.num_head_tiles)
    num_tile_parts = attention.tiles_per_head * attention.num_head_tiles
    num_rows = max(len(attention.lse), num_tile_parts * tiles.rows)
    attention.partial = torch.empty((num_rows, HEAD_DIM), dtype=torch.float32, device=DEVICE)
    attention.lse = torch.empty(num_rows, dtype=torch.float32, device=DEVICE)
    num_pairs = max(len(attention.num_arrived), num_tile_parts)
    attention.num_arrived = torch.zeros(num_pairs, dtype=torch.int32, device=DEVICE)


def replace_tiles(tiles: flash_attention._Tiles, variant: Variant) -> flash_attention._Tiles:
    changes = {
        name: value
        for name in ("num_warps", "num_stages", "keys")
        if (value := getattr(variant, name)) is not None
    }
    if variant.is_large:
        changes["max_registers"] = variant.max_registers
    return tiles._replace(max_splits=flash_attention.MAX_SPLITS, **changes)


def measure(name: str, shares: list[tuple[int, int]], variants: list[Variant]) -> dict[str, object]:
    """Microseconds of a layer by variant."""
    cache = Cache([c + n for c, n in shares])
    metadata, (q, k, v) = make_step(shares, cache)
    first = TritonAttention(cache, NUM_HEADS, len(shares))  # type: ignore[arg-type]
    first.start_step(metadata)
    first.forward(metadata, 0, q, k, v)  # the chunk's own keys and values are in the cache now
    _, expected = expected_rows(len(shares) - 1, shares, cache, q)
    num_pairs = sum(n * c + n * (n + 1) / 2 for c, n in shares)
    row: dict[str, object] = {
        "mix": name,
        "flops": 4 * HEAD_DIM * NUM_HEADS * num_pairs,
        "us": {},
        "error": {},
    }
    for variant in variants:
        attention = TritonAttention(cache, NUM_HEADS, len(shares))  # type: ignore[arg-type]
        apply(variant, attention)
        error, seconds = time_variant(attention, metadata, (q, k, v), expected, len(cache.keys))
        row["us"][variant.name] = round(seconds * 1e6, 2)  # type: ignore[index]
        row["error"][variant.name] = round(error, 5)  # type: ignore[index]
    return row


def time_variant(
    attention: TritonAttention,
    metadata: AttentionMetadata,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    expected: torch.Tensor,
    num_layers: int,
) -> tuple[float, float]:
    """Relative error of the last request's output, and seconds of a layer."""

    def attend(layer_idx: int) -> torch.Tensor:
        return attention.forward(metadata, layer_idx, *qkv)

    attention.start_step(metadata)
    torch.cuda.synchronize()
    out = attend(0)[-len(expected) :].float()
    error = ((out - expected.float()).norm() / expected.float().norm()).item()
    return error, time_layers(attend, num_layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--variants", default="", help="comma-separated beginnings; all")
    options = parser.parse_args()
    output, names = options.output, tuple(options.variants.split(","))
    variants = [variant for variant in VARIANTS if variant.name.startswith(names)]
    rows = []
    for name, shares in MIXES.items():
        rows.append(measure(name, shares, variants))
        print(rows[-1], flush=True)
        if output is not None:
            result = {"rows": rows, "environment": describe_environment()}
            output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
