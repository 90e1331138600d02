"""The benchmark's driver and report, on an engine and a clock that do what they are told."""

import gc
import json
import threading
from dataclasses import dataclass, fields, replace
from enum import Enum
from types import SimpleNamespace

import pytest
import torch

from folovllm.bench import probes as bench_probes
from folovllm.bench.benchmark import run_benchmark
from folovllm.bench.block_map import FREE, unpack_block_map
from folovllm.bench.blocks import block_section, prefix_section
from folovllm.bench.late_requests import token_times
from folovllm.bench.metrics import StepWork
from folovllm.bench.probes import (
    GpuUtilisation,
    HostTimers,
    SystemClock,
    frozen_heap,
    peak_memory_bytes,
    reset_peak_memory,
)
from folovllm.bench.recorder import RequestRecord, RunRecord, record_run
from folovllm.bench.report import check_record, step_works
from folovllm.hardware import Ceilings
from folovllm.interfaces import StepOutput, StepStats, TokenLogprobs, TokenOutput
from folovllm.model.collectives import Alone
from folovllm.request import FinishReason
from folovllm.workloads.workload import Workload, WorkloadRequest, make_workload

SCHEDULE_S, PREPARE_S, FORWARD_S, UPDATE_S = 0.001, 0.002, 1.0, 0.004
STEP_S = SCHEDULE_S + PREPARE_S + FORWARD_S + UPDATE_S
CEILINGS = Ceilings(copy_bytes_per_s=1e6, matmul_flops_per_s=1e6, dtype="float32")


class FakeClock:
    """Time passes only when somebody works or sleeps."""

    def __init__(self):
        self.time = 100.0
        self.slept = []

    def now(self):
        return self.time

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.time += seconds


class Policy(Enum):
    FCFS = "fcfs"


@dataclass(frozen=True)
class FakeConfig:
    max_num_seqs: int = 2
    max_model_len: int = 50
    policy: Policy = Policy.FCFS
    sizes: tuple[int, ...] = (1, 2)


class FakeScheduler:
    def __init__(self, engine):
        self.engine = engine

    def schedule(self):
        self.engine.clock.time += SCHEDULE_S
        return self.engine.start_requests()

    def update(self, scheduled, token_ids):
        self.engine.clock.time += UPDATE_S
        return self.engine.finish_step(scheduled, token_ids)


class FakeRunner:
    def __init__(self, engine):
        self.engine = engine
        self.kv_cache = SimpleNamespace(num_bytes=4000)

    def prepare_inputs(self, scheduled):
        self.engine.clock.time += PREPARE_S

    def execute(self, scheduled):
        self.prepare_inputs(scheduled)
        self.engine.clock.time += FORWARD_S
        return [request.num_tokens for request, _ in scheduled]


class FakeEngine:
    """Runs up to max_num_seqs requests, prompts and single tokens in one step.

    A token is the number of tokens before it, so outputs are known.
    """

    def __init__(self, clock):
        self.clock = clock
        self.config = FakeConfig()
        self.scheduler = FakeScheduler(self)
        self.model_runner = FakeRunner(self)
        self.waiting, self.running, self.log = [], [], []

    def add_request(self, request):
        if request.num_prompt_tokens + request.max_tokens > self.config.max_model_len:
            raise ValueError(f"too long for max_model_len {self.config.max_model_len}")
        self.log.append((self.clock.time, request))
        self.waiting.append(request)

    def abort_request(self, request_id):
        self.waiting = [r for r in self.waiting if r.request_id != request_id]

    def has_unfinished_requests(self):
        return bool(self.waiting or self.running)

    def step(self):
        scheduled = self.scheduler.schedule()
        return self.scheduler.update(scheduled, self.model_runner.execute(scheduled))

    def start_requests(self):
        while self.waiting and len(self.running) < self.config.max_num_seqs:
            self.running.append(self.waiting.pop(0))
        return [(r, r.num_tokens - r.num_computed_tokens) for r in self.running]

    def finish_step(self, scheduled, token_ids):
        tokens = []
        for (request, num_tokens), token_id in zip(scheduled, token_ids, strict=True):
            request.num_computed_tokens += num_tokens
            reason = request.append_output_token(token_id)
            top = ((token_id, -0.5), (0, -0.75))
            logprobs = TokenLogprobs(-0.5, 1, top) if request.sampling_params.logprobs else None
            tokens.append(TokenOutput(request.request_id, token_id, reason, logprobs))
        live = sum(request.num_computed_tokens for request in self.running)
        stats = StepStats(
            num_scheduled_tokens=sum(num_tokens for _, num_tokens in scheduled),
            num_scheduled_requests=len(scheduled),
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_preemptions=0,
            num_kv_tokens_live=live,
            num_kv_tokens_reserved=50 * len(self.running),
            num_kv_tokens_capacity=100,
        )
        self.running = [r for r in self.running if r.finish_reason is None]
        return StepOutput(tuple(tokens), stats)


