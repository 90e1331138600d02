"""The command line over a scripted engine: commands, flags, streams, exit codes, messages."""

import io
import json
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from folovllm.bench.summary import format_summary
from folovllm.cli.main import main
from folovllm.cli.options import add_field_flags, field_docstrings
from folovllm.entrypoints.engine_options import parse_size
from folovllm.json_files import write_json_atomically
from folovllm.request import SamplingParams
from folovllm.testing.scripted_engine import (
    ScriptedConfig,
    ScriptedLLM,
    ScriptedModel,
    ScriptedModelConfig,
    ScriptedPolicy,
)
from folovllm.testing.toy_tokenizers import save_byte_level_tokenizer
from folovllm.text.tokenizer import Tokenizer

ANSWER = "The dog naps. 世界!"


@pytest.fixture(scope="module")
def toy_path(tmp_path_factory):
    return save_byte_level_tokenizer(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def run(monkeypatch, capsys, toy_path):
    """Runs one command line; returns (exit status, stdout, stderr). `.made` holds the LLMs."""
    tokenizer = Tokenizer(toy_path)
    answer = [*tokenizer.encode(ANSWER), 1]

    class RecordingLLM(ScriptedLLM):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            run_command.made.append(self)
            run_command.on_llm(self)

    def run_command(*argv, model=str(toy_path), stdin="", on_llm=lambda llm: None):
        run_command.on_llm = on_llm
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        command, *rest = argv
        status = main(RecordingLLM, [command, "--model", model, *rest])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    run_command.made = []
    config = ScriptedModelConfig(tokenizer.vocab_size, 512, frozenset((1,)))
    model = ScriptedModel(config, lambda request: answer)
    monkeypatch.setattr("folovllm.entrypoints.llm.load_model", lambda *args, **kwargs: model)
    return run_command


def last_request(run):
    return run.made[-1].engine.added[-1]


def interrupt_in_step(number):
    """For on_llm: Ctrl-C in that step of the engine."""

    def on_llm(llm):
        def before_step(num_steps):
            if num_steps == number:
                llm.engine.before_step = lambda num_steps: None
                raise KeyboardInterrupt

        llm.engine.before_step = before_step

    return on_llm


# generate -----------------------------------------------------------------------------------------


def test_generate_answers_a_message_and_prints_statistics(run):
    status, out, err = run("generate", "Hello")
    assert (status, out) == (0, ANSWER + "\n")
    prompt = run.made[-1].tokenizer.decode(last_request(run).prompt_token_ids)
    assert prompt == "user: Hello\nassistant: "
    assert "output tok/s" in err and "TTFT" in err and "finish: stop" in err
    assert f"{len(last_request(run).prompt_token_ids)} input" in err


def test_generate_raw_continues_the_text(run):
    run("generate", "--raw", "Hello")
    assert last_request(run).prompt_token_ids == run.made[-1].tokenizer.encode("Hello")


def test_generate_of_a_base_model_continues_the_text(run, tmp_path):
    base = save_byte_level_tokenizer(tmp_path, chat_template=None)
    assert run("generate", "Hello", model=str(base))[1] == ANSWER + "\n"
    assert last_request(run).prompt_token_ids == run.made[-1].tokenizer.encode("Hello")


def test_generate_streams_piece_by_piece(run, monkeypatch):
    pieces = []
    monkeypatch.setattr("sys.stdout", type("Out", (io.StringIO,), {
        "write": lambda self, text: pieces.append(text) or len(text)
    })())  # fmt: skip
    run("generate", "Hello")
    assert len(pieces) > 5 and "".join(pieces) == ANSWER + "\n"


def test_generate_defaults_are_greedy_and_long_enough_for_an_answer(run):
    run("generate", "Hello")
    params = last_request(run).sampling_params
    assert (params.temperature, params.max_tokens) == (0.0, 256)


def test_several_prompts_and_completions_are_printed_under_headings(run):
    status, out, _ = run("generate", "--n", "2", "Hello", "dog", "--max-tokens", "30")
    assert status == 0
    assert out.count(ANSWER) == 4
    for heading in ("prompt 1, completion 1 (stop)", "prompt 2, completion 2 (stop)"):
        assert f"--- {heading}\n" in out


def test_logprobs_are_printed_per_token(run):
    _, out, _ = run("generate", "Hello", "--logprobs", "2", "--max-tokens", "3")
    lines = out.splitlines()
    assert len(lines) == 4
    assert "-0.250" in lines[1] and "rank 3" in lines[1] and "'<bos>' -0.500" in lines[1]


def test_every_sampling_flag_reaches_the_request(run):
    run(
        "generate", "Hello", "--max-tokens", "7", "--min-tokens", "2", "--temperature", "0.5",
        "--top-k", "5", "--top-p", "0.9", "--min-p", "0.1", "--presence-penalty", "0.2",
        "--frequency-penalty", "0.3", "--repetition-penalty", "1.1", "--logit-bias", "5=-1.5",
        "--logit-bias", "6=2", "--sampling-seed", "9", "--logprobs", "1", "--stop", "x",
        "--stop", "y z", "--stop-token-ids", "8", "--stop-token-ids", "9",
        "--include-stop-str-in-output", "--ignore-eos", "--no-skip-special-tokens",
    )  # fmt: skip
    assert last_request(run).sampling_params == SamplingParams(
        max_tokens=7, min_tokens=2, temperature=0.5, top_k=5, top_p=0.9, min_p=0.1,
        presence_penalty=0.2, frequency_penalty=0.3, repetition_penalty=1.1,
        logit_bias={5: -1.5, 6: 2.0}, seed=9, logprobs=1, stop=["x", "y z"],
        stop_token_ids=[8, 9], include_stop_str_in_output=True, ignore_eos=True,
        skip_special_tokens=False,
    )  # fmt: skip
    assert last_request(run).seed == 9


def test_every_field_of_sampling_params_has_a_flag_but_what_the_commands_cannot_show(capsys):
    with pytest.raises(SystemExit):
        main(ScriptedLLM, ["generate", "--help"])
    shown = capsys.readouterr().out
    for field in fields(SamplingParams):
        name = {"seed": "sampling_seed"}.get(field.name, field.name)
        is_shown = field.name not in ("prompt_logprobs", "structured_outputs", "detokenize")
        assert (f"--{name.replace('_', '-')}" in shown) is is_shown


def test_max_tokens_none_fills_the_context(run):
    run("generate", "--raw", "Hello", "--max-tokens", "none", "--ignore-eos")
    request = last_request(run)
    assert request.num_tokens == 300


def test_engine_options_reach_the_config(run):
    run(
        "generate", "Hello", "--kv-cache-bytes", "8GiB", "--scheduling-policy", "priority",
        "--max-num-seqs", "3", "--max-tokens", "2",
    )  # fmt: skip
    assert run.made[-1].engine.config == ScriptedConfig(
        kv_cache_bytes=8 * 2**30, scheduling_policy=ScriptedPolicy.PRIORITY, max_num_seqs=3
    )
    run("generate", "Hello", "--kv-cache-bytes", "none", "--max-tokens", "2")
    assert run.made[-1].engine.config.kv_cache_bytes is None


def test_seed_flag_is_the_llms_seed(run):
    run("generate", "Hello", "--seed", "1")
    run("generate", "Hello", "--seed", "1")
    run("generate", "Hello", "--seed", "2")
    first, again, other = (llm.engine.added[0].seed for llm in run.made)
    assert first == again != other


def test_interrupted_generation_shows_what_there_is_and_aborts(run):
    status, out, err = run("generate", "Hello", on_llm=interrupt_in_step(3))
    assert status == 130
    assert out.endswith(" [interrupted]\n") and out.startswith("The")
    assert "interrupted" in err
    assert run.made[-1].engine.aborted == ["0"]
    assert run("generate", "Hello", on_llm=interrupt_in_step(0))[0] == 130
    assert run("generate", "a", "b", on_llm=interrupt_in_step(3))[0] == 130


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "x", "--temperature", "-1"], "temperature must be a number"),
        (["generate", "x", "--stop-token-ids", "999999"], "stop_token_ids of prompt 0"),
        (["generate", "x", "--max-model-len", "9999"], "beyond this model's limit of 512"),
        (["generate", "--raw", ""], "prompt 0 has no tokens"),
        (["generate", "dog " * 300], "exceed max_model_len"),
        (["generate", "x", "--tokenizer", "/nowhere"], "cannot load a tokenizer"),
        (["chat", "--top-p", "0"], "top_p must be above 0"),
    ],
)
def test_mistake_is_one_line_on_stderr_and_status_2(run, argv, message):
    status, out, err = run(*argv)
    assert status == 2
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert "Traceback" not in out + err


