"""Tiled attention: what lies in HBM, what on the chip, and what never leaves it."""

from .canvas import (
    BLUE,
    BOLD,
    GREEN,
    GREY,
    INK,
    LIGHT_BLUE,
    LIGHT_GREEN,
    LIGHT_ORANGE,
    LIGHT_PURPLE,
    MIDDLE,
    ORANGE,
    PURPLE,
    RED,
    SMALL,
    SOFT_INK,
    Canvas,
    Font,
)

_NUM_TILES = 6
_SMALL_MIDDLE = Font(size=11, anchor="middle")


def tiles() -> Canvas:
    canvas = Canvas(
        720,
        410,
        "One program of tiled attention: its tile of queries stays on the chip, tiles of keys and "
        "values pass through, scores never leave the chip, and only the output is written to HBM",
    )
    canvas.text(20, 28, "HBM", BOLD)
    columns = (
        (20, "Q", LIGHT_ORANGE),
        (76, "K", LIGHT_BLUE),
        (132, "V", LIGHT_GREEN),
        (630, "out", LIGHT_PURPLE),
    )
    for x, name, fill in columns:
        canvas.text(x + 22, 52, name, MIDDLE)
        for tile in range(_NUM_TILES):
            mine = tile == 3 if name in ("Q", "out") else tile == 1
            canvas.box(x, 60 + 44 * tile, 44, 44, fill if mine else GREY, INK)
    canvas.text(630, 28, "HBM", BOLD)
    _chip(canvas)
    canvas.arrow([(42, 236), (42, 344), (270, 344), (270, 300)], ORANGE, 2)
    canvas.text(20, 366, "Q is read once, K and V tile after tile", SMALL)
    canvas.arrow([(120, 120), (222, 120)], BLUE, 2)
    canvas.arrow([(176, 136), (200, 136), (200, 176), (222, 176)], GREEN, 2)
    canvas.arrow([(580, 262), (608, 262), (608, 214), (628, 214)], PURPLE, 2)
    canvas.text(700, 346, "written once", Font(size=11, colour=SOFT_INK, anchor="end"))
    canvas.text(20, 396, "Plain attention writes the N × N scores to HBM and reads them back: six "
                "passes. Here they live for the time of one tile.", SMALL)  # fmt: skip
    return canvas


def _chip(canvas: Canvas) -> None:
    canvas.box(224, 44, 368, 284, "none", INK, 8)
    canvas.text(236, 64, "chip: one program (registers, shared memory)", BOLD)
    canvas.label(236, 100, 96, 40, "K tile", LIGHT_BLUE)
    canvas.label(236, 156, 96, 40, "V tile", LIGHT_GREEN)
    canvas.label(236, 258, 96, 40, "Q tile, stays", LIGHT_ORANGE)
    canvas.label(376, 100, 92, 60, "scores\nq·k / √d", "#FFFFFF", MIDDLE, RED)
    canvas.label(376, 196, 92, 46, "exp(s − m)", "#FFFFFF", MIDDLE, RED)
    canvas.text(422, 182, "masked", _SMALL_MIDDLE)
    canvas.label(498, 228, 82, 68, "m, l, a\nrunning", LIGHT_PURPLE)
    canvas.arrow([(332, 120), (374, 120)])
    canvas.arrow([(332, 272), (354, 272), (354, 144), (374, 144)])
    canvas.line([(422, 160), (422, 170)])
    canvas.arrow([(422, 186), (422, 195)])
    canvas.arrow([(468, 219), (482, 219), (482, 250), (496, 250)])
    canvas.arrow([(332, 184), (346, 184), (346, 310), (540, 310), (540, 298)], GREEN)
    canvas.text(376, 92, "never leave the chip", Font(size=11, colour=RED))
