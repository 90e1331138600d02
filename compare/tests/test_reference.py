"""Stages that run a quantised model: what their tokens are compared with, and who makes it."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from compare.agreement import is_quantized
from compare.cli import main
from compare.gate import check_gate
from compare.processes import EndedProcess
from compare.reference import first_request_of
from compare.results import read_json
from compare.table import footnotes
from compare.tests.fake_stage import make_stage
from compare.tests.synthetic import make_run
from folovllm.workloads.workload import make_workload

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "compare/results/cpu-2-cores/nano"
TOKENS = [[1, 2, 3, 4], [50, 60, 70, 80]]
GAPS = [[1.0, 2.0, 0.1, 3.0], [0.8, 1.5, 0.9, 2.0]]
REFERENCE = {"stage": "m1_baseline", "tokens": TOKENS, "top2_gaps": GAPS}
RUN = ["run", "--publish", "--device", "cpu", "--workload", "nano", "--repeats", "1", "--stages"]


def quantized_run(stage="m7_gptq", reference=REFERENCE, **options):
    run = make_run(stage, **options)
    run["model"] |= {
        "name": "SmolLM2-135M-Instruct-GPTQ",
        "quantization": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    }
    run["gate"] = {"tokens": [list(row) for row in TOKENS], "top2_gaps": GAPS}
    if reference is not None:
        run["gate"]["reference"] = reference
    return run


def runs_beside(quantized, **options):
    return {
        "m1_baseline": [make_run(**options)],
        "m6_prefix": [make_run("m6_prefix", **options)],
        "m7_gptq": [quantized],
    }


# the gate -----------------------------------------------------------------------------------------


def test_quantised_run_is_compared_with_its_reference_and_the_others_with_each_other():
    report = check_gate(runs_beside(quantized_run()))
    assert report.passed
    assert report.num_tokens_compared == 8 + 8


def test_float32_token_that_is_not_the_references_fails():
    run = quantized_run()
    run["gate"]["tokens"][1][2] = 99
    (failure,) = check_gate(runs_beside(run)).failures
    for part in ("m7_gptq", "m1_baseline on the dequantised", "request 1", "position 2", "99"):
        assert part in failure


@pytest.mark.parametrize(("position", "passes"), [(2, True), (1, False)])
def test_bfloat16_token_may_differ_from_the_reference_where_both_saw_a_near_tie(position, passes):
    run = quantized_run(dtype="bfloat16")
    run["gate"]["tokens"][0][position] = 99
    assert check_gate(runs_beside(run, dtype="bfloat16")).passed is passes


def test_quantised_run_without_a_reference_fails_and_says_what_to_do():
    (failure,) = check_gate(runs_beside(quantized_run(reference=None))).failures
    assert "m7_gptq" in failure and "`python -m compare run`" in failure


def test_random_quantised_weights_need_no_reference_and_are_noted():
    runs = runs_beside(quantized_run(reference=None))
    for (run,) in runs.values():
        run["model"] |= {"name": "qwen3-0.6b", "load_format": "dummy"}
    report = check_gate(runs)
    assert report.passed and report.num_tokens_compared == 8
    assert any("random quantised weights" in note for note in report.notes)
    runs["m7_gptq"][0]["model"]["name"] = "qwen3-8b"
    (failure,) = check_gate(runs).failures
    assert "model.name" in failure, "the shape of a random model is its name"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model", "dtype"), "bfloat16"),
        (("model", "load_format"), "dummy"),
        (("model", "kv_bytes_per_token"), 512),
        (("seed",), 1),
        (("device",), "elsewhere"),
        (("workload", "sha256"), "f" * 64),
    ],
)
def test_settings_of_a_quantised_run_must_be_those_of_the_others(path, value):
    run = quantized_run()
    target = run
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    assert not check_gate(runs_beside(run)).passed


def test_two_engines_with_quantised_models_must_name_the_same():
    runs = runs_beside(quantized_run())
    runs["vllm"] = [quantized_run("vllm")]
    assert check_gate(runs).passed
    runs["vllm"][0]["model"]["name"] = "another-GPTQ"
    (failure,) = check_gate(runs).failures
    assert "vllm" in failure and "m7_gptq" in failure


def test_quantised_stage_alone_is_checked_and_the_one_beside_it_is_said_to_be_alone():
    alone = check_gate({"m7_gptq": [quantized_run(), quantized_run()]})
    assert alone.passed and alone.num_tokens_compared == 16 and alone.notes == ()
    beside = check_gate({"m6_prefix": [make_run("m6_prefix")], "m7_gptq": [quantized_run()]})
    assert beside.passed and any("m6_prefix is alone" in note for note in beside.notes)


def test_repeats_of_a_quantised_stage_must_agree():
    runs = {"m7_gptq": [quantized_run(), quantized_run()]}
    runs["m7_gptq"][1]["requests"][3]["output_sha256"] = "other"
    assert "repeat 2" in check_gate(runs).failures[0]


def test_results_from_before_quantised_models_count_as_plain():
    assert "quantization" not in make_run()["model"] and not is_quantized(make_run())
    run = make_run()
    run["model"]["quantization"] = None
    assert not is_quantized(run) and check_gate({"a": [run], "hf": [make_run("hf")]}).passed


def test_table_says_what_a_quantised_row_was_compared_with():
    (note,) = footnotes([make_run(), quantized_run()])[2:]
    assert note == (
        "m7_gptq ran SmolLM2-135M-Instruct-GPTQ, quantised to 4 bits; its tokens were compared "
        "with those of m1_baseline on these weights, dequantised."
    )
    random = quantized_run(reference=None)
    random["model"]["load_format"] = "dummy"
    assert "not compared" in footnotes([make_run(), random])[-1]


# who makes the reference --------------------------------------------------------------------------


DEQUANTIZE = """
if sys.argv[1] == "dequantize":
    options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
    with open("calls.txt", "a") as log:
        log.write(json.dumps(["dequantize", options]) + "\\n")
    {body}
    os.makedirs(options["--output"])
    open(os.path.join(options["--output"], "weights"), "w").write("many")
    raise SystemExit(0)
