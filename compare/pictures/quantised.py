"""Charts of weights of 4 bits, from data files of the repository: quality, and time of a step."""

import statistics
from collections.abc import Callable

from folovllm.model.presets import preset_configs

from .axes import Axes, log_scale
from .canvas import BLUE, GREEN, ORANGE, PAPER, PURPLE, SMALL, Canvas, Font
from .measured import read_data

STEPS = {
    "vllm_bfloat16": ("vLLM, 16 bits", PURPLE),
    "m4_flash": ("m4_flash, 16 bits", ORANGE),
    "vllm_gptq_machete": ("vLLM with Machete, 4 bits", GREEN),
    "m7_gptq": ("m7_gptq, 4 bits", BLUE),
}
"""Name and colour of each row of the file."""
BITS = 4 + (16 + 8) / 128
"""Of a weight in m7_gptq's layout, with a scale of 16 bits and a zero point of 8 per group."""
_MOST_ROWS = 256


def step_over_batch() -> Canvas:
    """Step time of an 8B model over the batch, at 4 and at 16 bits, above the limits of both."""
    data, roofline = read_data("m7_beside_vllm_h200.json"), read_data("roofline_points_h200.json")
    canvas = Canvas(
        720,
        440,
        "Time of a decode step of Qwen3-8B over the batch: m7_gptq and vLLM at 4 bits, m4_flash "
        "and vLLM at 16, and the least times that weights and their products need",
    )
    axes = Axes(canvas, log_scale(1, _MOST_ROWS, 64, 696), log_scale(0.8, 24, 372, 40))
    axes.draw(
        [(rows, str(rows)) for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256)],
        [(ms, str(ms)) for ms in (1, 2, 3, 5, 10, 20)],
        "requests in the batch",
        "ms per step, both axes logarithmic",
    )
    floor = floor_ms(roofline["matmul_flops_per_s"], roofline["copy_bytes_per_s"])
    for bits, colour in ((16, ORANGE), (BITS, BLUE)):
        rows = [2 ** (step / 8) for step in range(8 * 8 + 1)]
        points = [axes.at(n, floor(n, bits)) for n in rows]
        canvas.line(points, colour, 1.5, "5 4")
    canvas.box(72, 44, 230, 110, PAPER, "none")
    for row, (name, (text, colour)) in enumerate(STEPS.items()):
        points = [(int(n), _median(ms)) for n, ms in data[name]["steps_ms"].items()]
        axes.curve(points, colour)
        for point in points:
            canvas.dot(*axes.at(*point), 4.5, colour)
        _legend(canvas, row, text, colour)
    _legend(canvas, len(STEPS), "least time at 16 bits", ORANGE, "5 4")
    _legend(canvas, len(STEPS) + 1, "least time at 4 bits, head at 16", BLUE, "5 4")
    canvas.text(64, 432, "One H200, random weights, groups of 128; 512 tokens in, 128 out; source: "
                "m7_beside_vllm_h200.json", SMALL)  # fmt: skip
    return canvas


def floor_ms(flops_per_s: float, bytes_per_s: float) -> Callable[[float, float], float]:
    """(rows, bits of a weight in the layers) -> ms that Qwen3-8B's weights and products need.

    As in note 07, 3.5: the head has 16 bits; attention, keys and values and launches are left out.
    """
    shape = preset_configs()["qwen3-8b"]
    hidden = shape["hidden_size"]
    heads = 2 * shape["num_attention_heads"] + 2 * shape["num_key_value_heads"]
    per_layer = hidden * (heads * shape["head_dim"] + 3 * shape["intermediate_size"])
    layers, head = shape["num_hidden_layers"] * per_layer, shape["vocab_size"] * hidden

    def floor(rows: float, bits: float) -> float:
        parts = ((layers, bits), (head, 16))
        return 1e3 * sum(n * max(b / 8 / bytes_per_s, 2 * rows / flops_per_s) for n, b in parts)

    return floor


def _median(ms: float | list[float]) -> float:
    """One run is a number in the file, several are a list."""
    return statistics.median(ms if isinstance(ms, list) else [ms])


def _legend(canvas: Canvas, row: int, text: str, colour: str, dashes: str = "") -> None:
    y = 54 + 18 * row
    canvas.line([(80, y), (108, y)], colour, 2, dashes)
    canvas.text(116, y + 4, text, Font(size=12, colour=colour))
