"""What rules about single tokens cost the host in every step. On a CPU, without a model.

    PYTHONPATH=.:shared python docs/dev/trials/mask_host_time.py --model DIR --output FILE.json

`Sampler.prepare` of a batch in which every row has the rule, for 64 steps of 1, 8 and 64 rows; DIR
has the tokenizer. Tokens are drawn from those that a mask leaves, so that grammars come everywhere
that they can; a row whose output is complete begins anew. Milliseconds per step, median and 90th
percentile; `first_ms` is the batch's first step, which fills what llguidance remembers; `cpu_ms` is
the median of the process's processor time, for a machine that others use at the same time.
"""

import argparse
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from folovllm.hardware import describe_environment
from folovllm.json_files import write_json_atomically
from folovllm.request import Request, SamplingParams, StructuredOutputsParams
from folovllm.sampling.sampler import Sampler
from folovllm.text.bad_words import encode_bad_words
from folovllm.text.grammars import GrammarCompiler
from folovllm.text.tokenizer import Tokenizer

NUM_STEPS = 64
ROWS = (1, 8, 64)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bc", "def"]}, "maxItems": 5},
    },
    "required": ["name", "age", "tags"],
}
BAD_WORDS = ["the", "fox", "not at all", "Paris", "blue sky", "seven", "quick", "never"]
RULES: dict[str, SamplingParams] = {
    "none (temperature)": SamplingParams(),
    "structured_outputs, json schema": SamplingParams(
        structured_outputs=StructuredOutputsParams(json=SCHEMA)
    ),
    "structured_outputs, regex": SamplingParams(
        structured_outputs=StructuredOutputsParams(regex=r"[A-Z][a-z ]{5,60}\. [0-9]{2,8}")
    ),
    "allowed_token_ids, 1000 of them": SamplingParams(allowed_token_ids=list(range(100, 1100))),
    "bad_words, 8 of them": SamplingParams(bad_words=BAD_WORDS),
}


@dataclass(frozen=True)
class StepTime:
    """In milliseconds."""

    wall_ms: float
    cpu_ms: float
    """Of all threads of the process."""


class Batch:
    """Requests with one rule, and the steps that they take."""

    def __init__(self, params: SamplingParams, num_rows: int, tokenizer: Tokenizer) -> None:
        self._params = params
        self._tokenizer = tokenizer
        self._eos = tokenizer.eos_token_ids
        self._vocab_size = tokenizer.vocab_size
        self._compiler = GrammarCompiler(tokenizer, self._vocab_size, self._eos)
        self._rng = random.Random(0)
        self._num_made = 0
        self._sampler = Sampler(self._vocab_size, torch.device("cpu"))
        self._requests = [self._new() for _ in range(num_rows)]

    def step(self) -> StepTime:
        """How long `prepare` took; then every row gets a token."""
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        tensors = self._sampler.prepare(self._requests)
        took = StepTime(
            1e3 * (time.perf_counter() - start_s), 1e3 * (time.process_time() - start_cpu_s)
        )
        for row, request in enumerate(self._requests):
            mask = None if tensors.mask is None else tensors.mask.bits[row].numpy()
            token_id = self._draw(mask)
            if token_id in self._eos or request.append_output_token(token_id) is not None:
                self._requests[row] = self._new()
        return took

    def _draw(self, mask: Any) -> int:
        if mask is None:
            return self._rng.randrange(self._vocab_size)
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: self._vocab_size]
        return int(self._rng.choice(np.flatnonzero(bits)))

    def _new(self) -> Request:
        self._num_made += 1
        structure = self._params.structured_outputs
        return Request(
            request_id=str(self._num_made),
            prompt_token_ids=[5, 6, 7],
            sampling_params=self._params,
            bad_words_token_ids=encode_bad_words(self._params.bad_words or (), self._tokenizer),
            grammar=None if structure is None else self._compiler.compile(structure),
            eos_token_ids=self._eos,
            seed=self._num_made,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = Tokenizer(arguments.model)
    rows = []
    for name, params in RULES.items():
        for num_rows in ROWS:
            batch = Batch(params, num_rows, tokenizer)
            first, *steps = [batch.step() for _ in range(NUM_STEPS)]
            times = [step.wall_ms for step in steps]
            row = {"rule": name, "rows": num_rows, "median_ms": statistics.median(times)}
            row |= {"p90_ms": statistics.quantiles(times, n=10)[-1], "first_ms": first.wall_ms}
            row |= {"cpu_ms": statistics.median(step.cpu_ms for step in steps)}
            rows.append(row)
            print(row, flush=True)
    if arguments.output is not None:
        about = {"steps": NUM_STEPS, "vocab_size": tokenizer.vocab_size}
        about |= {"tokenizer": arguments.model.name}
        write_json_atomically(
            arguments.output, {"environment": describe_environment(), "about": about, "rows": rows}
        )


if __name__ == "__main__":
    main()
