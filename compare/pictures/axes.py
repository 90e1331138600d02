"""A pair of axes on a canvas: numbers to pixels, ticks, names."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .canvas import INK, RULE, SOFT_INK, Canvas, Font


@dataclass(frozen=True)
class Scale:
    """From a number to a pixel, between two numbers and the pixels where they lie."""

    low: float
    high: float
    first: float
    last: float
    number: Callable[[float], float] = float

    def __call__(self, value: float) -> float:
        low, high = self.number(self.low), self.number(self.high)
        part = (self.number(value) - low) / (high - low)
        return self.first + part * (self.last - self.first)


def log_scale(low: float, high: float, first: float, last: float) -> Scale:
    return Scale(low, high, first, last, math.log10)


@dataclass(frozen=True)
class Axes:
    """Where a chart stands, and how its two directions count."""

    canvas: Canvas
    x: Scale
    y: Scale

    def draw(
        self,
        x_ticks: Sequence[tuple[float, str]],
        y_ticks: Sequence[tuple[float, str]],
        x_name: str,
        y_name: str,
    ) -> None:
        """The frame, its ticks with their texts, and what is counted, with its unit, or ""."""
        canvas, left, right = self.canvas, self.x.first, self.x.last
        top, bottom = self.y.last, self.y.first
        for value, text in x_ticks:
            canvas.line([(self.x(value), bottom), (self.x(value), top)], RULE, 0.7)
            canvas.text(self.x(value), bottom + 17, text, _tick("middle"))
        for value, text in y_ticks:
            canvas.line([(left, self.y(value)), (right, self.y(value))], RULE, 0.7)
            canvas.text(left - 7, self.y(value) + 4, text, _tick("end"))
        canvas.line([(left, top), (left, bottom), (right, bottom)], INK, 1.2)
        if x_name:
            canvas.text((left + right) / 2, bottom + 38, x_name, Font(size=12, anchor="middle"))
        if y_name:
            canvas.text(left, top - 12, y_name, Font(size=12))

    def curve(self, points: Sequence[tuple[float, float]], colour: str, width: float = 2) -> None:
        self.canvas.line([self.at(x, y) for x, y in points], colour, width)

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.x(x), self.y(y)


def _tick(anchor: str) -> Font:
    return Font(size=11, colour=SOFT_INK, anchor=anchor)