"""
ANSWER_FOR_BOTH = """
if "dequantized" in options.get("--model", ""):
    assert os.path.isfile(os.path.join(options["--model"], "weights"))
    {body}
    with open(options["--output"], "w") as file:
        file.write({text!r})
    raise SystemExit(0)
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_stages(root, run=None, *, dequantize="pass", baseline="pass", answer=None):
    """m1, m6 and m7, whose `bench` answers with `run`; m1 has an answer for dequantised models."""
    if answer is None:
        answer = make_run(num_requests=1, num_requests_before_cut=8)
        answer["model"]["name"] = "dequantized"
        answer["gate"] = {"tokens": TOKENS, "top2_gaps": GAPS}
    body = ANSWER_FOR_BOTH.format(text=json.dumps(answer), body=baseline)
    make_stage(root, "m1_baseline", json.dumps(make_run()), body=body)
    make_stage(root, "m6_prefix", json.dumps(make_run("m6_prefix")))
    run = run or quantized_run(reference=None)
    make_stage(root, "m7_gptq", json.dumps(run), options="max_num_seqs: int = 4")
    file = root / "m7_gptq/__main__.py"
    start = "import json, os, sys\n"
    text = file.read_text().replace(start, start + DEQUANTIZE.format(body=dequantize))
    file.write_text(text)


def calls(root):
    return [json.loads(line) for line in (root / "calls.txt").read_text().splitlines()]


