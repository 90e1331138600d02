"""Charts of what quantising the embedded model has cost, from trials on a CPU."""

from collections.abc import Sequence
from typing import Any

from .axes import Axes, Scale, log_scale
from .canvas import BLUE, BOLD, ORANGE, SMALL, SOFT_INK, Canvas, Font
from .measured import read_data

TRIALS = "m7_bits_and_groups_cpu.json"
METHODS = {"rtn": ("round to nearest", ORANGE), "gptq": ("GPTQ", BLUE)}
USUAL_BITS, USUAL_GROUP, WHOLE_ROW = 4, 128, -1
MATRICES = {
    "self_attn.qkv_proj": "q, k, v",
    "self_attn.o_proj": "o",
    "mlp.gate_up_proj": "gate, up",
    "mlp.down_proj": "down",
}
"""Names in the file, and on the chart."""
ERRORS_OF = "gptq-g128-act-first-32"
"""The trial whose errors are drawn."""
_TOP = 1000
"""Largest perplexity that has a place; what is above has an arrow and its number."""


def perplexity_over_bytes() -> Canvas:
    """Perplexity over the bytes of the whole model: for bits per weight, and for group sizes."""
    data = read_data(TRIALS)
    canvas = Canvas(
        720,
        400,
        "Perplexity of the embedded model over its bytes, rounded to nearest and by GPTQ: 2, 3, 4 "
        "and 8 bits in groups of 128, and at 4 bits one group per row and groups of 128, 64, 32",
    )
    by_bits = [t for t in data["trials"] if t["group_size"] == USUAL_GROUP]
    by_group = [t for t in data["trials"] if t["bits"] == USUAL_BITS]
    left = Axes(canvas, Scale(76, 174, 56, 366), log_scale(25, _TOP, 306, 64))
    right = Axes(canvas, Scale(109, 120, 426, 696), log_scale(25, 100, 306, 64))
    texts = [(t, f"{t['bits']} bits") for t in by_bits]
    _panel(left, data, texts, (30, 50, 100, 200, 500, 1000), "groups of 128")
    texts = [(t, _group(t["group_size"])) for t in by_group]
    _panel(right, data, texts, (30, 40, 60, 80, 100), "4 bits, group size")
    canvas.text(56, 26, "Perplexity, logarithmic", BOLD)
    for index, (name, colour) in enumerate(METHODS.values()):
        canvas.line([(300 + 150 * index, 22), (322 + 150 * index, 22)], colour, 2)
        canvas.text(328 + 150 * index, 26, name, Font(size=12, colour=colour))
    canvas.line([(556, 22), (578, 22)], SOFT_INK, 1.5, "5 4")
    text = f"16 bits, {_megabytes(data, None):.0f} MB"
    canvas.text(584, 26, text, Font(size=12, colour=SOFT_INK))
    canvas.text(56, 386, "Embedding at 16 bits included. 8 windows of 512 of WikiText-2, one run "
                f"each; source: {TRIALS}", SMALL)  # fmt: skip
    return canvas


def _panel(
    axes: Axes,
    data: dict[str, Any],
    trials: Sequence[tuple[dict[str, Any], str]],
    y_ticks: Sequence[int],
    name: str,
) -> None:
    """trials: with the text that stands below each."""
    canvas, bottom = axes.canvas, axes.y.first
    ticks = {_megabytes(data, trial): text for trial, text in trials}
    axes.draw(list(ticks.items()), [(y, f"{y:,}") for y in y_ticks], "", name)
    for x in ticks:
        font = Font(size=11, colour=SOFT_INK, anchor="middle")
        canvas.text(axes.x(x), bottom + 33, f"{x:.1f}", font)
    middle = (axes.x.first + axes.x.last) / 2
    canvas.text(middle, bottom + 53, "MB of the whole model", Font(size=12, anchor="middle"))
    source = data["source_perplexity"]
    ends = [(axes.x.first, axes.y(source)), (axes.x.last, axes.y(source))]
    canvas.line(ends, SOFT_INK, 1.5, "5 4")
    for method, (_, colour) in METHODS.items():
        own = (trial for trial, _ in trials if trial["method"] == method)
        points = sorted((_megabytes(data, trial), trial["perplexity"]) for trial in own)
        _curve(axes, points, colour)


def _curve(axes: Axes, points: Sequence[tuple[float, float]], colour: str) -> None:
    """Points within the axes and lines between them; an arrow for each that is above."""
    inside = [point for point in points if point[1] <= axes.y.high]
    axes.curve(inside, colour)
    for point in inside:
        axes.canvas.dot(*axes.at(*point), 4.5, colour)
    for x, y in (point for point in points if point[1] > axes.y.high):
        # Two methods may leave the chart at one place.
        at, base = (axes.x(x) - 8, 14) if colour == ORANGE else (axes.x(x) + 4, 32)
        axes.canvas.arrow([(at, axes.y.last + 22), (at, axes.y.last + 2)], colour)
        text = f"{y / 1e6:.1f} million" if y >= 1e6 else f"{y:,.0f}"
        font = Font(size=11, colour=colour)
        axes.canvas.text(axes.x(x) + 11, axes.y.last + base, text, font)


def _megabytes(data: dict[str, Any], trial: dict[str, Any] | None) -> float:
    """Of matrices as a trial packs them, or None: as published, and the embedding at 16 bits."""
    matrices = 2 * data["matrix_weights"] if trial is None else trial["packed_bytes"]
    return float((matrices + 2 * data["embedding_weights"]) / 1e6)


def _group(size: int) -> str:
    return "row" if size == WHOLE_ROW else str(size)


def error_by_layer() -> Canvas:
    """Error of every matrix on text that no Hessian has seen, for both ways to round it."""
    data = read_data(TRIALS)
    trial = next(trial for trial in data["trials"] if trial["name"] == ERRORS_OF)
    errors = {"rtn": trial["errors"]["rtn_held_out"], "gptq": trial["errors"]["held_out"]}
    canvas = Canvas(
        720,
        456,
        "Error of the outputs of each matrix in each layer of the embedded model at 4 bits, by "
        "rounding to nearest and by GPTQ, on text that GPTQ has not seen",
    )
    num_layers = len(errors["gptq"])
    for index, (matrix, text) in enumerate(MATRICES.items()):
        x, y = 60 + 340 * (index % 2), 62 + 190 * (index // 2)
        axes = Axes(canvas, Scale(0, num_layers - 1, x, x + 290), log_scale(4e-5, 4e-2, y + 140, y))
        axes.draw(
            [(layer, str(layer)) for layer in range(0, num_layers, 5)],
            [(1e-4, "0.01 %"), (1e-3, "0.1 %"), (1e-2, "1 %")],
            "",
            text,
        )
        for method, (_, colour) in METHODS.items():
            axes.curve([(n, layer[matrix]) for n, layer in enumerate(errors[method])], colour)
    canvas.text(60, 26, "|WX - QX|² / |WX|², logarithmic, over the layers", BOLD)
    for index, (name, colour) in enumerate(METHODS.values()):
        canvas.line([(430 + 150 * index, 22), (452 + 150 * index, 22)], colour, 2)
        canvas.text(458 + 150 * index, 26, name, Font(size=12, colour=colour))
    canvas.text(60, 440, "4 bits, groups of 128, act order; unseen text of C4, behind quantised "
                f"layers; source: {TRIALS}", SMALL)  # fmt: skip
    return canvas