def request(request_id, prompt_len, output_len, arrival_s=0.0):
    prompt = tuple(range(10, 10 + prompt_len))
    return WorkloadRequest(prompt, output_len, arrival_s, request_id)


# r0 and r1 run together; r2 waits for r1's place; r3 comes after a pause.
WORKLOAD = Workload(
    "mixed",
    (request("r0", 5, 3), request("r1", 9, 2), request("r2", 3, 2), request("r3", 4, 1, 60.0)),
    {"seed": 0},
    spec="mixed:4",
)


def fake_llm(clock):
    config = SimpleNamespace(
        vocab_size=30,
        hidden_size=10,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        quantization=None,
        tie_word_embeddings=False,
    )
    model = SimpleNamespace(
        config=config,
        device=torch.device("cpu"),
        dtype=torch.float32,
        num_parameters=1000,
        num_parameter_bytes=4000,
        collectives=Alone(),
    )
    return SimpleNamespace(engine=FakeEngine(clock), model=model)


def run(workload=WORKLOAD, clock=None, **changes):
    clock = clock or FakeClock()
    llm = fake_llm(clock)
    options = {"stage": "m9_fake", "ceilings": CEILINGS, "clock": clock, **changes}
    return run_benchmark(llm, workload, **options), llm.engine, clock


def test_every_request_gets_its_tokens_and_times():
    report, _, _ = run()
    rows = {row["request_id"]: row for row in report["requests"]}
    assert [row["num_output_tokens"] for row in report["requests"]] == [3, 2, 2, 1]
    assert {row["finish_reason"] for row in report["requests"]} == {"length"}
    assert rows["r0"]["first_token_s"] == pytest.approx(STEP_S)
    assert rows["r0"]["last_token_s"] == pytest.approx(3 * STEP_S)
    assert rows["r1"]["last_token_s"] == pytest.approx(2 * STEP_S)
    assert rows["r2"]["first_token_s"] == pytest.approx(3 * STEP_S)
    assert rows["r3"]["first_token_s"] == pytest.approx(60 + STEP_S)
    assert report["duration_s"] == pytest.approx(60 + STEP_S)


def test_report_says_what_the_model_is_quantised_with():
    clock = FakeClock()
    llm = fake_llm(clock)
    options = {"stage": "m9_fake", "ceilings": CEILINGS, "clock": clock}
    assert run_benchmark(llm, WORKLOAD, **options)["model"]["quantization"] is None
    llm.model.config.quantization = {"quant_method": "gptq", "bits": 4}
    report = run_benchmark(llm, WORKLOAD, **options)
    assert report["model"]["quantization"] == {"quant_method": "gptq", "bits": 4}


def test_report_says_how_many_processes_held_the_model():
    clock = FakeClock()
    llm = fake_llm(clock)
    options = {"stage": "m9_fake", "ceilings": CEILINGS, "clock": clock}
    assert run_benchmark(llm, WORKLOAD, **options)["tensor_parallel_size"] == 1
    llm.model.collectives.num_ranks = 2
    assert run_benchmark(llm, WORKLOAD, **options)["tensor_parallel_size"] == 2


def test_latencies_and_throughput_follow_from_the_times():
    report, _, _ = run()
    assert report["ttft_s"]["mean"] == pytest.approx(STEP_S * (1 + 1 + 3 + 1) / 4)
    assert report["tpot_s"]["mean"] == pytest.approx(STEP_S)
    assert report["output_tokens_per_s"] == pytest.approx(8 / (60 + STEP_S))
    assert report["total_tokens_per_s"] == pytest.approx((8 + 21) / (60 + STEP_S))


def test_request_is_added_when_it_arrives_and_the_idle_engine_is_not_stepped():
    report, engine, clock = run()
    times = [(time - 100, r.request_id) for time, r in engine.log]
    start = times[-4][0]
    assert [(time - start, name) for time, name in times[-4:-1]] == [
        (0, "r0"),
        (0, "r1"),
        (0, "r2"),
    ]
    assert times[-1][0] - start == pytest.approx(60.0)
    assert clock.slept == [pytest.approx(60.0 - 4 * STEP_S)]
    assert len(report["steps"]["start_s"]) == 5