def test_reference_is_made_once_after_the_runs_and_leaves_no_weights(root, capsys):
    make_stages(root)
    command = [*RUN, "m1_baseline,m6_prefix,m7_gptq", "--max-num-seqs", "2"]
    options = ["--stage-workload", "m7_gptq=nano:8", "--stage-option", "m7_gptq.max_model_len=64"]
    assert main([*command, *options, "--repeats", "2", "--model", "some/model"]) == 0
    (_, dequantize), (name, bench) = calls(root)[6:]
    folder = Path(dequantize["--output"])
    assert dequantize == {
        "--output": str(folder), "--dtype": "float32", "--model": "some/model"
    }  # fmt: skip
    assert folder.is_relative_to(root / "compare/results/.runs") and not folder.exists()
    assert name == "m1_baseline"
    assert bench["--model"] == str(folder) and bench["--dtype"] == "float32"
    assert bench["--workload"] == "nano:1" and bench["--seed"] == "0"
    assert bench["--max-model-len"] == "64" and "--max-num-seqs" not in bench
    assert bench["--gate-requests"] == dict(calls(root)[:6])["m7_gptq"]["--gate-requests"]
    stored = sorted(file.name for file in (root / FOLDER).glob("*.json"))
    assert stored == ["m1_baseline.json", "m6_prefix.json", "m7_gptq.json"]
    assert read_json(root / FOLDER / "m7_gptq.json")["gate"]["reference"] == REFERENCE
    assert "reference" not in read_json(root / FOLDER / "m1_baseline.json")["gate"]
    printed = capsys.readouterr().out
    assert "gate passed" in printed and "\nm7_gptq " in printed
    assert main(["charts"]) == 0, "what is stored passes the gate again"


def test_without_a_model_the_stage_takes_its_own_default(root):
    make_stages(root)
    assert main([*RUN, "m7_gptq"]) == 0
    assert [name for name, _ in calls(root)] == ["m7_gptq", "dequantize", "m1_baseline"]
    assert "--model" not in calls(root)[1][1]


def test_earlier_results_of_plain_stages_stay_beside_new_ones_of_a_quantised(root):
    make_stages(root)
    assert main([*RUN, "m1_baseline,m6_prefix"]) == 0
    assert "dequantize" not in dict(calls(root))
    assert main([*RUN, "m7_gptq"]) == 0
    assert main([*RUN, "m6_prefix"]) == 0
    stored = sorted(file.name for file in (root / FOLDER).glob("*.json"))
    assert stored == ["m1_baseline.json", "m6_prefix.json", "m7_gptq.json"]


def test_tokens_that_are_not_the_references_publish_nothing(root, capsys):
    run = quantized_run(reference=None)
    run["gate"]["tokens"][0][0] = 99
    make_stages(root, run)
    assert main([*RUN, "m6_prefix,m7_gptq"]) == 1
    assert "on the dequantised checkpoint differ" in capsys.readouterr().err
    assert not (root / FOLDER).exists()


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        ({"dequantize": "raise SystemExit('disk full')"}, "`python -m m7_gptq dequantize`: exit"),
        ({"baseline": "raise SystemExit('disk full')"}, "`python -m m1_baseline bench`: exit"),
    ],
)
def test_stage_without_a_reference_is_a_failed_run_and_the_others_are_published(
    root, capsys, failing, message
):
    make_stages(root, **failing)
    assert main([*RUN, "m1_baseline,m6_prefix,m7_gptq"]) == 4
    printed = capsys.readouterr().out
    assert f"FAILED: m7_gptq, repeat 1: it could not be gated: {message}" in printed
    assert "disk full" in printed
    assert (root / FOLDER / "m6_prefix.json").is_file()
    assert not (root / FOLDER / "m7_gptq.json").exists()
    assert not list(root.glob("compare/results/.runs/*/dequantized"))


def test_reference_that_ran_with_other_settings_is_none(root, capsys):
    make_stages(root, answer=make_run(sha256="e" * 64))
    assert main([*RUN, "m7_gptq"]) == 1
    assert "neither says that it is the beginning" in capsys.readouterr().out


def test_reference_needs_the_first_stage(root, capsys):
    make_stages(root)
    (root / "m1_baseline/__main__.py").unlink()
    assert main([*RUN, "m7_gptq"]) == 1
    assert "there is no stage m1_baseline" in capsys.readouterr().out


def test_random_weights_are_not_dequantised(root):
    run = quantized_run(reference=None)
    run["model"]["load_format"] = "dummy"
    make_stages(root, run)
    assert main([*RUN, "m7_gptq", "--model", "qwen3-0.6b", "--load-format", "dummy"]) == 0
    assert [name for name, _ in calls(root)] == ["m7_gptq"]


SHOW = """
[m6_prefix]
[m7_gptq]
previous = "m6_prefix"
[m7_gptq.show]
workload = "nano"
metrics = ["output_tokens_per_s"]
chart = "memory"
"""


