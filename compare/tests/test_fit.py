from pathlib import Path

import pytest

from compare.gate import check_gate
from compare.kv_need import kv_tokens_needed, memory_needed_bytes, waited_for_memory
from compare.ledger import FILE_NAME, fit_tokens, measured, read_ledger, record
from compare.results import read_json
from compare.session import EXIT_USAGE, main
from compare.tests.synthetic import make_run, with_blocks

STEPS = {
    "num_running": [1, 3, 3, 2],
    "num_waiting": [2, 0, 0, 0],
    "num_preemptions": [0, 0, 0, 0],
    "num_kv_tokens_reserved": [64, 208, 224, 160],
    "num_kv_tokens_capacity": [4096] * 4,
}


def run_with(steps=STEPS, stage="m3_paged", **changes):
    run = with_blocks(make_run(stage, on_cuda=True), 256)
    run["steps"] = {**run["steps"], **steps}
    return {**run, **changes}


def test_need_is_what_requests_reserved_at_once():
    assert kv_tokens_needed(run_with()) == 208 + 2 * 16  # not 224: two others could have grown
    late = {**STEPS, "num_kv_tokens_reserved": [64, 208, 256, 160]}
    assert kv_tokens_needed(run_with(late)) == 256
    slots = make_run("m2_batching")
    slots["steps"] = {**slots["steps"], **STEPS}
    assert kv_tokens_needed(slots) == 224


def test_a_peer_that_counts_all_of_its_pool_as_reserved_does_not_tell_its_need():
    whole = {**STEPS, "num_kv_tokens_reserved": [4096] * 4}
    assert kv_tokens_needed(run_with(whole, "vllm")) is None
    assert memory_needed_bytes(run_with(whole, "vllm")) is None
    assert kv_tokens_needed(run_with(whole)) == 4096 + 2 * 16


def test_memory_is_weights_and_need_and_activations_and_on_a_cpu_the_process():
    run = run_with()
    parts = run["peak_memory_bytes"]
    expected = parts["weights"] + 240 * 46080 + parts["activations"]
    assert memory_needed_bytes(run) == expected
    on_cpu = make_run()
    assert memory_needed_bytes(on_cpu) == on_cpu["peak_memory_bytes"]["total"]


def test_runs_in_which_somebody_waited_for_memory_show_no_need(tmp_path):
    preempted = run_with({**STEPS, "num_preemptions": [0, 0, 1, 0]})
    short = run_with({**STEPS, "num_kv_tokens_capacity": [1024] * 4})
    assert not waited_for_memory(run_with())  # the first step's budget was spent, memory was not
    for run in (preempted, short):
        assert waited_for_memory(run)
        record(tmp_path, measured("nano", [run_with(), run]))
        with pytest.raises(ValueError, match="measure that first, with plenty"):
            fit_tokens(tmp_path, "m3_paged", ["nano"], 2048)


def test_fit_is_that_of_the_largest_workload_and_holds_a_request_of_full_length(tmp_path):
    for folder, spec, needed in (("one", "nano:1", 4000), ("two", "nano:2", 5000)):
        steps = {**STEPS, "num_kv_tokens_reserved": [needed] * 4}
        run = run_with({**steps, "num_kv_tokens_capacity": [9000] * 4})
        run["workload"]["spec"] = spec
        record(tmp_path, measured(folder, [run]))
    assert fit_tokens(tmp_path, "m3_paged", ["nano:1", "nano:2"], 2048) == 5032
    record(tmp_path, measured("small", [run_with()]))
    assert fit_tokens(tmp_path, "m3_paged", ["nano"], 2048) == 2048
    with pytest.raises(ValueError, match="--max-model-len 64"):
        fit_tokens(tmp_path, "m3_paged", ["nano"], 64)


def test_rows_with_what_fits_are_compared_with_each_other_and_with_no_others():
    first, second = make_run(), make_run("m2_batching")
    first["engine_config"]["kv_cache_bytes"] = 1000
    second["engine_config"]["kv_cache_bytes"] = 2000
    assert not check_gate({"m1_baseline": [first], "m2_batching": [second]}).passed
    first["kv_cache_is_fitted"] = True
    assert not check_gate({"m1_baseline": [first], "m2_batching": [second]}).passed
    second["kv_cache_is_fitted"] = True
    assert check_gate({"m1_baseline": [first], "m2_batching": [second]}).passed


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    """Two stages measured with plenty and then with what fits, on a toy model."""
    pytest.importorskip("torch")
    from folovllm.testing.toy_models import toy_families, write_toy_model

    root = tmp_path_factory.mktemp("fit")
    model = write_toy_model(toy_families()[0], root / "toy")
    options = ["--model", str(model), "--dtype", "float32", "--device", "cpu", "--runs", "1",
               "--commit", "abc", "--to", str(root / "out"), "--max-model-len", "64"]  # fmt: skip
    spec = "poisson:rate=100000,num=6,input=8-24,output=4-30"
    for name, memory in (("plenty", "64MiB"), ("fit", "fit")):
        for engine in ("m2_batching", "m4_flash"):
            command = ["measure", engine, "--run", f"{name}={spec}", "--kv-cache-bytes", memory]
            assert main([*command, *options]) == 0
    return root / "out"


@pytest.mark.parametrize("engine", ["m2_batching", "m4_flash"])
def test_with_what_fits_as_many_requests_run_at_once_as_with_plenty(sessions, engine):
    plenty, fit = (read_json(sessions / name / f"{engine}.json") for name in ("plenty", "fit"))
    assert fit["kv_cache_is_fitted"] and "kv_cache_is_fitted" not in plenty
    assert max(fit["steps"]["num_running"]) == max(plenty["steps"]["num_running"]) == 6
    assert not any(fit["steps"]["num_preemptions"])
    assert kv_tokens_needed(fit) == kv_tokens_needed(plenty)
    given, before = (run["peak_memory_bytes"]["kv_reserved"] for run in (fit, plenty))
    assert given < before
    assert given == kv_tokens_needed(plenty) * plenty["model"]["kv_bytes_per_token"]


def test_slots_take_more_than_blocks_and_the_list_says_what_was_measured(sessions):
    needs = [kv_tokens_needed(read_json(sessions / f"fit/{engine}.json"))
             for engine in ("m2_batching", "m4_flash")]  # fmt: skip
    assert needs[0] == 6 * 64 and needs[1] is not None and needs[1] < 6 * 64
    entries = {(entry.engine, entry.folder): entry for entry in read_ledger(sessions)}
    assert len(entries) == 4 and entries["m2_batching", "plenty"].fit_kv_tokens == 6 * 64
    origin = entries["m4_flash", "fit"].origin
    assert origin is not None and origin.commit == "abc"


def test_what_fits_is_not_known_before_it_was_measured(sessions, tmp_path, capsys):
    command = ["measure", "m2_batching", "--to", str(tmp_path), "--run", "fit=nano:2"]
    assert main([*command, "--kv-cache-bytes=fit"]) == EXIT_USAGE
    assert f"{Path(tmp_path) / FILE_NAME} lists none" in capsys.readouterr().err
