"""The trie of cached blocks as text: one line per block, indented where prefixes part."""

from collections.abc import Iterator, Sequence

from .prefix_cache import Node, PrefixCache, tokens_of

_NUM_SHOWN = 4
"""First tokens of a block; of a longer one the last is shown besides."""


def trie_text(cache: PrefixCache, ref_counts: Sequence[int]) -> str:
    """ref_counts: block id -> how many requests hold it."""
    lines: list[str] = []
    for salt, root in sorted(cache.root.children.items()):
        lines.append(f"salt {salt.decode()!r}" if salt else "no salt")
        lines += _lines_below(root, "  ", ref_counts)
    return "\n".join(lines)


def _lines_below(node: Node, indent: str, ref_counts: Sequence[int]) -> Iterator[str]:
    while len(node.children) == 1:  # as long as nobody parts, a prefix goes straight down
        (node,) = node.children.values()
        yield indent + _line(node, ref_counts)
    for key in node.sorted_keys:
        child = node.children[key]
        yield indent + "+ " + _line(child, ref_counts)
        yield from _lines_below(child, indent + "|   ", ref_counts)


def _line(node: Node, ref_counts: Sequence[int]) -> str:
    tokens = list(map(str, tokens_of(node.key)))
    if len(tokens) > _NUM_SHOWN + 1:
        tokens[_NUM_SHOWN:-1] = ["…"]
    num_holders = ref_counts[node.block_id]
    state = f"held by {num_holders}" if num_holders else "idle"
    return f"[{node.block_id}] {' '.join(tokens)}  {state}"