def test_missing_model_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(ScriptedLLM, ["generate", "x"]) == 2
    assert "python -m m0_infra fetch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required"),
        (["generate"], "PROMPT"),
        (["generate", "x", "--max-model", "3"], "unrecognized arguments: --max-model"),
        (["generate", "x", "--kv-cache-bytes", "8Gx"], "expected a size like 512MiB"),
        (["generate", "x", "--scheduling-policy", "lifo"], "invalid choice: 'lifo'"),
        (["generate", "x", "--logit-bias", "5"], "expected ID=BIAS"),
        (["generate", "x", "--logit-bias", "a=b"], "expected ID=BIAS"),
        (["generate", "x", "--max-tokens", "many"], "invalid int or none value"),
        (["chat", "--n", "2"], "unrecognized arguments"),
        (["chat", "--logprobs", "2"], "unrecognized arguments"),
        (["bench"], "--workload"),
    ],
)
def test_wrong_flags_are_refused_by_name(argv, message, capsys):
    with pytest.raises(SystemExit) as info:
        main(ScriptedLLM, argv)
    assert info.value.code == 2
    assert message in capsys.readouterr().err


def test_help_holds_the_docstrings_and_defaults_of_the_fields(capsys):
    with pytest.raises(SystemExit) as info:
        main(ScriptedLLM, ["generate", "--help"])
    assert info.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Most requests running at once. (default: 2)" in text
    assert "Keep the k likeliest tokens; 0 (or -1) keeps all. (default: 0)" in text
    assert "Most tokens to produce" in text and "(default: 256)" in text


