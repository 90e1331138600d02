"""What host and device do when: eager launches against a graph, whole prompts against chunks."""

import json
from typing import Any

from .axes import Axes, Scale
from .canvas import (
    BLUE,
    BOLD,
    LIGHT_BLUE,
    LIGHT_ORANGE,
    ORANGE,
    RULE,
    SMALL,
    SOFT_INK,
    Canvas,
    Font,
)
from .measured import DATA

LAUNCH_US, KERNEL_US = 19.3, 4.2
"""M1's decode step: 7.18 ms and 1.57 ms of kernels over 372 launches (note 01, 6)."""
GRAPH_KERNEL_US = 3.2
"""m4_flash's: 0.86 ms over 265 kernels and copies (note 04b, 6)."""
_END = Font(size=12, anchor="end")


def eager_and_graph() -> Canvas:
    """The first 120 µs of a decode step, to scale."""
    canvas = Canvas(
        720,
        310,
        "Eager launches: the host needs 19 microseconds for each kernel and the device waits; a "
        "replayed graph: one call, and kernels run back to back",
    )
    x = Scale(0, 120, 110, 690)
    canvas.text(20, 28, "M1, eager: 19 µs of the host for each launch, 4 µs of the device", BOLD)
    _lane(canvas, 46, "host")
    _lane(canvas, 84, "device")
    for index in range(6):
        start = index * LAUNCH_US
        width = x(min(start + LAUNCH_US, 120)) - x(start)
        canvas.label(x(start), 46, width - 2, 28, f"launch {index + 1}", LIGHT_ORANGE,
                     Font(size=11, anchor="middle"))  # fmt: skip
        if start + LAUNCH_US + KERNEL_US < 120:
            canvas.box(x(start + LAUNCH_US), 84, x(KERNEL_US) - x(0), 28, LIGHT_BLUE, BLUE)
    canvas.text(110, 130, "between two kernels the device waits", SMALL)
    canvas.text(20, 158, "m4_flash, graph: one call, 3 µs for each kernel", BOLD)
    _lane(canvas, 176, "host")
    _lane(canvas, 214, "device")
    canvas.label(x(0), 176, x(19) - x(0), 28, "replay", LIGHT_ORANGE, Font(
        size=11, anchor="middle"))  # fmt: skip
    canvas.text(x(22), 195, "free for the next step", Font(size=11, colour=SOFT_INK))
    for index in range(32):
        start = 16 + index * GRAPH_KERNEL_US
        canvas.box(x(start), 214, x(GRAPH_KERNEL_US) - x(0) - 1, 28, LIGHT_BLUE, BLUE)
    for tick in range(0, 121, 20):
        canvas.line([(x(tick), 254), (x(tick), 260)], SOFT_INK, 1)
        canvas.text(x(tick), 274, str(tick), Font(size=11, colour=SOFT_INK, anchor="middle"))
    canvas.line([(x(0), 254), (x(120), 254)], SOFT_INK, 1)
    canvas.text(20, 298, "µs. Mean times, drawn to scale; the host's part of a replay, and when "
                "the first kernel starts, are sketched.", SMALL)  # fmt: skip
    return canvas


def chunks() -> Canvas:
    """Measured steps around the arrival of a long prompt, whole and in chunks."""
    data = json.loads((DATA / "chunk_timeline_h200.json").read_text(encoding="utf-8"))
    canvas = Canvas(
        720,
        316,
        "Steps around the arrival of a prompt of 16,384 tokens: whole, one step of 93 ms in which "
        "nobody decodes; in chunks, nine steps of up to 21 ms in which everybody decodes",
    )
    x = Scale(0, 120, 40, 690)
    texts = {
        "m4_flash": "m4_flash: the whole prompt in one step; sixteen decoders wait",
        "m5_chunked": "m5_chunked: 2,048 tokens a step; every step has a token for each decoder",
    }
    for index, lane in enumerate(data["stages"]):
        _steps(canvas, x, 30 + 124 * index, texts[lane["stage"]], lane)
    axes = Axes(canvas, x, Scale(0, 1, 256, 256))
    axes.draw([(ms, str(ms)) for ms in range(0, 121, 20)], [], "", "")
    canvas.text(40, 298, "ms, measured on an H200", SMALL)
    canvas.box(420, 286, 14, 14, LIGHT_BLUE, BLUE)
    canvas.text(440, 298, "decodes only", SMALL)
    canvas.box(540, 286, 14, 14, LIGHT_ORANGE, ORANGE)
    canvas.text(560, 298, "with prompt tokens", SMALL)
    return canvas


def _steps(canvas: Canvas, x: Scale, top: float, text: str, lane: dict[str, Any]) -> None:
    canvas.text(40, top, text, BOLD)
    names = ("start_ms", "duration_ms", "num_scheduled_tokens", "num_scheduled_requests")
    for start, duration, num_tokens, num_requests in zip(
        *(lane[name] for name in names), strict=True
    ):
        if start > 120:
            continue
        has_prompt = num_tokens > num_requests
        fill, colour = (LIGHT_ORANGE, ORANGE) if has_prompt else (LIGHT_BLUE, BLUE)
        width = x(min(start + duration, 120)) - x(start)
        canvas.box(x(start), top + 14, width, 34, fill, colour)
        if width > 45:
            canvas.text(x(start) + width / 2, top + 36, f"{duration:.0f} ms",
                        Font(size=11, anchor="middle"))  # fmt: skip
        if num_requests >= 16 and start + duration <= 120:  # the decoders get a token at its end
            end = x(start + duration)
            canvas.line([(end, top + 54), (end, top + 64)], BLUE, 2)
    canvas.text(40, top + 80, "bars below: the decoders get a token", SMALL)


def _lane(canvas: Canvas, top: float, name: str) -> None:
    canvas.text(100, top + 18, name, _END)
    canvas.box(110, top, 580, 28, "none", RULE)
