"""What is said of steps where prompts are padded and requests have slots: exact sentences."""

from folovllm.testing.scheduler_contract import make_request
from folovllm.testing.watched_steps import tell_next_step
from m2_batching.tests.test_scheduler_contract import TestSchedulerContract as Contract


def make_driver(num_slots, **options):
    config = Contract().make_config(max_model_len=16, **options)
    return Contract().make_driver(config, num_cache_tokens=16 * num_slots)


def test_slots_and_places_run_out():
    driver = make_driver(1)
    for name in "abc":
        driver.add(make_request(name, 3, max_tokens=2))
    assert tell_next_step(driver, 0) == [
        "Step 1: request a gets all of its 3 prompt tokens; request b waits: every slot of the KV "
        "cache is taken; 1 more waits behind.",
        "1 token comes out.",
    ]
    assert tell_next_step(driver, 1)[1] == "1 token comes out; request a ends (max_tokens)."
    driver = make_driver(2, max_num_seqs=1)
    driver.add(make_request("a", 3))
    driver.add(make_request("b", 1))
    assert "request b waits: 1 may run at once, and so many do." in tell_next_step(driver, 0)[0]


def test_padding_uses_the_budget_up_and_decodes_wait_for_prompts():
    driver = make_driver(4, max_num_batched_tokens=20, max_num_seqs=4)
    driver.add(make_request("a", 2))
    tell_next_step(driver, 0)
    driver.add(make_request("b", 12))
    driver.add(make_request("c", 2))
    driver.add(make_request("d", 9))
    assert tell_next_step(driver, 1)[0] == (
        "Step 2: request b gets all of its 12 prompt tokens; request a waits a step, because "
        "prompts start and decodes go without them here; request c waits: padded to the longest "
        "prompt, one more is too much for the budget of 20 tokens; 1 more waits behind."
    )
    assert tell_next_step(driver, 2)[0] == (
        "Step 3: request c gets all of its 2 prompt tokens; request d gets all of its 9 prompt "
        "tokens; requests a and b wait a step, because prompts start and decodes go without them "
        "here."
    )
