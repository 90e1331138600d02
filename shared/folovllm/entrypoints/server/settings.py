"""What a server allows, beside what its engine can do."""

from dataclasses import dataclass

from ...setting_checks import check_field_types, require_int

PAGES = ("auto", "control", "watch", "off")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How a server presents itself and where its limits are; a value that cannot work is refused.

    The limits keep one client from taking all memory or time: what is beyond them is an error of
    that client's.
    """

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines in."""
    port: int = 8000
    """0 takes a free one, which is printed."""
    served_model_name: str | None = None
    """What clients call the model; None: its Hub id, its preset, or the name of its directory."""
    api_key: str | None = None
    """Clients must send it as a bearer token."""
    generation_config: str = "auto"
    """auto: fields that a client leaves out are as the model's generation_config.json suggests;
    vllm: as in SamplingParams."""
    max_queue_len: int = 1024
    """Most requests that wait for their first step; more get status 429."""
    max_body_bytes: int = 4 << 20
    """Longest body of a call; a longer one gets status 413."""
    max_n: int = 64
    """Most completions of one call, prompts times n."""
    max_stop_strings: int = 16
    max_logprobs: int = 20
    """Most of the likeliest tokens that may be asked for."""
    body_timeout_s: float = 30.0
    """How long a client may take to send the body of a call."""
    drain_timeout_s: float = 60.0
    """How long requests under way may take after SIGTERM; then they are aborted."""

    step_timeout_s: float | None = 300.0
    """An engine that is longer in one step hangs: all get an error, and the server ends. Generous,
    since first steps may compile kernels; a long prompt in one piece on a CPU may need more."""
    page: str = "auto"
    """The page at / that shows the engine at work: control (all who come in may pause and step it),
    watch (nobody may), off; auto is control with a key or at a loopback address, else watch."""
    measure_roofline: bool = False
    """Let the page say how long a step must take at least: before the first request, two seconds go
    into what the machine can do."""
    pause_timeout_s: float = 300.0
    """A paused engine goes on by itself after so long without a click."""

    def __post_init__(self) -> None:
        check_field_types(self)
        if self.page not in PAGES:
            raise ValueError(f"page must be one of {', '.join(PAGES)}, got {self.page!r}")
        if self.generation_config not in ("auto", "vllm"):
            raise ValueError(
                f"generation_config must be auto or vllm, got {self.generation_config!r}"
            )
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"port must be in [0, 65535], got {self.port}")
        if self.api_key == "":
            raise ValueError("api_key is empty: everybody has that; leave it out, or give a key")
        for name in ("max_queue_len", "max_body_bytes", "max_n"):
            require_int(name, getattr(self, name), 1)
        for name in ("max_stop_strings", "max_logprobs"):
            require_int(name, getattr(self, name), 0)
        for name in ("body_timeout_s", "drain_timeout_s", "step_timeout_s", "pause_timeout_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
