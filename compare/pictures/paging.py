"""Block tables: from the tokens of two requests to the blocks of a pool."""

from .canvas import (
    BLUE,
    BOLD,
    GREY,
    LIGHT_BLUE,
    LIGHT_ORANGE,
    ORANGE,
    RULE,
    SMALL,
    SOFT_INK,
    Canvas,
    Font,
)

BLOCK_SIZE, NUM_BLOCKS = 4, 8
REQUESTS = (
    ("a", (71, 72, 73, 74, 75, 76), (7, 2), LIGHT_BLUE, BLUE),
    ("b", (81, 82, 83, 84, 85), (3, 0), LIGHT_ORANGE, ORANGE),
)
"""The example of note 03, 4.2: name, tokens, block table, colours."""
_CELL, _TINY = 26, Font(size=11, anchor="middle")


def block_tables() -> Canvas:
    canvas = Canvas(
        720,
        380,
        "Two requests with six and five tokens; their block tables [7, 2] and [3, 0] say in which "
        "blocks of the pool the keys and values of their tokens lie",
    )
    canvas.text(20, 28, "tokens of a request", BOLD)
    canvas.text(268, 28, "its block table", BOLD)
    canvas.text(430, 28, "pool: 8 blocks of 4 places", BOLD)
    held = {}
    for row, (name, tokens, table, fill, colour) in enumerate(REQUESTS):
        top = 70 + 150 * row
        canvas.text(20, top - 14, f"request {name}", SMALL)
        for index, token in enumerate(tokens):
            line, place = divmod(index, BLOCK_SIZE)
            x, y = 20 + _CELL * place, top + 44 * line
            canvas.label(x, y, _CELL, 28, str(token), fill, _TINY)
        for index, block in enumerate(table):
            y = top + 44 * index
            canvas.label(268, y, 44, 28, str(block), fill)
            canvas.arrow([(20 + _CELL * BLOCK_SIZE + 4, y + 14), (264, y + 14)], colour, 1.2)
            canvas.text(316, y + 19, f"entry {index}", SMALL)
            held[block] = (tokens[index * BLOCK_SIZE :][:BLOCK_SIZE], fill, colour, y + 14)
    for block in range(NUM_BLOCKS):
        _draw_block(canvas, block, 44 + 38 * block, held)
    canvas.text(20, 368, "Token 5 of request a: entry 5 // 4 = 1 names block 2, place 5 % 4 = 1, "
                "slot 2 × 4 + 1 = 9.", SMALL)  # fmt: skip
    return canvas


def _draw_block(canvas: Canvas, block: int, top: float, held: dict) -> None:
    tokens, fill, colour, from_y = held.get(block, ((), GREY, SOFT_INK, None))
    canvas.text(508, top + 19, f"block {block}", Font(size=11, colour=SOFT_INK, anchor="end"))
    for place in range(BLOCK_SIZE):
        x = 516 + _CELL * place
        if place < len(tokens):
            canvas.label(x, top, _CELL, 28, str(tokens[place]), fill, _TINY)
        else:
            canvas.box(x, top, _CELL, 28, "none" if tokens else GREY, RULE)
    if from_y is not None:
        canvas.arrow([(360, from_y), (452, top + 14)], colour, 1.2)
    else:
        canvas.text(630, top + 19, "free", SMALL)
