"""Checks of single settings: a ValueError says which one, what was given and what it may be."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from numbers import Integral, Real
from typing import Any, get_args, get_type_hints


def is_int(value: object) -> bool:
    """Whole numbers, numpy's among them; True and False are none."""
    if type(value) is int:  # to ask an abstract class takes ten times as long
        return True
    return isinstance(value, Integral) and not isinstance(value, bool)


def require_int(name: str, value: Any, low: int) -> None:
    if not is_int(value) or value < low:
        raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")


def require_range(name: str, value: Any, low: float, high: float) -> None:
    if not (_is_number(value) and math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name} must be a number in [{low}, {high}], got {value!r}")


def require_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def checked_texts(name: str, texts: object) -> tuple[str, ...]:
    """One text or several as a tuple; None is none."""
    given = (texts,) if isinstance(texts, str) else () if texts is None else texts
    if not isinstance(given, Sequence) or not all(isinstance(t, str) and t for t in given):
        raise ValueError(f"{name} must be a string or a list, none of them empty, got {texts!r}")
    return tuple(given)


def checked_token_ids(name: str, token_ids: object) -> tuple[int, ...]:
    """Token ids as a tuple; None is none."""
    ids = () if token_ids is None else token_ids
    if not isinstance(ids, Collection) or not all(map(is_int, ids)):
        raise ValueError(f"{name} must be a list of token ids, got {token_ids!r}")
    return tuple(map(int, ids))


def checked_bias(biases: object) -> dict[int, float]:
    """{token id: bias}; None is empty."""
    given = {} if biases is None else biases
    if not isinstance(given, Mapping) or not all(map(is_int, given)):
        raise ValueError(
            f"logit_bias must map token ids to numbers, like {{42: -1.5}}, got {biases!r}"
        )
    if not all(_is_number(bias) and math.isfinite(bias) for bias in given.values()):
        raise ValueError(f"logit_bias must hold finite numbers, got {biases!r}")
    return {int(token_id): float(bias) for token_id, bias in given.items()}


def check_field_types(config: Any) -> None:
    """ValueError for a field of a stage's EngineConfig that holds another type than it declares.

    Without it a text where an Enum belongs would be compared with its members, be none of them,
    and have no effect.
    """
    types = get_type_hints(type(config))
    for field in fields(config):
        value, declared = getattr(config, field.name), types[field.name]
        alternatives = get_args(declared) or (declared,)
        if not any(_fits(value, alternative) for alternative in alternatives):
            expected = " or ".join(map(_describe, alternatives))
            raise ValueError(f"{field.name} must be {expected}, got {value!r}")


def _fits(value: object, declared: type) -> bool:
    if declared is int:
        return is_int(value)
    return _is_number(value) if declared is float else isinstance(value, declared)


def _describe(declared: type) -> str:
    if issubclass(declared, Enum):
        return " or ".join(map(str, declared))
    return {int: "a whole number", float: "a number"}.get(declared, "None")


def _is_number(value: object) -> bool:
    if type(value) is float:
        return True
    return isinstance(value, Real) and not isinstance(value, bool)
