import json
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import pytest

from compare import session
from compare.results import lookup, read_json
from compare.session import main
from compare.stages import Stage
from compare.tests.synthetic import make_run

pytest.importorskip("torch")

STAGE = """
from dataclasses import dataclass

@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    max_model_len: int = 8

class LLM:
    config_class = EngineConfig
    made = []

    def __init__(self, model, **options):
        self.model, self.options = model, options
        self.made.append(self)
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def stage(root, monkeypatch):
    """A stage folder `m1_session`, whose `bench` notes what it was given and makes up results."""
    folder = root / "m1_session"
    folder.mkdir()
    (folder / "__main__.py").write_text("")
    (folder / "__init__.py").write_text(STAGE)
    (folder / "config.py").write_text(STAGE.partition("class LLM")[0])
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.delitem(sys.modules, "m1_session", raising=False)
    calls = []

    def run_bench(llm, name, arguments):
        calls.append((llm, name, arguments.workload, arguments.llm_seed, arguments.runs))
        if "broken" in arguments.workload:
            raise RuntimeError("out of memory")
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        for number in range(1, arguments.runs + 1):
            suffix = ".json" if number == 1 else f".run{number}.json"
            run = {**make_run(name, rate=20.0 + number), "runs_in_process": arguments.runs}
            arguments.output.with_suffix(suffix).write_text(json.dumps(run))

    monkeypatch.setattr("folovllm.cli.bench.run_bench", run_bench)
    yield calls
    sys.modules.pop("m1_session", None)


MEASURE = ["measure", "m1_session", "--to", "out"]
RUNS = ["--run", "one=fixed:batch=1,input=8,output=4", "--run", "two=nano:8"]


def test_workloads_of_a_stage_are_measured_on_one_engine(stage, root, capsys):
    options = ["--runs", "2", "--max-model-len", "64", "--seed", "5", "--dtype", "float32"]
    assert main([*MEASURE, *RUNS, *options]) == 0
    (llm,) = sys.modules["m1_session"].LLM.made
    assert llm.options["max_model_len"] == 64 and llm.options["dtype"] == "float32"
    assert stage == [
        (llm, "m1_session", "fixed:batch=1,input=8,output=4", 5, 2),
        (llm, "m1_session", "nano:8", 5, 2),
    ]
    written = sorted(str(file.relative_to(root / "out")) for file in root.glob("out/*/*.json"))
    assert written == [
        "one/m1_session.json", "one/m1_session.run2.json",
        "two/m1_session.json", "two/m1_session.run2.json",
    ]  # fmt: skip
    assert "m1_session: two = nano:8" in capsys.readouterr().out


def test_three_runs_unless_said_otherwise(stage):
    assert main([*MEASURE, *RUNS[:2]]) == 0
    assert stage[0][-1] == 3


def test_workloads_behind_a_failing_one_are_measured_and_the_status_says_so(stage, root, capsys):
    assert main([*MEASURE, "--run", "bad=broken", *RUNS]) == session.EXIT_INCOMPLETE
    assert [spec for _, _, spec, _, _ in stage] == ["broken", *(run[4:] for run in RUNS[1::2])]
    assert "out of memory" in capsys.readouterr().err
    assert not (root / "out/bad/m1_session.json").exists()
    assert (root / "out/two/m1_session.json").is_file()


@pytest.mark.parametrize("run", ["nano", "nano=", "=nano"])
def test_name_without_spec_or_spec_without_name_is_refused_before_an_engine_starts(
    stage, capsys, run
):
    assert main([*MEASURE, "--run", run]) == session.EXIT_USAGE
    assert "NAME=SPEC" in capsys.readouterr().err
    assert "m1_session" not in sys.modules


def test_a_name_that_is_given_twice_is_refused(stage, capsys):
    command = [*MEASURE, "--run", "one=nano:1", "--run", "one=nano:2"]
    assert main(command) == session.EXIT_USAGE
    assert "one" in capsys.readouterr().err and stage == []


def test_unknown_engines_and_options_are_refused(stage, capsys):
    assert main(["measure", "m9_none", "--to", "out", *RUNS]) == session.EXIT_USAGE
    assert "no stage called m9_none" in capsys.readouterr().err
    with pytest.raises(SystemExit) as refused:
        main([*MEASURE, *RUNS, "--no-such-option", "1"])
    assert refused.value.code == 2 and stage == []


def write_runs(root, name, *runs):
    folder = root / "out" / name
    folder.mkdir(parents=True)
    for number, run in enumerate(runs):
        (folder / f"{run['stage']}.{number}.json").write_text(json.dumps(run))


PUBLISH = ["publish", "out", "--commit", "abcdef"]
RESULTS = "compare/results/cpu-2-cores"


def test_publish_merges_and_stores_what_passes_with_the_commit_that_is_stated(root, capsys):
    runs = [make_run(rate=rate) for rate in (20.0, 30.0, 25.0)]
    write_runs(root, "nano", *runs, make_run("m2_batching", rate=60.0, batch=4))
    write_runs(root, "other", make_run())
    marked = "<!-- compare:cpu-2-cores/nano:begin -->\n<!-- compare:cpu-2-cores/nano:end -->\n"
    (root / "README.md").write_text(marked)
    assert main(PUBLISH) == 0
    merged = read_json(root / RESULTS / "nano/m1_baseline.json")
    assert merged["repeats"] == 3
    assert lookup(merged, "environment.commit") == "abcdef"
    assert lookup(merged, "environment.dirty") is False
    assert (root / RESULTS / "nano/m2_batching.json").is_file()
    assert (root / RESULTS / "nano/charts/throughput.png").is_file()
    assert (root / RESULTS / "other/m1_baseline.json").is_file()
    assert "m2_batching" in (root / "README.md").read_text()
    assert "gate passed" in capsys.readouterr().out


def test_publish_stores_nothing_of_a_folder_that_fails_the_gate_but_the_others(root, capsys):
    wrong = make_run("m2_batching")
    wrong["gate"]["tokens"][0][1] = 99
    write_runs(root, "bad", make_run(), wrong)
    write_runs(root, "good", make_run())
    assert main(PUBLISH) == session.EXIT_REFUSED
    assert "gate FAILED" in capsys.readouterr().err
    assert not (root / RESULTS / "bad").exists()
    assert (root / RESULTS / "good/m1_baseline.json").is_file()


def test_publish_says_which_earlier_results_it_moved_away(root, capsys):
    write_runs(root, "nano", make_run())
    other = make_run("m2_batching")
    other["seed"] = 1
    target = root / RESULTS / "nano"
    target.mkdir(parents=True)
    (target / "m2_batching.json").write_text(json.dumps(other))
    assert main(PUBLISH) == 0
    assert "superseded/m2_batching.json" in capsys.readouterr().out


def test_publish_leaves_out_a_workload_of_which_no_run_finished(root, capsys):
    (root / "out/none").mkdir(parents=True)
    write_runs(root, "nano", make_run())
    assert main(PUBLISH) == 0
    assert "no run finished" in capsys.readouterr().out
    assert not (root / RESULTS / "none").exists()


def test_publish_of_nothing_and_arguments_that_nobody_takes_are_mistakes(root, capsys):
    (root / "out").mkdir()
    assert main(["publish", "out"]) == session.EXIT_USAGE
    assert "run `measure` first" in capsys.readouterr().err
    assert main(["publish", "nowhere"]) == session.EXIT_USAGE
    with pytest.raises(SystemExit):
        main(["publish", "out", "--max-model-len", "8"])


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    max_model_len: int = 8


@pytest.fixture
def peer(root, monkeypatch):
    """A peer `toy` that can be imported; its module, and what happens to it, in order."""
    module, events = ModuleType("toy_peer"), []

    @contextmanager
    def start(model, **options):
        events.append(("start", model, options))
        yield "llm"
        events.append(("stop",))

    def bench_peer(name, llm, arguments, gate_not_comparable):
        events.append((name, llm, arguments.workload, gate_not_comparable))
        if arguments.workload == "broken":
            raise RuntimeError("the engine died")
        return make_run(name)

    vars(module).update(EngineConfig=ToyConfig, start=start, events=events)
    monkeypatch.setitem(sys.modules, "toy_peer", module)
    monkeypatch.setattr(session, "bench_peer", bench_peer)
    found = {
        "toy": Stage(name="toy", module="toy_peer", options=frozenset(), is_peer=True),
    }
    monkeypatch.setattr(session, "discover_stages", lambda root: found)
    return module


MEASURE_PEER = ["measure", "toy", "--to", "out", "--runs", "2", "--run", "bad=broken", *RUNS]


def test_a_peer_is_started_once_and_stopped_after_its_last_workload(peer, root):
    status = main([*MEASURE_PEER, "--model", "m", "--dtype", "float32", "--max-model-len", "64"])
    assert status == session.EXIT_INCOMPLETE
    first, *runs, last = peer.events
    options = {"load_format": "auto", "dtype": "float32", "device": "auto", "seed": 0}
    assert first == ("start", "m", {**options, "config": ToyConfig(max_model_len=64)})
    specs = ["broken", *[RUNS[1][4:]] * 2, *[RUNS[3][4:]] * 2]
    assert runs == [("toy", "llm", spec, None) for spec in specs]
    assert last == ("stop",)
    for name in ("toy.json", "toy.run2.json"):
        assert read_json(root / "out/two" / name)["runs_in_process"] == 2
    assert not (root / "out/bad/toy.json").exists()


def test_tokens_of_a_peer_that_has_none_to_compare_are_not_compared(peer):
    peer.NOT_COMPARABLE = "it has no log-probabilities"
    main(MEASURE_PEER)
    assert {event[-1] for event in peer.events[1:-1]} == {"it has no log-probabilities"}


def test_a_peer_that_is_not_installed_is_a_mistake_and_no_traceback(peer, capsys):
    def start(model, **options):
        raise ImportError("No module named 'toy'")

    peer.start = start
    assert main(MEASURE_PEER) == session.EXIT_USAGE
    assert "No module named 'toy'" in capsys.readouterr().err


def test_transformers_measured_on_two_workloads_can_be_published(root):
    pytest.importorskip("transformers")
    from folovllm.testing.toy_models import toy_families, write_toy_model

    model = write_toy_model(toy_families()[0], root / "toy")
    options = ["--runs", "1", "--model", str(model), "--dtype", "float32", "--device", "cpu"]
    runs = [
        "--run",
        "a=fixed:batch=1,input=8,output=4",
        "--run",
        "b=fixed:batch=2,input=4,output=3",
    ]
    assert main(["measure", "hf", "--to", "out", *runs, *options, "--max-model-len", "32"]) == 0
    assert main(PUBLISH) == 0
    (stored,) = root.glob("compare/results/*/b/hf.json")
    result = read_json(stored)
    assert result["workload"]["num_output_tokens"] == 6 and len(result["gate"]["tokens"]) == 2
