"""What the whole table is made of: which engine measures what, with which options, in which order.

A *setting* is a model with limits: what an engine is started with, and the workloads that it then
measures one after another. A *job* is one engine at one setting: one process of
`compare.session measure`. All engines measure a setting before the next one begins, so that the
rows of a table are made close to each other.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from .fit import FIT
from .stages import Stage


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A model with limits, the same for all engines of its folders."""

    name: str
    model: str
    max_model_len: int
    kv_cache_bytes: str
    """A size, or "fit": what the engine needs for `fit_to`."""
    prompt_budget: int
    """Tokens of a step of those stages that compute a prompt in one step."""
    workloads: Mapping[str, str]
    """Folder of the results -> spec."""
    fit_to: str | None = None
    """A folder of another setting, which an engine measures first: its need is what fits."""
    runs: int = 3
    is_memory_scarce: bool = False
    """Whether peers get the memory limit too; else they take what they take by default."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Workloads that one engine measures in one process."""

    engine: str
    setting: Setting
    workloads: Mapping[str, str]
    runs: int


@dataclass(frozen=True, kw_only=True)
class Table:
    """Settings and engines in the order of their turns, and where slow engines cut."""

    settings: Sequence[Setting]
    engines: Sequence[str]
    cuts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Engine -> folder -> beginning of the workload that it answers."""
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Engine -> folders that it does not measure at all."""
    single_runs: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Engine -> folders that it measures once, because a run takes long."""
    without_pool: Sequence[str] = ()
    """Engines that take memory for one request after another, and reserve none."""

    def jobs(self) -> list[Job]:
        """All jobs, a setting's one behind the other; single runs have a process of their own."""
        return [
            job
            for setting in self.settings
            for engine in self.engines
            for job in self._jobs_of(engine, setting)
        ]

    def _jobs_of(self, engine: str, setting: Setting) -> list[Job]:
        by_runs: dict[int, dict[str, str]] = {}
        for folder, spec in setting.workloads.items():
            if folder not in self.left_out.get(engine, ()):
                runs = 1 if folder in self.single_runs.get(engine, ()) else setting.runs
                cut = self.cuts.get(engine, {}).get(folder, spec)
                by_runs.setdefault(runs, {})[folder] = cut
        return [
            Job(engine=engine, setting=setting, workloads=workloads, runs=runs)
            for runs, workloads in by_runs.items()
        ]

    def engine_options(self, stage: Stage, setting: Setting) -> list[str]:
        """What an engine is started with at a setting, as words of a command line."""
        options = {
            "model": setting.model,
            "load_format": "dummy",
            "dtype": "bfloat16",
            "max_model_len": str(setting.max_model_len),
        }
        takes_limit = setting.is_memory_scarce or not stage.is_peer
        if setting.kv_cache_bytes == FIT and stage.name in self.without_pool:
            takes_limit = False
        if takes_limit and "kv_cache_bytes" in stage.options:
            options["kv_cache_bytes"] = setting.kv_cache_bytes
        if computes_prompts_whole(stage):
            options["max_num_batched_tokens"] = str(setting.prompt_budget)
        flags = ((f"--{name.replace('_', '-')}", value) for name, value in options.items())
        return [word for pair in flags for word in pair]


PLENTY = Setting(
    name="plenty of memory",
    model="qwen3-0.6b",
    max_model_len=2048,
    kv_cache_bytes="60GiB",
    prompt_budget=16384,
    workloads={
        "nano": "nano",
        **{
            f"fixed-batch-{batch}": f"fixed:batch={batch},input=512,output=128"
            for batch in (1, 8, 64, 256)
        },
        "multi-turn": "multi-turn:conversations=64,turns=8,system=256,question=32-128,"
        "output=32-128",
    },
)
"""60 GiB hold the 256 slots of 2,048 tokens that m2_batching needs to run `nano` at once."""

FITTED_NANO = replace(
    PLENTY,
    name="what nano needs",
    kv_cache_bytes=FIT,
    fit_to="nano",
    workloads={"nano-fit": "nano"},
    runs=1,
)
"""Once: these rows are there for their memory, and that is the same every time."""

EIGHT_BILLION = Setting(
    name="8B",
    model="qwen3-8b",
    max_model_len=2048,
    kv_cache_bytes=FIT,
    fit_to="nano",
    prompt_budget=16384,
    workloads={
        "qwen3-8b-nano": "nano",
        "qwen3-8b-fixed-batch-1": "fixed:batch=1,input=512,output=128",
    },
)
"""The same requests take as many tokens of KV cache in every model."""