def test_request_that_arrives_during_a_step_waits_for_its_end():
    workload = Workload("late", (request("b", 2, 1, 0.5), request("a", 2, 1)))
    report, _, _ = run(workload)
    rows = {row["request_id"]: row for row in report["requests"]}
    assert rows["b"]["arrival_s"] == 0.5
    assert rows["b"]["first_token_s"] == pytest.approx(2 * STEP_S)
    assert [row["request_id"] for row in report["requests"]] == ["b", "a"]


def conversation(think_s=0.0):
    """Two turns and a request beside them, for an engine whose token is the length before it."""
    return Workload(
        "talk",
        (
            WorkloadRequest((10, 11, 12), 2, 0.0, "turn1", group="turn 1"),
            WorkloadRequest((20, 21), 3, think_s, "turn2", "turn1", 5, "turn 2"),
            WorkloadRequest((30,), 8, 0.0, "other"),
        ),
    )


def added_for_the_run(engine):
    names = ("warmup-", "gate-")
    timed = [(t, r) for t, r in engine.log if not r.request_id.startswith(names)]
    return timed[3:]  # all three were tried for their length first


def test_follow_up_has_the_prompt_and_the_actual_answer_before_its_own_tokens():
    report, engine, _ = run(conversation())
    added = {r.request_id: r for _, r in added_for_the_run(engine)}
    assert added["turn2"].prompt_token_ids == [10, 11, 12, 3, 4, 20, 21]
    rows = {row["request_id"]: row for row in report["requests"]}
    assert rows["turn2"]["num_prompt_tokens"] == 7 and rows["turn2"]["follows"] == "turn1"
    assert [row["request_id"] for row in report["requests"]] == ["turn1", "turn2", "other"]
    assert report["workload"]["num_input_tokens"] == 3 + 7 + 1


@pytest.mark.parametrize(("think_s", "waited_s"), [(0.0, 0.0), (0.5 * STEP_S, 0.5 * STEP_S)])
def test_follow_up_arrives_when_the_turn_before_it_is_done_and_thought_about(think_s, waited_s):
    report, engine, _ = run(conversation(think_s))
    rows = {row["request_id"]: row for row in report["requests"]}
    due_s = 2 * STEP_S + think_s
    assert rows["turn2"]["arrival_s"] == pytest.approx(due_s, abs=1e-6)
    assert rows["turn2"]["arrival_s"] >= rows["turn1"]["last_token_s"]
    # "other" is in the middle of a step when the time to think is over.
    steps = 3 if think_s else 2
    times = {r.request_id: time for time, r in added_for_the_run(engine)}
    assert times["turn2"] - times["turn1"] == pytest.approx(steps * STEP_S)
    assert rows["turn2"]["first_token_s"] == pytest.approx((steps + 1) * STEP_S, abs=1e-5)
    ttft = report["ttft_by_group_s"]["turn 2"]
    assert ttft["p50"] == pytest.approx((steps + 1) * STEP_S - due_s)


def test_what_the_benchmark_does_between_steps_is_no_time_of_who_follows():
    clock = FakeClock()
    record = record_run(
        FakeEngine(clock),
        Workload("alone", conversation().requests[:2]),
        seed=0,
        clock=clock,
        before_step=lambda: None,
        after_step=lambda: clock.sleep(0.1),
    )
    turn1, turn2 = record.requests.values()
    assert turn2.arrival_s == pytest.approx(record.ends_s[turn1.steps[-1]] + 0.1)
    assert record.starts_s[turn2.steps[0]] == pytest.approx(turn2.arrival_s)


def test_idle_engine_waits_for_the_time_to_think():
    alone = Workload("alone", conversation(7.0).requests[:2])
    report, _, clock = run(alone)
    assert clock.slept == [pytest.approx(7.0)]
    assert report["duration_s"] == pytest.approx(5 * STEP_S + 7.0)


def test_ttft_is_told_by_group_and_a_workload_without_groups_has_none():
    report, _, _ = run(conversation())
    assert list(report["ttft_by_group_s"]) == ["turn 1", "turn 2"]
    assert report["ttft_by_group_s"]["turn 1"]["p99"] == pytest.approx(STEP_S)
    assert {row["group"] for row in report["requests"]} == {"turn 1", "turn 2", None}
    assert run()[0]["ttft_by_group_s"] is None


def test_turns_are_no_late_requests():
    report, _, _ = run(conversation())  # two at the start and one later
    assert report["late_ttft_s"] is None and report["decoder_itl_s"] is None


