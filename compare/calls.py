"""Which job comes next in a call of so many seconds; a plan is the same, with estimates for clocks.

A job is taken whole if it fits into what is left of the call. Only one that is longer than a whole
call is taken in parts, since every part starts the engine again.
"""

from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass, replace

from .estimate import StoredDurations, job_seconds, run_seconds, start_seconds
from .ledger import Measured, Place
from .stages import is_ladder_stage
from .whole_table import Job, Table


@dataclass(frozen=True)
class Caller:
    """Gives out the jobs of a table."""

    table: Table
    stored: StoredDurations
    limit_s: float
    """Of one call."""

    def next_job(self, jobs: Sequence[Job], left_s: float, done: Collection[Place]) -> Job | None:
        """The first job that can begin and ends in time; of a very long one the first workloads.

        done: what is measured.
        """
        for job in jobs:
            if not self.can_begin(job, done):
                continue
            seconds = job_seconds(job, self.stored)
            if seconds <= left_s:
                return job
            if seconds > self.limit_s and (part := self.fitting_part(job, left_s)) is not None:
                return part
        return None

    def can_begin(self, job: Job, done: Collection[Place]) -> bool:
        """Whether it is known how much KV cache fits, where that is what the engine gets."""
        source = job.setting.fit_to
        gets_what_fits = source is not None and job.engine not in self.table.without_pool
        if not (gets_what_fits and is_ladder_stage(job.engine)):
            return True
        return (job.engine, source) in done

    def fitting_part(self, job: Job, left_s: float) -> Job | None:
        """The first workloads that end in time; None if not one does."""
        seconds = start_seconds(job)
        fitting = {}
        for folder, spec in job.workloads.items():
            seconds += run_seconds(job, folder, self.stored)
            if seconds > left_s:
                break
            fitting[folder] = spec
        return replace(job, workloads=fitting) if fitting else None

    def plan(self, jobs: Sequence[Job], done: Collection[Place]) -> list[list[Job]]:
        """Jobs by call; ValueError if one workload alone is longer than a call."""
        left, finished = list(jobs), set(done)
        calls: list[list[Job]] = []
        while left:
            call: list[Job] = []
            left_s = self.limit_s
            while (job := self.next_job(left, left_s, finished)) is not None:
                call.append(job)
                left_s -= job_seconds(job, self.stored)
                finished |= places_of(job)
                left = without(left, job)
            if not call:
                raise ValueError(
                    f"nothing of {left[0].engine}, {left[0].setting.name}, ends within "
                    f"{self.limit_s:.0f} s, or it waits for a run of {left[0].setting.fit_to} "
                    f"that is not asked for; raise --limit, or ask for that folder too"
                )
            calls.append(call)
        return calls


def without(jobs: Sequence[Job], taken: Job) -> list[Job]:
    """The jobs less the workloads of one that was taken, whole or in part."""
    left = []
    for job in jobs:
        workloads = job.workloads
        if (job.engine, job.setting, job.runs) == (taken.engine, taken.setting, taken.runs):
            workloads = {name: s for name, s in workloads.items() if name not in taken.workloads}
        if workloads:
            left.append(replace(job, workloads=workloads))
    return left


def in_turn(jobs: Sequence[Job], failed: Set[Place]) -> list[Job]:
    """The jobs in their order, but last those that failed: they may fail and take time again."""
    return sorted(jobs, key=lambda job: not failed.isdisjoint(places_of(job)))


def places_of(job: Job) -> set[Place]:
    return {(job.engine, folder) for folder in job.workloads}


def places(entries: Sequence[Measured]) -> set[Place]:
    """Of what is measured."""
    return {(entry.engine, entry.folder) for entry in entries}


def missing_jobs(jobs: Sequence[Job], entries: Sequence[Measured]) -> list[Job]:
    """What the jobs still have to measure."""
    done = {(entry.engine, entry.folder): (entry.spec, entry.num_runs) for entry in entries}
    missing = []
    for job in jobs:
        workloads = {
            folder: spec
            for folder, spec in job.workloads.items()
            if done.get((job.engine, folder)) != (spec, job.runs)
        }
        if workloads:
            missing.append(replace(job, workloads=workloads))
    return missing
