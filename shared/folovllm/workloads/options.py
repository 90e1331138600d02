"""Parsing of workload specs such as `poisson:rate=4,num=64,input=100-1024`."""

import math
import random
import re
from dataclasses import dataclass, field
from typing import Any, NoReturn


@dataclass(frozen=True)
class LenRange:
    """Token counts drawn uniformly from [low, high], both included."""

    low: int
    high: int

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass
class WorkloadOptions:
    """What follows the colon of a spec; remembers every value it was asked for.

    A builder asks for each option it knows and calls `finish`, which refuses the rest by name.
    """

    spec: str
    kind: str
    positional: str
    """What stands before the first `key=value`: a path, or a count; "" if nothing does."""
    given: dict[str, str]
    values: dict[str, Any] = field(default_factory=dict)
    """Every option and its value, defaults included: a workload's `parameters`."""

    @classmethod
    def parse(cls, spec: str) -> "WorkloadOptions":
        """Split `kind[:positional][,key=value…]`; a path may hold commas and colons."""
        kind, _, rest = spec.partition(":")
        match = re.fullmatch(r"(?P<positional>.*?)(?P<pairs>(?:(?:^|,)\w+=[^,]*)*)", rest)
        assert match is not None, "the pattern accepts every string without a newline"
        pairs = [pair for pair in match["pairs"].split(",") if pair]
        given = dict(pair.split("=", 1) for pair in pairs)
        if len(given) < len(pairs):
            raise ValueError(f"workload {spec!r} gives the same option twice")
        return cls(spec, kind, match["positional"], given)

    @property
    def name(self) -> str:
        """A name for files: the kind and the options that were given, without the path."""
        described = [f"{key}{value}" for key, value in self.given.items()]
        return "-".join([self.kind, *described]).replace("/", "-")

    def integer(self, name: str, default: int, *, low: int = 1) -> int:
        text = self.given.get(name)
        value = default if text is None else self._to_integer(name, text, low)
        self.values[name] = value
        return value

    def optional_integer(self, name: str, *, low: int = 1) -> int | None:
        """None when it was not given: no limit."""
        text = self.given.get(name)
        value = None if text is None else self._to_integer(name, text, low)
        self.values[name] = value
        return value

    def positive_number(self, name: str, default: float) -> float:
        text = self.given.get(name)
        value = default if text is None else _to_number(text)
        if text is not None and not value > 0:
            self._refuse(name, text, "a number above 0")
        self.values[name] = value
        return value

    def seconds(self, name: str, default: float) -> float:
        """A duration, which may be 0."""
        text = self.given.get(name)
        value = default if text is None else _to_number(text)
        if text is not None and not value >= 0:
            self._refuse(name, text, "a number of seconds, 0 or more")
        self.values[name] = value
        return value

    def shares(self, name: str, default: str) -> list[float]:
        """`0.9` or `0.5/0.9/0.99`: different numbers between 0 and 1, neither included."""
        text = self.given.get(name, default)
        values = [_to_number(part) for part in text.split("/")]
        if not all(0 < value < 1 for value in values) or len(set(values)) < len(values):
            self._refuse(name, text, "different shares between 0 and 1 like 0.9 or 0.5/0.9/0.99")
        self.values[name] = text
        return values

    def len_range(self, name: str, default: LenRange) -> LenRange:
        """`512` or `100-1024`."""
        text = self.given.get(name)
        value = default
        if text is not None:
            match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
            if match is None:
                self._refuse(name, text, "a token count like 512 or a range like 100-1024")
            value = LenRange(int(match[1]), int(match[2] or match[1]))
            if not 1 <= value.low <= value.high:
                self._refuse(name, text, "a range whose first number is 1 or more and the lower")
        self.values[name] = str(value)
        return value

    def path(self) -> str:
        if not self.positional:
            raise ValueError(f"workload {self.spec!r} needs a file: {self.kind}:PATH")
        return self.positional

    def optional_path(self) -> str | None:
        """The file of a kind that takes a file, a count or nothing; None for the last two."""
        return None if self.positional.isdecimal() else self.positional or None

    def head(self) -> int | None:
        """The count of `nano:8`; None when all requests are wanted."""
        if not self.positional:
            return None
        return self._to_integer("number of requests", self.positional, 1)

    def finish(self) -> None:
        """Refuse what nobody asked for."""
        unknown = sorted(set(self.given) - set(self.values))
        if unknown:
            known = ", ".join(sorted(self.values)) or "none"
            raise ValueError(
                f"workload {self.spec!r} has unknown option {unknown[0]!r}; "
                f"{self.kind} takes: {known}"
            )

    def _to_integer(self, name: str, text: str, low: int) -> int:
        if re.fullmatch(r"\d+", text) is None or int(text) < low:
            self._refuse(name, text, f"a whole number of at least {low}")
        return int(text)

    def _refuse(self, name: str, text: str, expected: str) -> NoReturn:
        raise ValueError(f"workload {self.spec!r}: {name} must be {expected}, got {text!r}")


def _to_number(text: str) -> float:
    """NaN, which is in no range, for what is no finite number."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan
