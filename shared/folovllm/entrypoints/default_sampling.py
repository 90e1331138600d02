"""Sampling settings that a model's generation_config.json suggests."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..request import SamplingParams

_FILE = "generation_config.json"
_HONOURED: Mapping[str, str] = MappingProxyType(
    {
        "temperature": "temperature",
        "top_k": "top_k",
        "top_p": "top_p",
        "min_p": "min_p",
        "repetition_penalty": "repetition_penalty",
        "max_new_tokens": "max_tokens",
        "min_new_tokens": "min_tokens",
        "stop_strings": "stop",
    }
)
"""Name in the file -> name in SamplingParams."""
_REFUSED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "bad_words_ids": (),
        "begin_suppress_tokens": (),
        "constraints": (),
        "diversity_penalty": (0.0,),
        "dola_layers": (),
        "encoder_no_repeat_ngram_size": (0,),
        "encoder_repetition_penalty": (1.0,),
        "epsilon_cutoff": (0.0,),
        "eta_cutoff": (0.0,),
        "exponential_decay_length_penalty": (),
        "force_words_ids": (),
        "forced_bos_token_id": (),
        "forced_eos_token_id": (),
        "guidance_scale": (1.0,),
        "min_length": (0,),
        "no_repeat_ngram_size": (0,),
        "num_beams": (1,),
        "penalty_alpha": (0.0,),
        "sequence_bias": (),
        "suppress_tokens": (),
        "top_h": (),
        "typical_p": (1.0,),
        "watermarking_config": (),
    }
)
"""Settings that change tokens and that SamplingParams does not have -> values without effect."""


def default_sampling_params(model: str | Path) -> SamplingParams:
    """What a call without SamplingParams gets, as in vLLM: the file's settings over the defaults.

    `do_sample: false` is greedy. ValueError names a setting of the file that we do not have: the
    model's answers would not be what its publisher meant, unless the caller chooses.
    """
    path = Path(model) / _FILE
    if not path.is_file():
        return SamplingParams()
    settings = json.loads(path.read_text(encoding="utf-8"))
    given = {name: value for name, value in settings.items() if value is not None}
    for name, neutral in _REFUSED.items():
        if name in given and given[name] not in (*neutral, [], {}):
            raise ValueError(
                f"{path} sets {name}={given[name]!r}, which this engine does not have; give "
                f"SamplingParams of your own, which replace all that the file suggests"
            )
    values = {ours: given[theirs] for theirs, ours in _HONOURED.items() if theirs in given}
    if given.get("do_sample") is False:
        values["temperature"] = 0.0
    try:
        return SamplingParams(**values)
    except ValueError as error:
        raise ValueError(f"{path} cannot be followed: {error}") from error
