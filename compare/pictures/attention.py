"""Attention for the primer: one query that weighs all keys, and who may see whom."""

from .canvas import (
    BLUE,
    BOLD,
    CODE,
    GREEN,
    GREY,
    INK,
    LIGHT_BLUE,
    LIGHT_GREEN,
    LIGHT_ORANGE,
    MIDDLE,
    PLAIN,
    RULE,
    SMALL,
    SOFT_INK,
    Canvas,
    Font,
)

WORDS = ("The", "cat", "sat", "on")
WEIGHTS = (0.05, 0.55, 0.3, 0.1)
"""Made up for the picture; they add up to 1."""


def one_query() -> Canvas:
    """The newest token's query against every key, then the weighted values."""
    canvas = Canvas(
        720,
        330,
        "Attention of one token: its query is multiplied with every key, softmax turns the "
        "products into weights, and the output is the weighted sum of the values",
    )
    canvas.label(20, 142, 104, 44, "q of “on”", LIGHT_ORANGE)
    canvas.text(72, 208, "what I look for", Font(size=11, colour=SOFT_INK, anchor="middle"))
    heads = ((226, "keys"), (376, "weights"), (500, "values"))
    for x, text in heads:
        canvas.text(x, 34, text, Font(weight="bold", anchor="middle"))
    canvas.text(376, 52, "softmax(q·k / √d)", Font(size=11, colour=SOFT_INK, anchor="middle"))
    for index, (word, weight) in enumerate(zip(WORDS, WEIGHTS, strict=True)):
        y = 68 + 60 * index
        canvas.line([(124, 164), (176, y + 19)], RULE)
        canvas.label(176, y, 100, 38, f"k of “{word}”", LIGHT_BLUE)
        canvas.arrow([(276, y + 19), (318, y + 19)])
        canvas.box(318, y + 4, 116, 30, "none", RULE)
        canvas.box(318, y + 4, 116 * weight, 30, BLUE, BLUE)
        inside = Font(size=12, anchor="end")
        canvas.text(430, y + 24, f"{weight:.2f}", inside)
        canvas.label(450, y, 100, 38, f"v of “{word}”", LIGHT_GREEN)
        canvas.line([(550, y + 19), (606, 164)], GREEN, 0.8 + 5 * weight)
    canvas.label(606, 142, 94, 44, "output", LIGHT_ORANGE)
    canvas.text(653, 208, "Σ weight × v", Font(size=11, colour=SOFT_INK, anchor="middle"))
    canvas.text(20, 316, "Keys and values of “The cat sat” are the same at every later step: "
                "that is what a KV cache keeps.", SMALL)  # fmt: skip
    return canvas


def mask() -> Canvas:
    """Who sees whom: a whole prompt, one new token, a chunk at the end."""
    canvas = Canvas(
        720,
        270,
        "Causal masks: a whole prompt is a triangle, one new token sees everything, a chunk of "
        "two tokens sees what is before it and a small triangle of itself",
    )
    _mask(canvas, 60, "whole prompt", "5 queries, 5 keys", 5, 5)
    _mask(canvas, 300, "one new token", "1 query, 6 keys", 1, 6)
    _mask(canvas, 530, "a chunk of 2", "2 queries, 6 keys", 2, 6)
    canvas.box(60, 236, 14, 14, LIGHT_BLUE)
    canvas.text(82, 248, "query i may see key j:  j ≤ position of i", PLAIN)
    canvas.box(380, 236, 14, 14, GREY, RULE)
    canvas.text(402, 248, "the future: score −∞, weight 0", PLAIN)
    return canvas


def _mask(canvas: Canvas, x: float, title: str, sizes: str, num_queries: int, seq_len: int) -> None:
    cell, top = 24, 78
    canvas.text(x, 28, title, BOLD)
    canvas.text(x, 46, sizes, SMALL)
    for key in range(seq_len):
        canvas.text(x + cell * (key + 0.5), top - 8, f"k{key}",
                    Font(size=11, colour=SOFT_INK, anchor="middle"))  # fmt: skip
    for query in range(num_queries):
        position = seq_len - num_queries + query
        canvas.text(x - 6, top + cell * (query + 0.68), f"q{position}",
                    Font(size=11, colour=SOFT_INK, anchor="end"))  # fmt: skip
        for key in range(seq_len):
            seen = key <= position
            canvas.box(x + cell * key, top + cell * query, cell, cell,
                       LIGHT_BLUE if seen else GREY, INK if seen else RULE, 0)  # fmt: skip


