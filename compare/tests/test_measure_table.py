from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compare import measure_table
from compare.calls import Caller, places
from compare.estimate import StoredDurations, job_seconds
from compare.ledger import FILE_NAME, measured, read_ledger, record
from compare.measure_table import EXIT_INCOMPLETE, EXIT_USAGE, main
from compare.origin import Origin
from compare.processes import EndedProcess
from compare.results import read_json, write_json
from compare.stages import discover_stages
from compare.tests.synthetic import make_run
from compare.whole_table import WHOLE_TABLE, Setting, Table, select_jobs

HERE = Origin(device="cpu-2-cores", name="some CPU, 2 cores", memory_bytes=None, commit="abc")
SMALL = Setting(
    name="small",
    model="toy",
    max_model_len=64,
    kv_cache_bytes="1MiB",
    prompt_budget=64,
    workloads={"few": "nano:2", "many": "nano:8"},
)
FITTED = replace(
    SMALL, name="fit", kv_cache_bytes="fit", fit_to="many", workloads={"fitted": "nano:8"}, runs=1
)
TABLE = Table(
    settings=(SMALL, FITTED),
    engines=("m2_batching", "m5_chunked"),
    cuts={"m5_chunked": {"many": "nano:1"}},
    left_out={"m5_chunked": ("fitted",)},
)
# Unknown models start in 60 s, unknown runs take 20 s and 3 s beside the clock.
FIRST, SECOND, FIT = 30 + 2 * 69, 30 + 2 * 69, 30 + 23


class Machine:
    """Stands where processes are: notes their commands, writes runs, takes `seconds` for each."""

    def __init__(self, seconds: float = 10.0):
        self.now, self.seconds, self.origin = 0.0, seconds, HERE
        self.commands: list[tuple[str, ...]] = []
        self.words: list[list[str]] = []
        self.timeouts: list[float] = []
        self.broken: set[str] = set()

    def clock(self) -> float:
        return self.now

    def run(self, command: list[str], root: Path, timeout_s: float, log_file: Path) -> EndedProcess:
        words = command[3:]
        engine, to, num_runs = words[1], Path(words[3]), int(words[5])
        pairs = [words[i + 1] for i, word in enumerate(words) if word == "--run"]
        self.commands.append((engine, *pairs))
        self.words.append(words)
        self.timeouts.append(timeout_s)
        self.now += self.seconds
        log_file.write_text("its words\n")
        for name, _, spec in (pair.partition("=") for pair in pairs):
            if name not in self.broken:
                runs = [self.result(engine, spec) for _ in range(num_runs)]
                for number, run in enumerate(runs, start=1):
                    ending = ".json" if number == 1 else f".run{number}.json"
                    write_json(to / name / f"{engine}{ending}", run)
                record(to, measured(name, runs))
        failure = "exit status 4" if self.broken else None
        return EndedProcess(status=4 if failure else 0, failure=failure)

    def result(self, engine: str, spec: str) -> dict[str, Any]:
        result = make_run(engine)
        result["workload"]["spec"] = spec
        result["environment"] |= {"commit": self.origin.commit, "dirty": False}
        return result


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(measure_table, "run_process", machine.run)
    monkeypatch.setattr(measure_table, "this_origin", lambda commit: machine.origin)
    return machine


@pytest.fixture
def measure(machine, tmp_path):
    def call(*words: str) -> int:
        command = ["--to", str(tmp_path / "runs"), "--results", str(tmp_path / "stored"), *words]
        return main(command, table=TABLE, clock=machine.clock)

    return call


def test_every_engine_measures_a_setting_in_one_process_before_the_next_setting(
    machine, measure, capsys
):
    assert measure("--limit", "600") == 0
    assert machine.commands == [
        ("m2_batching", "few=nano:2", "many=nano:8"),
        ("m5_chunked", "few=nano:2", "many=nano:1"),
        ("m2_batching", "fitted=nano:8"),
    ]
    assert "1MiB" in machine.words[0] and "fit" in machine.words[2]
    told = capsys.readouterr().out
    assert f"m5_chunked, small: 10 s, {SECOND} estimated" in told and "missing" not in told


def test_a_further_call_goes_on_with_what_the_first_had_no_time_for(machine, measure, capsys):
    machine.seconds = 150
    assert measure("--limit", f"{FIRST + 100}") == EXIT_INCOMPLETE
    # 118 s are left: too few for the second engine, enough for what the first one needs.
    assert [command[:2] for command in machine.commands] == [
        ("m2_batching", "few=nano:2"),
        ("m2_batching", "fitted=nano:8"),
    ]
    assert "missing: m5_chunked: few, many" in capsys.readouterr().out
    assert measure("--limit", f"{FIRST + 100}") == 0
    assert machine.commands[2:] == [("m5_chunked", "few=nano:2", "many=nano:1")]
    assert all(timeout <= FIRST + 100 for timeout in machine.timeouts)