# chat ---------------------------------------------------------------------------------------------


def contents(run):
    """Prompts of all answers, as text."""
    llm = run.made[-1]
    return [llm.tokenizer.decode(request.prompt_token_ids) for request in llm.engine.added]


def test_chat_remembers_the_conversation_until_reset_and_ends_with_its_input(run):
    status, out, _ = run("chat", "--system", "be", stdin="one\n\ntwo\n/reset\nthree\n")
    assert status == 0
    assert out.count(ANSWER) == 3
    assert contents(run) == [
        "system: be\nuser: one\nassistant: ",
        f"system: be\nuser: one\nassistant: {ANSWER}\nuser: two\nassistant: ",
        "system: be\nuser: three\nassistant: ",
    ]


def test_chat_exits_and_knows_its_commands(run):
    _, out, _ = run("chat", stdin="/help me\n/exit\nnever\n")
    assert "Unknown command /help: /reset forgets" in out
    assert contents(run) == []


def test_interrupt_ends_the_answer_and_not_the_chat(run):
    status, out, _ = run("chat", stdin="one\ntwo\n", on_llm=interrupt_in_step(3))
    assert status == 0
    assert "[interrupted]" in out and out.count(ANSWER) == 1
    assert run.made[-1].engine.aborted == ["0"]
    first = contents(run)[1]
    assert first.startswith("user: one\nassistant: The") and first.endswith(
        "user: two\nassistant: "
    )


def test_answer_interrupted_before_its_first_token_is_forgotten(run):
    run("chat", stdin="one\ntwo\n", on_llm=interrupt_in_step(0))
    assert contents(run)[1] == "user: two\nassistant: "


