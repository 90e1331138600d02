"""Cost of choosing the next tokens of 256 requests."""

from typing import Any

import pytest
import torch

from folovllm.request import Request, SamplingParams
from folovllm.sampling.sampler import Sampler

BATCH_SIZE = 256
VOCAB_SIZE = 4096
"""Small, so that the benchmark shows what a batch costs and not how fast the device sorts."""

SAMPLING_PARAMS = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(temperature=0.8),
    "filters": SamplingParams(temperature=0.8, top_k=50, top_p=0.9, min_p=0.01),
    "penalties": SamplingParams(temperature=0.8, repetition_penalty=1.1, presence_penalty=0.5),
    "logprobs": SamplingParams(temperature=0.0, logprobs=5),
}


@pytest.fixture(params=sorted(SAMPLING_PARAMS))
def requests(request: pytest.FixtureRequest) -> list[Request]:
    """A full batch whose requests all sample in the same way, eight tokens into their output."""
    batch = [
        Request(
            request_id=f"r{index}",
            prompt_token_ids=[(index + position) % VOCAB_SIZE for position in range(16)],
            sampling_params=SAMPLING_PARAMS[request.param],
            seed=index,
        )
        for index in range(BATCH_SIZE)
    ]
    for sequence in batch:
        for token_id in range(8):
            sequence.append_output_token(token_id)
    return batch


@torch.inference_mode()
def test_prepare_sampling(benchmark: Any, requests: list[Request], device: torch.device) -> None:
    """The host's part: settings of all requests into tensors, and their upload."""
    benchmark(Sampler(VOCAB_SIZE, device).prepare, requests)


@torch.inference_mode()
def test_sample(benchmark: Any, requests: list[Request], device: torch.device) -> None:
    """The device's part, and fetching the tokens: the one wait of a step."""
    sampler = Sampler(VOCAB_SIZE, device)
    tensors = sampler.prepare(requests)
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(BATCH_SIZE, VOCAB_SIZE, device=device, generator=generator)
    output = benchmark(lambda: sampler.sample(logits.clone(), tensors).to_host())
    assert len(output.token_ids) == BATCH_SIZE
