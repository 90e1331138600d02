"""From option names and texts to a stage's EngineConfig."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from typing import Any, get_type_hints

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def build_config(config_class: type[Any], options: Mapping[str, Any]) -> Any:
    """An instance of `config_class` with these options, its own defaults for the others.

    A string is converted where the field is an Enum. ValueError names an option that the stage
    does not have, or a value that the Enum does not have.
    """
    known = [field.name for field in fields(config_class)]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(
                f"unknown engine option {name!r}{hint}; this stage knows: {', '.join(known)}"
            )
    types = get_type_hints(config_class)
    return config_class(**{name: _convert(name, types[name], options[name]) for name in options})


def _convert(name: str, option_type: Any, value: Any) -> Any:
    is_enum = isinstance(option_type, type) and issubclass(option_type, Enum)
    if not is_enum or isinstance(value, option_type):
        return value
    try:
        return option_type(value)
    except ValueError:
        choices = ", ".join(repr(member.value) for member in option_type)
        raise ValueError(f"{name} must be one of {choices}, got {value!r}") from None


def parse_size(text: str) -> int:
    """Bytes of a size like "512MiB", "8GiB" (powers of 1024), "8GB" (of 1000) or "1048576"."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"expected a size like 512MiB, 8GB or a number of bytes, got {text!r}")
    number, prefix, binary = match.groups()
    if binary and not prefix:
        raise ValueError(f"expected a size like 512MiB, 8GB or a number of bytes, got {text!r}")
    size = float(number) * (1024 if binary else 1000) ** _POWERS[prefix.upper()]
    if size != int(size):
        raise ValueError(f"{text!r} is {size} bytes, which is not a whole number")
    return int(size)