def test_only_a_job_that_is_longer_than_a_call_is_taken_in_parts(machine, measure):
    machine.seconds = 100
    assert measure("--limit", "140", "--engines", "m2_batching") == EXIT_INCOMPLETE
    assert machine.commands == [("m2_batching", "few=nano:2")]
    assert measure("--limit", "140", "--engines", "m2_batching") == EXIT_INCOMPLETE
    assert machine.commands[1:] == [("m2_batching", "many=nano:8")]


def test_a_machine_that_starts_empty_needs_to_know_only_what_is_measured(
    machine, measure, tmp_path
):
    assert measure("--folders", "few,many") == 0
    ledger = (tmp_path / "runs" / FILE_NAME).read_text()
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / FILE_NAME).write_text(ledger)
    assert measure() == 0
    assert machine.commands[2:] == [("m2_batching", "fitted=nano:8")]


def test_half_of_the_runs_or_another_spec_are_measured_again(machine, measure, tmp_path):
    assert measure() == 0
    half, other = [
        entry for entry in read_ledger(tmp_path / "runs") if entry.folder in ("few", "many")
    ][:2]
    record(tmp_path / "runs", replace(half, num_runs=2))
    record(tmp_path / "runs", replace(other, spec="nano:3"))
    machine.commands.clear()
    assert measure() == 0
    assert machine.commands == [("m2_batching", "few=nano:2", "many=nano:8")]


@pytest.mark.parametrize("change", [{"commit": "def"}, {"name": "NVIDIA H100"}])
def test_a_call_on_another_card_or_commit_is_refused_before_anything_runs(
    machine, measure, capsys, change
):
    assert measure("--folders", "few") == 0
    machine.origin = replace(HERE, **change)
    assert measure() == EXIT_USAGE
    assert next(iter(change.values())) in capsys.readouterr().err
    assert len(machine.commands) == 2


def test_a_failure_is_told_with_the_end_of_its_log_and_stops_nothing(machine, measure, capsys):
    machine.broken = {"few"}
    assert measure() == EXIT_INCOMPLETE
    told = capsys.readouterr().out
    assert "exit status 4" in told and "its words" in told
    assert "missing: m2_batching: few" in told and len(machine.commands) == 3


def test_what_failed_is_tried_again_after_everything_else(machine, measure):
    machine.broken, machine.seconds = {"few"}, 100
    assert measure("--limit", "140", "--engines", "m2_batching") == EXIT_INCOMPLETE
    machine.broken, machine.seconds = set(), 10
    assert measure("--folders", "few,many") == 0
    assert machine.commands[1:] == [
        ("m5_chunked", "few=nano:2", "many=nano:1"),
        ("m2_batching", "few=nano:2", "many=nano:8"),
    ]


def test_a_job_waits_for_the_run_that_shows_what_it_needs(machine, measure, capsys):
    assert measure("--folders", "fitted") == EXIT_INCOMPLETE
    assert machine.commands == [] and "missing: m2_batching: fitted" in capsys.readouterr().out
    assert measure("--plan", "--folders", "fitted") == EXIT_USAGE
    assert "waits for a run of many" in capsys.readouterr().err


def test_a_plan_says_which_job_runs_in_which_call_and_runs_nothing(
    machine, measure, tmp_path, capsys
):
    result = make_run("m2_batching")
    result |= {"duration_s": 7.0, "model": {**result["model"], "name": "toy"}}
    result["workload"]["spec"] = "nano:8"
    write_json(tmp_path / "stored/nvidia-h200/many/m2_batching.json", result)
    assert measure("--plan", "--limit", "280") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "call 1: 169 s" and lines[3] == "call 2: 168 s"
    assert "m2_batching, small, 3 runs: start 30, few 69, many 30" in lines[1]
    assert "m2_batching, fit, 1 run: start 30, fitted 10" in lines[2]
    assert lines[-1] == "2 calls, 337 s, as estimated"
    assert machine.commands == []
    (tmp_path / "stored").rename(tmp_path / "far away")
    assert measure("--plan", "--limit", "280") == 0
    assert capsys.readouterr().out.splitlines() == lines
    assert measure("--folders", "many") == 0
    capsys.readouterr()
    assert measure("--plan", "--engines", "m2_batching") == 0
    assert "many" not in capsys.readouterr().out


