"""M1's bookkeeping keeps the contract of every scheduler."""

from folovllm.testing.scheduler_contract import SchedulerContract


class TestSchedulerContract(SchedulerContract):
    stage = "m1_baseline"
