"""A word of a GPTQ checkpoint: eight weights of 4 bits, and how they become numbers."""

from .canvas import (
    BLUE,
    BOLD,
    INK,
    LIGHT_BLUE,
    LIGHT_GREEN,
    LIGHT_ORANGE,
    MONO,
    RULE,
    SMALL,
    SOFT_INK,
    YELLOW,
    Canvas,
    Font,
)

VALUES = (1, 2, 3, 4, 5, 6, 7, 8)
"""What inputs 8r to 8r + 7 have, as in note 07, 4.2."""
ZERO, SCALE = 8, 0.02
_FILLS = (LIGHT_BLUE, LIGHT_ORANGE, LIGHT_GREEN, YELLOW)
_CELL, _LEFT = 82, 32
_MONO = Font(size=13, family=MONO, anchor="middle")


def nibbles() -> Canvas:
    word = sum(value << (4 * index) for index, value in enumerate(VALUES))
    canvas = Canvas(
        720,
        330,
        "Eight weights of four bits in one 32-bit word, the first in the lowest bits; each minus "
        "the zero point, times the scale of its group, is a weight",
    )
    canvas.text(_LEFT, 28, f"one word of qweight: 0x{word:08X}, inputs 8r to 8r + 7 of one output",
                BOLD)  # fmt: skip
    for index in reversed(range(8)):
        _column(canvas, _LEFT + _CELL * (7 - index), index)
    canvas.text(_LEFT, 246, f"minus the zero point {ZERO}, times the scale {SCALE}:", SMALL)
    canvas.text(
        _LEFT,
        312,
        f"The zero point is stored as {ZERO - 1} in version 1 of the format, as {ZERO} in version "
        "2: a reader that mixes them up shifts every weight.",
        SMALL,
    )
    return canvas


def _column(canvas: Canvas, x: float, index: int) -> None:
    value, fill = VALUES[index], _FILLS[index % 4]
    middle = x + _CELL / 2
    canvas.text(x + 2, 58, str(4 * index + 3), Font(size=10, colour=SOFT_INK))
    canvas.text(x + _CELL - 2, 58, str(4 * index), Font(size=10, colour=SOFT_INK, anchor="end"))
    for bit in range(4):
        width = _CELL / 4
        shown = (value >> (3 - bit)) & 1
        canvas.box(x + width * bit, 64, width, 34, fill, RULE, 0)
        canvas.text(x + width * (bit + 0.5), 87, str(shown), _MONO)
    canvas.box(x, 64, _CELL, 34, "none", INK, 0)
    canvas.arrow([(middle, 100), (middle, 126)], BLUE, 1.2)
    canvas.label(x + 4, 128, _CELL - 8, 34, f"q = {value}", fill, _MONO)
    canvas.text(middle, 184, f"in 8r + {index}" if index else "in 8r",
                Font(size=11, colour=SOFT_INK, anchor="middle"))  # fmt: skip
    canvas.arrow([(middle, 192), (middle, 226)], BLUE, 1.2)
    canvas.label(x + 4, 256, _CELL - 8, 30, f"{(value - ZERO) * SCALE:+.2f}", fill, _MONO)
