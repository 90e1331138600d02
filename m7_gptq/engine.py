"""The engine: what it takes and refuses, and one step after the other."""

from folovllm.interfaces import StepOutput
from folovllm.model.transformer import CausalLM
from folovllm.request import Request

from .async_step import StepPipeline
from .chunk_policy import ChunkSizes, FixedChunks
from .config import EngineConfig
from .kv_cache_manager import KVCacheManager
from .model_runner import ModelRunner
from .scheduler import Scheduler
from .step_costs import measure_chunk_sizes


class LLMEngine:
    """Serves requests one step at a time."""

    def __init__(self, config: EngineConfig, model: CausalLM) -> None:
        self.config = config
        self._check_context(model)
        self.model_runner = ModelRunner(config, model)
        self.kv_cache_manager = KVCacheManager(config, self.model_runner.kv_cache.num_tokens)
        self.scheduler = Scheduler(config, self.kv_cache_manager, self._chunk_sizes())
        num_ahead = 1 if config.async_scheduling else 0
        self.pipeline = StepPipeline(self.scheduler, self.model_runner, num_ahead)

    def add_request(self, request: Request) -> None:
        """Queue a request; ValueError if it can never run or its id is in use."""
        num_tokens = request.num_prompt_tokens + request.max_tokens
        if num_tokens > self.config.max_model_len:
            raise ValueError(
                f"request {request.request_id} needs {num_tokens} tokens of context "
                f"({request.num_prompt_tokens} of prompt + max_tokens {request.max_tokens}) but "
                f"max_model_len is {self.config.max_model_len}; shorten the prompt, lower "
                f"max_tokens, or raise max_model_len"
            )
        self.model_runner.sampler.validate(request)
        self.scheduler.add_request(request)

    def abort_request(self, request_id: str) -> None:
        """Drop a request in any state; an id that is unknown or finished is ignored."""
        self.scheduler.abort_request(request_id)

    def has_unfinished_requests(self) -> bool:
        return self.scheduler.has_unfinished_requests()

    def step(self) -> StepOutput:
        """Return the tokens of one forward pass, while the next one may be under way already.

        A step that breaks off at any line (Ctrl-C) counts as not begun.
        """
        try:
            return self.pipeline.step()
        except BaseException:
            self.pipeline.start_over()
            raise

    def reset_prefix_cache(self) -> None:
        """Forget what was computed; who is running keeps its own, and publishes it again."""
        try:
            self.kv_cache_manager.reset_prefix_cache()
        except BaseException:
            self.pipeline.start_over()
            raise

    def _chunk_sizes(self) -> ChunkSizes:
        if self.config.target_step_ms is None:
            return FixedChunks(self.config.max_chunk_tokens)
        return measure_chunk_sizes(self.model_runner, self.config.target_step_ms / 1000)

    def _check_context(self, model: CausalLM) -> None:
        limit = model.config.max_context_len
        if self.config.max_model_len > limit:
            raise ValueError(
                f"max_model_len is {self.config.max_model_len} but this model attends to at most "
                f"{limit} tokens; lower max_model_len"
            )
