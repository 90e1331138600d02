"""Whether two runs measured the same thing: model, dtype, seed, memory limit, workload."""

from collections.abc import Mapping
from typing import Any

from .results import Result, lookup

MUST_AGREE = ("model.dtype", "model.load_format", "seed", "device")
MUST_AGREE_IF_BOTH = ("engine_config.kv_cache_bytes", "engine_config.max_model_len")
"""Options that not every engine has, or that it derives itself when they are None."""
FITTED = "kv_cache_is_fitted"
"""In a result: its engine was given the KV cache that it needs for the workload, and no more."""


def is_quantized(run: Result) -> bool:
    """Whether its weights were of another format than those of most stages."""
    return lookup(run, "model.quantization") is not None


def has_random_weights(run: Result) -> bool:
    return lookup(run, "model.load_format") == "dummy"


def needs_reference(run: Result) -> bool:
    """Whether its tokens can be compared only with those of its own checkpoint, dequantised."""
    return is_quantized(run) and not has_random_weights(run)


def setting_failures(who: str, run: Result, ref_name: str, reference: Result) -> list[str]:
    failures = []
    are_fitted = bool(run.get(FITTED) and reference.get(FITTED))
    for path in (_model_path(run, reference), *MUST_AGREE, *MUST_AGREE_IF_BOTH):
        if are_fitted and path == "engine_config.kv_cache_bytes":
            continue  # each has what it needs: that is what their rows compare
        mine, theirs = lookup(run, path), lookup(reference, path)
        if path in MUST_AGREE_IF_BOTH and (mine is None or theirs is None):
            continue
        if mine != theirs:
            failures.append(f"{who} ran with {path} = {mine!r}, {ref_name} with {theirs!r}")
    return failures


def _model_path(run: Result, reference: Result) -> str:
    """What tells whether two runs had the same model; a quantised one has a name of its own."""
    is_other_checkpoint = needs_reference(run) != needs_reference(reference)
    return "model.kv_bytes_per_token" if is_other_checkpoint else "model.name"


def workload_failures(who: str, run: Result, ref_name: str, reference: Result) -> list[str]:
    """The same workload, or one the stated beginning of the other."""
    mine, theirs = run["workload"], reference["workload"]
    if mine["sha256"] == theirs["sha256"]:
        return []
    short, long = sorted((run, reference), key=lambda result: result["workload"]["num_requests"])
    cut = short["workload"].get("num_requests_before_cut")
    whole = long["workload"].get("num_requests_before_cut") or long["workload"]["num_requests"]
    same_source = all(mine.get(key) == theirs.get(key) for key in ("name", "parameters"))
    if cut is None or cut != whole or not same_source:
        return [
            f"{who} ran workload {_describe(mine)}, {ref_name} ran {_describe(theirs)}; neither "
            f"says that it is the beginning of the other"
        ]
    shapes = [
        [_shape(request) for request in result["requests"][: len(short["requests"])]]
        for result in (short, long)
    ]
    if shapes[0] != shapes[1]:
        index = next(i for i, pair in enumerate(zip(*shapes, strict=False)) if pair[0] != pair[1])
        return [
            f"{who} and {ref_name}: request {index} differs in (prompt, output tokens, arrival), "
            f"{shapes[0][index]} and {shapes[1][index]}: one workload is not the beginning of "
            f"the other"
        ]
    return []


def _shape(request: Mapping[str, Any]) -> tuple[int, int, float | str]:
    """What a request has in every run: the arrival of one that follows another differs."""
    arrival = request["arrival_s"]
    if request.get("follows"):
        arrival = f"after {request['follows']}"
    return request["num_prompt_tokens"], request["num_output_tokens"], arrival


def _describe(workload: Mapping[str, Any]) -> str:
    return (
        f"{workload.get('spec') or workload.get('name')} ({workload['num_requests']} requests, "
        f"sha256 {str(workload['sha256'])[:8]}…)"
    )
