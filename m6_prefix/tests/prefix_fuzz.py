"""Runs of scheduler and prefix cache in which prompts begin alike all the time.

    python -m m6_prefix.tests.prefix_fuzz 10000

makes as many runs as that, half of them with a step launched ahead.
"""

import sys

from folovllm.request import Request, SamplingParams
from folovllm.testing.scheduler_fuzz import SchedulerFuzz


class PrefixFuzz(SchedulerFuzz):
    """Prompts go on where earlier requests are, or were, or part from them at any token."""

    def run(self) -> None:
        self.salts = self.rng.choice([[None], [None, "a", "b"]])
        self.reset_rate = self.rng.choice([0.0, 0.0, 0.05])
        super().run()
        self._check_everything_can_be_evicted()

    def _draw_request(self) -> Request:
        if self.rng.random() < 0.3:
            request = super()._draw_request()  # any tokens, or a fork
            request.cache_salt = request.fork_of.cache_salt if request.fork_of else None
            return request
        rng, earlier = self.rng, self.driver.requests
        prompt: list[int] = []
        if earlier and rng.random() < 0.8:
            prompt = list(rng.choice(earlier).token_ids)
            if rng.random() < 0.6:
                prompt = prompt[: rng.randint(0, len(prompt))]
        room = self.max_model_len - 1 - len(prompt)
        num_new = rng.choice([0, 1, rng.randint(0, max(room, 0))])
        prompt = (prompt + [rng.randrange(2) for _ in range(num_new)])[: self.max_model_len - 1]
        prompt = prompt or [0]
        max_tokens = rng.randint(1, min(self.max_model_len - len(prompt), 25))
        return Request(
            request_id=f"r{len(earlier)}",
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(max_tokens=max_tokens),
            eos_token_ids=frozenset(rng.sample(range(50), rng.choice([0, 3]))),
            # One seed for most: the same prompt then gets the same answer.
            seed=rng.choice([0, 0, 1]),
            priority=rng.randrange(3),
            cache_salt=rng.choice(self.salts),
        )

    def _abort_somebody(self) -> None:
        super()._abort_somebody()
        if self.rng.random() < self.reset_rate:
            self.driver.scheduler.kv_cache_manager.reset_prefix_cache()

    def _check_everything_can_be_evicted(self) -> None:
        manager = self.driver.scheduler.kv_cache_manager
        pool, cache = manager.pool, manager.prefix_cache
        assert sorted(pool.allocate() for _ in range(pool.num_blocks)) == [*range(pool.num_blocks)]
        assert not cache.nodes and not cache.idle and not cache.root.children
        assert not manager.num_cached_blocks


def _main() -> None:
    from m6_prefix.tests import test_scheduler_contract as tests

    num_runs = int(sys.argv[1])
    for seed in range(num_runs):
        ahead = seed % 2
        contract = (
            tests.TestSchedulerContractOneStepAhead() if ahead else tests.TestSchedulerContract()
        )
        try:
            contract.run_fuzz(1_000_000 + seed)
        except BaseException:
            print(f"seed {1_000_000 + seed} with {ahead} steps ahead fails", file=sys.stderr)
            raise
    print(f"{num_runs} runs: nobody reads what is not its own")


if __name__ == "__main__":
    _main()