def test_quantised_stage_is_shown_beside_the_one_before_it(root, capsys):
    make_stages(root)
    (root / "m0_infra").mkdir()
    (root / "m0_infra/stages.toml").write_text(SHOW)
    assert main(["show", "--device", "cpu", "--stage", "m7", "--repeats", "1"]) == 0
    assert [name for name, _ in calls(root)][-2:] == ["dequantize", "m1_baseline"]
    assert "m7_gptq" in capsys.readouterr().out.splitlines()[-2]
    reference = read_json(root / "build/compare/m7_gptq/m7_gptq.json")["gate"]["reference"]
    assert reference == REFERENCE


@pytest.mark.parametrize(
    ("spec", "first"),
    [
        ("nano", "nano:1"),
        ("nano:8", "nano:1"),
        ("fixed:batch=8,input=512,output=128", "fixed:1,batch=8,input=512,output=128"),
        ("chat:4,num=12", "chat:1,num=12"),
        ("multi-turn:conversations=3,turns=4", "multi-turn:1,conversations=3,turns=4"),
        ("azure:a/trace.csv", "azure:a/trace.csv,num=4"),
        ("azure:a/trace.csv,num=2,max_input=9", "azure:a/trace.csv,num=2,max_input=9"),
        ("multi-turn:a/b.json,turns=3", "multi-turn:a/b.json,turns=3,conversations=4"),
    ],
)
def test_reference_times_only_the_first_request(spec, first):
    assert first_request_of(spec, "4") == first


def test_first_request_is_a_stated_beginning_with_all_requests_for_the_gate():
    whole = make_workload("fixed:batch=8,input=16,output=4", vocab_size=99)
    first = make_workload(first_request_of(whole.spec, "8"), vocab_size=99)
    assert len(first.requests) == 1 and first.num_requests_before_cut == 8
    assert first.uncut_requests == whole.requests


# all of it on a model -----------------------------------------------------------------------------


def run_here(command, *_):
    """`python -m MODULE …` in this process, which has torch loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command[2:])
        try:
            runpy.run_module(command[2], run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            return EndedProcess(status=ended.code, failure=None if ended.code == 0 else "failed")
    raise AssertionError("a stage ends with its status")


@pytest.mark.no_cover
def test_toy_model_passes_the_gate_against_the_first_stage(tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers")
    from folovllm.testing.toy_models import ToyFamily, write_toy_model
    from folovllm.testing.toy_tokenizers import save_byte_level_tokenizer

    family = ToyFamily("qwen2", "qwen2", {"tie_word_embeddings": True, "vocab_size": 400})
    model, quantized = tmp_path / "toy", tmp_path / "toy-GPTQ"
    save_byte_level_tokenizer(write_toy_model(family, model))
    command = [sys.executable, "-m", "m7_gptq", "quantize", "--method", "rtn", "--group-size", "32"]
    command += ["--num-sequences", "1", "--sequence-len", "8", "--device", "cpu"]
    assert run_here([*command, "--model", str(model), "--output", str(quantized)]).status == 0
    for module in ("runner", "reference"):
        monkeypatch.setattr(f"compare.{module}.run_process", run_here)
        monkeypatch.setattr(f"compare.{module}.log_tail", str)
    options = ["--model", str(quantized), "--max-model-len", "64", "--results", str(tmp_path / "r")]
    run = ["run", "--device", "cpu", "--dtype", "float32", "--stages", "m7_gptq", "--repeats", "1"]
    workload = ["--workload", "fixed:batch=2,input=16,output=4", "--root", str(ROOT)]
    assert main([*run, *workload, *options]) == 0
    assert "gate passed: 8 tokens compared" in capsys.readouterr().out
    (stored,) = (tmp_path / "r").glob("[!.]*/*/m7_gptq.json")
    result = read_json(stored)
    assert result["model"]["name"] == "toy-GPTQ" and result["model"]["quantization"]["bits"] == 4
    assert result["gate"]["reference"]["tokens"] == result["gate"]["tokens"]
    assert not list((tmp_path / "r").glob(".runs/*/dequantized"))
