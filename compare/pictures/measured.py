"""Charts of what was measured, from data files of the repository."""

import json
from pathlib import Path
from typing import Any

from .axes import Axes, Scale, log_scale
from .canvas import BLUE, GREEN, INK, ORANGE, PURPLE, SMALL, SOFT_INK, Canvas, Font

DATA = Path(__file__).resolve().parents[2] / "docs/dev/data"
STAGES = {"m1_baseline": ("M1", ORANGE), "m2_batching": ("M2", BLUE), "m5_chunked": ("M5", GREEN)}
"""Name and colour of each stage in the roofline."""


def time_per_token() -> Canvas:
    """Seconds per token of the primer's two loops."""
    report = read_data("primer_engine_cpu.json")
    canvas = Canvas(
        720,
        300,
        "Time per token on a CPU: it grows with the text without a cache, and hardly with one",
    )
    loops = {name: loop["processor_s_by_token"] for name, loop in report["loops"].items()}
    num_tokens = report["num_new_tokens"]
    highest = 0.1 * (1 + int(10 * max(max(seconds) for seconds in loops.values())))
    axes = Axes(canvas, Scale(1, num_tokens, 64, 690), Scale(0, highest, 236, 44))
    axes.draw(
        [(n, str(n)) for n in (1, *range(32, num_tokens + 1, 32))],
        [(tick / 10, f"{100 * tick}") for tick in range(round(10 * highest) + 1)],
        f"output token (prompt of {report['num_prompt_tokens']} tokens)",
        "ms per token, of one processor core",
    )
    for name, colour, text in (
        ("generate_without_cache", ORANGE, "without a cache"),
        ("generate_with_cache", BLUE, "with a KV cache"),
    ):
        points = list(enumerate(loops[name], 1))
        axes.curve(points, colour)
        x, y = axes.at(*points[len(points) // 2])
        canvas.text(x, y - 22, text, Font(size=13, colour=colour, anchor="end", weight="bold"))
    return canvas


def roofline() -> Canvas:
    """The two lines of an H200 and decode steps between them."""
    data = read_data("roofline_points_h200.json")
    bandwidth, rate = data["copy_bytes_per_s"], data["matmul_flops_per_s"]
    canvas = Canvas(
        720,
        420,
        "Roofline of an H200: decode steps of M1, M2 and M5 by their FLOPs per byte, and attention "
        "of a long prompt",
    )
    axes = Axes(canvas, log_scale(0.5, 6000, 76, 690), log_scale(1e11, 2e15, 356, 46))
    axes.draw(
        [(1, "1"), (10, "10"), (100, "100"), (1000, "1,000")],
        [(1e11, "0.1"), (1e12, "1"), (1e13, "10"), (1e14, "100"), (1e15, "1,000")],
        "FLOPs per byte that must be moved",
        "TFLOP/s reached",
    )
    ridge = rate / bandwidth
    axes.curve([(0.5, 0.5 * bandwidth), (ridge, rate), (6000, rate)], INK, 2.5)
    canvas.line([axes.at(ridge, rate), axes.at(ridge, 1e11)], SOFT_INK, 1, "4 4")
    canvas.text(axes.x(ridge) + 6, 350, f"ridge: {ridge:.0f}", SMALL)
    canvas.text(axes.x(300), axes.y(rate) - 8, f"{rate / 1e12:.0f} TFLOP/s, measured", SMALL)
    canvas.text(axes.x(0.62), axes.y(2.0 * 2.1 * bandwidth), "4.26 TB/s, measured", SMALL)
    for point in data["points"]:
        _decode_point(axes, data, point)
    prompt = data["prompt_attention"]
    x, y = axes.at(prompt["num_tokens"] / 3, prompt["flops_per_s"])
    canvas.dot(x, y, 6, PURPLE)
    canvas.text(x + 4, y + 22, "M4, attention of", Font(size=11, colour=PURPLE, anchor="middle"))
    canvas.text(x + 4, y + 36, "8,192 tokens", Font(size=11, colour=PURPLE, anchor="middle"))
    canvas.text(76, 412, "Dots: decode steps, 0.6B shape, 1, 8, 64, 256 requests of "
                "576 tokens; sources: roofline_points_h200.json", SMALL)  # fmt: skip
    return canvas


def _decode_point(axes: Axes, data: dict[str, Any], point: dict[str, Any]) -> None:
    """FLOPs over the least bytes to the right, FLOPs over the step's time upwards."""
    model, num_requests = data["model"], point["num_requests"]
    context = num_requests * data["context_len"]
    flops = 2 * model["num_parameters"] * num_requests
    flops += model["attention_flops_per_token_of_context"] * context
    num_bytes = model["weight_bytes"] + model["kv_bytes_per_token"] * context
    x, y = axes.at(flops / num_bytes, flops / point["decode_step_s"])
    name, colour = STAGES[point["stage"]]
    axes.canvas.dot(x, y, 6, colour)
    text = f"{name}, {num_requests}"
    axes.canvas.text(x + 10, y + 5, text, Font(size=12, colour=colour, weight="bold"))


def read_data(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((DATA / name).read_text(encoding="utf-8"))
    return content