def cache() -> Canvas:
    """What is computed per token: everything again, or one row."""
    canvas = Canvas(
        720,
        300,
        "Rows computed for each new token: without a cache all positions again, with a cache the "
        "prompt once and then one position per token",
    )
    for x, title, cached in ((40, "without a cache", False), (400, "with a KV cache", True)):
        canvas.text(x, 30, title, BOLD)
        for step in range(4):
            y = 52 + 50 * step
            canvas.text(x, y + 22, f"step {step + 1}", SMALL)
            for position in range(4 + step):
                new = step == 0 or position == 3 + step or not cached
                fill = LIGHT_ORANGE if new else LIGHT_GREEN
                canvas.label(x + 52 + 34 * position, y, 30, 34, f"{position}", fill, CODE)
    canvas.box(40, 264, 14, 14, LIGHT_ORANGE)
    canvas.text(62, 276, "computed in this step", PLAIN)
    canvas.box(240, 264, 14, 14, LIGHT_GREEN)
    canvas.text(262, 276, "not computed: its keys and values are in the cache", PLAIN)
    canvas.text(630, 30, "prompt of 4", Font(size=11, colour=SOFT_INK, anchor="middle"))
    return canvas


def grid() -> Canvas:
    """A launch is a grid of programs; programs run on multiprocessors as warps of 32 threads."""
    canvas = Canvas(
        720,
        250,
        "The host launches a grid of programs; each program works on one row of the input, runs "
        "on one multiprocessor and is made of warps of 32 threads",
    )
    canvas.label(20, 70, 110, 60, "host:\none launch", LIGHT_ORANGE)
    canvas.arrow([(130, 100), (178, 100)])
    canvas.text(180, 30, "grid of 6 programs", BOLD)
    canvas.text(450, 30, "device: multiprocessors (SMs)", BOLD)
    for index in range(6):
        y = 44 + 30 * index
        canvas.label(180, y, 130, 24, f"program {index}: row {index}", LIGHT_BLUE, Font(
            size=12, anchor="middle"))  # fmt: skip
    for sm in range(3):
        y = 44 + 62 * sm
        canvas.box(450, y, 250, 54, "none", INK, 4)
        canvas.text(458, y + 16, f"SM {sm}", SMALL)
        for slot in range(2):
            x = 500 + 98 * slot
            canvas.box(x, y + 6, 90, 42, LIGHT_BLUE)
            for warp in range(4):
                canvas.box(x + 5 + 21 * warp, y + 26, 17, 16, LIGHT_GREEN, GREEN)
            canvas.text(x + 45, y + 20, f"program {2 * sm + slot}",
                        Font(size=11, anchor="middle"))  # fmt: skip
            canvas.line([(310, 56 + 30 * (2 * sm + slot)), (450, y + 27)], RULE)
    canvas.text(700, 242, "each small square is a warp: 32 threads in step",
                Font(size=11, colour=SOFT_INK, anchor="end"))  # fmt: skip
    return canvas


def memories() -> Canvas:
    """The memories of an H200 from the smallest to the largest."""
    rows = (
        ("registers", "64 Ki × 32 bit = 256 KiB per SM, 33 MiB in all", LIGHT_ORANGE),
        ("shared memory", "up to 228 KiB per SM, 29 MiB in all", LIGHT_ORANGE),
        ("L2 cache", "60 MiB, for all SMs", LIGHT_BLUE),
        ("HBM, “GPU memory”", "141 GB; 4.8 TB/s by the data sheet, 4.26 measured", LIGHT_BLUE),
        ("host memory", "hundreds of GB behind PCIe: 63 GB/s each way on paper", GREY),
    )
    canvas = Canvas(
        720,
        300,
        "The memories of an H200 as a pyramid: registers, shared memory, L2 cache, HBM, host",
    )
    for index, (name, text, fill) in enumerate(rows):
        half = 70 + 26 * index
        y = 24 + 50 * index
        canvas.label(190 - half, y, 2 * half, 40, name, fill, MIDDLE)
        canvas.text(390, y + 25, text, Font(size=12))
    canvas.text(20, 290, "upwards: smaller, faster, nearer to the arithmetic", SMALL)
    return canvas