def test_gate_asks_what_is_known_beforehand_and_warm_up_is_as_long_as_the_last_turn():
    report, engine, _ = run(conversation(), gate_tokens=2)
    assert report["gate"]["tokens"] == [[3, 4], [1, 2]]
    assert report["warmup"]["longest_prompt_len"] == 7
    (longest, _) = (r for _, r in engine.log if r.request_id.startswith("warmup-"))
    assert longest.prompt_token_ids == [20, 21, 20, 21, 20, 21, 20][::-1]


def test_gate_answers_requests_that_follow_without_history():
    workload = make_workload("prefix-hit:prompt=20,num=1,output=2", vocab_size=30)
    report, _, _ = run(workload)
    assert report["gate"]["tokens"] == [[20, 21]] * 2
    assert list(report["ttft_by_group_s"]) == ["cold", "hit 90%"]
    cold, hit = report["requests"]
    assert hit["arrival_s"] == cold["last_token_s"] == pytest.approx(2 * STEP_S)
    assert report["ttft_s"]["p99"] == pytest.approx(STEP_S)  # nobody waits for another


def test_conversation_that_grows_too_long_is_named_before_anything_runs():
    spec = "multi-turn:conversations=2,turns=3,system=4,question=8,output=8"
    clock = FakeClock()
    message = (
        r"conversation grows too long: 36 of the prompt tokens are its history up to c0-turn2; "
        r"the engine refuses request c0-turn3 \(44 prompt tokens, 8 output tokens\): too long for "
        r"max_model_len 50"
    )
    with pytest.raises(ValueError, match=message):
        run(make_workload(spec, vocab_size=30), clock)
    assert clock.time == 100.0


def test_roofline_counts_the_whole_prompt_of_a_follow_up():
    follow_up = WorkloadRequest((1, 2), 1, 0.0, "b", "a", 3)
    record = record_of(follow_up, [stats(5)])
    assert step_works(record)[0].num_attention_pairs == 15
    assert step_works(record_of(follow_up, [stats(2)]))[0].num_attention_pairs == 6


def test_engine_that_ends_a_turn_early_is_refused_though_the_next_never_came():
    class Short(FakeEngine):
        def finish_step(self, scheduled, token_ids):
            output = super().finish_step(scheduled, token_ids)
            self.running = [r for r in self.running if r.request_id != "turn1"]
            return output

    clock = FakeClock()
    llm = fake_llm(clock)
    llm.engine = Short(clock)
    with pytest.raises(RuntimeError, match="request turn1 ended with 1 tokens"):
        run_benchmark(llm, conversation(), stage="x", ceilings=CEILINGS, clock=clock)


def test_result_keeps_the_time_of_every_token_and_the_gaps_beside_a_late_request():
    late = request("c", 9, 2, STEP_S * 1.5)
    workload = Workload("late", (request("a", 2, 4), request("b", 2, 4), late))
    clock = FakeClock()
    llm = fake_llm(clock)
    llm.engine.config = FakeConfig(max_num_seqs=3)
    report = run_benchmark(llm, workload, stage="m9_fake", ceilings=CEILINGS, clock=clock)
    rows = {row["request_id"]: row for row in report["requests"]}
    assert rows["a"]["token_steps"] == [[0, 3]] and rows["c"]["token_steps"] == [[2, 3]]
    for row in rows.values():
        times = token_times(report, row)
        assert [times[0], times[-1]] == pytest.approx([row["first_token_s"], row["last_token_s"]])
    # "c" arrives in the second step and gets its first token from the third.
    assert report["late_ttft_s"]["max"] == pytest.approx(1.5 * STEP_S)
    assert report["decoder_itl_beside_late_s"]["max"] == pytest.approx(STEP_S)
    together = Workload("together", workload.requests[:2])
    assert run(together)[0]["late_ttft_s"] is None


def test_columns_of_steps_and_requests_agree():
    report, _, _ = run()
    steps, rows = report["steps"], report["requests"]
    assert len({len(column) for column in steps.values()}) == 1
    blocks = {f.name for f in fields(StepStats) if f.default is None}  # the fake has none
    columns = {"start_s", "duration_s", *(f.name for f in fields(StepStats))}
    assert set(steps) == columns - blocks
    computed = sum(row["num_prompt_tokens"] + row["num_output_tokens"] - 1 for row in rows)
    assert sum(steps["num_scheduled_tokens"]) == computed
    assert sum(steps["num_scheduled_requests"]) == sum(row["num_output_tokens"] for row in rows)
    assert steps["num_scheduled_tokens"] == [5 + 9, 2, 1 + 3, 1, 4]
    assert steps["num_waiting"] == [1, 1, 0, 0, 0]
    ends = [
        start + length for start, length in zip(steps["start_s"], steps["duration_s"], strict=True)
    ]
    assert all(
        end <= after + 1e-6
        for end, after in zip(ends, [*steps["start_s"][1:], ends[-1]], strict=True)
    )
    assert max(row["last_token_s"] for row in rows) == pytest.approx(ends[-1])


