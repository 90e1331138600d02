"""Pictures of a comparison, drawn from result files only."""

from .draw import draw_all, draw_chart

__all__ = ["draw_all", "draw_chart"]
