"""Reads the rotary settings of a config.json, wherever they stand in it, into one mapping."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_SCALED_FROM_ORIGINAL = ("llama3", "yarn")
"""Types that know how long the contexts of the training were."""

_NEEDED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "default": (),
        "linear": ("factor",),
        "dynamic": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "yarn": ("factor",),
    }
)
_YARN_OPTIONS = (
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "finetuned",  # says where the weights come from, and changes no frequency
)
_PLACES = ("rope_scaling", "rope_parameters")
_ORIGINAL_LEN = "original_max_position_embeddings"
_ANYWHERE = ("rope_theta", "partial_rotary_factor", _ORIGINAL_LEN)
"""Settings that may also stand beside the others, at the top level of the file."""


def read_rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings of a config.json, with `rope_type` and `rope_theta` always among them.

    They are read from `rope_parameters` (transformers 5), from `rope_scaling` (before), and from
    the top level. Where Transformers would take one of two values that contradict each other, or
    read over a setting that its rope_type does not have, this is a ValueError that names it:
    nothing is ignored. ValueError also for a type that we do not know and for a missing setting.
    """
    scaling, parameters = (_nested_settings(config, place) for place in _PLACES)
    if scaling and parameters:
        _check_agreement(scaling, parameters, config)
    where = "rope_scaling" if scaling else "rope_parameters"
    settings = {"rope_type": "default", **(scaling or parameters)}
    _check_names(settings, where)
    for name in _ANYWHERE:
        top = config.get(name)
        if top is None or (name == _ORIGINAL_LEN and not _takes(settings, name, config)):
            continue
        if settings.setdefault(name, top) != top:
            raise ValueError(
                f"config.json gives {name} twice: {settings[name]!r} in {where} and {top!r} "
                f"beside it; remove one of them"
            )
    settings.setdefault("rope_theta", 10000.0)
    if settings["rope_type"] in _SCALED_FROM_ORIGINAL:
        settings.setdefault(_ORIGINAL_LEN, config["max_position_embeddings"])
    return settings


def _nested_settings(config: Mapping[str, Any], place: str) -> dict[str, Any]:
    """What stands under one of the two names; `type` is the old name of `rope_type`."""
    value = config.get(place) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"config.json must have an object or null as {place}, got {value!r}")
    settings = {name: item for name, item in value.items() if item is not None}
    if not settings:
        return {}
    old_name = settings.pop("type", None)
    rope_type = settings.setdefault("rope_type", old_name or "default")
    if old_name not in (None, rope_type):
        raise ValueError(
            f"config.json gives the rope_type twice in {place}: {rope_type!r}, and {old_name!r} "
            f"as type; remove one of them"
        )
    if rope_type == "yarn" and "factor" in value:
        settings["factor"] = value["factor"]  # null: as far as the positions of the model go
    return settings


def _check_agreement(
    scaling: Mapping[str, Any], parameters: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    """rope_scaling replaces rope_parameters; nothing may be lost by that."""
    beside = {name: config[name] for name in _ANYWHERE if config.get(name) is not None}
    known = {"rope_theta": 10000.0, **beside, **scaling}
    for name, value in parameters.items():
        is_unscaled = name == "rope_type" and value == "default"
        if not is_unscaled and known.get(name) != value:
            raise ValueError(
                f"config.json has both rope_scaling and rope_parameters, and they differ in "
                f"{name}: {known.get(name)!r} and {value!r}; put all rotary settings under one "
                f"of the two names"
            )


def _check_names(settings: Mapping[str, Any], where: str) -> None:
    """Every setting is one of this rope_type, and every setting that it needs is there."""
    rope_type = settings["rope_type"]
    if not isinstance(rope_type, str) or rope_type not in _NEEDED:
        raise ValueError(
            f"config.json asks for rope_type {rope_type!r}, which is not supported; this engine "
            f"knows {', '.join(_NEEDED)}"
        )
    needed = _NEEDED[rope_type]
    for name in needed:
        if name not in settings:
            raise ValueError(
                f"config.json has no {name!r} in its {where}, which rope_type {rope_type!r} needs; "
                f"download the model again, or add it"
            )
    known = {"rope_type", "rope_theta", "partial_rotary_factor", *needed}
    if rope_type in _SCALED_FROM_ORIGINAL:
        known.add(_ORIGINAL_LEN)
    if rope_type == "yarn":
        known.update(_YARN_OPTIONS)
    for name, value in settings.items():
        if name not in known:
            raise ValueError(
                f"config.json sets {name}={value!r} in {where}, which rope_type {rope_type!r} does "
                f"not have: it would be ignored; remove it, or name the rope_type that it is for"
            )


def _takes(settings: Mapping[str, Any], name: str, config: Mapping[str, Any]) -> bool:
    """Whether the length of the original contexts, at the top level, is a setting of this type.

    ValueError if it is not and says that the model was stretched all the same.
    """
    if settings["rope_type"] in _SCALED_FROM_ORIGINAL:
        return True
    if config[name] != config["max_position_embeddings"]:
        raise ValueError(
            f"config.json sets {name}={config[name]!r}, which rope_type {settings['rope_type']!r} "
            f"does not have: it would be ignored; remove it, or name the rope_type that it is for"
        )
    return False