def test_decode_steps_are_those_with_one_token_per_request():
    report, _, _ = run()
    assert report["decode_step_s"]["count"] == 2
    assert report["decode_step_s"]["p50"] == pytest.approx(STEP_S)


def test_host_times_are_measured_per_method_and_methods_are_restored():
    report, engine, _ = run()
    expected = {"schedule": SCHEDULE_S, "prepare_inputs": PREPARE_S, "update": UPDATE_S}
    assert report["host_time_s"] == pytest.approx(expected)
    assert report["host_time_at_max_running_s"] == pytest.approx(expected)
    assert not {"schedule", "update"} & set(vars(engine.scheduler))
    assert "prepare_inputs" not in vars(engine.model_runner)


def test_methods_are_restored_when_the_run_fails():
    runner = FakeRunner(FakeEngine(FakeClock()))
    with (
        pytest.raises(KeyError),
        HostTimers({"execute": (runner, "execute")}, FakeClock()),
    ):
        assert "execute" in vars(runner)
        raise KeyError
    assert "execute" not in vars(runner)


def test_gate_runs_the_first_requests_together_for_a_few_tokens():
    report, engine, _ = run(gate_requests=3, gate_tokens=2)
    # A token is the number of tokens before it.
    assert report["gate"]["tokens"] == [[5, 6], [9, 10], [3, 4]]
    assert report["gate"]["top2_gaps"] == [[0.25, 0.25]] * 3
    gate = [(time, r) for time, r in engine.log if r.request_id.startswith("gate-")]
    assert len({time for time, _ in gate}) == 1
    assert all(r.sampling_params.is_greedy and r.sampling_params.logprobs == 2 for _, r in gate)


def test_gate_of_a_cut_workload_answers_the_requests_of_the_whole():
    cut = WORKLOAD.head(1)
    report, _, _ = run(cut, gate_requests=3, gate_tokens=2)
    assert report["workload"]["num_requests"] == 1
    assert report["gate"]["tokens"] == [[5, 6], [9, 10], [3, 4]]
    assert cut.head(1).uncut_requests == WORKLOAD.requests


def test_gate_leaves_out_what_does_not_fit_the_engine():
    whole = Workload("w", (request("r0", 4, 3), request("long", 49, 9), request("r2", 5, 3)))
    report, _, _ = run(whole.head(1), gate_requests=3, gate_tokens=2)
    assert report["gate"]["tokens"] == [[4, 5], [5, 6]]


def test_gate_without_logprobs_is_refused():
    class Silent(FakeEngine):
        def finish_step(self, scheduled, token_ids):
            output = super().finish_step(scheduled, token_ids)
            return StepOutput(tuple(t._replace(logprobs=None) for t in output.tokens), output.stats)

    clock = FakeClock()
    llm = fake_llm(clock)
    llm.engine = Silent(clock)
    with pytest.raises(RuntimeError, match="gate-r0 got no top-2 log-probabilities"):
        run_benchmark(llm, WORKLOAD, stage="x", ceilings=CEILINGS, clock=clock)


def test_warm_up_is_as_wide_and_as_long_as_the_workload_and_is_not_counted():
    report, engine, _ = run(warmup_tokens=2)
    warm = [r for _, r in engine.log if r.request_id.startswith("warmup-")]
    assert [(r.num_prompt_tokens, r.max_tokens) for r in warm] == [(9, 2), (5, 2)]
    assert report["warmup"]["num_requests"] == 2
    assert report["warmup"]["longest_prompt_len"] == 9
    assert report["warmup"]["num_output_tokens"] == 4
    assert report["warmup"]["duration_s"] == pytest.approx(2 * STEP_S)
    assert warm[0].prompt_token_ids == list(WORKLOAD.requests[1].prompt_token_ids)[::-1]
    assert sum(report["steps"]["num_scheduled_requests"]) == 8


class FakeMemory:
    """Of an engine in another process."""

    def __init__(self, peak):
        self.peak, self.num_resets = peak, 0

    def reset(self):
        self.num_resets += 1

    def peak_bytes(self):
        return self.peak


