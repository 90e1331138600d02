"""Compares a stage with Transformers: ids of the prompts, greedy tokens, logits along the way."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from folovllm.model.config import kv_bytes_per_token
from folovllm.model.loader import resolve_model_directory

from .parity_engine import ForcedSampler, make_requests, run_engine
from .parity_reference import (
    Reference,
    greedy_reference,
    load_reference_model,
    read_prompts,
)
from .parity_report import ParityReport, PromptParity
from .parity_tokenizer import compare_encodings, encode_prompts


@dataclass(frozen=True)
class Tolerance:
    """What rounding alone may cause."""

    logit: float
    """Largest absolute difference of any logit at any step."""
    near_tie: float
    """Where the two likeliest logits are at most this far apart, either token may be chosen."""


TOLERANCES: Mapping[str, Tolerance] = MappingProxyType(
    {
        # fp32 has no excuse: near ties are compared as well.
        "float32": Tolerance(logit=1e-3, near_tie=0.0),
        "float16": Tolerance(logit=0.5, near_tie=0.125),
        # At single positions of a real model, rounding moves some unlikely token's logit far:
        # Transformers in bfloat16 is as far from itself in float32. The likeliest move less.
        "bfloat16": Tolerance(logit=4.0, near_tie=1.0),
    }
)
"""By dtype. bfloat16 has 3 bits less than float16: 8 times the rounding error."""
CACHED_REQUESTS = 8
"""The KV cache has room for so many of the longest requests: the rest wait, join and leave."""


class ParityError(Exception):
    """The comparison could not be made; the message says why and what to change."""


@dataclass(frozen=True, kw_only=True)
class ParityOptions:
    """What to compare."""

    stage: str
    model: str
    prompts: Path
    dtype: str = "float32"
    device: str = "auto"
    num_prompts: int = 30
    max_tokens: int = 32
    tolerance: float | None = None
    """Of a logit; None takes the dtype's."""


def run_parity(options: ParityOptions) -> ParityReport:
    """Run Transformers, then the stage twice: freely, and along Transformers' tokens.

    Both get the ids that Transformers' tokenizer makes of the prompts; that the stage's own
    tokenizer makes the same of them is compared as well.
    ParityError or ValueError if the stage, the model or an option cannot be used.
    """
    if options.max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {options.max_tokens}")
    stage = _import_stage(options.stage)
    directory = resolve_model_directory(options.model)
    texts = read_prompts(options.prompts, options.num_prompts)
    prompts = encode_prompts(directory, texts)
    llm = _start(stage, options, max(map(len, prompts)) + options.max_tokens)
    device, dtype = llm.model.device, llm.model.dtype
    references = compute_references(directory, dtype, device, prompts, options.max_tokens)
    tolerance = TOLERANCES[options.dtype]
    results = compare_engine(
        llm.engine,
        references,
        max_tokens=options.max_tokens,
        eos_token_ids=llm.model.config.eos_token_ids,
        near_tie=tolerance.near_tie,
    )
    encodings = compare_encodings(llm.tokenizer, directory, texts)
    return ParityReport(
        stage=options.stage,
        model=options.model,
        dtype=options.dtype,
        device=str(device),
        tolerance=tolerance.logit if options.tolerance is None else options.tolerance,
        near_tie=tolerance.near_tie,
        prompts=tuple(
            replace(result, mismatch=encoding or result.mismatch)
            for result, encoding in zip(results, encodings, strict=True)
        ),
    )


def compute_references(
    directory: Path,
    dtype: torch.dtype,
    device: torch.device,
    prompts: Sequence[list[int]],
    max_tokens: int,
) -> list[Reference]:
    """What Transformers makes of each prompt; its model is gone from memory afterwards."""
    model = load_reference_model(directory, dtype, device)
    return [greedy_reference(model, prompt, max_tokens) for prompt in prompts]


def compare_engine(
    engine: Any,
    references: Sequence[Reference],
    *,
    max_tokens: int,
    eos_token_ids: frozenset[int],
    near_tie: float,
) -> list[PromptParity]:
    """Run the engine freely and forced; replaces its sampler while it does the latter.

    near_tie: a token may differ where the reference's two likeliest logits are at most this far
    apart, and is not compared any more after that.
    """
    outputs = run_engine(engine, make_requests(references, max_tokens, eos_token_ids))
    forced = ForcedSampler({str(index): reference for index, reference in enumerate(references)})
    sampler, engine.model_runner.sampler = engine.model_runner.sampler, forced
    try:
        # Backwards, so that every request has other batch mates than before.
        run_engine(engine, make_requests(references, max_tokens, eos_token_ids)[::-1])
    finally:
        engine.model_runner.sampler = sampler
    results = []
    for index, reference in enumerate(references):
        num_compared, mismatch = compare_tokens(reference, outputs[str(index)], near_tie)
        num_tokens = len(reference.output_token_ids)
        # A step that never happened was not right: infinitely wrong.
        differences = [
            forced.max_differences.get((str(index), i), float("inf")) for i in range(num_tokens)
        ]
        results.append(
            PromptParity(
                num_prompt_tokens=len(reference.prompt_token_ids),
                num_reference_tokens=num_tokens,
                num_compared_tokens=num_compared,
                mismatch=mismatch,
                max_logit_difference=max(differences),
            )
        )
    return results


def compare_tokens(
    reference: Reference, token_ids: list[int], near_tie: float
) -> tuple[int, str | None]:
    """How many tokens were compared, and the first that differs although it must not."""
    expected = reference.output_token_ids
    for index, gap in enumerate(reference.top_gaps):
        found = token_ids[index] if index < len(token_ids) else None
        if found == expected[index]:
            continue
        if found is not None and near_tie > 0.0 and gap <= near_tie:
            return index, None
        return index, f"token {index} is {found}, not {expected[index]} (top-2 gap {gap:.2e})"
    if len(token_ids) > len(expected):
        return len(expected), f"goes on for {len(token_ids) - len(expected)} tokens after the end"
    return len(expected), None


def _import_stage(name: str) -> Any:
    try:
        stage = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ParityError(
            f"no stage {name!r} can be imported; give a folder's name, such as m2_batching, and "
            f"run this in the root of the checkout"
        ) from None
    if not hasattr(stage, "LLM"):
        raise ParityError(f"{name} has no LLM; give the name of a stage, such as m2_batching")
    return stage


def _start(stage: Any, options: ParityOptions, max_model_len: int) -> Any:
    """The stage's LLM, with a KV cache that does not hold all requests at once."""
    from folovllm.model.config import ModelConfig

    config = ModelConfig.from_directory(resolve_model_directory(options.model))
    token_bytes = kv_bytes_per_token(config, getattr(torch, options.dtype))
    return stage.LLM(
        model=options.model,
        dtype=options.dtype,
        device=options.device,
        max_model_len=max_model_len,
        kv_cache_bytes=CACHED_REQUESTS * max_model_len * token_bytes,
    )
