"""The process of the engine: requests and aborts come in, the tokens of every step go out."""

import os
import signal
import threading
import time
import traceback
from dataclasses import fields
from enum import Enum
from multiprocessing import parent_process
from multiprocessing.connection import wait
from typing import Any

import msgspec
import zmq

from ..interfaces import Engine, StepOutput, TokenLogprobs
from ..request import Request, RequestStatus
from ..text.grammars import Grammar, GrammarCompiler
from .core_messages import (
    Abort,
    Accepted,
    Add,
    CoreFacts,
    CoreFailure,
    CoreOptions,
    FromCore,
    Idle,
    MeasureRoofline,
    NewRequest,
    Pause,
    Ping,
    Pong,
    Refused,
    ResetPrefixCache,
    Resume,
    ShutDown,
    Start,
    Step,
    StepOnce,
    ToCore,
    Unwatch,
    Watch,
    make_request,
)
from .live.engine_watch import EngineWatch
from .llm import LLM
from .request_builder import grammar_compiler

EXIT_DIED = 1
MAX_UNREAD_STEPS = 10_000
"""Steps that may wait to be read; behind them the engine waits for whoever is in front."""
_LINGER_MS = 2000


class EngineCore:
    """Steps one engine for as long as there is something to do, and waits for requests else.

    Text never comes here: the other process has the tokenizer, and all the time that HTTP takes.
    Messages are looked at between steps, so that an abort frees its blocks within a step.
    """

    def __init__(
        self,
        engine: Engine,
        grammars: GrammarCompiler,
        incoming: zmq.Socket[bytes],
        outgoing: zmq.Socket[bytes],
    ) -> None:
        self._engine = engine
        self._grammars = grammars
        self._incoming = incoming
        self._outgoing = outgoing
        self._watch = EngineWatch(engine)
        self._decoder = msgspec.msgpack.Decoder(ToCore)
        self._encoder = msgspec.msgpack.Encoder()
        self._unstarted: dict[str, Request] = {}
        """Requests that have never left the queue, by id."""
        self._prompts_wanted: dict[str, Request] = {}
        """Requests that want log-probabilities of their prompt and have no token yet, by id."""
        self._is_shut_down = False

    def run(self) -> None:
        """Serve until `ShutDown`."""
        while True:
            self._take_messages()
            if self._is_shut_down:
                return
            self._step()

    def send(self, message: FromCore) -> None:
        self._outgoing.send(self._encoder.encode(message))

    def _take_messages(self) -> None:
        """Act on all that has come; wait for the next one while there is nothing to run."""
        while not self._is_shut_down:
            has_work = self._engine.has_unfinished_requests()
            is_busy = has_work and self._watch.may_step
            if not is_busy and self._watch.has_news and not self._incoming.poll(0):
                self.send(self._watch.take_snapshot())
            if not self._incoming.poll(0 if is_busy else None):
                return
            self._act_on(self._decoder.decode(self._incoming.recv()))
            if has_work:
                self._tell_if_idle()

    def _act_on(self, message: ToCore) -> None:
        if not isinstance(message, Ping):
            self._watch.note_change()
        match message:
            case Add():
                self._add(message)
            case Abort():
                for request_id in message.request_ids:
                    self._engine.abort_request(request_id)
                    self._unstarted.pop(request_id, None)
                    self._prompts_wanted.pop(request_id, None)
            case ResetPrefixCache():
                engine: Any = self._engine
                engine.reset_prefix_cache()
            case Ping():
                self.send(Pong())
            case MeasureRoofline():
                self._watch.measure_roofline()
            case Watch() | Unwatch() | Pause() | StepOnce() | Resume():
                self._watch.act_on(message)
            case ShutDown():
                self._is_shut_down = True

    def _add(self, message: Add) -> None:
        added: dict[str, Request] = {}
        try:
            for new in message.requests:
                parent = None if new.fork_of is None else added[new.fork_of]
                request = make_request(new, parent, self._grammar(new))
                self._engine.add_request(request)
                added[new.request_id] = request
        except ValueError as error:
            for request_id in added:
                self._engine.abort_request(request_id)
            self.send(Refused(message.prompt_id, str(error)))
            return
        self._unstarted |= added
        self._prompts_wanted |= {
            request_id: request
            for request_id, request in added.items()
            if request.sampling_params.prompt_logprobs is not None
        }
        self.send(Accepted(message.prompt_id))

    def _grammar(self, new: NewRequest) -> Grammar | None:
        structure = new.sampling_params.structured_outputs
        return None if structure is None else self._grammars.compile(structure)

    def _step(self) -> None:
        start_s = time.perf_counter()
        output = self._watch.step()
        end_s = time.perf_counter()
        started = self._take_started(output, start_s)
        prompts = self._take_prompt_logprobs(output) if self._prompts_wanted else {}
        self.send(Step(end_s, output.tokens, started, output.stats, prompts))
        if self._watch.has_story:
            self.send(self._watch.take_snapshot())
        self._tell_if_idle()

    def _tell_if_idle(self) -> None:
        if not self._engine.has_unfinished_requests():
            self.send(Idle())

    def _take_started(self, output: StepOutput, start_s: float) -> list[Start]:
        """Who left the queue in this step, or in one that was launched behind it."""
        unstarted = self._unstarted
        # Whoever waits has never started, or gave way. Equal numbers mean that nobody started, or
        # that somebody gave way meanwhile; then the newcomer's first token tells.
        if len(unstarted) == output.stats.num_waiting and not any(
            token.request_id in unstarted for token in output.tokens
        ):
            return []
        started = [request for request in unstarted.values() if _has_started(request)]
        for request in started:
            del unstarted[request.request_id]
        return [Start(r.request_id, r.num_cached_tokens, start_s - r.arrival_time) for r in started]

    def _take_prompt_logprobs(self, output: StepOutput) -> dict[str, list[TokenLogprobs]]:
        wanted = self._prompts_wanted
        ids = [token.request_id for token in output.tokens if token.request_id in wanted]
        return {request_id: wanted.pop(request_id).prompt_logprobs for request_id in ids}


