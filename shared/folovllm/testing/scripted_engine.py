"""An engine that answers from a script, for tests of everything above the engine seam."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from ..entrypoints.llm import LLM
from ..interfaces import StepOutput, StepStats, TokenLogprobs, TokenOutput
from ..request import FinishReason, Request


class ScriptedPolicy(Enum):
    """Which waiting request runs next."""

    FCFS = "fcfs"
    PRIORITY = "priority"


@dataclass(frozen=True, kw_only=True)
class ScriptedConfig:
    """Options of the scripted engine."""

    max_model_len: int = 300
    """Longest prompt plus output, in tokens."""
    max_num_seqs: int = 2
    """Most requests running at once."""
    kv_cache_bytes: int | None = None
    scheduling_policy: ScriptedPolicy = ScriptedPolicy.FCFS


@dataclass(frozen=True)
class ScriptedModelConfig:
    """The part of ModelConfig that LLM reads."""

    vocab_size: int
    max_context_len: int = 512
    eos_token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class ScriptedModel:
    """Has no weights: `answer` gives the whole output of a request."""

    config: ScriptedModelConfig
    answer: Callable[[Request], Sequence[int]]


class ScriptedEngine:
    """Runs up to `max_num_seqs` requests, one token each per step, in order of arrival."""

    def __init__(self, config: ScriptedConfig, model: ScriptedModel) -> None:
        self.config = config
        self.added: list[Request] = []
        self.aborted: list[str] = []
        """Every id that was asked to be aborted, known or not."""
        self.num_steps = 0
        self.before_step: Callable[[int], None] = lambda num_steps: None
        """Called with the number of steps so far; a test lets it raise."""
        self._model = model
        self._requests: dict[str, Request] = {}

    def add_request(self, request: Request) -> None:
        num_tokens = request.num_prompt_tokens + request.max_tokens
        if num_tokens > self.config.max_model_len:
            raise ValueError(f"{num_tokens} tokens exceed max_model_len")
        if request.request_id in self._requests:
            raise ValueError(f"request id {request.request_id} is in use")
        self.added.append(request)
        self._requests[request.request_id] = request

    def abort_request(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self._requests.pop(request_id, None)

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests)

    def step(self) -> StepOutput:
        self.before_step(self.num_steps)
        self.num_steps += 1
        waiting = sorted(self._requests.values(), key=lambda request: request.priority)
        tokens = tuple(map(self._next_token, waiting[: self.config.max_num_seqs]))
        return StepOutput(tokens, StepStats(
            num_scheduled_tokens=len(tokens), num_scheduled_requests=len(tokens),
            num_running=len(tokens), num_waiting=len(self._requests), num_preemptions=0,
            num_kv_tokens_live=0, num_kv_tokens_reserved=0, num_kv_tokens_capacity=0,
        ))  # fmt: skip

    def _next_token(self, request: Request) -> TokenOutput:
        answer = self._model.answer(request)
        token_id = answer[request.num_output_tokens % len(answer)]
        reason: FinishReason | None = request.append_output_token(token_id)
        if reason is not None:
            del self._requests[request.request_id]
        num_top = request.sampling_params.logprobs
        logprobs = None
        if num_top is not None:
            top = tuple((rank, -0.5 * (rank + 1)) for rank in range(num_top))
            logprobs = TokenLogprobs(-0.25, num_top + 1, top)
        return TokenOutput(request.request_id, token_id, reason, logprobs)


class ScriptedLLM(LLM):
    """LLM over the scripted engine; tests replace `folovllm.llm.load_model` first."""

    config_class = ScriptedConfig
    engine_class = ScriptedEngine
    engine: ScriptedEngine
