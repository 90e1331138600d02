"""The primer shows code that runs, and times that were measured."""

import importlib.util
import json
import re

import pytest
import torch

from folovllm.model.loader import load_model
from folovllm.testing.toy_models import reference_greedy, toy_families, write_toy_model
from m0_infra.tests.notes import LEARN, code_of, dead_links, num_words, read, shown_code

PROMPT = [5, 9, 2, 7, 11]


@pytest.fixture(scope="module")
def first_engine():
    spec = importlib.util.spec_from_file_location("first_engine", LEARN / "code/first_engine.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def toy_directory(tmp_path_factory):
    return write_toy_model(toy_families()[0], tmp_path_factory.mktemp("toy"))


@pytest.mark.parametrize("loop", ["generate_without_cache", "generate_with_cache"])
def test_both_loops_write_the_greedy_tokens_of_transformers(first_engine, toy_directory, loop):
    model = load_model(toy_directory, device="cpu", dtype="float32")
    with torch.inference_mode():
        token_ids = getattr(first_engine, loop)(model, PROMPT, 12)
    assert token_ids == PROMPT + reference_greedy(toy_directory, [PROMPT], 12)[0]


def test_loop_with_a_cache_computes_the_prompt_and_then_single_tokens(
    first_engine, toy_directory, monkeypatch
):
    computed, original = [], first_engine.next_token

    def counted(model, token_ids, first_position, attend):
        computed.append((first_position, len(token_ids)))
        return original(model, token_ids, first_position, attend)

    monkeypatch.setattr(first_engine, "next_token", counted)
    model = load_model(toy_directory, device="cpu", dtype="float32")
    with torch.inference_mode():
        first_engine.generate_with_cache(model, PROMPT, 3)
    assert computed == [(0, 5), (5, 1), (6, 1)]


@pytest.mark.parametrize("page", ["00_primer.md", "00_primer.zh.md"])
def test_page_shows_the_code_of_its_files(page):
    blocks = shown_code(page)
    assert len(blocks) == 4
    for file, names, code in blocks:
        assert code == code_of(file, names), f"copy {names} of {file} into {page} again"


def test_engine_without_a_cache_has_25_lines_of_code():
    code = code_of("code/first_engine.py", "attention next_token generate_without_cache")
    assert len([line for line in code.splitlines() if line.strip()]) <= 25


@pytest.mark.parametrize("page", ["00_primer.md", "00_primer.zh.md"])
def test_times_of_the_page_are_those_of_the_data(page):
    path = LEARN.parent / "dev/data/primer_engine_cpu.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    for name in ("generate_without_cache", "generate_with_cache"):
        loop = report["loops"][name]
        by_token = [1e3 * loop["processor_s_by_token"][index] for index in (0, 1, 63, 191)]
        total = sorted(loop["total_processor_s"])[1]
        cells = " | ".join([*(f"{ms:.0f} ms" for ms in by_token), f"{total:.1f} s"])
        assert f"| {cells} |" in read(page)


def test_snippet_of_the_kernel_prints_what_the_page_says(capsys):
    pytest.importorskip("triton")
    (snippet,) = (
        code
        for code in re.findall(r"```python\n(.*?)```", read("00_primer.md"), re.S)
        if "TRITON_INTERPRET" in code
    )
    exec(snippet, {})
    assert capsys.readouterr().out == "True\n"


@pytest.mark.parametrize("page", ["00_primer.md", "01_baseline.md"])
def test_note_can_be_read_in_an_hour_and_its_links_lead_somewhere(page):
    assert num_words(read(page)) <= 5000
    assert dead_links(page) == []
