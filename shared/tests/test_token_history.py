"""What a sampler keeps of requests with penalties: what it uploads, and that no token shows it."""

import gc
import random
import weakref

import numpy as np
import pytest
import torch

from folovllm.request import Request, RequestStatus, SamplingParams
from folovllm.sampling import tensors as sampling_tensors
from folovllm.sampling.sampler import Sampler
from folovllm.sampling.token_history import TokenHistory

CPU = torch.device("cpu")
VOCAB = 61
PENALTIES = [
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.7},
    {"frequency_penalty": 0.3},
    {"repetition_penalty": 0.8, "presence_penalty": -1.1, "frequency_penalty": 0.1},
    {},
]


def make_request(num_prompt_tokens=3, penalty=3, request_id="r", seed=0, max_tokens=10_000):
    rng = random.Random(seed)
    return Request(
        request_id=request_id,
        prompt_token_ids=[rng.randrange(VOCAB) for _ in range(num_prompt_tokens)],
        sampling_params=SamplingParams(
            temperature=0.0, max_tokens=max_tokens, **PENALTIES[penalty]
        ),
    )


def plain_edit(logits, requests):
    """The penalties as loops over the requests' own tokens, in the arithmetic of float32."""
    edited = logits.numpy().copy()
    for row, request in zip(edited, requests, strict=True):
        params = request.sampling_params
        factor = np.float32(params.repetition_penalty)
        for token_id in set(request.token_ids):
            row[token_id] = row[token_id] / factor if row[token_id] > 0 else row[token_id] * factor
        for token_id in set(request.output_token_ids):
            row[token_id] -= np.float32(params.presence_penalty)
        for token_id in request.output_token_ids:
            row[token_id] -= np.float32(params.frequency_penalty)
    return torch.from_numpy(edited)


def check(sampler, requests, seed):
    logits = torch.randn(len(requests), VOCAB, generator=torch.Generator().manual_seed(seed))
    edited = sampler.prepare(requests).edit(logits)
    torch.testing.assert_close(edited, plain_edit(logits, requests), rtol=0, atol=0)


@pytest.fixture
def uploaded(monkeypatch):
    """How many numbers each upload had."""
    sizes, upload = [], sampling_tensors.upload

    def spy(arrays, device):
        sizes.append(sum(array.size for array in arrays))
        return upload(arrays, device)

    monkeypatch.setattr(sampling_tensors, "upload", spy)
    return sizes


def test_what_a_step_uploads_does_not_grow_with_the_history(uploaded):
    sampler = Sampler(VOCAB, CPU)
    sizes = {}
    for num_tokens in (100, 4000):
        requests = [make_request(num_tokens, penalty=i % 4, seed=i) for i in range(8)]
        for request in requests:
            request.append_output_token(5)
        sampler.prepare(requests)
        for request in requests:
            request.append_output_token(6)
        uploaded.clear()
        sampler.prepare(requests)
        sizes[num_tokens] = uploaded[0]
    assert sizes[4000] == sizes[100] < 8 * 12


def test_penalties_equal_plain_loops_whatever_requests_go_through():
    """Requests join, wait, are preempted, aborted, replaced under their id; two samplers look."""
    for seed in range(6):
        rng = random.Random(seed)
        samplers = [Sampler(VOCAB, CPU), Sampler(VOCAB, CPU)]
        requests = []
        for step in range(120):
            if rng.random() < 0.25 or not requests:
                length = rng.choice([1, 2, 30, 300])
                penalty = rng.randrange(len(PENALTIES))
                name = f"r{rng.randrange(4)}"  # ids come again
                requests.append(make_request(length, penalty, name, seed=1000 * seed + step))
            if rng.random() < 0.1:
                requests.pop(rng.randrange(len(requests)))
            batch = rng.sample(requests, rng.randint(min(1, len(requests)), len(requests)))
            for request in batch:
                if rng.random() < 0.2:  # preempted, and computed again
                    request.status, request.num_computed_tokens = RequestStatus.WAITING, 0
            if batch:
                check(samplers[rng.random() < 0.3], batch, step)
            for request in batch:
                if rng.random() < 0.9:
                    request.append_output_token(rng.randrange(VOCAB))


