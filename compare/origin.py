"""Where a run was made: rows of one table are of one card and one commit."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .results import Result, lookup


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A card and a commit; two cards of one kind are told apart by nothing that a run records."""

    device: str
    """What results are filed under: `nvidia-h200`."""
    name: str
    memory_bytes: int | None
    """Of the card; None on a CPU."""
    commit: str

    def __str__(self) -> str:
        memory = f", {self.memory_bytes / 2**30:.0f} GiB" if self.memory_bytes else ""
        return f"{self.name} ({self.device}{memory}) at {self.commit[:10]}"


def origin_of(result: Result) -> Origin:
    """ValueError if the run does not know its commit, or its files differed from that."""
    environment = result["environment"]
    return _origin(result["device"], environment, f"a run of {result['stage']}")


def this_origin(commit: str | None) -> Origin:
    """Of a run that would be made here and now; `commit` is what the user states, if anything."""
    import torch  # only here: a plan needs no torch

    from folovllm.hardware import describe_environment, device_slug

    device = device_slug("cuda" if torch.cuda.is_available() else "cpu")
    environment = describe_environment()
    if commit is not None:
        environment |= {"commit": commit, "dirty": False}
    return _origin(device, environment, "this checkout")


def _origin(device: str, environment: Result, what: str) -> Origin:
    commit = environment.get("commit")
    if commit is None:
        raise ValueError(
            f"{what} lies in no git checkout, and a row of a table names its commit: state it, "
            f"--commit $(git rev-parse HEAD) of the checkout that this is a copy of"
        )
    if environment.get("dirty"):
        raise ValueError(
            f"{what} has changes that are in no commit, and a row of a table names its commit: "
            f"commit them, or state with --commit what is measured"
        )
    return Origin(
        device=device,
        name=str(environment.get("device")),
        memory_bytes=lookup(environment, "gpu_memory_bytes"),
        commit=str(commit),
    )


def one_origin(origins: Iterable[tuple[Path | str, Origin]]) -> Origin | None:
    """The origin that all of these have; None of nothing. ValueError names two that differ."""
    first: tuple[Path | str, Origin] | None = None
    for where, origin in origins:
        first = first or (where, origin)
        if origin != first[1]:
            raise ValueError(
                f"{where} was measured on {origin}, {first[0]} on {first[1]}: rows of different "
                f"cards or commits have no place in one table; keep them in folders of their own"
            )
    return None if first is None else first[1]
