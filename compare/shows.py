"""What each stage declares to show its idea: a workload, what decides, and the picture of it."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MANIFEST = Path("m0_infra", "stages.toml")
"""Relative to the root of a checkout; `m0_infra check-stages` checks its form."""


@dataclass(frozen=True, kw_only=True)
class Show:
    """The table `show` of one stage in stages.toml."""

    stage: str
    previous: str
    """The stage that it is compared with."""
    workload: str
    metrics: tuple[str, ...]
    """Names that `verdict.py` knows; the first decides, the others stand beside it."""
    chart: str
    """A name of `charts/draw.py`."""
    options: Mapping[str, str]
    """Of the engines, as on a command line: `max_num_seqs` for every stage that has it,
    `m4_flash.max_num_seqs` for one."""


def read_show(root: Path, name: str) -> Show:
    """What the stage called `name` declares ("m3" or "m3_paged").

    ValueError if there is no such stage or it declares nothing.
    """
    path = root / MANIFEST
    try:
        stages = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        what = f"cannot read {path}, where stages declare what they show: {error}"
        raise ValueError(what) from error
    found = [key for key in stages if name in (key, key.partition("_")[0])]
    if len(found) != 1:
        raise ValueError(f"{path} has no stage called {name!r}; there are: {', '.join(stages)}")
    stage, table = found[0], stages[found[0]]
    declared = table.get("show")
    if declared is None:
        raise ValueError(
            f"{stage} declares nothing to show in {path}: it is the first stage, or [{stage}.show] "
            f"with workload, metrics and chart is missing"
        )
    return Show(
        stage=stage,
        previous=table["previous"],
        workload=declared["workload"],
        metrics=tuple(declared["metrics"]),
        chart=declared["chart"],
        options=declared.get("options", {}),
    )