LONG_PROMPTS = Setting(
    name="long prompts",
    model="qwen3-0.6b",
    max_model_len=17408,
    kv_cache_bytes="32GiB",
    prompt_budget=17408,
    workloads={
        "long-arrival": "long-arrival:decoders=16,input=128,output=600,prompt=16384,at=0.5",
        "long-context": "fixed:batch=8,input=16384,output=256",
        "prefix-hit": "prefix-hit:prompt=8192,cached=0.5/0.9/0.99,num=6,output=4",
    },
)
"""32 GiB are the 17 slots of 17,408 tokens that m2_batching needs for `long-arrival`."""

LITTLE_MEMORY = Setting(
    name="8 GiB",
    model="qwen3-0.6b",
    max_model_len=2048,
    kv_cache_bytes="8GiB",
    prompt_budget=16384,
    workloads={"nano-8gib": "nano"},
    is_memory_scarce=True,
)

_SETTINGS = (PLENTY, EIGHT_BILLION, LONG_PROMPTS, LITTLE_MEMORY, FITTED_NANO)
_ALL_FOLDERS = tuple(folder for setting in _SETTINGS for folder in setting.workloads)

WHOLE_TABLE = Table(
    settings=_SETTINGS,
    engines=(
        "m1_baseline",
        "m2_batching",
        "m3_paged",
        "m4_flash",
        "m5_chunked",
        "m6_prefix",
        "m7_gptq",
        "vllm",
        "hf",
    ),
    cuts={
        "m1_baseline": {
            "nano": "nano:2",
            "nano-fit": "nano:2",
            "fixed-batch-8": "fixed:1,batch=8,input=512,output=128",
            "fixed-batch-64": "fixed:1,batch=64,input=512,output=128",
            "fixed-batch-256": "fixed:1,batch=256,input=512,output=128",
            "multi-turn": "multi-turn:4,conversations=64,turns=8,system=256,question=32-128,"
            "output=32-128",
            "long-context": "fixed:1,batch=8,input=16384,output=256",
            "qwen3-8b-nano": "nano:2",
        },
        "hf": {
            "nano": "nano:1",
            "long-context": "fixed:1,batch=8,input=16384,output=256",
        },
    },
    left_out={
        # A cut has no late request, and all of it takes 80 s of one request after another.
        # 8 GiB are as good as 60 for one request at a time.
        "m1_baseline": ("long-arrival", "nano-8gib"),
        # It does not tell what it needs of the memory that it takes.
        "vllm": ("nano-fit",),
        "hf": (
            *("nano-fit", "nano-8gib", "multi-turn", "long-arrival", "prefix-hit"),
            # One request after another: as many as there are, the first takes as long as that of
            # fixed-batch-1.
            *("fixed-batch-8", "fixed-batch-64", "fixed-batch-256"),
            *EIGHT_BILLION.workloads,
        ),
    },
    # Three runs of the slow ones would be half of the time, for distances of several times.
    single_runs=dict.fromkeys(("m1_baseline", "m2_batching", "m3_paged", "hf"), _ALL_FOLDERS),
    without_pool=("m1_baseline",),
)


def select_jobs(
    table: Table, engines: Iterable[str] | None, folders: Iterable[str] | None
) -> list[Job]:
    """The jobs of these engines for these folders; None means all. ValueError for unknown names."""
    wanted_engines = _known(engines, table.engines, "engine")
    there = [folder for setting in table.settings for folder in setting.workloads]
    wanted = _known(folders, there, "folder")
    jobs = []
    for job in table.jobs():
        workloads = {name: spec for name, spec in job.workloads.items() if name in wanted}
        if job.engine in wanted_engines and workloads:
            jobs.append(replace(job, workloads=workloads))
    return jobs


def _known(names: Iterable[str] | None, there: Sequence[str], kind: str) -> list[str]:
    if names is None:
        return list(there)
    names = list(names)
    unknown = [name for name in names if name not in there]
    if unknown:
        raise ValueError(
            f"no {kind} called {', '.join(unknown)} in the table; there are: {', '.join(there)}"
        )
    return names


def computes_prompts_whole(stage: Stage) -> bool:
    """Whether a step's budget must be as large as the longest prompt: a stage without chunks."""
    return not stage.is_peer and (
        "max_num_batched_tokens" in stage.options and "chunk_policy" not in stage.options
    )