@pytest.mark.parametrize("peak", [123_456, None])
def test_peak_memory_of_an_engine_elsewhere_is_what_it_tells_or_unknown(peak):
    memory = FakeMemory(peak)
    report, _, _ = run(memory=memory)
    parts = report["peak_memory_bytes"]
    assert (parts["total"], parts["weights"], parts["activations"]) == (peak, 4000, None)
    assert memory.num_resets == 1


def test_engine_forgets_the_prefixes_of_warm_up_and_gate_before_the_clock_starts():
    class PrefixEngine(FakeEngine):
        def reset_prefix_cache(self):
            self.log.append((self.clock.time, SimpleNamespace(request_id="reset")))

    clock = FakeClock()
    llm = fake_llm(clock)
    llm.engine = PrefixEngine(clock)
    run_benchmark(llm, WORKLOAD, stage="m9_fake", ceilings=CEILINGS, clock=clock)
    names = [request.request_id for _, request in llm.engine.log]
    assert names[-6:] == ["gate-r3", "reset", "r0", "r1", "r2", "r3"]
    assert names.count("reset") == 1


def test_settings_of_sampling_are_reported():
    assert run()[0]["sampling"] == {"temperature": 0.0, "ignore_eos": True}


def test_memory_utilisation_and_roofline_are_reported():
    report, _, _ = run()
    memory = report["peak_memory_bytes"]
    bytes_per_token = 2 * 2 * 2 * 8 * 4
    assert report["model"]["kv_bytes_per_token"] == bytes_per_token
    assert memory["weights"] == 4000 and memory["kv_reserved"] == 4000
    assert memory["kv_live"] == max(report["steps"]["num_kv_tokens_live"]) * bytes_per_token
    assert memory["total"] > 1e6 and memory["activations"] is None
    live, room = report["steps"]["num_kv_tokens_live"], report["steps"]["num_kv_tokens_reserved"]
    assert report["kv_utilisation"] == pytest.approx(
        sum(a / b for a, b in zip(live, room, strict=True)) / len(live)
    )
    assert report["gpu_utilisation"] is None


def block_stats(free, used, live, running, preempted=0, swapped=0):
    return StepStats(
        num_scheduled_tokens=1,
        num_scheduled_requests=1,
        num_running=running,
        num_waiting=0,
        num_preemptions=preempted,
        num_swapped_tokens=swapped,
        num_kv_tokens_live=live,
        num_kv_tokens_reserved=4 * used,
        num_kv_tokens_capacity=40,
        num_free_blocks=free,
        num_used_blocks=used,
    )


def test_blocks_and_their_waste_are_worked_out_from_the_steps():
    steps = [block_stats(8, 2, 6, 1), block_stats(5, 5, 15, 2, 1, 8), block_stats(10, 0, 0, 0)]
    assert block_section(steps, kv_bytes_per_token=3) == {
        "block_size": 4,
        "num_blocks": 10,
        "max_used_blocks": 5,
        "mean_free_blocks": pytest.approx(23 / 3),
        "waste": pytest.approx((2 / 8 + 5 / 20) / 2),
        "wasted_tokens_per_request": pytest.approx((2 / 1 + 5 / 2) / 2),
        "num_preemptions": 1,
        "swapped_bytes": 24,
    }


def test_stage_without_blocks_reports_none():
    report, _, _ = run()
    assert report["kv_blocks"] is None and report["block_map"] is None
    assert report["prefix_cache"] is None


def test_what_a_prefix_cache_found_is_summed_over_the_steps():
    counts = [(3, 1, 0, 10, 0), (9, 5, 2, 30, 25), (7, 7, 1, 0, 0)]
    names = ("cached_blocks", "idle_blocks", "evicted_blocks", "prompt_tokens_looked_up",
             "prompt_tokens_found")  # fmt: skip
    steps = [
        replace(
            block_stats(8, 2, 6, 1),
            **{f"num_{name}": value for name, value in zip(names, row, strict=True)},
        )
        for row in counts
    ]
    assert prefix_section(steps) == {
        "hit_rate": 25 / 40,
        "num_prompt_tokens_looked_up": 40,
        "num_prompt_tokens_found": 25,
        "num_evicted_blocks": 3,
        "max_cached_blocks": 9,
        "max_idle_blocks": 7,
    }
    nothing_new = prefix_section(steps[2:])
    assert nothing_new is not None and nothing_new["hit_rate"] is None
    assert prefix_section([block_stats(8, 2, 6, 1)]) is None


