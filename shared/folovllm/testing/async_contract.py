"""What `AsyncLLM` over a stage must give: the tokens, texts and log-probabilities of its LLM."""

import asyncio
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ..entrypoints.async_llm import AsyncLLM
from ..entrypoints.async_stream import AsyncOutputStream
from ..entrypoints.outputs import CompletionOutput, RequestOutput, RequestOutputKind
from ..request import SamplingParams
from .toy_models import ToyFamily, toy_families, write_toy_model
from .toy_tokenizers import save_byte_level_tokenizer

VOCAB_SIZE = 400
"""Room for the toy tokenizer's, and some more: a model's vocabulary may be padded."""


def write_model_with_tokenizer(directory: Path) -> Path:
    """A toy model that reads and writes text; returns its directory."""
    family = toy_families()[0]
    family = ToyFamily(
        family.name, family.model_type, {**family.overrides, "vocab_size": VOCAB_SIZE}
    )
    write_toy_model(family, directory)
    return save_byte_level_tokenizer(directory)


def check_async_outputs_equal_offline_ones(stage: ModuleType, directory: Path) -> None:
    """Every request of a battery, all at once in another process, as `LLM.generate` answers it.

    Read in all three ways; of deltas the sum is compared.
    """
    options = {"max_model_len": 256, "dtype": "float32", "device": "cpu"}
    battery = _battery()
    llm = stage.LLM(directory, **options)
    # One call each, and all of it once per kind: so prompts have the same numbers, and seeds.
    expected = [
        llm.generate(prompt, params, use_tqdm=False)[0]
        for _ in RequestOutputKind
        for prompt, params in battery
    ]
    found = asyncio.run(_run(stage, directory, options, battery))
    for output, reference in zip(found, expected, strict=True):
        assert output.prompt == reference.prompt
        assert output.prompt_token_ids == reference.prompt_token_ids
        assert output.finished
        _check_same_positions(output.prompt_logprobs, reference.prompt_logprobs)
        assert output.metrics.ttft_s is not None and output.metrics.ttft_s > 0
        for completion, other in zip(output.outputs, reference.outputs, strict=True):
            _check_same(completion, other)


def _check_same(found: CompletionOutput, expected: CompletionOutput) -> None:
    """Log-probabilities to rounding: sums go another way in a batch of another size."""
    assert _without_logprobs(found) == _without_logprobs(expected)
    assert found.cumulative_logprob == pytest.approx(expected.cumulative_logprob, abs=1e-3)
    _check_same_positions(found.logprobs, expected.logprobs)


def _check_same_positions(found: Any, expected: Any) -> None:
    assert (found is None) == (expected is None)
    for position, other in zip(found or (), expected or (), strict=True):
        assert list(position or ()) == list(other or ())
        for token_id, logprob in (position or {}).items():
            assert logprob.logprob == pytest.approx(other[token_id].logprob, abs=1e-4)
            assert logprob[1:] == other[token_id][1:]


def _without_logprobs(completion: CompletionOutput) -> CompletionOutput:
    return replace(completion, cumulative_logprob=None, logprobs=None)


def _battery() -> list[tuple[Any, SamplingParams]]:
    def params(**settings: Any) -> SamplingParams:
        return SamplingParams(**{"max_tokens": 24, "ignore_eos": True, **settings})

    return [
        ("Hello world", params(temperature=0.0)),
        ("The quick brown fox", params(n=3, logprobs=2)),
        ([5, 6, 7, 8, 9], params(n=2, seed=7, top_k=20, top_p=0.9, min_p=0.01)),
        ("你好世界", params(temperature=0.0, stop=["e", "o", "a"], min_tokens=3)),
        ("你好", params(temperature=0.0, stop=["e", "o"], include_stop_str_in_output=True)),
        ("Hello", params(ignore_eos=False, temperature=3.0, max_tokens=100)),
        ("Hello", params(temperature=2.0, max_tokens=100, stop_token_ids=list(range(40, 80)))),
        ("lazy dog", params(repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2)),
        ("café", params(temperature=0.0, logit_bias={40: 50.0}, logprobs=0)),
        ("Hello", params(temperature=0.0, max_tokens=None)),
        ("quick brown", params(n=2, prompt_logprobs=1, bad_words=["e", "the"])),
        ("quick brown fox", params(allowed_token_ids=[40, 41, 42], truncate_prompt_tokens=3)),
        ("quick", params(detokenize=False)),
    ]


async def _run(
    stage: ModuleType,
    directory: Path,
    options: dict[str, Any],
    battery: list[tuple[Any, SamplingParams]],
) -> list[RequestOutput]:
    outputs: list[RequestOutput] = []
    async with AsyncLLM(stage.LLM, directory, **options) as llm:
        for kind in RequestOutputKind:
            streams = []
            for prompt, params in battery:
                streams += await llm.start([prompt], params, output_kind=kind)
            outputs += await asyncio.gather(*(_read(stream, kind) for stream in streams))
            assert llm.num_unfinished == llm.num_queued == 0
    return outputs


async def _read(stream: AsyncOutputStream, kind: RequestOutputKind) -> RequestOutput:
    return _join([output async for output in stream], kind)


def _join(outputs: list[RequestOutput], kind: RequestOutputKind) -> RequestOutput:
    """The last output, or what the deltas come to."""
    last = outputs[-1]
    if kind is not RequestOutputKind.DELTA:
        return last
    parts: dict[int, list[CompletionOutput]] = {}
    for output in outputs:
        for delta in output.outputs:
            parts.setdefault(delta.index, []).append(delta)
    joined = [_sum(deltas) for _, deltas in sorted(parts.items())]
    known = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
    assert len(known) <= 1
    return replace(last, outputs=joined, prompt_logprobs=known[0] if known else None)


def _sum(deltas: list[CompletionOutput]) -> CompletionOutput:
    last = deltas[-1]
    has_logprobs = last.logprobs is not None
    return CompletionOutput(
        index=last.index,
        text="".join(delta.text for delta in deltas),
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        cumulative_logprob=last.cumulative_logprob,
        logprobs=[p for d in deltas for p in d.logprobs or ()] if has_logprobs else None,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
    )
