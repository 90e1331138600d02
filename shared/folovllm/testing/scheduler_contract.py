"""What every stage's scheduler and KV cache manager must do, as tests that a stage inherits.

    class TestSchedulerContract(SchedulerContract):
        stage = "m3_paged"

Nothing here needs torch: a symbolic cache plays the model.
"""

import contextlib
import importlib
import itertools
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from ..request import FinishReason, Request, SamplingParams
from .invariants import check_bookkeeping
from .line_interrupts import LineInterrupt
from .scheduler_driver import MAX_STEPS, SchedulerDriver
from .scheduler_fuzz import SchedulerFuzz
from .symbolic_cache import VOCAB_SIZE, SymbolicCache, tokens_alone
from .watched_steps import watched_steps


def make_request(name: str, prompt_len: int, max_tokens: int = 4, **fields: Any) -> Request:
    """A request whose prompt is its own: it begins with a token made of its name."""
    prompt = [sum(map(ord, name)) % VOCAB_SIZE] + [1] * (prompt_len - 1)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return Request(
        request_id=name, prompt_token_ids=prompt, sampling_params=params, seed=1, **fields
    )


LINE_STRIDE = 7
"""Interrupts are tried at every seventh line: all of them take minutes (set it to 1 for that)."""


class SchedulerContract:
    """Inherit and set `stage`; a stage with other options or another cache says so."""

    stage: ClassVar[str]
    fuzz: ClassVar[type[SchedulerFuzz]] = SchedulerFuzz

    def module(self, name: str) -> Any:
        return importlib.import_module(f"{self.stage}.{name}")

    def make_config(self, **options: Any) -> Any:
        return self.module("config").EngineConfig(**options)

    def draw_options(self, rng: random.Random) -> dict[str, Any]:
        """EngineConfig values for one run of the fuzz."""
        return {"max_model_len": rng.choice([6, 16, 40])}

    def draw_num_cache_tokens(self, config: Any, rng: random.Random) -> int:
        """A cache that holds one request of full length, and little more."""
        return config.max_model_len

    def locate(self, config: Any, scheduled: Any, position: int) -> tuple[int, int]:
        """(Block or slot, place in it) of a scheduled request's token."""
        return 0, position

    def count_tokens(self, scheduled: Any) -> int:
        """What these requests take of the token budget."""
        return sum(s.num_scheduled_tokens for s in scheduled)

    def make_driver(self, config: Any, num_cache_tokens: int) -> SchedulerDriver:
        manager = self.module("kv_cache_manager").KVCacheManager(config, num_cache_tokens)
        cache = SymbolicCache(
            lambda scheduled, position: self.locate(config, scheduled, position),
            getattr(config, "block_size", config.max_model_len),
        )
        scheduler = self.module("scheduler").Scheduler(config, manager)
        return SchedulerDriver(scheduler, cache, self.count_tokens)

    @pytest.mark.no_cover
    @pytest.mark.parametrize("seed", range(10))
    def test_everybody_reads_its_own_prefix_whatever_happens(self, seed: int) -> None:
        for run in range(20):
            self.run_fuzz(1000 * seed + run)

    def run_fuzz(self, seed: int) -> None:
        """One run, with everything drawn from this seed."""
        rng = random.Random(seed)
        config = self.make_config(**self.draw_options(rng))
        driver = self.make_driver(config, self.draw_num_cache_tokens(config, rng))
        self.fuzz(rng, driver, config.max_model_len, self.files()).run()

    @pytest.mark.no_cover
    def test_watcher_knows_why_whoever_waits_and_what_everybody_holds(self) -> None:
        for seed in range(25):
            rng = random.Random(seed)
            config = self.make_config(**self.draw_options(rng))
            driver = self.make_driver(config, self.draw_num_cache_tokens(config, rng))
            fuzz = self.fuzz(rng, driver, config.max_model_len, self.files())
            fuzz.num_interrupts = 0
            with watched_steps(driver):
                fuzz.run()

    def make_plain_driver(self) -> SchedulerDriver:
        """One whose requests do not get in each other's way, as far as the stage can."""
        return self.make_driver(self.make_config(max_model_len=64), num_cache_tokens=64 * 4)

    def test_request_aborted_while_its_step_runs_gets_no_token(self) -> None:
        driver = self.make_plain_driver()
        request = make_request("a", 3)
        (stop_token_id, *_) = tokens_alone(request)
        request.stop_token_ids = frozenset({stop_token_id})  # must not turn the abort into a stop
        driver.add(request)
        driver.add(make_request("b", 3))
        driver.step(while_it_runs=lambda: driver.abort(request))
        assert request.output_token_ids == []
        assert request.finish_reason is FinishReason.ABORT
        while driver.scheduler.has_unfinished_requests():
            driver.step()
        driver.check_end()

    def test_id_of_a_request_aborted_while_its_step_runs_is_free_at_once(self) -> None:
        driver = self.make_plain_driver()
        first, heir = make_request("a", 3), make_request("a", 2)
        driver.add(first)

        def replace() -> None:
            driver.abort(first)
            driver.add(heir)

        driver.step(while_it_runs=replace)
        assert first.output_token_ids == heir.output_token_ids == []
        while driver.scheduler.has_unfinished_requests():
            driver.step()
        driver.check_end()

    def test_id_in_use_is_refused(self) -> None:
        scheduler = self.make_plain_driver().scheduler
        scheduler.add_request(make_request("a", 3))
        with pytest.raises(ValueError, match="'a' is in use"):
            scheduler.add_request(make_request("a", 3))

    @pytest.mark.no_cover
    def test_aborting_all_waiting_requests_takes_time_in_proportion(self) -> None:
        def seconds_to_abort(num_requests: int) -> float:
            scheduler = self.make_plain_driver().scheduler
            names = [f"r{number}" for number in range(num_requests)]
            for name in names:
                scheduler.add_request(make_request(name, 3))
            scheduler.schedule()
            start = time.process_time()
            for name in names:
                scheduler.abort_request(name)
            assert not scheduler.waiting
            return time.process_time() - start

        # Of this process alone: what else the machine does is not the scheduler's.
        few, many = (min(seconds_to_abort(n) for _ in range(3)) for n in (250, 5_000))
        # 20 times as long if each abort is O(1), 400 times if it looks at all that wait.
        assert many < 120 * few

    def test_bookkeeping_runs_where_torch_is_not_installed(self) -> None:
        code = (
            "import sys, importlib; sys.modules['torch'] = None\n"
            f"tests = importlib.import_module('{self.stage}.tests.test_scheduler_contract')\n"
            "tests.TestSchedulerContract().test_everybody_reads_its_own_prefix_whatever_happens(0)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    def files(self) -> list[str]:
        """Those in which an interrupt is tried at every line."""
        names = ["scheduler", "kv_cache_manager"]
        modules = [self.module(name) for name in names]
        if hasattr(modules[1], "BlockPool"):
            modules.append(self.module("block_pool"))
        if hasattr(modules[1], "PrefixCache"):
            modules.append(self.module("prefix_cache"))
        modules.append(importlib.import_module("folovllm.request_queue"))
        return [str(module.__file__) for module in modules]

    def scenarios(self) -> dict[str, dict[str, Any]]:
        """Name -> EngineConfig values and `num_cache_tokens` for the test of interrupts."""
        return {"plain": {"max_model_len": 16, "num_cache_tokens": 32}}

    @pytest.mark.no_cover
    def test_interrupt_at_any_line_of_a_step_leaves_no_trace(self) -> None:
        for options in self.scenarios().values():
            num_cache_tokens = options.pop("num_cache_tokens")
            config = self.make_config(**options)
            for line_number in itertools.count(1, LINE_STRIDE):
                driver = self.make_driver(config, num_cache_tokens)
                interrupt = LineInterrupt(self.files(), line_number)
                self._run_scenario(driver, interrupt)
                if not interrupt.has_fired:
                    break

    @pytest.mark.no_cover
    def test_interrupt_at_any_line_of_an_abort_or_an_arrival_loses_nobody(self) -> None:
        for driver, interrupt in self._interrupted_drivers():
            with contextlib.suppress(KeyboardInterrupt), interrupt:
                for name in "ae":  # one runs, one waits
                    driver.scheduler.abort_request(name)
                driver.scheduler.add_request(make_request("f", 3))
            self._finish_all(driver)

    @pytest.mark.no_cover
    def test_interrupt_at_any_line_of_starting_over_loses_nobody(self) -> None:
        for driver, interrupt in self._interrupted_drivers():
            driver.break_off(interrupt)
            if interrupt.num_lines > 1 or not interrupt.has_fired:
                self._finish_all(driver)

    def _interrupted_drivers(self) -> Iterator[tuple[SchedulerDriver, LineInterrupt]]:
        """Schedulers of five requests after a step, until an interrupt's line was not reached."""
        for options in self.scenarios().values():
            num_cache_tokens = options.pop("num_cache_tokens")
            config = self.make_config(**options)
            for line_number in itertools.count(1, LINE_STRIDE):
                driver = self.make_driver(config, num_cache_tokens)
                for name in "abcde":
                    driver.add(make_request(name, 3))
                driver.step()
                interrupt = LineInterrupt(self.files(), line_number)
                yield driver, interrupt
                if not interrupt.has_fired:
                    break

    def _finish_all(self, driver: SchedulerDriver) -> None:
        """Who is aborted gets no more, everybody else what it gets alone, and nothing is left."""
        scheduler = driver.scheduler
        requests = {*driver.requests, *scheduler.requests.values()}
        aborted = {r: r.num_output_tokens for r in requests if r.finish_reason is not None}
        for _ in range(MAX_STEPS):
            driver.step_unchecked()
            if not scheduler.has_unfinished_requests():
                break
        check_bookkeeping(scheduler, driver.progress)
        assert not scheduler.has_unfinished_requests()
        assert scheduler.kv_cache_manager.num_reserved_tokens == 0
        for request in requests:
            num_tokens = aborted.get(request)  # None: all of them
            assert request.output_token_ids == tokens_alone(request)[:num_tokens]

    def _run_scenario(self, driver: SchedulerDriver, interrupt: LineInterrupt) -> None:
        """Start, decode, fork, preempt, finish; one step of it is interrupted."""
        parent = make_request("a", 6, max_tokens=4)
        driver.add(parent)
        driver.add(make_request("a2", 1, max_tokens=1))
        fork = Request(
            request_id="fork",
            prompt_token_ids=parent.prompt_token_ids,
            sampling_params=parent.sampling_params,
            seed=2,
            fork_of=parent,
        )
        driver.add(fork)
        driver.add(make_request("c", 4, max_tokens=5))
        for _ in range(MAX_STEPS):
            if not driver.scheduler.has_unfinished_requests():
                return driver.check_end()
            driver.step(interrupt)
        raise AssertionError("the scheduler hangs")
