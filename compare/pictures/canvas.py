"""A sheet of paper that becomes an SVG file: boxes, texts, lines, arrows.

The sheet has a light background of its own, so that a page with a dark theme shows the same
picture, and no fonts or styles of the page that it stands on. The same calls give the same bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

PAPER, INK, SOFT_INK, RULE = "#FBFAF7", "#1F2328", "#5B6168", "#C9CBC6"
BLUE, ORANGE, GREEN, RED = "#0072B2", "#D55E00", "#009E73", "#B3261E"
LIGHT_BLUE, LIGHT_ORANGE, LIGHT_GREEN = "#CFE5F3", "#FBDFC8", "#C9EBDD"
PURPLE, LIGHT_PURPLE, YELLOW, GREY = "#8E4585", "#EBD6E8", "#F7E9B0", "#E4E5E1"
"""From Okabe and Ito's palette, and tints of it to write on."""
SANS = "Helvetica, Arial, 'Noto Sans', sans-serif"
MONO = "Menlo, Consolas, 'DejaVu Sans Mono', monospace"


@dataclass(frozen=True)
class Font:
    """How a text looks; anchor is start, middle or end, the part that stands at the point."""

    size: float = 13
    colour: str = INK
    anchor: str = "start"
    weight: str = "normal"
    family: str = SANS


PLAIN = Font()
MIDDLE = Font(anchor="middle")
BOLD = Font(weight="bold")
SMALL = Font(size=11, colour=SOFT_INK)
CODE = Font(family=MONO, anchor="middle", size=12)


class Canvas:
    """Elements in the order in which they are drawn; lengths in pixels, y grows downwards."""

    def __init__(self, width: int, height: int, description: str) -> None:
        """description: what the picture shows, for those who cannot see it."""
        self.width, self.height, self.description = width, height, description
        self._elements: list[str] = []

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str = "none",
        stroke: str = INK,
        radius: float = 2,
    ) -> None:
        self._add(
            f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" '
            f'rx="{_n(radius)}" fill="{fill}" stroke="{stroke}"/>'
        )

    def text(self, x: float, y: float, text: str, font: Font = PLAIN) -> None:
        """One line whose base is at y."""
        self._add(
            f'<text x="{_n(x)}" y="{_n(y)}" font-family="{escape(font.family)}" '
            f'font-size="{_n(font.size)}" font-weight="{font.weight}" fill="{font.colour}" '
            f'text-anchor="{font.anchor}" xml:space="preserve">{escape(text)}</text>'
        )

    def label(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        text: str,
        fill: str = "none",
        font: Font = MIDDLE,
        stroke: str = INK,
    ) -> None:
        """A box with lines of text in its middle."""
        self.box(x, y, width, height, fill, stroke)
        lines = text.split("\n")
        step = font.size * 1.3
        first = y + height / 2 + font.size * 0.35 - step * (len(lines) - 1) / 2
        for index, line in enumerate(lines):
            self.text(x + width / 2, first + index * step, line, font)

    def line(
        self,
        points: Sequence[tuple[float, float]],
        colour: str = INK,
        width: float = 1.5,
        dashes: str = "",
    ) -> None:
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        path = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
        self._add(
            f'<polyline points="{path}" fill="none" stroke="{colour}" '
            f'stroke-width="{_n(width)}"{dashed}/>'
        )

    def arrow(
        self, points: Sequence[tuple[float, float]], colour: str = INK, width: float = 1.5
    ) -> None:
        """A line with a head at its last point."""
        (x0, y0), (x1, y1) = points[-2:]
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        dx, dy = (x1 - x0) / length, (y1 - y0) / length
        base_x, base_y = x1 - 9 * dx, y1 - 9 * dy
        self.line([*points[:-1], (base_x, base_y)], colour, width)
        corners = ((x1, y1), (base_x - 4 * dy, base_y + 4 * dx), (base_x + 4 * dy, base_y - 4 * dx))
        path = " ".join(f"{_n(x)},{_n(y)}" for x, y in corners)
        self._add(f'<polygon points="{path}" fill="{colour}"/>')

    def dot(self, x: float, y: float, radius: float, fill: str, stroke: str = "none") -> None:
        self._add(
            f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}" fill="{fill}" stroke="{stroke}"/>'
        )

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" '
            f'viewBox="0 0 {self.width} {self.height}" role="img">\n'
            f"<title>{escape(self.description)}</title>\n"
            f'<rect width="100%" height="100%" rx="6" fill="{PAPER}"/>\n'
        )
        return head + "\n".join(self._elements) + "\n</svg>\n"

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.svg(), encoding="utf-8")

    def _add(self, element: str) -> None:
        self._elements.append(element)


def _n(value: float) -> str:
    """A length with two digits at most, the same on every machine."""
    return f"{round(value, 2):g}" if abs(value) < 1e5 else f"{value:.0f}"
