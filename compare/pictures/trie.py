"""The trie of cached blocks as it grows, shares, copies and evicts: note 06, 2.3."""

from dataclasses import dataclass

from .canvas import (
    BOLD,
    INK,
    LIGHT_BLUE,
    LIGHT_GREEN,
    LIGHT_ORANGE,
    RULE,
    SMALL,
    SOFT_INK,
    Canvas,
    Font,
)


@dataclass(frozen=True)
class Node:
    """A cached block: its id, its tokens, and what stands behind it."""

    block: int
    tokens: str
    children: tuple["Node", ...] = ()
    fill: str = LIGHT_GREEN


@dataclass(frozen=True)
class Panel:
    """The trie after a prompt, with the sentences above and below it."""

    title: str
    below: str
    roots: tuple[Node, ...]


_WIDTH, _HEIGHT, _GAP, _ROW = 96, 34, 22, 44


def trie() -> Canvas:
    new, copied = LIGHT_BLUE, LIGHT_ORANGE
    tail_of_b = Node(3, "20 21 22 23", (Node(4, "24", fill=new),), new)
    after_c = Node(3, "20 21 22 23", (Node(4, "24"),))
    panels = (
        Panel(
            "A = 1 … 10, three tokens of answer: nothing is found, three blocks stay",
            "idle, oldest first: 2 1 0 · free: 3 4 5 6 7",
            (
                Node(0, "1 2 3 4", (
                    Node(1, "5 6 7 8", (Node(2, "9 10 90 90", fill=new),), new),
                ), new),
            ),
        ),
        Panel(
            "B = 1 … 8, 20 … 24: blocks 0 and 1 are found, the prefixes part behind them",
            "idle: 2 4 3 1 0 · free: 5 6 7",
            (Node(0, "1 2 3 4", (Node(1, "5 6 7 8", (Node(2, "9 10 90 90"), tail_of_b)),)),),
        ),
        Panel(
            "C = 1 … 6, 30, 31: half of block 1 matches and is copied to block 5",
            "idle: 2 4 3 1 5 0 · free: 6 7",
            (
                Node(0, "1 2 3 4", (
                    Node(1, "5 6 7 8", (Node(2, "9 10 90 90"), after_c)),
                    Node(5, "5 6 30 31", fill=copied),
                )),
            ),
        ),
        Panel(
            "D = 13 × 40: four blocks, two are free; 2 and 4, idle longest, are evicted",
            "idle: 3 1 5 0 4 2 7 6 · free: none",
            (
                Node(0, "1 2 3 4", (
                    Node(1, "5 6 7 8", (Node(3, "20 21 22 23"),)),
                    Node(5, "5 6 30 31"),
                )),
                Node(6, "40 40 40 40", (
                    Node(7, "40 40 40 40", (
                        Node(2, "40 40 40 40", (Node(4, "40", fill=new),), new),
                    ), new),
                ), new),
            ),
        ),
    )  # fmt: skip
    canvas = Canvas(
        720,
        680,
        "A trie of cached blocks after four prompts: it grows, two prompts share a prefix, a match "
        "in part is copied, and the blocks that were idle longest are evicted",
    )
    top = 26.0
    for panel in panels:
        canvas.text(20, top, panel.title, BOLD)
        rows = _draw(canvas, panel.roots, top + 16)
        canvas.text(20, top + 16 + rows * _ROW + 12, panel.below, SMALL)
        top += 16 + rows * _ROW + 46
    for x, fill, text in (
        (20, new, "new"),
        (90, LIGHT_GREEN, "was there"),
        (200, copied, "a copy"),
    ):
        canvas.box(x, 654, 14, 14, fill)
        canvas.text(x + 20, 666, text, SMALL)
    return canvas


def _draw(canvas: Canvas, roots: tuple[Node, ...], top: float) -> int:
    """All nodes from the root; the number of rows that they take."""
    canvas.label(20, top, 44, _HEIGHT, "root", "none", Font(size=12, anchor="middle"))
    row = 0
    for node in roots:
        row = _draw_node(canvas, node, (64, top + _HEIGHT / 2), (0, row), top)
    return row


def _draw_node(
    canvas: Canvas,
    node: Node,
    parent: tuple[float, float],
    place: tuple[int, int],
    top: float,
) -> int:
    """Draw a node at (depth, row) and what stands behind it; the first row that is free then."""
    depth, row = place
    x, y = 86 + depth * (_WIDTH + 2 * _GAP), top + row * _ROW
    middle = y + _HEIGHT / 2
    bend = parent[0] + _GAP / 2
    canvas.line([parent, (bend, parent[1]), (bend, middle), (x, middle)], SOFT_INK, 1.2)
    canvas.box(x, y, _WIDTH + 20, _HEIGHT, node.fill, INK)
    canvas.text(x + 8, y + 22, f"{node.block}:", Font(size=12, weight="bold"))
    canvas.text(x + 28, y + 22, node.tokens, Font(size=12))
    next_row = row
    for child in node.children:
        next_row = _draw_node(canvas, child, (x + _WIDTH + 20, middle), (depth + 1, next_row), top)
    canvas.line([(x, y + _HEIGHT), (x + _WIDTH + 20, y + _HEIGHT)], RULE, 0.5)
    return max(next_row, row + 1)