def test_block_tables_of_an_engine_are_sampled_after_every_step():
    class BlockEngine(FakeEngine):
        def __init__(self, clock):
            super().__init__(clock)
            self.kv_cache_manager = SimpleNamespace(block_tables={})

        def finish_step(self, scheduled, token_ids):
            output = super().finish_step(scheduled, token_ids)
            self.kv_cache_manager.block_tables = {
                r.request_id: [i] for i, r in enumerate(self.running)
            }
            return replace(
                output, stats=replace(output.stats, num_free_blocks=1, num_used_blocks=1)
            )

    clock = FakeClock()
    llm = fake_llm(clock)
    llm.engine = BlockEngine(clock)
    report = run_benchmark(llm, WORKLOAD, stage="x", ceilings=CEILINGS, clock=clock)
    sampled = unpack_block_map(report["block_map"])
    assert sampled.request_ids == ["r0", "r1", "r2", "r3"]
    assert sampled.steps == [0, 1, 2, 3, 4]
    assert sampled.owners.tolist() == [[0, 0, 2, FREE, FREE], [1, FREE, FREE, FREE, FREE]]
    assert report["steps"]["num_free_blocks"] == [1] * 5


def test_heap_is_thawed_after_a_run_that_fails():
    with pytest.raises(ValueError, match="broken"), frozen_heap():
        assert gc.get_freeze_count() > 0
        raise ValueError("broken")
    assert gc.get_freeze_count() == 0


def test_roofline_of_one_prompt_is_worked_out_by_hand():
    report, _, _ = run(Workload("one", (request("r0", 4, 1),)))
    weight_bytes = 4000 - 300 * 4  # an untied embedding table is only looked up
    num_bytes = weight_bytes + 4 * 256
    flops = 2 * (400 * 4 + 300) + 4 * 2 * 4 * 8 * (1 + 2 + 3 + 4)
    assert flops > num_bytes  # both ceilings are 1e6 here
    assert report["roofline_fraction"] == pytest.approx(flops / 1e6 / STEP_S)


def test_report_is_json_and_names_everything():
    report, _, _ = run(model_name="toy", load_format="dummy", seed=3)
    assert json.loads(json.dumps(report)) == report
    assert report["schema"] == 1 and report["stage"] == "m9_fake" and report["seed"] == 3
    assert report["workload"]["sha256"] == WORKLOAD.sha256
    assert report["workload"]["num_input_tokens"] == 21
    assert report["workload"]["spec"] == "mixed:4"
    assert report["model"]["name"] == "toy" and report["model"]["dtype"] == "float32"
    assert report["engine_config"] == {
        "max_num_seqs": 2,
        "max_model_len": 50,
        "policy": "fcfs",
        "sizes": [1, 2],
    }
    assert report["ceilings"]["copy_bytes_per_s"] == 1e6
    assert report["environment"]["torch"] == torch.__version__
    assert report["device"].startswith("cpu")


def test_equal_outputs_have_equal_hashes_and_others_do_not():
    same = Workload("same", (request("a", 3, 2), request("b", 3, 2), request("c", 4, 2)))
    digests = [row["output_sha256"] for row in run(same)[0]["requests"]]
    assert digests[0] == digests[1] != digests[2]


def test_request_that_does_not_fit_is_named_before_anything_runs():
    workload = Workload("big", (request("r0", 5, 3), request("whale", 45, 9)))
    clock = FakeClock()
    with pytest.raises(ValueError, match=r"refuses request whale \(45 prompt tokens, 9 output"):
        run(workload, clock)
    assert clock.time == 100.0


