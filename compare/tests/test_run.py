import json
from pathlib import Path

import pytest

from compare.cli import main
from compare.profiles import CPU_PROFILE, GPU_PROFILE, choose_profile
from compare.results import lookup, read_json
from compare.runner import plan_runs
from compare.stages import Stage, config_fields, discover_stages, select_stages, stage_label
from compare.tests.fake_stage import make_stage
from compare.tests.synthetic import make_run
from compare.tests.test_data_tables import PROFILE

FOLDER = "compare/results/cpu-2-cores/nano"
MEASURE = ["run", "--device", "cpu", "--workload", "nano", "--stages", "m1_baseline,m2_batching"]
RUN = [*MEASURE[:1], "--publish", *MEASURE[1:]]


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def two_stages(root, second=None, **options):
    make_stage(root, "m1_baseline", json.dumps(make_run()))
    second = second or make_run("m2_batching", rate=60.0, batch=4)
    make_stage(
        root, "m2_batching", json.dumps(second), **{"options": "max_num_seqs: int = 4", **options}
    )


def calls(root):
    return [json.loads(line) for line in (root / "calls.txt").read_text().splitlines()]


def test_run_publishes_results_table_charts_and_report(root, capsys):
    two_stages(root)
    marked = "<!-- compare:cpu-2-cores/nano:begin -->\n<!-- compare:cpu-2-cores/nano:end -->\n"
    (root / "README.md").write_text(marked)
    assert main([*RUN, "--repeats", "2"]) == 0
    merged = read_json(root / FOLDER / "m2_batching.json")
    assert merged["repeats"] == 2
    assert lookup(merged, "spread.output_tokens_per_s.min") is not None
    assert (root / FOLDER / "charts/throughput.png").is_file()
    assert (root / FOLDER / "report.html").is_file()
    assert "m2_batching" in (root / "README.md").read_text()
    printed = capsys.readouterr().out
    assert "gate passed" in printed and "report.html" in printed and "throughput.png" in printed


@pytest.mark.parametrize("switch", ["--eager", "--no-eager"])
def test_switch_of_an_engine_is_passed_on_without_a_value(root, switch):
    body = f"""
assert {switch!r} in sys.argv and "true" not in sys.argv
options = dict(zip(*[iter([word for word in arguments if word != {switch!r}])] * 2))
"""
    make_stage(
        root, "m1_baseline", json.dumps(make_run()), options="eager: bool = False", body=body
    )
    command = [*RUN[:-1], "m1_baseline", "--repeats", "1", switch, "--max-model-len", "9"]
    assert main(command) == 0


def test_runs_that_share_a_process_are_all_merged_and_said_to(root, capsys):
    body = """
for run in range(2, int(options.get("--runs", 1)) + 1):
    name = options["--output"].replace(".json", f".run{run}.json")
    with open(name, "w") as file:
        file.write(open(os.path.join(os.path.dirname(__file__), "result.json")).read())
"""
    run = json.dumps(make_run() | {"runs_in_process": 3})
    make_stage(root, "m1_baseline", run, body=body)
    command = [*RUN[:-1], "m1_baseline", "--repeats", "1", "--runs-per-process", "3"]
    assert main(command) == 0
    assert [options["--runs"] for _, options in calls(root)] == ["3"]
    assert read_json(root / FOLDER / "m1_baseline.json")["repeats"] == 3
    assert "but for m1_baseline: all in one process" in capsys.readouterr().out
    assert main([*RUN, "--runs-per-process", "0"]) == 2


def test_stages_take_turns_and_get_only_options_that_they_know(root):
    two_stages(root)
    command = [*RUN, "--repeats", "2", "--max-num-seqs=7", "--max-model-len", "512"]
    assert main([*command, "--stage-workload", "m1_baseline=nano:8"]) == 0
    names = [name for name, _ in calls(root)]
    assert names == ["m1_baseline", "m2_batching", "m2_batching", "m1_baseline"]
    by_name = dict(calls(root))
    assert "--max-num-seqs" not in by_name["m1_baseline"]
    assert by_name["m2_batching"]["--max-num-seqs"] == "7"
    assert by_name["m1_baseline"]["--max-model-len"] == "512"
    assert by_name["m1_baseline"]["--workload"] == "nano:8"
    assert by_name["m2_batching"]["--workload"] == "nano"
    assert by_name["m1_baseline"]["--dtype"] == "float32"


