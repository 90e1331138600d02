"""Beam search on forked requests against Transformers'."""

import json
import weakref
from pathlib import Path

import pytest
import torch

from folovllm.entrypoints.beam_search import BeamSearchParams
from folovllm.testing.driver import check_idle, random_prompts
from folovllm.testing.toy_models import reference_greedy, toy_families, write_toy_model
from m6_prefix import LLM
from m6_prefix.config import PreemptionMode


@pytest.fixture(scope="module")
def toy_directory(tmp_path_factory) -> Path:
    """A model with so many end-of-sequence ids that beams end at different lengths."""
    directory = write_toy_model(toy_families()[0], tmp_path_factory.mktemp("toy"))
    path = directory / "generation_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "eos_token_id": list(range(2, 14))}))
    return directory


def make_llm(directory: Path, **options) -> LLM:
    options = {"max_model_len": 256, "kv_cache_bytes": 1 << 23, **options}
    return LLM(directory, device="cpu", **options)


def transformers_beams(directory: Path, prompt: list[int], params: BeamSearchParams):
    """(token ids, cumulative log-probability) of the beams, best first."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        num_beams=params.beam_width,
        num_return_sequences=params.beam_width,
        max_new_tokens=params.max_tokens,
        length_penalty=params.length_penalty,
        early_stopping=False,
        do_sample=False,
        eos_token_id=None if params.ignore_eos else model.generation_config.eos_token_id,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    eos = set() if params.ignore_eos else set(model.generation_config.eos_token_id)
    beams = []
    for row, score in zip(output.sequences.tolist(), output.sequences_scores.tolist(), strict=True):
        end = next((i + 1 for i in range(len(prompt), len(row)) if row[i] in eos), len(row))
        beams.append((row[:end], score * (end - len(prompt)) ** params.length_penalty))
    return beams


@pytest.mark.parametrize(
    "params",
    [
        BeamSearchParams(beam_width=3, max_tokens=12, ignore_eos=True),
        BeamSearchParams(beam_width=4, max_tokens=20, length_penalty=0.5),
        BeamSearchParams(beam_width=5, max_tokens=30, length_penalty=2.0),
    ],
    ids=["ignore-eos", "short", "long"],
)
def test_beams_equal_transformers(toy_directory: Path, params) -> None:
    prompts = random_prompts(seed=11, count=4, vocab_size=199, max_len=21)
    llm = make_llm(toy_directory)
    outputs = llm.beam_search(prompts, params)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = transformers_beams(toy_directory, prompt, params)
        assert [sequence.tokens for sequence in output.sequences] == [ids for ids, _ in expected]
        for sequence, (_, cum_logprob) in zip(output.sequences, expected, strict=True):
            assert sequence.cum_logprob == pytest.approx(cum_logprob, abs=1e-3)
    check_idle(llm.engine)


def test_one_beam_is_greedy(toy_directory: Path) -> None:
    prompts = random_prompts(seed=11, count=4, vocab_size=199, max_len=21)
    params = BeamSearchParams(beam_width=1, max_tokens=9, ignore_eos=True)
    outputs = make_llm(toy_directory).beam_search(prompts, params)
    expected = reference_greedy(toy_directory, prompts, max_tokens=9)
    assert [
        output.sequences[0].tokens[len(prompt) :]
        for prompt, output in zip(prompts, outputs, strict=True)
    ] == expected


def test_end_of_sequence_matters_in_these_tests(toy_directory: Path) -> None:
    params = BeamSearchParams(beam_width=5, max_tokens=30, length_penalty=2.0)
    prompts = random_prompts(seed=11, count=4, vocab_size=199, max_len=21)
    ends = {
        len(ids) - len(prompt)
        for prompt in prompts
        for ids, _ in transformers_beams(toy_directory, prompt, params)
    }
    assert min(ends) < 30, "no beam ends early: the tests above would not see a wrong rule"


def test_beams_share_blocks_and_compute_one_token_each(toy_directory: Path, monkeypatch) -> None:
    llm = make_llm(toy_directory, block_size=4)
    scheduled = []
    original = llm.engine.step

    def step():
        output = original()
        scheduled.append(output.stats.num_scheduled_tokens)
        return output

    monkeypatch.setattr(llm.engine, "step", step)
    params = BeamSearchParams(beam_width=4, max_tokens=9, ignore_eos=True)
    llm.beam_search([list(range(1, 41))], params)
    # Nine steps, none launched ahead. Beside each beam its parent computes a token, which nobody
    # needs: a parent stays until its children share its blocks.
    assert scheduled == [40, 1 + 4] + [4 + 4] * 7


def test_beams_survive_a_pool_that_is_too_small_for_them(toy_directory: Path) -> None:
    params = BeamSearchParams(beam_width=4, max_tokens=24, ignore_eos=True)
    prompts = random_prompts(seed=12, count=2, vocab_size=199, min_len=20, max_len=20)
    expected = make_llm(toy_directory).beam_search(prompts, params)
    bytes_per_token = 2 * 2 * 2 * 16 * 4
    llm = make_llm(
        toy_directory, block_size=4, max_num_seqs=5, kv_cache_bytes=256 * bytes_per_token
    )
    actual = llm.beam_search(prompts, params)
    for output, other in zip(actual, expected, strict=True):
        tokens = [sequence.tokens for sequence in output.sequences]
        assert tokens == [sequence.tokens for sequence in other.sequences]
    check_idle(llm.engine)


@pytest.mark.parametrize("mode", PreemptionMode)
def test_beams_that_give_way_to_each_other_end_the_same(
    toy_directory: Path, monkeypatch, mode: PreemptionMode
) -> None:
    params = BeamSearchParams(beam_width=4, max_tokens=24, ignore_eos=True)
    prompts = random_prompts(seed=12, count=2, vocab_size=199, min_len=20, max_len=20)
    expected = make_llm(toy_directory).beam_search(prompts, params)
    bytes_per_token = 2 * 2 * 2 * 16 * 4
    llm = make_llm(
        toy_directory,
        max_model_len=48,
        block_size=2,
        kv_cache_bytes=58 * bytes_per_token,
        preemption_mode=mode,
    )
    num_preemptions = []
    original = llm.engine.step

    def step():
        output = original()
        num_preemptions.append(output.stats.num_preemptions)
        return output

    monkeypatch.setattr(llm.engine, "step", step)
    actual = llm.beam_search(prompts, params)
    assert sum(num_preemptions) > 0
    for output, other in zip(actual, expected, strict=True):
        tokens = [sequence.tokens for sequence in output.sequences]
        assert tokens == [sequence.tokens for sequence in other.sequences]
    check_idle(llm.engine)


def test_search_keeps_only_its_last_beams_alive(toy_directory: Path, monkeypatch) -> None:
    llm = make_llm(toy_directory, max_num_seqs=8)
    requests, num_alive = [], []
    add_request, step = llm.engine.add_request, llm.engine.step

    def watched_add_request(request):
        requests.append(weakref.ref(request))
        add_request(request)

    def watched_step():
        num_alive.append(sum(request() is not None for request in requests))
        return step()

    monkeypatch.setattr(llm.engine, "add_request", watched_add_request)
    monkeypatch.setattr(llm.engine, "step", watched_step)
    llm.beam_search([[5, 6, 7]], BeamSearchParams(beam_width=3, max_tokens=60, ignore_eos=True))
    assert len(requests) > 170
    # A round's beams, their parents, and those whose rows on the device are not used again yet.
    assert max(num_alive) <= 3 + 3 + 3 + 8


def test_prompt_without_room_is_refused_and_nothing_stays(toy_directory: Path) -> None:
    llm = make_llm(toy_directory)
    params = BeamSearchParams(beam_width=2, max_tokens=200)
    with pytest.raises(ValueError, match="prompt 1 has 57 tokens, and max_tokens 200 more exceed"):
        llm.beam_search([[5], [7] * 57], params)
    check_idle(llm.engine)


def test_interrupted_search_leaves_nothing_behind(toy_directory: Path, monkeypatch) -> None:
    llm = make_llm(toy_directory)
    original, steps = llm.engine.step, iter(range(4))

    def step():
        next(steps)
        return original()

    monkeypatch.setattr(llm.engine, "step", step)
    with pytest.raises(StopIteration):
        llm.beam_search([[5, 6, 7]], BeamSearchParams(beam_width=3, max_tokens=20, ignore_eos=True))
    check_idle(llm.engine)


@pytest.mark.parametrize("name", ["beam_width", "max_tokens"])
def test_count_that_cannot_work_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got 0"):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 2, name: 0})
