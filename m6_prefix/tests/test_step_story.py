"""What is said of steps with chunks, cached prefixes and preemptions: exact sentences."""

import pytest

from folovllm.entrypoints.live.engine_view import CACHED, FIRST_REQUEST, FREE, SHARED, view_engine
from folovllm.testing.scheduler_contract import make_request
from folovllm.testing.watched_steps import tell_next_step
from m6_prefix.tests.test_scheduler_contract import TestSchedulerContract as Contract


def make_driver(num_blocks=16, **options):
    """Blocks of 4 tokens."""
    defaults = {"max_model_len": 32, "block_size": 4, "max_num_seqs": 4}
    config = Contract().make_config(**{**defaults, "max_num_batched_tokens": 8, **options})
    return Contract().make_driver(config, num_cache_tokens=4 * num_blocks)


def memory_of(driver):
    memory = view_engine(driver.scheduler).memory
    assert memory is not None
    return memory


def test_budget_is_why_a_prompt_comes_in_chunks_and_another_waits():
    driver = make_driver()
    driver.add(make_request("a", 3))
    tell_next_step(driver, 40)
    driver.add(make_request("b", 12))
    driver.add(make_request("c", 12))
    assert tell_next_step(driver, 40) == [
        "Step 41: request a decodes one token; request b gets 7 prompt tokens of its 12 because "
        "8 tokens is the budget of all together; request c waits: the budget of 8 tokens is given "
        "out.",
        "1 token comes out.",
    ]
    assert tell_next_step(driver, 41)[0] == (
        "Step 42: request a decodes one token; request b gets the last 5 of its 12 prompt tokens; "
        "request c gets 2 prompt tokens of its 12 because 8 tokens is the budget of all together."
    )


def test_largest_chunk_is_another_reason():
    driver = make_driver(max_chunk_tokens=5)
    driver.add(make_request("a", 12))
    assert tell_next_step(driver, 0) == [
        "Step 1: request a gets 5 prompt tokens of its 12 because chunks are at most 5 tokens.",
        "No token comes out.",
    ]


def test_found_prefixes_and_kept_blocks():
    driver = make_driver()
    driver.add(make_request("a", 8, max_tokens=1))
    assert tell_next_step(driver, 0)[1] == (
        "1 token comes out; request a ends (max_tokens); 2 blocks can be given out again, 2 of "
        "them kept for later prompts until then."
    )
    memory = memory_of(driver)
    assert memory.cells == [CACHED] * 2 + [FREE] * 14
    assert memory.num_cached == 2 and memory.num_free == 16
    again = make_request("a", 8)
    again.request_id = "b"
    driver.add(again)
    assert tell_next_step(driver, 1)[0] == (
        "Step 2: request b gets the last one of its 8 prompt tokens (the first 7 were found in the "
        "prefix cache)."
    )


def test_blocks_run_out_for_newcomers_and_for_those_who_run():
    driver = make_driver(num_blocks=8, max_num_batched_tokens=16)
    driver.add(make_request("a", 7, max_tokens=20))
    driver.add(make_request("b", 4, max_tokens=20))
    driver.add(make_request("c", 20))
    tell_next_step(driver, 0)
    assert tell_next_step(driver, 1)[0] == (
        "Step 2: requests a and b decode one token each; request c waits: 5 blocks needed and 2 to "
        "stay free so that those who run can grow, 4 free."
    )
    told = [tell_next_step(driver, number)[0] for number in range(2, 16)]
    (preemption,) = [text for text in told if "gives way" in text]
    assert preemption == (
        "Step 11: request b gives way (request a needs 1 block, 0 free): its 4 blocks are given "
        "back; request a decodes one token; 1 more waits behind."
    )


@pytest.mark.parametrize("num_holders", [1, 3])
def test_shared_blocks_are_told_from_those_of_one(num_holders):
    driver = make_driver(max_num_batched_tokens=16)
    for name in range(num_holders):
        request = make_request("a", 9)
        request.request_id = f"a{name}"
        driver.add(request)
        tell_next_step(driver, name)
    memory = memory_of(driver)
    own = [FIRST_REQUEST + index for index in range(num_holders)]
    if num_holders == 1:
        assert memory.cells[:3] == [FIRST_REQUEST] * 3 and memory.holders == {}
    else:
        assert memory.cells[:2] == [SHARED] * 2
        assert memory.holders == {0: [0, 1, 2], 1: [0, 1, 2]}
        assert sorted(cell for cell in memory.cells if cell >= FIRST_REQUEST) == own
    assert memory.kept == [0, 1]