def test_failed_run_is_reported_with_its_error_and_others_are_published(root, capsys):
    two_stages(root, body="raise SystemExit('out of patience')")
    assert main([*RUN, "--repeats", "1"]) == 4
    printed = capsys.readouterr().out
    assert "FAILED" in printed and "out of patience" in printed and "exit status 1" in printed
    assert (root / FOLDER / "m1_baseline.json").is_file()
    assert not (root / FOLDER / "m2_batching.json").exists()


def test_stage_that_refuses_is_asked_once(root, capsys):
    two_stages(root, body="raise SystemExit(2)")
    assert main([*RUN, "--repeats", "3"]) == 4
    names = [name for name, _ in calls(root)]
    assert names.count("m1_baseline") == 3 and names.count("m2_batching") <= 1
    assert capsys.readouterr().out.count("FAILED, exit status 2") == 1


def test_run_that_takes_too_long_is_a_failed_run(root, capsys):
    two_stages(root, body="import time; time.sleep(60)")
    assert main([*RUN, "--repeats", "1", "--timeout", "3"]) == 4
    assert "--timeout" in capsys.readouterr().out


def test_run_that_writes_no_result_is_a_failed_run(root):
    two_stages(root, body="raise SystemExit(0)")
    assert main([*RUN, "--repeats", "1"]) == 4


def test_failing_gate_publishes_nothing_and_keeps_the_runs(root, capsys):
    wrong = make_run("m2_batching")
    wrong["gate"]["tokens"][0][1] = 99
    two_stages(root, wrong)
    readme = "<!-- compare:cpu-2-cores/nano:begin -->\nold\n<!-- compare:cpu-2-cores/nano:end -->\n"
    (root / "README.md").write_text(readme)
    assert main([*RUN, "--repeats", "1"]) == 1
    assert "position 1" in capsys.readouterr().err
    assert not (root / FOLDER).exists()
    assert (root / "README.md").read_text() == readme
    kept = sorted(file.name for file in root.glob("compare/results/.runs/*/*.json"))
    assert kept == ["m1_baseline.1.json", "m2_batching.1.json"]


def test_results_are_a_users_own_unless_they_are_published(root):
    two_stages(root)
    keys = ("cpu-2-cores/nano", "data/profile")
    marked = "\n".join(
        f"<!-- compare:{key}:{edge} -->" for key in keys for edge in ("begin", "end")
    )
    (root / "README.md").write_text(marked)
    (root / "docs/dev/data").mkdir(parents=True)
    (root / "docs/dev/data/profile.json").write_text(json.dumps(PROFILE))
    assert main([*MEASURE, "--repeats", "1"]) == 0
    assert (root / "build/compare/cpu-2-cores/nano/report.html").is_file()
    assert (root / "README.md").read_text() == marked and not (root / "compare").exists()


def test_results_kept_elsewhere_never_reach_the_documents(root):
    two_stages(root)
    readme = "<!-- compare:cpu-2-cores/nano:begin -->\n<!-- compare:cpu-2-cores/nano:end -->\n"
    (root / "README.md").write_text(readme)
    assert main([*RUN, "--repeats", "1", "--results", "trial"]) == 0
    assert main(["charts", "--results", "trial"]) == 0
    assert (root / "trial/cpu-2-cores/nano/report.html").is_file()
    assert (root / "README.md").read_text() == readme


def test_earlier_results_of_another_model_are_set_aside(root, capsys):
    two_stages(root)
    other = make_run("hf")
    other["model"]["name"] = "another"
    (root / FOLDER).mkdir(parents=True)
    (root / FOLDER / "hf.json").write_text(json.dumps(other))
    assert main([*RUN, "--repeats", "1"]) == 0
    assert not (root / FOLDER / "hf.json").exists()
    assert (root / FOLDER / "superseded/hf.json").is_file()
    assert "hf.json" in capsys.readouterr().out


def test_earlier_results_that_fit_stay_in_the_table(root, capsys):
    two_stages(root)
    (root / FOLDER).mkdir(parents=True)
    (root / FOLDER / "hf.json").write_text(json.dumps(make_run("hf")))
    assert main([*RUN, "--repeats", "1"]) == 0
    assert "\nhf " in capsys.readouterr().out