def test_published_rows_are_merged_and_those_of_another_commit_leave_the_table(
    machine, measure, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "stored/cpu-2-cores/few"
    old = make_run("m1_baseline")
    old["environment"] |= {"commit": "older", "dirty": False}
    write_json(folder / "m1_baseline.json", old)
    monkeypatch.setattr(measure_table, "discover_stages", lambda root: discover_stages(ROOT))
    assert measure("--folders", "few") == 0
    assert measure("--publish", "--folders", "few") == 0
    assert sorted(file.name for file in folder.glob("*.json")) == [
        "m2_batching.json",
        "m5_chunked.json",
    ]
    assert read_json(folder / "m5_chunked.json")["repeats"] == 3
    assert (folder / "superseded/m1_baseline.json").is_file()
    assert measure("--publish") == EXIT_INCOMPLETE
    assert "missing in many: m2_batching, m5_chunked" in capsys.readouterr().out


@pytest.mark.parametrize("environment", [{"commit": "other"}, {"device": "NVIDIA H100"}])
def test_runs_of_two_commits_or_cards_are_not_published_at_all(
    machine, measure, tmp_path, capsys, environment
):
    assert measure("--folders", "few,many") == 0
    file = tmp_path / "runs/many/m5_chunked.run2.json"
    result = read_json(file)
    result["environment"] |= environment
    write_json(file, result)
    assert measure("--publish") == EXIT_USAGE
    told = capsys.readouterr().err
    assert "no place in one table" in told and next(iter(environment.values())) in told
    assert not (tmp_path / "stored").exists()


def test_a_stage_without_stored_runs_is_estimated_by_its_nearest_neighbour():
    seconds = {
        ("m5_chunked", "toy", "nano:8", "many"): 5.0,
        ("m2_batching", "toy", "nano:8", "many"): 17.0,
        ("m2_batching", "toy", "nano:8", "little"): 70.0,
        ("vllm", "toy", "nano:8", "many"): 6.0,
    }
    stored = StoredDurations(seconds)
    expected = {"m6_prefix": 5.0, "m3_paged": 17.0, "m2_batching": 17.0, "vllm": 6.0, "hf": 5.0}
    found = {name: stored.of_run(name, "toy", "nano:8", "elsewhere") for name in expected}
    assert found == expected
    assert stored.of_run("m2_batching", "toy", "nano:8", "little") == 70.0
    assert stored.of_run("m2_batching", "toy", "nano", "many") is None


@pytest.mark.parametrize("words", [["--engines", "m9_none"], ["--folders", "none"]])
def test_unknown_engines_and_folders_are_refused(measure, capsys, words):
    assert measure(*words) == EXIT_USAGE
    assert "there are: " in capsys.readouterr().err


ROOT = Path(__file__).parents[2]


def test_every_request_of_the_whole_table_is_shorter_than_its_limit():
    from folovllm.workloads.workload import make_workload

    for setting in WHOLE_TABLE.settings:
        for spec in setting.workloads.values():
            for request in make_workload(spec, vocab_size=151_936).requests:
                length = len(request.prompt_token_ids) + request.history_len + request.output_len
                assert length <= setting.max_model_len


def test_the_whole_table_names_engines_that_exist_and_cuts_that_are_beginnings():
    from folovllm.workloads.workload import make_workload

    assert set(WHOLE_TABLE.engines) <= set(discover_stages(ROOT))
    whole = {name: spec for s in WHOLE_TABLE.settings for name, spec in s.workloads.items()}
    for cuts in WHOLE_TABLE.cuts.values():
        for folder, cut in cuts.items():
            requests = make_workload(cut, vocab_size=151_936).requests
            all_requests = make_workload(whole[folder], vocab_size=151_936).requests
            assert requests == all_requests[: len(requests)]


def test_the_whole_table_gives_each_engine_the_options_it_has():
    stages, options = discover_stages(ROOT), {}
    for job in select_jobs(WHOLE_TABLE, None, ["long-context", "nano-8gib", "qwen3-8b-nano"]):
        words = WHOLE_TABLE.engine_options(stages[job.engine], job.setting)
        options[job.engine, job.setting.name] = dict(zip(words[::2], words[1::2], strict=True))
    budgets = {name for (name, _), words in options.items() if "--max-num-batched-tokens" in words}
    assert budgets == {"m2_batching", "m3_paged", "m4_flash"}
    given = {place: words.get("--kv-cache-bytes") for place, words in options.items()}
    assert given["m1_baseline", "long prompts"] == "32GiB"
    assert given["m7_gptq", "8B"] == "fit" and given["m1_baseline", "8B"] is None
    assert given["vllm", "8B"] is None and given["vllm", "8 GiB"] == "8GiB"


def test_the_whole_table_is_planned_in_calls_of_nine_minutes():
    stored = StoredDurations.read(ROOT / "compare/results", ROOT / "nowhere")
    jobs = WHOLE_TABLE.jobs()
    calls = Caller(WHOLE_TABLE, stored, 540.0).plan(jobs, places([]))
    assert max(sum(job_seconds(job, stored) for job in call) for call in calls) <= 540
    planned = [(job.engine, folder) for call in calls for job in call for folder in job.workloads]
    assert sorted(planned) == sorted((job.engine, f) for job in jobs for f in job.workloads)