def test_interrupt_at_the_input_line_leaves_the_chat_running(run, monkeypatch):
    lines = iter([KeyboardInterrupt, "one", EOFError])

    def read(prompt):
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    status, out, _ = run("chat")
    assert status == 0 and ANSWER in out


def test_conversation_beyond_the_context_is_reported_and_left_out(run):
    status, out, _ = run("chat", "--max-model-len", "60", stdin="dog " * 100 + "\none\n")
    assert status == 0
    assert "error: prompt 0 has" in out and "/reset" in out
    assert contents(run) == ["user: one\nassistant: "]


def test_model_without_chat_template_cannot_chat(run, tmp_path):
    base = save_byte_level_tokenizer(tmp_path, chat_template=None)
    status, _, err = run("chat", model=str(base))
    assert status == 2 and "no chat template" in err


# bench --------------------------------------------------------------------------------------------

RESULT = {
    "stage": "folovllm",
    "device": "cpu-2-cores",
    "model": {"name": "toy"},
    "workload": {"spec": "nano:2", "num_requests": 2, "num_requests_before_cut": 256},
    "output_tokens_per_s": 12.34,
    "total_tokens_per_s": 56.7,
    "duration_s": 1.5,
    "ttft_s": {"p50": 0.001, "p99": 0.002},
    "tpot_s": {"p50": None, "p99": None},
    "itl_s": {"p50": 0.003, "p99": 0.004},
    "decode_step_s": {"p50": 0.005, "p99": 0.006},
    "peak_memory_bytes": {"total": 2**30},
    "steps": {"start_s": [0.0]},
    "requests": [],
    "gate": {},
}


@pytest.fixture
def benchmark_calls(monkeypatch):
    calls = []

    def run_benchmark(llm, workload, **kwargs):
        calls.append((llm, workload, kwargs))
        return RESULT

    monkeypatch.setattr("folovllm.bench.benchmark.run_benchmark", run_benchmark)
    return calls


def test_bench_writes_the_result_and_prints_a_table(run, benchmark_calls, tmp_path):
    output = tmp_path / "new" / "result.json"
    status, out, _ = run(
        "bench", "--workload", "fixed:batch=2,input=4,output=3", "--output", str(output),
        "--seed", "5", "--gate-requests", "1", "--gate-tokens", "2", "--warmup-tokens", "3",
    )  # fmt: skip
    assert status == 0
    assert json.loads(output.read_text()) == {**RESULT, "runs_in_process": 1}
    assert list(output.parent.iterdir()) == [output]
    assert out.splitlines()[-1] == f"  every request and step in {output}"
    assert "2 requests of 256" in out and "1.00 / 2.00 ms" in out
    ((llm, workload, kwargs),) = benchmark_calls
    assert llm is run.made[-1] and len(workload.requests) == 2
    assert kwargs["stage"] == type(llm).__module__.partition(".")[0]
    assert (kwargs["seed"], kwargs["gate_requests"], kwargs["gate_tokens"]) == (5, 1, 2)
    assert kwargs["warmup_tokens"] == 3 and kwargs["load_format"] == "auto"
    assert kwargs["model_name"] == Path(llm.model_path).name