@pytest.mark.parametrize("option", ["gate_requests", "gate_tokens", "warmup_tokens"])
def test_counts_below_one_are_refused(option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        run(**{option: 0})


def test_engine_that_schedules_nothing_for_ever_is_reported():
    class Stuck(FakeEngine):
        def start_requests(self):
            return []

    clock = FakeClock()
    llm = fake_llm(clock)
    llm.engine = Stuck(clock)
    with pytest.raises(RuntimeError, match="scheduled nothing for 1000 steps"):
        run_benchmark(llm, WORKLOAD, stage="x", ceilings=CEILINGS, clock=clock)


def stats(num_tokens, num_requests=1, live=0, reserved=0):
    return StepStats(
        num_scheduled_tokens=num_tokens,
        num_scheduled_requests=num_requests,
        num_running=1,
        num_waiting=0,
        num_preemptions=0,
        num_kv_tokens_live=live,
        num_kv_tokens_reserved=reserved,
        num_kv_tokens_capacity=reserved,
    )


def record_of(source, step_stats, finish_reason=FinishReason.LENGTH, num_tokens=None):
    num_tokens = source.output_len if num_tokens is None else num_tokens
    steps = list(range(len(step_stats)))[-num_tokens:]
    entry = RequestRecord(
        source,
        source.prompt_token_ids,
        source.arrival_s,
        list(range(num_tokens)),
        steps,
        finish_reason,
    )
    times = [float(step) for step in range(len(step_stats) + 1)]
    return RunRecord({source.request_id: entry}, times[:-1], times[1:], list(step_stats))


def test_work_of_a_step_follows_from_who_got_a_token_in_it():
    works = step_works(record_of(request("a", 4, 3), [stats(4), stats(1), stats(1)]))
    assert works == [
        StepWork(num_tokens=4, num_logits_rows=1, num_cached_tokens_read=0, num_attention_pairs=10),
        StepWork(num_tokens=1, num_logits_rows=1, num_cached_tokens_read=4, num_attention_pairs=5),
        StepWork(num_tokens=1, num_logits_rows=1, num_cached_tokens_read=5, num_attention_pairs=6),
    ]


def test_prompt_computed_in_part_counts_only_that_share_of_its_attention():
    works = step_works(record_of(request("a", 4, 1), [stats(2), stats(2)]))
    assert [work.num_attention_pairs for work in works] == [0, 5]
    assert [work.num_logits_rows for work in works] == [0, 1]


def check(record, source):
    check_record(record, Workload("w", (source,)))


def test_record_of_a_good_run_passes():
    check(
        record_of(request("a", 4, 2), [stats(4, live=4, reserved=9), stats(1)]), request("a", 4, 2)
    )


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            record_of(request("a", 4, 2), [stats(4)], num_tokens=1),
            "request a ended with 1 tokens and finish reason 'length'; expected 2",
        ),
        (
            record_of(request("a", 4, 2), [stats(4), stats(1)], finish_reason=FinishReason.STOP),
            "finish reason 'stop'",
        ),
        (
            record_of(request("a", 4, 2), [stats(4), stats(0, 0)]),
            "step 1 gave 1 tokens but says that it scheduled 0 requests",
        ),
        (
            record_of(request("a", 4, 2), [stats(4, 5), stats(1)]),
            "scheduled 5 requests and 4 tokens",
        ),
        (
            record_of(request("a", 4, 2), [stats(4, live=4, reserved=3), stats(1)]),
            "4 KV tokens live in room for 3",
        ),
    ],
)
def test_record_that_contradicts_the_workload_is_refused(record, message):
    with pytest.raises(RuntimeError, match=message):
        check(record, request("a", 4, 2))


def test_request_that_ran_before_it_arrived_is_refused():
    source = request("a", 4, 1, arrival_s=0.5)
    with pytest.raises(RuntimeError, match="ran before it arrived"):
        check(record_of(source, [stats(4)]), source)


def test_peak_memory_falls_after_a_reset_and_rises_with_use():
    device = torch.device("cpu")
    block = torch.ones(64 << 20, dtype=torch.uint8)
    del block
    reset_peak_memory(device)
    before = peak_memory_bytes(device)
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert peak_memory_bytes(device) >= before + (60 << 20)
    del block


def test_gpu_utilisation_is_unknown_on_a_cpu():
    with GpuUtilisation(torch.device("cpu")) as gpu:
        pass
    assert gpu.mean is None


class FakeNvml:
    class NVMLError(Exception):
        pass

    def __init__(self, readings):
        self.readings = list(readings)
        self.drained = threading.Event()

    def nvmlDeviceGetUtilizationRates(self, handle):
        if not self.readings:
            self.drained.set()
            raise self.NVMLError
        return SimpleNamespace(gpu=self.readings.pop(0))


def test_gpu_utilisation_is_the_mean_of_the_samples(monkeypatch):
    nvml = FakeNvml([50, 100])
    monkeypatch.setattr(bench_probes, "_NVML_INTERVAL_S", 0.001)
    monkeypatch.setattr(bench_probes, "_nvml_handle", lambda device: (nvml, "handle"))
    with GpuUtilisation(torch.device("cuda")) as gpu:
        assert nvml.drained.wait(timeout=5)
    assert gpu.mean == 0.75


def test_system_clock_moves_forward_by_at_least_what_it_slept():
    clock = SystemClock()
    start = clock.now()
    clock.sleep(0.002)
    assert clock.now() - start >= 0.002
