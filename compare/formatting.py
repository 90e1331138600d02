"""Numbers as people read them: three digits, a unit, and a dash where there is none."""

from collections.abc import Sequence

MISSING = "–"
TIME_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
BYTE_UNITS = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))


def three_digits(value: float) -> str:
    """`0.0123`, `1.23`, `12.3`, `123`, `12,345`: no digit that a repeat would not confirm."""
    size = abs(value)
    if size >= 100 or value == 0:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.1 else f"{value:.2g}"


def seconds(*values: float | None) -> str:
    """One or more durations in one unit, that of the smallest: `12.3 / 45.6 ms`."""
    return _in_one_unit(values, TIME_UNITS)


def num_bytes(*values: float | None) -> str:
    """One or more sizes in one unit, that of the largest: `1.10 / 0.25 GiB`."""
    known = [value for value in values if value is not None]
    largest = max(known, default=0.0)
    unit = next((unit for unit in BYTE_UNITS if largest >= unit[0]), BYTE_UNITS[-1])
    return _in_one_unit(values, (unit,))


def _in_one_unit(values: Sequence[float | None], units: Sequence[tuple[float, str]]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return MISSING
    smallest = min((value for value in known if value > 0), default=0.0)
    scale, name = next((unit for unit in units if smallest >= unit[0]), units[-1])
    shown = (MISSING if value is None else three_digits(value / scale) for value in values)
    return f"{' / '.join(shown)} {name}"


def number(value: float | None) -> str:
    return MISSING if value is None else three_digits(value)


def factor(value: float | None) -> str:
    return MISSING if value is None else f"{three_digits(value)}×"


def percent(fraction: float | None) -> str:
    return MISSING if fraction is None else f"{three_digits(100 * fraction)} %"