def _has_started(request: Request) -> bool:
    has_tokens = len(request.token_ids) > request.num_prompt_tokens
    return has_tokens or request.status is not RequestStatus.WAITING


def run_engine_core(llm_class: type[LLM], options: bytes, incoming: str, outgoing: str) -> None:
    """The whole life of the process; ends it with a status other than 0 if the engine died.

    options: an encoded `CoreOptions`; incoming, outgoing: addresses that the front listens on.
    """
    # Ctrl-C and SIGTERM reach the whole group of processes: the front decides what they mean.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    context = zmq.Context()
    pull, push = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    pull.set_hwm(0)  # how many requests may wait is decided in front
    push.set_hwm(MAX_UNREAD_STEPS)
    push.setsockopt(zmq.LINGER, _LINGER_MS)
    pull.connect(incoming)
    push.connect(outgoing)
    status = EXIT_DIED
    try:
        llm = _make_llm(llm_class, msgspec.msgpack.decode(options, type=CoreOptions), push)
        if llm is not None:
            grammars = grammar_compiler(llm.tokenizer, llm.request_settings)
            EngineCore(llm.engine, grammars, pull, push).run()
            status = 0
    except BaseException as error:
        failure = CoreFailure(is_mistake=False, text="".join(traceback.format_exception(error)))
        push.send(msgspec.msgpack.encode(failure))
    context.destroy(linger=_LINGER_MS)
    os._exit(status)  # at once: a broken device may keep the interpreter from ending


def _make_llm(
    llm_class: type[LLM], options: CoreOptions, outgoing: zmq.Socket[bytes]
) -> LLM | None:
    """The LLM, of which the facts are sent; None after a mistake, which is sent instead."""
    message: FromCore
    llm = None
    try:
        llm = llm_class(options.model, **options.options)
        llm.use_device()
        message = _facts(llm)
    except (ValueError, OSError) as error:
        message = CoreFailure(is_mistake=True, text=str(error))
    outgoing.send(msgspec.msgpack.encode(message))
    return llm


def _facts(llm: LLM) -> CoreFacts:
    return CoreFacts(
        model_path=str(llm.model_path),
        tokenizer_path=None if llm.tokenizer is None else llm.tokenizer.path,
        keeps_prefixes=hasattr(llm.engine, "reset_prefix_cache"),
        engine_config=_as_text(getattr(llm.engine, "config", None)),
        can_be_watched=hasattr(llm.engine, "scheduler"),
        **llm.request_settings,
    )


def _as_text(config: Any) -> dict[str, str]:
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {
        name: str(value.value if isinstance(value, Enum) else value)
        for name, value in values.items()
    }


def _end_with_parent() -> None:
    """A server that was killed leaves no engine behind that holds the device's memory."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(EXIT_DIED)