def test_bench_writes_a_file_for_each_of_several_runs(run, benchmark_calls, tmp_path):
    output = tmp_path / "result.json"
    command = ("bench", "--workload", "fixed:batch=2,input=4,output=3", "--runs", "3")
    assert run(*command, "--output", str(output))[0] == 0
    names = ["result.json", "result.run2.json", "result.run3.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert json.loads((tmp_path / names[2]).read_text())["runs_in_process"] == 3
    assert len({id(llm) for llm, _, _ in benchmark_calls}) == 1
    status, _, err = run(*command)
    assert status == 2 and "--output" in err


def test_bench_without_a_file_prints_the_summary_as_json(run, benchmark_calls):
    status, out, _ = run("bench", "--workload", "fixed:batch=2,input=4,output=3")
    summary = json.loads(out.splitlines()[-1])
    assert status == 0 and len(benchmark_calls) == 1
    assert summary["output_tokens_per_s"] == 12.34 and "steps" not in summary


def test_bench_refuses_a_folder_as_output_and_an_unknown_workload(run, benchmark_calls, tmp_path):
    status, _, err = run("bench", "--workload", "nano", "--output", str(tmp_path))
    assert status == 2 and "is a directory" in err
    (tmp_path / "file").write_text("")
    status, _, err = run("bench", "--workload", "nano", "--output", str(tmp_path / "file/x.json"))
    assert status == 2 and "file" in err
    status, _, err = run("bench", "--workload", "zzz")
    assert status == 2 and "unknown workload" in err
    assert benchmark_calls == []


def test_table_names_the_number_of_processes_that_held_the_model():
    assert "parallel" not in format_summary(RESULT | {"tensor_parallel_size": 1})
    table = format_summary(RESULT | {"tensor_parallel_size": 2})
    assert "tensor parallel size   2; memory is that of rank 0" in table


def test_table_shows_a_dash_where_there_is_nothing_to_measure():
    assert "TPOT p50 / p99         – / – ms" in format_summary(RESULT)


def test_table_shows_late_prompts_where_the_workload_has_them():
    assert "late" not in format_summary(RESULT)
    assert "cached" not in format_summary(RESULT)
    found = {"prefix_cache": {"hit_rate": 0.625, "num_evicted_blocks": 1234}}
    assert "prompt tokens cached   62.5 %" in format_summary(RESULT | found)
    assert "cached blocks evicted  1,234" in format_summary(RESULT | found)
    found["prefix_cache"]["hit_rate"] = None
    assert "prompt tokens cached   –" in format_summary(RESULT | found)
    late = {"p50": 0.25, "p99": 0.25, "max": 0.25}
    beside = {"p50": 0.002, "p99": 0.09, "max": 0.1}
    table = format_summary(RESULT | {"late_ttft_s": late, "decoder_itl_beside_late_s": beside})
    assert "late TTFT p50 / p99    250.00 / 250.00 ms" in table
    assert "gap beside p50 / p99   2.00 / 90.00 ms" in table
    assert "worst gap beside       100.00 ms" in table
    nobody = dict.fromkeys(beside)
    table = format_summary(RESULT | {"late_ttft_s": late, "decoder_itl_beside_late_s": nobody})
    assert "worst gap beside       –" in table


def test_table_shows_the_ttft_of_each_group_of_requests():
    groups = {"cold": {"p50": 0.25, "p99": 0.5}, "hit 90%": {"p50": 0.025, "p99": 0.05}}
    table = format_summary(RESULT | {"ttft_by_group_s": groups})
    assert "TTFT cold p50 / p99    250.00 / 500.00 ms" in table
    assert "TTFT hit 90% p50 / p99 25.00 / 50.00 ms" in table
    assert "cold" not in format_summary(RESULT | {"ttft_by_group_s": None})


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        write_json_atomically(path, {"a": object()})
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# Options from dataclasses -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("1048576", 2**20), ("512MiB", 2**29), ("8 GiB", 2**33), ("8gib", 2**33), ("8GB", 8 * 10**9),
     ("1.5KiB", 1536), ("2k", 2000), ("3B", 3), ("1TiB", 2**40)],
)  # fmt: skip
def test_sizes_are_read_with_their_units(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "8Gx", "-1", "8iB", "1e9", "1.5"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match=r"expected a size|not a whole number"):
        parse_size(text)


def test_docstrings_under_fields_are_found_and_missing_ones_left_out():
    docstrings = field_docstrings(ScriptedConfig)
    assert docstrings == {
        "max_model_len": "Longest prompt plus output, in tokens.",
        "max_num_seqs": "Most requests running at once.",
    }


def test_field_that_no_flag_can_express_is_an_error():
    import argparse

    @dataclass
    class Odd:
        value: int | str = 0

    with pytest.raises(TypeError, match="no flag can be made of field value"):
        add_field_flags(argparse.ArgumentParser().add_argument_group(), Odd)