def test_request_that_lost_tokens_is_read_anew():
    sampler, request = Sampler(VOCAB, CPU), make_request()
    request.token_ids += [7, 8, 9]
    check(sampler, [request], 0)
    del request.token_ids[-2:]
    check(sampler, [request], 1)
    request.token_ids += [20, 21]
    check(sampler, [request], 2)


def test_same_request_may_fill_several_rows():
    sampler, request = Sampler(VOCAB, CPU), make_request(5)
    for step in range(3):
        check(sampler, [request] * 3, step)
        request.append_output_token(step)


def test_rules_of_a_step_outlive_later_steps():
    sampler = Sampler(VOCAB, CPU)
    requests = [make_request(20, seed=i) for i in range(3)]
    for request in requests:
        request.token_ids += [1, 2]
    logits = torch.zeros(3, VOCAB) + 1.5
    early, expected = sampler.prepare(requests), plain_edit(logits, requests)
    for step in range(700):  # far more than the first buffer holds
        for request in requests:
            request.append_output_token(step % VOCAB)
        sampler.prepare([*requests, make_request(500, seed=step)])
    torch.testing.assert_close(early.edit(logits), expected, rtol=0, atol=0)


def test_upload_that_failed_is_made_up_for(monkeypatch):
    sampler, request = Sampler(VOCAB, CPU), make_request()
    check(sampler, [request], 0)
    request.append_output_token(9)

    def broken(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(sampling_tensors, "upload", broken)
        sampler.prepare([request])
    request.append_output_token(11)
    check(sampler, [request], 1)


def test_prepare_may_be_called_inside_and_outside_of_inference_mode():
    sampler, request = Sampler(VOCAB, CPU), make_request()
    with torch.inference_mode():
        sampler.prepare([request])
    for step in range(2):
        request.append_output_token(step)
        check(sampler, [request], step)


def collect_and_write(history, requests):
    update = history.collect(requests)
    history.write(update, torch.from_numpy(update.positions), torch.from_numpy(update.token_ids))
    return update


def test_tokens_lie_where_the_update_says():
    history = TokenHistory(CPU)
    first, second = make_request(2, max_tokens=4), make_request(1, max_tokens=3, seed=1)
    update = collect_and_write(history, [first, second])
    assert update.starts.tolist() == [0, 6]
    assert update.positions.tolist() == [0, 1, 6]
    assert update.token_ids.tolist() == first.token_ids + second.token_ids
    first.append_output_token(8)
    update = collect_and_write(history, [second, first])
    assert update.starts.tolist() == [6, 0]
    assert update.positions.tolist() == [2] and update.token_ids.tolist() == [8]
    assert history.token_ids[:3].tolist() == first.token_ids


def test_tokens_are_written_a_few_times_each_however_long_requests_come_and_go():
    history, rng = TokenHistory(CPU), random.Random(0)
    num_written = num_tokens = 0
    running: list[Request] = []
    for step in range(2000):
        running = [request for request in running if request.num_output_tokens < 200]
        new = []
        if len(running) < 16:
            new = [make_request(rng.randint(1, 400), seed=step, max_tokens=100_000)]
            num_tokens += new[0].num_tokens
        # As where steps with prompts and steps without take turns.
        for batch in (new, running):
            if batch:
                num_written += len(collect_and_write(history, batch).positions)
        running += new
        for request in running:
            request.append_output_token(1)
        num_tokens += len(running)
    assert num_tokens > 20_000
    assert num_written < 3 * num_tokens
    assert len(history.token_ids) < 16 * 2 * 2 * (600 + 600 + 256)


def test_finished_requests_are_not_kept_alive():
    sampler, request = Sampler(VOCAB, CPU), make_request()
    sampler.prepare([request])
    seen = weakref.ref(request)
    del request
    gc.collect()
    assert seen() is None
