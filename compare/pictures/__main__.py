"""Draw every picture of the notes again: `python -m compare.pictures`."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from . import attention, measured, nibbles, paging, quality, quantised, tiles, timelines, trie
from .canvas import Canvas

FOLDER = Path("docs/learn/pictures")
PICTURES: Mapping[str, Callable[[], Canvas]] = MappingProxyType(
    {
        "attention": attention.one_query,
        "mask": attention.mask,
        "cache": attention.cache,
        "grid": attention.grid,
        "memories": attention.memories,
        "time-per-token": measured.time_per_token,
        "roofline": measured.roofline,
        "eager-and-graph": timelines.eager_and_graph,
        "block-tables": paging.block_tables,
        "tiles": tiles.tiles,
        "chunks": timelines.chunks,
        "trie": trie.trie,
        "nibbles": nibbles.nibbles,
        "perplexity-over-bytes": quality.perplexity_over_bytes,
        "error-by-layer": quality.error_by_layer,
        "step-over-batch": quantised.step_over_batch,
    }
)
"""What each file without its ending shows."""


def draw(folder: Path) -> list[Path]:
    """Write all pictures; the files, in order."""
    files = []
    for name, picture in PICTURES.items():
        files.append(folder / f"{name}.svg")
        picture().save(files[-1])
    return files


if __name__ == "__main__":
    for path in draw(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER):
        print(path)