def test_stored_results_that_disagree_are_not_drawn(root):
    wrong = make_run("m2_batching")
    wrong["gate"]["tokens"][0][1] = 99
    (root / FOLDER).mkdir(parents=True)
    for run in (make_run(), wrong):
        (root / FOLDER / f"{run['stage']}.json").write_text(json.dumps(run))
    assert main(["charts"]) == 1
    assert not (root / FOLDER / "charts").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*RUN, "--max-num-sequences", "4"], "max_num_seqs"),
        ([*RUN, "--max-num-seqs"], "max_num_seqs"),
        ([*RUN, "--stage-workload", "m9=nano:8"], "STAGE=SPEC"),
        ([*RUN, "--repeats", "0"], "repeats"),
        (["run", "--device", "cpu", "--stages", "m9_x"], "m9_x"),
        (["run", "--profile", "tpu"], "tpu"),
        (["table"], "no results"),
        (["table", "cpu/none"], "cpu/none"),
    ],
)
def test_mistakes_on_the_command_line_are_named(root, capsys, arguments, message):
    two_stages(root)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (root / "calls.txt").exists()


def test_stages_are_found_by_existing_and_peers_beside_them(root):
    two_stages(root)
    (root / "m3_unfinished").mkdir()  # no __main__.py
    make_stage(root, "m9_not_on_the_ladder", "{}")
    found = discover_stages(root)
    assert list(found)[:2] == ["m1_baseline", "m2_batching"]
    assert {"hf", "vllm", "nano_vllm"} == set(found) - {"m1_baseline", "m2_batching"}
    assert found["vllm"].module == "compare.peers.vllm_peer"
    assert found["m2_batching"].options == {"max_model_len", "max_num_seqs"}
    default = [stage.name for stage in select_stages(found, None)]
    assert default == ["m1_baseline", "m2_batching", "hf"]


def test_file_without_an_engine_config_has_no_options(tmp_path):
    (tmp_path / "config.py").write_text("x: int = 1\n")
    assert config_fields(tmp_path / "config.py") is None
    assert config_fields(tmp_path / "absent.py") is None


def test_turns_are_reversed_on_odd_repeats():
    stages = [
        Stage(name=name, module=name, options=frozenset(), is_peer=False) for name in ("a", "b")
    ]
    order = [(stage.name, repeat) for stage, repeat in plan_runs(stages, 3)]
    assert order == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]


def test_peer_that_is_not_installed_is_skipped_with_its_reason(root, capsys):
    pytest.importorskip("torch")
    two_stages(root)
    real_root = Path(__file__).resolve().parents[2]
    (root / "compare").symlink_to(real_root / "compare")
    try:
        import nanovllm  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("nano-vllm is installed here")
    command = ["run", "--device", "cpu", "--workload", "nano", "--results", "results"]
    assert main([*command, "--stages", "m1_baseline,nano_vllm", "--repeats", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("skipped") == 1 and "nano_vllm is not usable here" in printed


def test_profile_follows_the_device():
    assert choose_profile("auto", "cpu") is CPU_PROFILE
    assert choose_profile("auto", "cuda:0") is GPU_PROFILE
    assert choose_profile("gpu", "cpu") is GPU_PROFILE


def test_stage_names_in_words():
    assert stage_label("m2_batching") == "M2 batching"
    assert stage_label("hf") == "Transformers"


def test_commit_that_is_stated_replaces_what_the_runs_found(root):
    first, second = make_run(), make_run("m2_batching", rate=60.0, batch=4)
    first["environment"]["commit"] = None
    second["environment"]["commit"] = "0123abc"
    make_stage(root, "m1_baseline", json.dumps(first))
    make_stage(root, "m2_batching", json.dumps(second), options="max_num_seqs: int = 4")
    assert main([*RUN, "--repeats", "1", "--commit", "fed9876"]) == 0
    for stage in ("m1_baseline", "m2_batching"):
        environment = read_json(root / FOLDER / f"{stage}.json")["environment"]
        assert (environment["commit"], environment["dirty"]) == ("fed9876", False)
        assert environment["commit_stated"]


def test_profile_brings_the_engine_options_that_suit_its_workload(root):
    two_stages(root)
    base = ["run", "--device", "cpu", "--stages", "m1_baseline,m2_batching", "--repeats", "1"]
    assert main(base) == 0
    seen = dict(calls(root))["m2_batching"]
    assert seen["--workload"] == CPU_PROFILE.workload
    assert seen["--max-model-len"] == CPU_PROFILE.engine_options["max_model_len"]
    assert "--kv-cache-bytes" not in seen, "the fake stage has no such option"
    assert seen["--gate-tokens"] == CPU_PROFILE.bench_options["gate_tokens"]
    assert main([*base, "--max-model-len", "512"]) == 0
    assert calls(root)[-1][1]["--max-model-len"] == "512"


def test_profile_leaves_the_engine_of_another_workload_alone(root):
    two_stages(root)
    assert main([*RUN, "--repeats", "1"]) == 0
    assert "--max-model-len" not in dict(calls(root))["m2_batching"]
