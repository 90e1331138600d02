"""The offline interface over any stage's engine: `generate`, `chat`, `stream`, `beam_search`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..interfaces import Engine
from ..memory import kv_cache_allocation
from ..model.config import ModelConfig
from ..model.linear import LinearsOf, plain_linears
from ..model.loader import load_model, resolve_device, resolve_model_directory
from ..model.transformer import CausalLM
from ..request import SamplingParams
from ..text.chat import DEFAULT_OPTIONS, ChatOptions, Message
from ..text.tokenizer import Tokenizer
from .beam_search import (
    BeamSearchOutput,
    BeamSearchParams,
    BeamSearchSequence,
    FinishedBeam,
    search_beams,
)
from .default_sampling import default_sampling_params
from .engine_options import build_config
from .followers import Followers, Place, lead, led
from .output_state import PromptState
from .output_stream import OutputStream
from .outputs import RequestOutput
from .placement import check_tensor_parallelism, device_of_rank
from .progress import ThroughputBar
from .prompts import Prompt, PromptInput, check_token_ids, parse_prompt, split_prompts
from .request_builder import RequestBuilder
from .shared_engine import SharedEngine

DEFAULT_MODEL = Path("models/SmolLM2-135M-Instruct")
"""Where `python -m m0_infra fetch` puts the embedded model, under the current directory."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class LLM:
    """A model behind one stage's engine; a stage sets the two class attributes.

        llm = LLM("models/SmolLM2-135M-Instruct", max_model_len=1024)
        outputs = llm.generate(["Hello", "The sky is"], SamplingParams(max_tokens=8))
        print(outputs[0].outputs[0].text)

    Call signatures and results are vLLM's. Every call aborts its own requests when it fails or
    is interrupted, so that the next call finds an engine that is free. Calls may come from
    several threads: they share steps, and each gets the tokens that it would have got alone
    (without a seed of its own, those of the number that its prompts happen to get).

    An output ends at every end-of-sequence id that generation_config.json names (config.json, if
    it names none) and at the tokenizer's own. The latter as in vLLM; Transformers goes on there.
    """

    config_class: ClassVar[type[Any]]
    engine_class: ClassVar[Callable[..., Engine]]
    linears: LinearsOf = staticmethod(plain_linears)
    """What computes the matrices of the layers, see `LinearsOf`."""

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        load_format: str = "auto",
        dtype: str = "auto",
        device: str = "auto",
        seed: int = 0,
        tokenizer: str | Path | None = None,
        tensor_parallel_size: int = 1,
        place: Place | None = None,
        **engine_options: Any,
    ) -> None:
        """Load a model and start an engine; `engine_options` are the stage's EngineConfig fields.

        model: a directory, a Hub id, or with load_format="dummy" a preset; None is the embedded
            model. tokenizer: where to read it, if not beside the model.
        seed: of dummy weights, and of requests whose SamplingParams give none.
        tensor_parallel_size: processes that share the model out, each with a device of its own
            (on a CPU, each with a part of the work). place: of a process among those; whoever
            makes an LLM gives none.
        max_model_len, where not given, is the stage's default or the model's limit, whichever is
        less. ValueError for an unknown option or one beyond the model's limit.
        """
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise ValueError(f"seed must be a whole number of at least 0, got {seed!r}")
        config = build_config(self.config_class, engine_options)  # before any weight is read
        model = _default_model() if model is None else model
        if load_format != "dummy":
            model = resolve_model_directory(model)
        self.model_path = model
        """The directory, or a preset's name."""
        _check_config(model)  # first: a tokenizer's reader would blame the tokenizer for it
        self.tokenizer = _load_tokenizer(model, tokenizer)
        loading: dict[str, Any] = {
            "load_format": load_format,
            "dtype": dtype,
            "device": device,
            "seed": seed,
        }
        self._followers: Followers | None = None
        if tensor_parallel_size != 1:
            check_tensor_parallelism(tensor_parallel_size, model, config)
            options = {"model": model, **loading, **engine_options}
            self._followers = Followers(type(self), tensor_parallel_size, options)
            place = self._followers.place
        with led(self._followers):
            self.model = self._load(model, place, **loading)
            config = self._limit_model_len(config, was_given="max_model_len" in engine_options)
            with kv_cache_allocation():
                self.engine = self.engine_class(config, self.model)
        if self._followers is not None:
            self.engine = lead(self.engine, self._followers)
        self.request_settings = self._make_request_settings(config, seed)
        """What a RequestBuilder for this engine needs, but for the tokenizer, by name."""
        self._requests = RequestBuilder(tokenizer=self.tokenizer, **self.request_settings)
        self._shared = SharedEngine(self.engine, self.use_device)

    def _load(
        self, model: str | Path, place: Place | None, *, device: str, **loading: Any
    ) -> CausalLM:
        if place is None:
            return load_model(model, device=device, linears=self.linears, **loading)
        device = device_of_rank(device, place.ranks)
        collectives = place.join(resolve_device(device))
        return load_model(
            model, device=device, linears=self.linears, collectives=collectives, **loading
        )

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete one prompt or several; outputs are in the order of the prompts.

        sampling_params: one for all, or one per prompt; they replace all that the model's
            generation_config.json suggests. None is `get_default_sampling_params()`.
        A text gets what the tokenizer puts around every prompt. A text that a chat template made
        has that already, and a second bos changes the answer: use `chat`, give `render_chat`'s
        prompt, or the ids of `tokenizer.encode(text, add_special_tokens=False)`.
        priority: one number per prompt, lower first; needs scheduling_policy="priority".
        ValueError if any prompt or setting cannot work; then none of them was run.
        """
        items = split_prompts(prompts)
        vocab_size = self.model.config.vocab_size
        parsed = [
            parse_prompt(item, index, self.tokenizer, vocab_size)
            for index, item in enumerate(items)
        ]
        states = self._requests.build(parsed, self._params_or_default(sampling_params), priority)
        return self._run(states, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of messages) or a list of conversations.

        The arguments behind `use_tqdm` are those of `ChatOptions`, where they are described. What
        a model says about tools is text: nothing here takes its calls apart.
        """
        options = ChatOptions(
            chat_template=chat_template,
            chat_template_content_format=chat_template_content_format,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )
        is_several = isinstance(messages, Sequence) and isinstance(
            next(iter(messages), None), list | tuple
        )
        conversations: Any = messages if is_several else [messages]
        prompts = [self.render_chat(messages, options) for messages in conversations]
        states = self._requests.build(prompts, self._params_or_default(sampling_params), None)
        return self._run(states, use_tqdm)

    def stream(
        self, prompt: PromptInput, sampling_params: SamplingParams | None = None
    ) -> OutputStream:
        """Complete one prompt and yield all of its output so far after every new token.

        Mistakes raise here, not at the first output: the request is in the engine when this
        returns. Closing the iterator, or dropping it, aborts the request. Several streams, and
        calls of `generate`, may be under way at once.
        """
        parsed = parse_prompt(prompt, 0, self.tokenizer, self.model.config.vocab_size)
        params = self._params_or_default(sampling_params)
        (state,) = self._requests.build([parsed], params, None)
        self._shared.start(state)
        return OutputStream(self._shared, state)

    def beam_search(
        self, prompts: PromptInput | Sequence[PromptInput], params: BeamSearchParams
    ) -> list[BeamSearchOutput]:
        """The `beam_width` likeliest outputs of each prompt that beam search finds, best first.

        ValueError if a prompt cannot be one, or leaves no room for `max_tokens`. Other threads'
        calls wait until the search is over, while its steps carry their requests on.
        """
        vocab_size = self.model.config.vocab_size
        parsed = [
            parse_prompt(item, index, self.tokenizer, vocab_size)
            for index, item in enumerate(split_prompts(prompts))
        ]
        with self._shared.turn():
            searches = search_beams(
                self._shared,
                self._shared.step,
                parsed,
                params,
                self._requests.eos_token_ids,
                self._requests.max_model_len,
            )
        return [
            BeamSearchOutput(list(map(self._describe_beam, search.finished))) for search in searches
        ]

    def _describe_beam(self, beam: FinishedBeam) -> BeamSearchSequence:
        text = None
        if self.tokenizer is not None:
            text = self.tokenizer.decode(beam.token_ids, skip_special_tokens=True)
        return BeamSearchSequence(beam.token_ids, beam.cum_logprob, text)

    def close(self) -> None:
        """End the other processes of this model, where it has any; it cannot be called any more."""
        if self._followers is not None:
            self._followers.close()

    def reset_prefix_cache(self) -> bool:
        """Forget the keys and values of all earlier prompts and answers; True, as it is done.

        For after a change of the weights, or to measure without them. What other threads run goes
        on, and is found again by those who come later. ValueError in stages that keep no prefixes.
        """
        if not hasattr(self.engine, "reset_prefix_cache"):
            raise no_prefixes(type(self))
        self._shared.reset_prefix_cache()
        return True

    def get_default_sampling_params(self) -> SamplingParams:
        """What a call without SamplingParams gets: the suggestions of generation_config.json.

        ValueError if one of them is nothing that this engine can follow.
        """
        return default_sampling_params(self.model_path)

    def _params_or_default(
        self, sampling_params: SamplingParams | Sequence[SamplingParams] | None
    ) -> SamplingParams | Sequence[SamplingParams]:
        return self.get_default_sampling_params() if sampling_params is None else sampling_params

    def render_chat(
        self, messages: Sequence[Message], options: ChatOptions = DEFAULT_OPTIONS
    ) -> Prompt:
        """The prompt that the chat template makes of a conversation; `stream` takes it."""
        if self.tokenizer is None:
            raise ValueError(
                "this model has no tokenizer and so no chat template; name one with tokenizer=…"
            )
        token_ids = self.tokenizer.apply_chat_template(messages, options)
        check_token_ids("the conversation", token_ids, self.model.config.vocab_size)
        return Prompt(self.tokenizer.decode(token_ids, skip_special_tokens=False), token_ids)

    def _run(self, states: list[PromptState], use_tqdm: bool) -> list[RequestOutput]:
        with ThroughputBar(len(states), is_shown=use_tqdm) as progress:
            self._shared.run(states, progress.update)
        return [state.output() for state in states]

    def _make_request_settings(self, config: Any, seed: int) -> dict[str, Any]:
        policy = getattr(config, "scheduling_policy", "fcfs")
        return {
            "vocab_size": self.model.config.vocab_size,
            "max_model_len": config.max_model_len,
            "eos_token_ids": self._eos_token_ids(),
            "seed": seed,
            "scheduling_policy": policy.value if isinstance(policy, Enum) else policy,
        }

    def use_device(self) -> None:
        """Make the model's device the current one of this thread, where Triton launches."""
        device = getattr(self.model, "device", None)
        if device is not None and device.index is not None:
            torch.cuda.set_device(device)

    def _eos_token_ids(self) -> frozenset[int]:
        """The model's and, as in vLLM, the tokenizer's, as far as the model can produce them."""
        ids = self.model.config.eos_token_ids
        if self.tokenizer is not None:
            ids |= self.tokenizer.eos_token_ids
        return frozenset(token_id for token_id in ids if token_id < self.model.config.vocab_size)

    def _limit_model_len(self, config: Any, was_given: bool) -> Any:
        """The config with a `max_model_len` that the model can attend to."""
        limit = self.model.config.max_context_len
        if config.max_model_len <= limit:
            return config
        if was_given:
            raise ValueError(
                f"max_model_len={config.max_model_len} is beyond this model's limit of {limit} "
                f"tokens; lower it"
            )
        return replace(config, max_model_len=limit)


def _default_model() -> Path:
    if not (DEFAULT_MODEL / "config.json").is_file():
        raise FileNotFoundError(
            f"no model was given, and the embedded one is not in {DEFAULT_MODEL} under the current "
            f"directory; run `python -m m0_infra fetch` there, or name a model"
        )
    return DEFAULT_MODEL


def _check_config(model: str | Path) -> None:
    """ValueError if the model's config.json, where there is one, describes none that can run."""
    if (Path(model) / "config.json").is_file():
        ModelConfig.from_directory(model)


def _load_tokenizer(model: str | Path, tokenizer: str | Path | None) -> Tokenizer | None:
    """The named tokenizer, or the model's; None if its directory has none, or it is a preset."""
    if tokenizer is not None:
        return Tokenizer(tokenizer)
    has_tokenizer = any((Path(model) / name).is_file() for name in _TOKENIZER_FILES)
    return Tokenizer(model) if has_tokenizer else None


def no_prefixes(llm_class: type[LLM]) -> ValueError:
    """What is said where a stage is asked to forget prefixes that it does not keep."""
    return ValueError(
        f"{llm_class.engine_class.__module__} keeps no prefixes that could be forgotten; "
        f"m6_prefix and the stages after it do"
    )
