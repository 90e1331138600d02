"""How many engines a server has, and which of them gets a call."""

import re
from dataclasses import dataclass

from ...setting_checks import check_field_types, require_int

_ADDRESS = re.compile(r"[^\s/]+:\d+")
ROUTINGS = ("prefix", "round-robin")


@dataclass(frozen=True, kw_only=True)
class ReplicaSettings:
    """The engines behind one address; what would have no effect is refused."""

    replicas: int = 1
    """Engines, each in processes of its own and, where there are GPUs, on one of its own; more than
    1 run under Ray Serve, which needs the extra `ray`."""
    routing: str | None = None
    """prefix: prompts that begin alike go to the engine that has run such a beginning; round-robin:
    each engine in turn. None is prefix."""
    max_load_gap: int | None = None
    """With prefix routing: calls that an engine may have above one and a half times those of the
    least loaded one and still get prompts whose beginning it has. None is 2."""
    ray_address: str | None = None
    """The Ray cluster to run in: auto, or HOST:PORT. None starts one on this machine that ends with
    the server."""

    def __post_init__(self) -> None:
        check_field_types(self)
        require_int("replicas", self.replicas, 1)
        names = ("routing", "max_load_gap", "ray_address")
        given = [name for name in names if getattr(self, name) is not None]
        if self.replicas == 1 and given:
            raise ValueError(f"{given[0]} has no effect with one replica; give replicas=2 or more")
        if self.routing not in (None, *ROUTINGS):
            raise ValueError(f"routing must be one of {', '.join(ROUTINGS)}, got {self.routing!r}")
        if self.max_load_gap is not None:
            require_int("max_load_gap", self.max_load_gap, 0)
            if self.routing == "round-robin":
                raise ValueError("max_load_gap has no effect with round-robin; leave it out")
        if self.ray_address not in (None, "auto") and not _ADDRESS.fullmatch(self.ray_address):
            raise ValueError(f"ray_address must be auto or HOST:PORT, got {self.ray_address!r}")
