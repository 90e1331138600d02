"""Pictures of a comparison, drawn from result files only."""

from .draw import draw_all

__all__ = ["draw_all"]
