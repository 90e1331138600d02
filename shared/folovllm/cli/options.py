"""Command line flags made from the fields of a dataclass, with their docstrings as help."""

import argparse
import ast
import inspect
import textwrap
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, fields
from enum import Enum
from types import NoneType
from typing import Any, get_args, get_type_hints

from ..entrypoints.engine_options import parse_size

FlagArguments = dict[str, Any]
"""Keyword arguments of `ArgumentParser.add_argument`."""


def field_docstrings(dataclass_type: type[Any]) -> dict[str, str]:
    """The string under each field of a dataclass, on one line; fields without one are left out.

    Python does not keep these strings, so they are read from the source.
    """
    source = textwrap.dedent(inspect.getsource(dataclass_type))
    (class_def,) = ast.parse(source).body
    assert isinstance(class_def, ast.ClassDef)
    docstrings = {}
    for statement, following in zip(class_def.body, class_def.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            docstrings[statement.target.id] = " ".join(following.value.value.split())
    return docstrings


def add_field_flags(
    group: argparse._ArgumentGroup,
    dataclass_type: type[Any],
    *,
    special: Mapping[str, FlagArguments] | None = None,
    defaults: Mapping[str, Any] | None = None,
    skipped: Collection[str] = (),
) -> None:
    """One `--kebab-case` flag per field; only flags that were given reach the namespace.

    special: add_argument's arguments for fields whose type says too little; defaults: values
    that the command uses instead of the dataclass's, for the help.
    """
    types = get_type_hints(dataclass_type)
    docstrings = field_docstrings(dataclass_type)
    for field in fields(dataclass_type):
        if field.name in skipped:
            continue
        default = (defaults or {}).get(field.name, field.default)
        arguments: FlagArguments = {"help": _help(docstrings.get(field.name, ""), default)}
        arguments |= (special or {}).get(field.name) or _flag_arguments(field, types[field.name])
        flag = "--" + field.name.replace("_", "-")
        group.add_argument(
            arguments.pop("flag", flag), dest=field.name, default=argparse.SUPPRESS, **arguments
        )


def given_fields(namespace: argparse.Namespace, dataclass_type: type[Any]) -> dict[str, Any]:
    """What was given on the command line of the dataclass's fields."""
    return {
        field.name: getattr(namespace, field.name)
        for field in fields(dataclass_type)
        if hasattr(namespace, field.name)
    }


def optional(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """As `convert`, and the word "none" is None."""

    def convert_or_none(text: str) -> Any:
        return None if text.lower() == "none" else convert(text)

    convert_or_none.__name__ = f"{convert.__name__} or none"  # argparse's message names it
    return convert_or_none


def size(text: str) -> int:
    """`parse_size` with its message shown by argparse."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _flag_arguments(field: Field[Any], annotation: Any) -> FlagArguments:
    alternatives = [part for part in get_args(annotation) or (annotation,) if part is not NoneType]
    if len(alternatives) != 1 or not isinstance(alternatives[0], type):
        raise TypeError(f"no flag can be made of field {field.name}: {annotation}")
    (field_type,) = alternatives
    if field_type is bool:
        return {"action": argparse.BooleanOptionalAction}
    if issubclass(field_type, Enum):
        return {"choices": [member.value for member in field_type]}
    convert: Callable[[str], Any] = field_type
    metavar = field_type.__name__.upper()
    if field.name.endswith("_bytes"):
        convert, metavar = size, "SIZE"
    if NoneType in get_args(annotation):
        convert = optional(convert)
    return {"type": convert, "metavar": metavar}


def _help(docstring: str, default: Any) -> str:
    default = default.value if isinstance(default, Enum) else default
    text = f"{docstring} (default: {default})".strip()
    return text.replace("%", "%%").replace("`", "")
