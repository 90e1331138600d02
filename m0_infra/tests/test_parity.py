"""parity passes the stages of this checkout and notices what is wrong with a broken one."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from folovllm.request import Request, SamplingParams
from folovllm.sampling.sampler import Sampler
from folovllm.testing.forced_sampler import ForcedSampler as ForcedTokensSampler
from folovllm.testing.forced_sampler import forced_tokens
from folovllm.testing.toy_tokenizers import save_byte_level_tokenizer
from folovllm.text.tokenizer import Tokenizer
from m0_infra.cli import main
from m0_infra.parity import compare_engine, compare_tokens, compute_references
from m0_infra.parity_engine import ForcedSampler, run_engine
from m0_infra.parity_reference import Reference, read_prompts
from m0_infra.parity_tokenizer import compare_encodings, encode_prompts
from m0_infra.stages import stage_folders

STAGES = stage_folders(Path(__file__).parents[2])
EOS = frozenset({2})
MAX_TOKENS = 6


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory):
    texts = ["he", "hello world", "1 2 3", "a\n\nb 12", "what is it?", "naïve 🙂", "x" * 40]
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def references(model_dir, prompts_file):
    prompts = encode_prompts(model_dir, read_prompts(prompts_file, 7))
    return compute_references(model_dir, torch.float32, torch.device("cpu"), prompts, MAX_TOKENS)


@pytest.fixture
def llm(model_dir):
    stage = importlib.import_module(STAGES[-1])
    return stage.LLM(str(model_dir), device="cpu", max_model_len=128, kv_cache_bytes=1 << 20)


def compare(llm, references, near_tie=0.0):
    return compare_engine(
        llm.engine, references, max_tokens=MAX_TOKENS, eos_token_ids=EOS, near_tie=near_tie
    )


def parity(model_dir, prompts_file, *more):
    options = ["--model", str(model_dir), "--prompts", str(prompts_file), "--device", "cpu"]
    return main(["parity", *options, "--num-prompts", "5", "--max-tokens", "6", *more])


@pytest.mark.parametrize("stage", STAGES)
def test_stage_equals_transformers(stage, model_dir, prompts_file, tmp_path, capsys):
    output = tmp_path / "deeper" / "parity.json"
    assert parity(model_dir, prompts_file, "--stage", stage, "--output", str(output)) == 0
    assert "PASSED" in capsys.readouterr().out
    written = json.loads(output.read_text())
    assert written["passed"] is True and written["stage"] == stage
    assert len(written["prompts"]) == 5
    assert all(0 <= prompt["max_logit_difference"] < 1e-3 for prompt in written["prompts"])


@pytest.mark.parametrize("stage", STAGES)
def test_stage_equals_transformers_in_bfloat16(stage, model_dir, prompts_file):
    assert parity(model_dir, prompts_file, "--stage", stage, "--dtype", "bfloat16") == 0


def test_ids_of_our_tokenizer_that_differ_fail(model_dir, prompts_file, capsys, monkeypatch):
    right = Tokenizer.encode

    def truncated(self, text, add_special_tokens=True):
        return right(self, text, add_special_tokens)[:9]

    monkeypatch.setattr(Tokenizer, "encode", truncated)
    assert parity(model_dir, prompts_file, "--stage", STAGES[0]) == 1
    assert (
        "as text the prompt is 9 ids, not 11, and differs from id 9 on" in capsys.readouterr().out
    )


def test_ids_of_a_text_are_compared_with_what_is_put_around_it(tmp_path):
    reference = save_byte_level_tokenizer(tmp_path / "reference")
    ours = Tokenizer(save_byte_level_tokenizer(tmp_path / "ours"))
    assert compare_encodings(ours, reference, ["the dog", ""]) == [None, None]
    backend = Backend.from_file(str(reference / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    backend.save(str(reference / "tokenizer.json"))
    (difference,) = compare_encodings(ours, reference, [""])
    assert difference == "as text the prompt is 0 ids, not 1, and differs from id 0 on"


def test_ids_of_a_turn_are_compared_with_those_of_the_template(tmp_path):
    reference = save_byte_level_tokenizer(tmp_path / "reference", chat_template="{{ 'dog' }}")
    ours = Tokenizer(save_byte_level_tokenizer(tmp_path / "ours"))
    (difference,) = compare_encodings(ours, reference, ["the dog"])
    assert "as user's turn the prompt is" in str(difference)


def test_exceeded_tolerance_fails(model_dir, prompts_file, capsys):
    assert parity(model_dir, prompts_file, "--stage", STAGES[-1], "--tolerance", "0") == 1
    out = capsys.readouterr().out
    assert "FAILED" in out and "LOGITS DIFFER" in out


class SecondBest:
    """A sampler with a mistake: it takes the second likeliest token."""

    def validate(self, request):
        return None

    def prepare(self, requests):
        return None

    def sample(self, logits, tensors):
        token_ids = logits.topk(2, dim=-1).indices[:, 1].tolist()
        return forced_tokens(token_ids, logits.device)


def test_wrong_sampler_is_noticed_by_its_tokens(llm, references):
    llm.engine.model_runner.sampler = SecondBest()
    results = compare(llm, references)
    assert all("token 0 is" in result.mismatch for result in results)
    # Its logits are right, and forcing the tokens shows that.
    assert max(result.max_logit_difference for result in results) < 1e-3
    assert isinstance(llm.engine.model_runner.sampler, SecondBest)


def test_wrong_logits_are_noticed_though_tokens_agree(llm, references, monkeypatch):
    right = llm.model.compute_logits

    def slightly_wrong(hidden, out=None):
        logits = right(hidden, out)
        logits[:, 7] -= 0.25
        return logits

    monkeypatch.setattr(llm.model, "compute_logits", slightly_wrong)
    results = compare(llm, references)
    assert all(0.24 < result.max_logit_difference < 0.26 for result in results)


@pytest.mark.parametrize("stand_in", [ForcedSampler, ForcedTokensSampler])
def test_stand_ins_offer_every_method_of_the_sampler(stand_in):
    """A stage may call any of them, some only on a GPU."""
    methods = {name for name in vars(Sampler) if not name.startswith("_")}
    assert methods == {"validate", "collect_noise", "prepare", "sample"}
    assert methods <= vars(stand_in).keys()


def test_nan_logits_are_infinitely_wrong(references):
    sampler = ForcedSampler({"0": references[0]})
    sampler.sample(torch.full_like(references[0].logits[:1], float("nan")), [("0", 0)])
    assert sampler.max_differences == {("0", 0): float("inf")}


def test_logits_in_the_middle_of_a_prompt_are_not_compared(references):
    """A prompt in chunks leaves a row per chunk, and only the last one counts."""
    sampler = ForcedSampler({"0": references[0]})
    right = references[0].logits[:1]
    for logits in (right + 5.0, right - 3.0, right):
        sampler.sample(logits, [("0", 0)])
    assert sampler.max_differences == {("0", 0): 0.0}


def test_requests_that_do_not_stop_are_noticed(llm, references):
    # As an engine does that knows only the first of several end tokens.
    ends_early = [
        Reference(r.prompt_token_ids, r.output_token_ids[:3], r.logits[:3])
        for r in references
        if len(r.output_token_ids) > 3
    ]
    assert ends_early
    results = compare(llm, ends_early)
    assert all(result.mismatch.startswith("goes on for") for result in results)
    assert max(result.max_logit_difference for result in results) < 1e-3


def test_engine_that_schedules_nothing_is_an_error_not_a_hang():
    stats = SimpleNamespace(num_scheduled_tokens=0, num_running=0, num_waiting=1)
    stalled = SimpleNamespace(
        add_request=lambda request: None,
        has_unfinished_requests=lambda: True,
        step=lambda: SimpleNamespace(tokens=(), stats=stats),
    )
    request = Request(request_id="0", prompt_token_ids=[1], sampling_params=SamplingParams())
    with pytest.raises(RuntimeError, match="stalls"):
        run_engine(stalled, [request])


LOGITS = torch.tensor([[5.0, 1.0, 0.0], [0.0, 3.0, 2.9], [4.0, 0.0, 1.0]])
PATH = Reference([1], [0, 1, 0], LOGITS)


@pytest.mark.parametrize(
    ("token_ids", "near_tie", "num_compared", "complaint"),
    [
        ([0, 1, 0], 0.0, 3, None),
        ([0, 2, 2], 0.0, 1, "token 1 is 2, not 1"),
        ([0, 2, 2], 0.5, 1, None),
        ([2, 1, 0], 0.5, 0, "token 0 is 2, not 0"),
        ([0, 1], 0.5, 2, "token 2 is None"),
        ([0], 0.5, 1, "token 1 is None"),
        ([0, 1, 0, 0], 0.5, 3, "goes on for 1"),
    ],
)
def test_tokens_may_differ_only_at_a_near_tie(token_ids, near_tie, num_compared, complaint):
    compared, mismatch = compare_tokens(PATH, token_ids, near_tie)
    assert compared == num_compared
    assert (complaint or "None") in str(mismatch)


def test_prompts_are_spread_over_the_file(prompts_file):
    assert read_prompts(prompts_file, 3) == ["he", "1 2 3", "what is it?"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stage", "m9_nothing"], "no stage 'm9_nothing'"),
        (["--stage", "m0_infra"], "has no LLM"),
        (["--stage", STAGES[0], "--num-prompts", "99"], "between 1 and 7"),
        (["--stage", STAGES[0], "--max-tokens", "0"], "max_tokens must be at least 1"),
        (["--stage", STAGES[0], "--prompts", "no-such-file"], "no-such-file"),
        (["--stage", STAGES[0], "--device", "abacus"], "abacus"),
    ],
)
def test_what_cannot_be_compared_is_named(model_dir, prompts_file, capsys, options, message):
    assert parity(model_dir, prompts_file, *options) == 1
    assert message in capsys.readouterr().err
