"""Checks prompts and sampling settings, and makes the requests of a call out of them."""

import hashlib
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..request import Request, SamplingParams
from ..setting_checks import is_int
from ..text.bad_words import encode_bad_words
from ..text.grammars import Grammar, GrammarCompiler
from ..text.tokenizer import Tokenizer
from .output_state import CompletionState, PromptState
from .prompts import Prompt, check_token_ids


def grammar_compiler(tokenizer: Tokenizer | None, settings: Mapping[str, Any]) -> GrammarCompiler:
    """For requests that came from another process without their grammars.

    settings: `LLM.request_settings`, of the model that answers them.
    """
    return GrammarCompiler(tokenizer, settings["vocab_size"], settings["eos_token_ids"])


class RequestBuilder:
    """Knows what one model and its engine can take, and numbers the requests.

    Everything that can be refused without asking the engine is refused here, before the first
    request of a call is queued.
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        max_model_len: int,
        eos_token_ids: frozenset[int],
        seed: int,
        scheduling_policy: str,
    ) -> None:
        """scheduling_policy: "priority" is the only one under which priorities may be given."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids
        self._seed = seed
        self._scheduling_policy = scheduling_policy
        self._grammars = GrammarCompiler(tokenizer, vocab_size, eos_token_ids)
        self._num_prompts = 0
        self._numbering = threading.Lock()
        """Calls in several threads get numbers, and so request ids and seeds, of their own."""

    def build(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams],
        priority: Sequence[int] | None,
        arrival_time: float | None = None,
    ) -> list[PromptState]:
        """The requests of one call, one state per prompt in order; ValueError builds none.

        arrival_time: when the call came, on the clock of `time.perf_counter`; None is now.
        """
        all_params = self._one_per_prompt(sampling_params, len(prompts))
        priorities = self._check_priority(priority, len(prompts))
        prompts = [
            self._truncate(prompt, params, index)
            for index, (params, prompt) in enumerate(zip(all_params, prompts, strict=True))
        ]
        resolved = [
            self._resolve(params, prompt, index)
            for index, (params, prompt) in enumerate(zip(all_params, prompts, strict=True))
        ]
        structures = (params.structured_outputs for params in resolved)
        grammars = [None if s is None else self._grammars.compile(s) for s in structures]
        if arrival_time is None:
            arrival_time = time.perf_counter()
        with self._numbering:
            return [
                self._build_one(*of_prompt, arrival_time)
                for of_prompt in zip(prompts, resolved, grammars, priorities, strict=True)
            ]

    def _build_one(
        self,
        prompt: Prompt,
        params: SamplingParams,
        grammar: Grammar | None,
        priority: int,
        arrival_time: float,
    ) -> PromptState:
        prompt_id = str(self._num_prompts)
        bad_words = self._encode_bad_words(params)
        completions: list[CompletionState] = []
        for child in range(params.n):
            request = Request(
                request_id=prompt_id if params.n == 1 else f"{prompt_id}-{child}",
                prompt_token_ids=prompt.token_ids,
                sampling_params=_params_of_child(params, child),
                bad_words_token_ids=bad_words,
                grammar=grammar if grammar is None else grammar.fork(),
                eos_token_ids=self.eos_token_ids,
                seed=self._seed_of(params, child),
                priority=priority,
                fork_of=completions[0].request if completions else None,
                cache_salt=prompt.cache_salt,
                arrival_time=arrival_time,
            )
            completions.append(CompletionState(request, child, self._tokenizer))
        self._num_prompts += 1
        return PromptState(prompt_id, prompt, completions, arrival_time)

    def _seed_of(self, params: SamplingParams, child: int) -> int:
        """The given seed counted on per completion, or one of this prompt's number."""
        if params.seed is not None:
            return params.seed + child
        key = f"{self._seed}/{self._num_prompts}/{child}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) >> 1  # fits int64

    def _resolve(self, params: SamplingParams, prompt: Prompt, index: int) -> SamplingParams:
        """Check the settings against the model; fill in `max_tokens` where it is None."""
        for name, token_ids in (
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", list(params.logit_bias or ())),
            ("allowed_token_ids", params.allowed_token_ids),
        ):
            if token_ids:
                check_token_ids(f"{name} of prompt {index}", token_ids, self._vocab_size)
        if params.stop_strings and self._tokenizer is None:
            raise ValueError(
                f"stop strings {params.stop_strings} need text, but this model has no tokenizer; "
                f"use stop_token_ids, or name a tokenizer with tokenizer=…"
            )
        if params.bad_words and self._tokenizer is None:
            raise ValueError(
                f"bad_words {params.bad_words} are text, but this model has no tokenizer; name "
                f"one with tokenizer=…"
            )
        if params.max_tokens is not None:
            return params
        room = self.max_model_len - len(prompt.token_ids)
        if room < 1:
            raise ValueError(
                f"prompt {index} has {len(prompt.token_ids)} tokens and leaves no room for an "
                f"output within max_model_len={self.max_model_len}; shorten the prompt or raise "
                f"max_model_len"
            )
        return replace(params, max_tokens=room)

    def _truncate(self, prompt: Prompt, params: SamplingParams, index: int) -> Prompt:
        """The prompt as `truncate_prompt_tokens` cuts it; its text stays as it was given."""
        num_kept = params.truncate_prompt_tokens
        if num_kept is None:
            return prompt
        if num_kept > self.max_model_len:
            raise ValueError(
                f"truncate_prompt_tokens={num_kept} of prompt {index} is above "
                f"max_model_len={self.max_model_len}; lower it, or raise max_model_len"
            )
        if num_kept == -1:
            num_kept = max(self.max_model_len - (params.max_tokens or 1), 1)
        return replace(prompt, token_ids=prompt.token_ids[-num_kept:])

    def _encode_bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        if not params.bad_words or self._tokenizer is None:
            return ()
        return encode_bad_words(params.bad_words, self._tokenizer)

    @staticmethod
    def _one_per_prompt(
        sampling_params: SamplingParams | Sequence[SamplingParams], num_prompts: int
    ) -> Sequence[SamplingParams]:
        if isinstance(sampling_params, SamplingParams):
            return [sampling_params] * num_prompts
        if not isinstance(sampling_params, Sequence) or any(
            not isinstance(params, SamplingParams) for params in sampling_params
        ):
            raise ValueError(
                f"sampling_params must be a SamplingParams or a list of them, "
                f"got {sampling_params!r}"
            )
        if len(sampling_params) != num_prompts:
            raise ValueError(
                f"got {len(sampling_params)} sampling_params for {num_prompts} prompts; "
                f"give one for all or one per prompt"
            )
        return sampling_params

    def _check_priority(self, priority: Sequence[int] | None, num_prompts: int) -> Sequence[int]:
        if priority is None:
            return [0] * num_prompts
        if self._scheduling_policy != "priority":
            raise ValueError(
                f"priorities {priority} would have no effect: the scheduling policy of this "
                f"engine is {self._scheduling_policy!r}; where the stage has it, use "
                f"scheduling_policy='priority'"
            )
        if not isinstance(priority, Sequence) or not all(map(is_int, priority)):
            raise ValueError(f"priority must be a list of whole numbers, got {priority!r}")
        if len(priority) != num_prompts:
            raise ValueError(
                f"got {len(priority)} priorities for {num_prompts} prompts; give one per prompt"
            )
        return priority


def _params_of_child(params: SamplingParams, child: int) -> SamplingParams:
    """Those of one completion; what is said about the prompt, the first one's request says."""
    if params.n == 1:
        return params
    return replace(params, n=1, prompt_logprobs=params.prompt_logprobs if child == 0 else None)
