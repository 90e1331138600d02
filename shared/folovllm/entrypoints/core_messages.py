"""What passes between the process of the engine and the one in front of it, as MessagePack."""

from typing import Any

import msgspec

from ..interfaces import StepStats, TokenGrammar, TokenLogprobs, TokenOutput
from ..request import Request, SamplingParams
from .live.engine_view import EngineView
from .live.step_facts import Share


class CoreOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How the engine's process makes its LLM: the arguments of `LLM.__init__`."""

    model: str | None
    options: dict[str, Any]
    """Keyword arguments, those of the stage's EngineConfig among them."""


class CoreFacts(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag=True):
    """The engine is ready; what those in front of it need to know of it."""

    model_path: str
    tokenizer_path: str | None
    """None for a model without one."""
    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]
    seed: int
    scheduling_policy: str
    keeps_prefixes: bool
    """Whether `ResetPrefixCache` is for this engine."""
    engine_config: dict[str, str]
    """Every field of the stage's EngineConfig, as text."""
    can_be_watched: bool
    """Whether `Watch` is for this engine."""


class CoreFailure(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag=True):
    """The engine could not be made, or died; the process ends after this."""

    is_mistake: bool
    """Whether it could not be made, and changing an argument helps (ValueError, OSError)."""
    text: str
    """The message of a mistake; else the whole traceback."""


class Accepted(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The requests of one prompt are in the engine."""

    prompt_id: str


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The engine can never run one of the requests of this prompt; it has none of them."""

    prompt_id: str
    reason: str


class Start(msgspec.Struct, frozen=True, array_like=True):
    """A request left the queue for the first time."""

    request_id: str
    num_cached_tokens: int | None
    queue_time_s: float
    """From its arrival to the step that it was first part of."""


class Step(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What a step of the engine brought."""

    time_s: float
    """When its tokens were there, on the clock of `time.perf_counter`, which all processes of a
    Linux or macOS machine share."""
    tokens: tuple[TokenOutput, ...]
    starts: list[Start]
    stats: StepStats
    prompt_logprobs: dict[str, list[TokenLogprobs]]
    """Of the requests that asked for them and got their first token, by id."""


class Idle(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Nothing is left to run, which the stats of the last step do not say."""


class Pong(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The engine is not in a step for ever."""


class PlannedStep(msgspec.Struct, frozen=True, array_like=True):
    """What each request gets of one step."""

    number: int
    """Of the step, counted from 1."""
    shares: list[Share]


class Snapshot(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """How an engine that is watched stands, between two steps."""

    num_steps: int
    """That have brought their tokens."""
    is_paused: bool
    view: EngineView
    planned: list[PlannedStep]
    """By the last step; like the next two empty if this has been told before."""
    story: list[str]
    """Sentences about the last step."""
    step_s: float | None
    """How long it took, in seconds."""
    least_s: float | None
    """How long it must take on this machine; None if several were planned in it, or if nobody has
    asked for `MeasureRoofline`."""


class NewRequest(msgspec.Struct, frozen=True, array_like=True):
    """The part of a `Request` that an engine is given."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    eos_token_ids: frozenset[int]
    seed: int
    priority: int
    fork_of: str | None
    """Id of another request of the same prompt."""
    cache_salt: str | None
    bad_words_token_ids: tuple[tuple[int, ...], ...]
    arrival_time: float


class Add(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Queue the requests of one prompt, all or none of them."""

    prompt_id: str
    requests: list[NewRequest]


class Abort(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Drop requests in any state; unknown ids are ignored."""

    request_ids: list[str]


class ResetPrefixCache(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Forget the keys and values of earlier requests."""


class Ping(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Answer with `Pong`."""


class MeasureRoofline(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Find out what this machine can do at most, so that snapshots can say how long a step must
    take; for an engine that has nothing to do."""


class Watch(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Send snapshots: at most ten per second, and of every step of a paused engine."""


class Unwatch(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Send none any more."""


class Pause(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """No step but those of `StepOnce`; requests come and go as ever."""


class StepOnce(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """One step of a paused engine; ignored if it is not paused, or has nothing to do."""


class Resume(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The end of a pause."""


class ShutDown(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """End the process."""


FromCore = CoreFacts | CoreFailure | Accepted | Refused | Step | Idle | Pong | Snapshot
ToCore = (
    Add
    | Abort
    | ResetPrefixCache
    | Ping
    | MeasureRoofline
    | Watch
    | Unwatch
    | Pause
    | StepOnce
    | Resume
    | ShutDown
)


def new_request(request: Request) -> NewRequest:
    return NewRequest(
        request.request_id,
        request.prompt_token_ids,
        request.sampling_params,
        request.eos_token_ids,
        request.seed,
        request.priority,
        None if request.fork_of is None else request.fork_of.request_id,
        request.cache_salt,
        request.bad_words_token_ids,
        request.arrival_time,
    )


def make_request(new: NewRequest, fork_of: Request | None, grammar: TokenGrammar | None) -> Request:
    """The request that `new` was made of; `fork_of` is the one that it names.

    grammar: of its structured outputs, which stays in the process where it was made.
    """
    return Request(
        request_id=new.request_id,
        prompt_token_ids=new.prompt_token_ids,
        sampling_params=new.sampling_params,
        eos_token_ids=new.eos_token_ids,
        seed=new.seed,
        priority=new.priority,
        fork_of=fork_of,
        cache_salt=new.cache_salt,
        bad_words_token_ids=new.bad_words_token_ids,
        grammar=grammar,
        arrival_time=new.arrival_time,
    )
