"""How long a job of the whole table will take, from what the stored results took."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .results import load_folder, result_folders, write_text
from .stages import is_ladder_stage, ladder_order
from .whole_table import Job

FILE_NAME = "durations.json"
PER_RUN_S = 3.0
"""Beside the clock: ceilings, warm-up, gate and writing the file."""
UNKNOWN_RUN_S = 20.0
"""Of a run that neither this engine nor a neighbour of it has made."""
START_S = {"qwen3-0.6b": 15.0, "qwen3-8b": 30.0}
"""Process, weights, kernels, graphs."""
PEER_START_S = {
    "hf": {"qwen3-0.6b": 40.0},
    "vllm": {"qwen3-0.6b": 100.0, "qwen3-8b": 150.0},
}
"""A peer's random weights go through a checkpoint on the disk, and vLLM compiles."""
SEQUENTIAL_TOKENS_PER_S = {"m1_baseline": 80.0, "hf": 12.0}
"""Of engines that answer one request after another, on a slow host; launches take the time, so it
is much the same for every model."""
VOCAB_SIZE = 151_936
"""Of the table's models; a workload draws its prompts from it."""
GATE_TOKENS, WARMUP_TOKENS = 16, 4
"""Of each of the first 8 requests, and of each request: `bench`'s defaults."""


@dataclass(frozen=True)
class StoredDurations:
    """Seconds of one run by (engine, model, spec, folder)."""

    seconds: Mapping[tuple[str, str, str, str], float]

    @classmethod
    def read(cls, results: Path, to: Path) -> "StoredDurations":
        """Of the stored results, and what a plan noted of them under `to` where they are not."""
        file = to / FILE_NAME
        noted = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        found = {(stage, model, spec, folder): s for stage, model, spec, folder, s in noted}
        for folder in result_folders(results):
            for result in load_folder(folder):
                spec = str(result["workload"].get("spec") or result["workload"]["name"])
                model = str(result["model"]["name"])
                key = (str(result["stage"]), model, spec, folder.name)
                found[key] = float(result["duration_s"])
        return cls(found)

    def note(self, to: Path) -> None:
        """For a machine that gets no stored results: they are large."""
        lines = ",\n".join(json.dumps([*key, seconds]) for key, seconds in self.seconds.items())
        write_text(to / FILE_NAME, f"[\n{lines}\n]\n")

    def of_run(self, engine: str, model: str, spec: str, folder: str) -> float | None:
        """What this engine took, or its nearest neighbour on the ladder that measured it.

        Of other folders than `folder` the fastest counts: there memory is not what it waited for.
        """
        engines: Iterable[str] = {name for name, *_ in self.seconds}
        for other in sorted(engines, key=lambda name: _distance(engine, name)):
            times = {
                key[3]: value
                for key, value in self.seconds.items()
                if key[:3] == (other, model, spec)
            }
            if times and (other == engine or is_ladder_stage(other)):
                return times.get(folder, min(times.values()))
        return None


def _distance(engine: str, other: str) -> tuple[int, str]:
    """A stage's own first, then those before and behind it; a peer is as fast as the last ones."""
    if engine == other:
        return (0, other)
    return (1 + abs(min(ladder_order(engine)[0], 7) - ladder_order(other)[0]), other)


def run_seconds(job: Job, folder: str, stored: StoredDurations) -> float:
    """All runs of one workload."""
    spec = job.workloads[folder]
    if job.engine in SEQUENTIAL_TOKENS_PER_S:
        once = _sequential_seconds(job.engine, spec)
    else:
        known = stored.of_run(job.engine, job.setting.model, spec, folder)
        once = UNKNOWN_RUN_S if known is None else known
    return job.runs * (once + PER_RUN_S)


@cache
def _sequential_seconds(engine: str, spec: str) -> float:
    from folovllm.workloads.workload import make_workload

    requests = make_workload(spec, vocab_size=VOCAB_SIZE).requests
    num_tokens = sum(request.output_len for request in requests)
    num_tokens += GATE_TOKENS * min(len(requests), 8) + WARMUP_TOKENS * len(requests)
    return num_tokens / SEQUENTIAL_TOKENS_PER_S[engine]


def start_seconds(job: Job) -> float:
    seconds = PEER_START_S.get(job.engine, START_S)
    return seconds.get(job.setting.model, max(seconds.values()))


def job_seconds(job: Job, stored: StoredDurations) -> float:
    return start_seconds(job) + sum(run_seconds(job, folder, stored) for folder in job.workloads)
