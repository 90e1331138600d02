"""What every stage's engine must do, as tests that a stage inherits.

A stage's test file is

    class TestEngineContract(EngineContract):
        stage = m2_batching
        options = {"max_num_seqs": 4, ...}
"""

import json
import random
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from ..bench.arrivals import make_request
from ..bench.benchmark import run_benchmark
from ..bench.probes import SystemClock
from ..bench.recorder import record_run
from ..entrypoints.beam_search import BeamSearchParams
from ..entrypoints.llm import LLM
from ..hardware import Ceilings
from ..interfaces import Engine
from ..model.loader import load_model
from ..model.transformer import CausalLM
from ..request import FinishReason, Request, SamplingParams, StructuredOutputsParams
from ..text.tokenizer import Tokenizer
from ..workloads.workload import make_workload
from .driver import check_idle, check_step, drain, make_requests, random_prompts
from .forced_sampler import ForcedSampler
from .line_interrupts import LineInterrupt
from .toy_models import ToyFamily, reference_greedy, reference_logits, toy_families, write_toy_model
from .toy_tokenizers import save_byte_level_tokenizer


def _greedy(max_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **options)


def _interrupt_calls(function: Callable[..., Any], every: int) -> Callable[..., Any]:
    """`function` of which one call in `every` ends with a KeyboardInterrupt, its work done."""
    num_calls = 0

    def interrupted(*args: Any) -> Any:
        nonlocal num_calls
        result = function(*args)
        num_calls += 1
        if num_calls % every == 0:
            raise KeyboardInterrupt
        return result

    return interrupted


def _is_person(text: str) -> bool:
    person = json.loads(text)
    is_whole = person.keys() == {"age", "name"} and person["age"] in (7, 42)
    return is_whole and len(person["name"]) <= 4


def _is_repeated(text: str) -> bool:
    return re.fullmatch("(ab|cd){2,5}", text) is not None


def _is_choice(text: str) -> bool:
    return text in ("yes", "no", "世界")


def _is_nested(text: str) -> bool:
    depth = text.count("(")
    return text in ("(" * depth + ")" * depth, "(" * depth + "x" + ")" * depth) and text != ""


@pytest.fixture(scope="session", params=toy_families(), ids=lambda family: family.name)
def toy_directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model of each family on disk."""
    family: ToyFamily = request.param
    return write_toy_model(family, tmp_path_factory.mktemp(f"toy-{family.name}"))


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    """One toy model, for tests that are not about families."""
    return load_model(write_toy_model(toy_families()[3], tmp_path_factory.mktemp("toy")))


def _mixed_calls(num_calls: int) -> list[Callable[[LLM], Any]]:
    """Calls of an LLM in turns of every kind, greedy or seeded; each returns its token ids."""

    def generate(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> Any:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [[c.token_ids for c in output.outputs] for output in outputs]

    def stream(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> Any:
        *_, last = llm.stream(prompts[0], params)
        return [completion.token_ids for completion in last.outputs]

    def closed_stream(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> Any:
        llm.stream(prompts[0], params).close()

    def search(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> Any:
        found = llm.beam_search(prompts[:1], BeamSearchParams(beam_width=2, max_tokens=4))
        return [sequence.tokens for sequence in found[0].sequences]

    kinds = (generate, stream, generate, closed_stream, generate, search)
    calls: list[Callable[[LLM], Any]] = []
    for index in range(num_calls):
        prompts = random_prompts(seed=index, count=1 + index % 3, vocab_size=199, max_len=30)
        sampled = SamplingParams(n=2, seed=index, temperature=1.0, top_p=0.9, max_tokens=9)
        params = _greedy(3 + index % 9) if (index + index // 6) % 2 else sampled
        calls.append(partial(kinds[index % 6], prompts=prompts, params=params))
    return calls


class EngineContract:
    """Inherit, set `stage` to the package and `options` to EngineConfig values for toy models."""

    stage: ClassVar[ModuleType]
    options: ClassVar[dict[str, Any]]
    run_step: ClassVar[str] = "execute"
    """ModelRunner's method that computes a step."""

    def make_engine(self, model: CausalLM, **overrides: Any) -> Engine:
        options = {"max_model_len": 192, **self.options, **overrides}
        return self.stage.LLMEngine(self.stage.EngineConfig(**options), model)

    def make_llm(self, directory: Path, **overrides: Any) -> LLM:
        options = {"max_model_len": 192, **self.options, **overrides}
        llm: LLM = self.stage.LLM(directory, device="cpu", **options)
        return llm

    @pytest.mark.no_cover
    def test_greedy_tokens_equal_transformers(self, toy_directory: Path) -> None:
        prompts = random_prompts(seed=1, count=30, vocab_size=199, max_len=120)
        expected = reference_greedy(toy_directory, prompts, max_tokens=24)
        engine = self.make_engine(load_model(toy_directory))
        requests = make_requests(prompts, _greedy(24, ignore_eos=True))
        drain(engine, requests[:10], later={3: requests[10:12], 9: requests[12:30]})
        assert [request.output_token_ids for request in requests] == expected

    def test_logits_equal_transformers_at_every_step(self, toy_directory: Path) -> None:
        prompts = random_prompts(seed=2, count=6, vocab_size=199, max_len=60)
        forced = random_prompts(seed=3, count=6, vocab_size=199, min_len=12, max_len=12)
        expected = reference_logits(toy_directory, prompts, forced)
        engine = self.make_engine(load_model(toy_directory))
        requests = make_requests(prompts, _greedy(12, ignore_eos=True))
        sampler = ForcedSampler({r.request_id: f for r, f in zip(requests, forced, strict=True)})
        engine.model_runner.sampler = sampler  # type: ignore[attr-defined]
        drain(engine, requests)
        for request, rows in zip(requests, expected, strict=True):
            recorded = sampler.logits_of(request.request_id)
            assert (recorded - rows).abs().max() < 1e-3 * rows.abs().max()

    def test_tokens_do_not_depend_on_batch_mates_or_order(self, toy_model: CausalLM) -> None:
        prompts = random_prompts(seed=4, count=9, vocab_size=199, max_len=50)
        params = [
            SamplingParams(temperature=0.9, top_k=50, max_tokens=15, ignore_eos=True),
            _greedy(15, ignore_eos=True, repetition_penalty=1.3, logprobs=2),
            SamplingParams(temperature=1.3, top_p=0.8, max_tokens=9, presence_penalty=0.5),
        ] * 3
        alone = []
        for index, prompt in enumerate(prompts):
            (request,) = make_requests([prompt], params[index], seeds=[index])
            drain(self.make_engine(toy_model), [request])
            alone.append(request.output_token_ids)
        requests = make_requests(prompts, params, seeds=range(9))
        shuffled = random.Random(5).sample(requests, len(requests))
        drain(self.make_engine(toy_model), shuffled[:4], later={2: shuffled[4:]})
        assert [request.output_token_ids for request in requests] == alone

    def test_conversation_goes_on_from_what_this_engine_answered(self, toy_model: CausalLM) -> None:
        spec = "multi-turn:conversations=3,turns=3,system=20,question=2-9,output=3-8,think=0.001"
        workload = make_workload(spec, vocab_size=199)
        record = record_run(
            self.make_engine(toy_model), workload, seed=0, clock=SystemClock(),
            before_step=lambda: None, after_step=lambda: None,
        )  # fmt: skip
        for source in workload.requests:
            done = record.requests[source.request_id]
            if source.follows is not None:
                before = record.requests[source.follows]
                history = [*before.prompt_token_ids, *before.token_ids]
                assert list(done.prompt_token_ids) == [*history, *source.prompt_token_ids]
                assert done.arrival_s >= record.token_times_s(source.follows)[-1] + 0.001
            alone = make_request(source, done.prompt_token_ids, seed=0)
            drain(self.make_engine(toy_model), [alone])
            assert done.token_ids == alone.output_token_ids

    def test_closed_loops_are_measured_from_end_to_end(self, toy_model: CausalLM) -> None:
        ceilings = Ceilings(copy_bytes_per_s=1e9, matmul_flops_per_s=1e9, dtype="float32")
        for spec, groups in (
            ("multi-turn:conversations=2,turns=2,question=2-9,output=3-8,system=0", 2),
            ("prefix-hit:prompt=40,cached=0.5/0.9,num=2", 3),
        ):
            llm = SimpleNamespace(engine=self.make_engine(toy_model), model=toy_model)
            workload = make_workload(spec, vocab_size=199)
            result = run_benchmark(llm, workload, stage=self.stage.__name__, ceilings=ceilings)
            assert len(result["ttft_by_group_s"]) == groups
            rows = {row["request_id"]: row for row in result["requests"]}
            for row in rows.values():
                if row["follows"] is not None:
                    assert row["arrival_s"] >= rows[row["follows"]]["last_token_s"]

    def test_every_eos_id_of_the_generation_config_ends_a_request(
        self, toy_model: CausalLM
    ) -> None:
        assert toy_model.config.eos_token_ids == {2, 3}
        for eos in (2, 3):
            params = _greedy(8, logit_bias={eos: 1e4})
            (request,) = make_requests([[5, 6, 7]], params, eos_token_ids=frozenset({2, 3}))
            drain(self.make_engine(toy_model), [request])
            assert request.output_token_ids == [eos]
            assert request.finish_reason is FinishReason.STOP

    def test_llm_knows_every_eos_id_of_the_generation_config(self, toy_directory: Path) -> None:
        options = {"max_model_len": 192, **self.options}
        llm = self.stage.LLM(toy_directory, device="cpu", **options)
        for eos in (2, 3):
            params = _greedy(8, logit_bias={eos: 1e4})
            (output,) = llm.generate([[5, 6, 7]], params, use_tqdm=False)
            assert output.outputs[0].token_ids == [eos]
            assert output.outputs[0].finish_reason == "stop"

    def test_ignore_eos_goes_on_to_max_tokens(self, toy_model: CausalLM) -> None:
        params = _greedy(8, logit_bias={2: 1e4}, ignore_eos=True)
        (request,) = make_requests([[5, 6, 7]], params, eos_token_ids=frozenset({2}))
        drain(self.make_engine(toy_model), [request])
        assert request.output_token_ids == [2] * 8
        assert request.finish_reason is FinishReason.LENGTH

    def test_no_stop_token_before_min_tokens(self, toy_model: CausalLM) -> None:
        params = _greedy(8, logit_bias={2: 1e4, 9: 1e3}, min_tokens=3, stop_token_ids=[9])
        (request,) = make_requests([[5, 6, 7]], params, eos_token_ids=frozenset({2}))
        drain(self.make_engine(toy_model), [request])
        assert len(request.output_token_ids) == 4
        assert request.output_token_ids[-1] == 2
        assert not {2, 9} & set(request.output_token_ids[:-1])

    def test_stop_token_id_ends_a_request(self, toy_model: CausalLM) -> None:
        params = _greedy(8, logit_bias={11: 1e4}, stop_token_ids=[11], ignore_eos=True)
        (request,) = make_requests([[5, 6, 7]], params)
        drain(self.make_engine(toy_model), [request])
        assert request.output_token_ids == [11]
        assert request.finish_reason is FinishReason.STOP

    def test_request_may_fill_max_model_len_exactly(self, toy_model: CausalLM) -> None:
        (request,) = make_requests([[7] * 150], _greedy(42, ignore_eos=True))
        drain(self.make_engine(toy_model), [request])
        assert request.num_output_tokens == 42

    def test_oversize_request_is_refused_and_harms_nobody(self, toy_model: CausalLM) -> None:
        engine = self.make_engine(toy_model)
        good, bad = make_requests([[1, 2, 3], [7] * 151], _greedy(42, ignore_eos=True))
        engine.add_request(good)
        with pytest.raises(ValueError, match="max_model_len is 192"):
            engine.add_request(bad)
        drain(engine, [])
        assert good.num_output_tokens == 42

    def test_setting_that_the_vocabulary_cannot_serve_is_refused(self, toy_model: CausalLM) -> None:
        engine = self.make_engine(toy_model)
        good, bad = make_requests([[1], [2]], [_greedy(3), _greedy(3, logit_bias={199: 1.0})])
        engine.add_request(good)
        with pytest.raises(ValueError, match="logit_bias names token 199"):
            engine.add_request(bad)
        drain(engine, [])
        assert good.finish_reason is not None

    def test_max_model_len_beyond_the_model_is_refused(self, toy_model: CausalLM) -> None:
        with pytest.raises(ValueError, match="at most 512 tokens"):
            self.make_engine(toy_model, max_model_len=513, **self.options_for_long_context())

    def options_for_long_context(self) -> dict[str, Any]:
        """Overrides that make max_model_len 513 valid but for the model."""
        return {}

    def test_cache_too_small_for_one_request_is_refused(self, toy_model: CausalLM) -> None:
        with pytest.raises(ValueError, match="kv_cache_bytes"):
            self.make_engine(toy_model, kv_cache_bytes=100)

    @pytest.mark.parametrize("option", ["max_model_len", "kv_cache_bytes"])
    def test_config_value_that_cannot_work_is_refused(self, option: str) -> None:
        with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
            self.stage.EngineConfig(**{option: 0})

    def test_config_value_of_another_type_is_refused(self) -> None:
        for option, value, message in (
            ("max_model_len", 100.5, "max_model_len must be a whole number, got 100.5"),
            ("max_model_len", True, "max_model_len must be a whole number, got True"),
            ("max_model_len", None, "max_model_len must be a whole number, got None"),
            ("kv_cache_bytes", 1e9, "kv_cache_bytes must be a whole number or None, got 1000000"),
            ("kv_cache_bytes", "1GiB", "kv_cache_bytes must be a whole number or None, got '1GiB'"),
        ):
            with pytest.raises(ValueError, match=message):
                self.stage.EngineConfig(**{option: value})

    def test_request_id_in_use_is_refused_and_free_again_later(self, toy_model: CausalLM) -> None:
        engine = self.make_engine(toy_model)
        first, twin, heir = make_requests([[1, 2]] * 3, _greedy(4), ids=["a", "a", "a"])
        engine.add_request(first)
        with pytest.raises(ValueError, match="'a' is in use"):
            engine.add_request(twin)
        drain(engine, [])
        drain(engine, [heir])
        assert heir.output_token_ids == first.output_token_ids

    @pytest.mark.no_cover
    def test_abort_in_every_state_frees_everything(self, toy_model: CausalLM) -> None:
        prompts = random_prompts(seed=6, count=6, vocab_size=199, max_len=40)
        for num_steps in range(12):
            engine = self.make_engine(toy_model)
            survivor, *others = make_requests(prompts, _greedy(6, ignore_eos=True))
            for request in (*others[:3], survivor, *others[3:]):
                engine.add_request(request)
            for _ in range(num_steps):
                check_step(engine, engine.step())
            for request in others:
                engine.abort_request(request.request_id)
                engine.abort_request(request.request_id)
            drain(engine, [])
            assert survivor.num_output_tokens == 6
            for request in others:
                is_complete = request.num_output_tokens == 6
                expected = FinishReason.LENGTH if is_complete else FinishReason.ABORT
                assert request.finish_reason is expected

    def test_abort_of_an_unknown_request_is_ignored(self, toy_model: CausalLM) -> None:
        engine = self.make_engine(toy_model)
        engine.abort_request("nobody")
        check_idle(engine)

    def test_abort_does_not_change_the_others_tokens(self, toy_model: CausalLM) -> None:
        prompts = random_prompts(seed=7, count=5, vocab_size=199, max_len=40)
        expected = make_requests(prompts, _greedy(12, ignore_eos=True))
        drain(self.make_engine(toy_model), expected)
        engine = self.make_engine(toy_model)
        requests = make_requests(prompts, _greedy(12, ignore_eos=True))
        for request in requests:
            engine.add_request(request)
        for _ in range(4):
            engine.step()
        engine.abort_request(requests[0].request_id)
        engine.abort_request(requests[2].request_id)
        drain(engine, [])
        for index in (1, 3, 4):
            assert requests[index].output_token_ids == expected[index].output_token_ids

    @pytest.mark.parametrize("num_good_steps", [0, 3])
    def test_step_that_was_broken_off_can_be_repeated(
        self, toy_model: CausalLM, monkeypatch: pytest.MonkeyPatch, num_good_steps: int
    ) -> None:
        prompts = random_prompts(seed=8, count=3, vocab_size=199, max_len=40)
        expected = make_requests(prompts, _greedy(8, ignore_eos=True))
        drain(self.make_engine(toy_model), expected)
        engine: Any = self.make_engine(toy_model)
        requests = make_requests(prompts, _greedy(8, ignore_eos=True))
        for request in requests:
            engine.add_request(request)
        for _ in range(num_good_steps):
            engine.step()
        # Ctrl-C in the middle of the model: keys and values of some layers are stored already. A
        # captured graph calls no attention: there it comes once the whole model has run.
        with monkeypatch.context() as patch:
            runner = engine.model_runner
            attend, execute = runner.attention.forward, getattr(runner, self.run_step)
            patch.setattr(runner.attention, "forward", _interrupt_calls(attend, every=2))
            patch.setattr(runner, self.run_step, _interrupt_calls(execute, every=1))
            for _ in range(20):  # once might leave too little behind to change a token
                with pytest.raises(KeyboardInterrupt):
                    engine.step()
        drain(engine, [])
        assert [r.output_token_ids for r in requests] == [r.output_token_ids for r in expected]

    def test_request_aborted_while_its_step_runs_gets_no_token(
        self, toy_model: CausalLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine: Any = self.make_engine(toy_model)
        params = _greedy(6, logit_bias={2: 1e4})
        aborted, other = make_requests([[5, 6]] * 2, params, eos_token_ids=frozenset({2}))
        engine.add_request(aborted)
        engine.add_request(other)
        execute = getattr(engine.model_runner, self.run_step)

        def abort_and_execute(scheduler_output: Any) -> Any:
            engine.abort_request(aborted.request_id)
            return execute(scheduler_output)

        with monkeypatch.context() as patch:
            patch.setattr(engine.model_runner, self.run_step, abort_and_execute)
            output = engine.step()
        assert aborted.request_id not in [token.request_id for token in output.tokens]
        drain(engine, [])
        assert (aborted.output_token_ids, other.output_token_ids) == ([], [2])
        assert aborted.finish_reason is FinishReason.ABORT

    @pytest.mark.no_cover
    def test_interrupt_at_any_line_of_the_stage_changes_no_token(self, toy_model: CausalLM) -> None:
        assert self.stage.__file__ is not None
        files = [str(path) for path in Path(self.stage.__file__).parent.glob("*.py")]
        prompts = random_prompts(seed=9, count=4, vocab_size=199, max_len=12)
        params = [_greedy(n, ignore_eos=True) for n in (1, 3, 5, 4)]
        expected, num_lines = self._run_interrupted(toy_model, prompts, params, files, 0)
        for index in range(25):  # lines spread over the whole run; the scheduler's tests try all
            line_number = 1 + index * num_lines // 25
            tokens, _ = self._run_interrupted(toy_model, prompts, params, files, line_number)
            assert tokens == expected, f"interrupted at line {line_number}"

    def _run_interrupted(
        self,
        model: CausalLM,
        prompts: list[list[int]],
        params: list[SamplingParams],
        files: list[str],
        line_number: int,
    ) -> tuple[list[list[int]], int]:
        """(Tokens that were reported per request, lines that were executed)."""
        engine = self.make_engine(model)
        requests = make_requests(prompts, params)
        reported: dict[str, list[int]] = {request.request_id: [] for request in requests}
        interrupt = LineInterrupt(files, line_number)
        for request in requests:
            engine.add_request(request)
        for _ in range(200):  # without end if a request is in no queue
            try:
                with interrupt:
                    output = engine.step()
            except KeyboardInterrupt:
                continue
            check_step(engine, output)
            for token in output.tokens:
                reported[token.request_id].append(token.token_id)
            if not engine.has_unfinished_requests():
                break
        assert interrupt.has_fired == (line_number > 0)
        check_idle(engine)
        return list(reported.values()), interrupt.num_lines

    def test_step_without_requests_returns_nothing(self, toy_model: CausalLM) -> None:
        output = self.make_engine(toy_model).step()
        assert output.tokens == ()
        assert output.stats.num_scheduled_tokens == 0

    def test_tokens_are_reported_once_each_and_in_order(self, toy_model: CausalLM) -> None:
        prompts = random_prompts(seed=8, count=7, vocab_size=199, max_len=40)
        requests = make_requests(prompts, _greedy(10, ignore_eos=True))
        tokens = drain(self.make_engine(toy_model), requests)
        for request in requests:
            own = [token for token in tokens if token.request_id == request.request_id]
            assert [token.token_id for token in own] == request.output_token_ids
            assert [token.finish_reason for token in own[:-1]] == [None] * (len(own) - 1)
            assert own[-1].finish_reason is FinishReason.LENGTH

    def test_logprobs_come_with_every_token_of_who_asked(self, toy_model: CausalLM) -> None:
        asking, silent = make_requests([[4, 5], [6]], [_greedy(5, logprobs=3), _greedy(5)])
        tokens = drain(self.make_engine(toy_model), [asking, silent])
        for token in tokens:
            if token.request_id == silent.request_id:
                assert token.logprobs is None
            else:
                assert token.logprobs is not None
                assert token.logprobs.rank == 1
                assert token.logprobs.top[0] == (token.token_id, token.logprobs.logprob)
                assert len(token.logprobs.top) == 3

    def test_prompt_logprobs_equal_transformers(self, toy_directory: Path) -> None:
        """In one engine twice, so that a prefix cache has them; with more than its blocks hold."""
        prompts = random_prompts(seed=7, count=10, vocab_size=199, max_len=90)
        rows = reference_logits(toy_directory, [p[:1] for p in prompts], [p[1:] for p in prompts])
        options = self.fuzz_options(random.Random(7))
        engine = self.make_engine(load_model(toy_directory), **options)
        for run in range(2):
            params = [_greedy(12, prompt_logprobs=index % 4) for index in range(9)] + [_greedy(12)]
            requests = make_requests(prompts, params, ids=[f"{run}-{i}" for i in range(10)])
            drain(engine, requests[:3], later={1: requests[3:7], 4: requests[7:]})
            assert requests[9].prompt_logprobs == []
            for index, request in enumerate(requests[:9]):
                self.check_prompt_logprobs(request, rows[index].log_softmax(-1), index % 4)

    @staticmethod
    def check_prompt_logprobs(request: Request, expected: torch.Tensor, num_top: int) -> None:
        assert len(request.prompt_logprobs) == request.num_prompt_tokens - 1 == len(expected)
        for position, row, token_id in zip(
            request.prompt_logprobs, expected, request.prompt_token_ids[1:], strict=True
        ):
            assert position.logprob == pytest.approx(float(row[token_id]), abs=1e-3)
            assert position.rank == int((row > row[token_id]).sum()) + 1
            ids, values = [i for i, _ in position.top], [value for _, value in position.top]
            assert values == pytest.approx(row.topk(num_top).values.tolist(), abs=1e-3)
            assert values == pytest.approx(row[ids].tolist(), abs=1e-3)

    def test_prompt_logprobs_survive_steps_that_break_off(self, toy_model: CausalLM) -> None:
        prompts = random_prompts(seed=8, count=6, vocab_size=199, max_len=60)
        params = _greedy(6, prompt_logprobs=1)
        expected = make_requests(prompts, params)
        drain(self.make_engine(toy_model), expected)
        engine: Any = self.make_engine(toy_model)
        runner = engine.model_runner
        setattr(runner, self.run_step, _interrupt_calls(getattr(runner, self.run_step), every=10))
        requests = make_requests(prompts, params)
        for request in requests:
            engine.add_request(request)
        while engine.has_unfinished_requests():
            with suppress(KeyboardInterrupt):
                engine.step()
        for request, twin in zip(requests, expected, strict=True):
            assert len(request.prompt_logprobs) == len(twin.prompt_logprobs)
            for position, other in zip(request.prompt_logprobs, twin.prompt_logprobs, strict=True):
                assert position.logprob == pytest.approx(other.logprob, abs=1e-3)

    def test_rules_on_tokens_hold_in_every_output(self, toy_directory: Path) -> None:
        """Words of several tokens are checked against outputs that are still on their way."""
        prompts = random_prompts(seed=9, count=4, vocab_size=199, max_len=40)
        engine = self.make_engine(load_model(toy_directory))
        allowed = _greedy(20, allowed_token_ids=[7, 30, 198], ignore_eos=True)
        requests = make_requests(prompts, [allowed, allowed, _greedy(20), _greedy(20)])
        drain(engine, requests)
        plain = requests[2].output_token_ids
        for request in requests[:2]:
            assert set(request.output_token_ids) <= {7, 30, 198}
        params = _greedy(20, bad_words=["given as token ids"])
        words = ((plain[0],), (plain[3], plain[4]), (plain[5], plain[6], plain[7]))
        ruled = Request(
            request_id="ruled",
            prompt_token_ids=prompts[2],
            sampling_params=params,
            bad_words_token_ids=words,
        )
        drain(engine, [ruled])
        tokens = ruled.output_token_ids
        assert len(tokens) == 20
        for word in words:
            starts = range(len(tokens) - len(word) + 1)
            assert not any(tuple(tokens[start : start + len(word)]) == word for start in starts)

    def test_structured_outputs_are_valid_whatever_is_sampled(self, tmp_path: Path) -> None:
        """A random model at a high temperature, in a cache that makes requests give way."""
        pytest.importorskip("llguidance")
        write_toy_model(
            ToyFamily("llama", "llama", {"vocab_size": 373, "tie_word_embeddings": False}), tmp_path
        )
        tokenizer = Tokenizer(save_byte_level_tokenizer(tmp_path))
        (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 0]}')
        options = {"max_model_len": 192, **self.options, **self.fuzz_options(random.Random(3))}
        llm = self.stage.LLM(tmp_path, device="cpu", **options)
        schema = {
            "type": "object",
            "properties": {"age": {"enum": [7, 42]}, "name": {"type": "string", "maxLength": 4}},
            "required": ["age", "name"],
            "additionalProperties": False,
        }
        structures = [
            StructuredOutputsParams(json=schema, disable_any_whitespace=True),
            StructuredOutputsParams(regex="(ab|cd){2,5}"),
            StructuredOutputsParams(choice=["yes", "no", "世界"]),
            StructuredOutputsParams(grammar='start: "(" start? ")" | "x"'),
        ] * 3
        params = [
            SamplingParams(temperature=2.0, seed=index, max_tokens=70, structured_outputs=structure)
            for index, structure in enumerate(structures)
        ]
        plain = _greedy(20)
        prompts = random_prompts(seed=10, count=13, vocab_size=tokenizer.vocab_size, max_len=60)
        *outputs, other = llm.generate(prompts, [*params, plain], use_tqdm=False)
        for index, output in enumerate(outputs):
            (completion,) = output.outputs
            check = (_is_person, _is_repeated, _is_choice, _is_nested)[index % 4]
            if completion.finish_reason == "stop":
                assert check(completion.text), completion.text
            assert (completion.finish_reason == "length") == (len(completion.token_ids) == 70)
        assert sum(output.outputs[0].finish_reason == "stop" for output in outputs) >= 9
        (alone,) = llm.generate(prompts[-1:], plain, use_tqdm=False)
        assert other.outputs[0].token_ids == alone.outputs[0].token_ids

    def test_scaled_rope_reaches_beyond_the_original_context(self, tmp_path: Path) -> None:
        """YaRN with a factor of 4: the file's max_position_embeddings are not the end."""
        rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
        overrides = {"rope_parameters": rope, "max_position_embeddings": 64}
        directory = write_toy_model(ToyFamily("yarn", "qwen2", overrides), tmp_path)
        prompts = random_prompts(seed=9, count=2, vocab_size=199, min_len=70, max_len=230)
        expected = reference_greedy(directory, prompts, max_tokens=20)
        model = load_model(directory)
        assert model.config.max_context_len == 256
        engine = self.make_engine(model, max_model_len=256)
        requests = make_requests(prompts, _greedy(20, ignore_eos=True))
        drain(engine, requests)
        assert [request.output_token_ids for request in requests] == expected

    @pytest.mark.no_cover
    def test_calls_of_several_threads_get_the_tokens_of_each_alone(self, tmp_path: Path) -> None:
        directory = write_toy_model(toy_families()[3], tmp_path)
        llm = self.make_llm(directory)
        calls = _mixed_calls(num_calls=24)
        expected = [call(self.make_llm(directory)) for call in calls]
        with ThreadPoolExecutor(6) as pool:
            for _ in range(2):
                assert list(pool.map(lambda call: call(llm), calls)) == expected
        check_idle(llm.engine)

    @pytest.mark.no_cover
    def test_two_processes_give_the_tokens_of_one(self, tmp_path: Path) -> None:
        directory = write_toy_model(toy_families()[3], tmp_path)
        calls = _mixed_calls(num_calls=6)
        expected = [call(self.make_llm(directory)) for call in calls]
        llm = self.make_llm(directory, tensor_parallel_size=2)
        assert [call(llm) for call in calls] == expected
        check_idle(llm.engine)
        llm.close()

    @pytest.mark.no_cover
    @pytest.mark.parametrize("seed", range(8))
    def test_fuzz_of_arrivals_aborts_and_settings(self, toy_model: CausalLM, seed: int) -> None:
        rng = random.Random(seed)
        prompts = random_prompts(seed=seed, count=14, vocab_size=199, max_len=rng.choice([3, 60]))
        params = [
            rng.choice(
                [
                    _greedy(rng.randrange(1, 20)),
                    SamplingParams(temperature=1.0, top_p=0.9, max_tokens=rng.randrange(1, 20)),
                ]
            )
            for _ in prompts
        ]
        eos = frozenset(rng.sample(range(199), 20))
        expected = []
        for index, prompt in enumerate(prompts):
            (request,) = make_requests([prompt], params[index], seeds=[index], eos_token_ids=eos)
            drain(self.make_engine(toy_model), [request])
            expected.append(request.output_token_ids)
        requests = make_requests(prompts, params, seeds=range(14), eos_token_ids=eos)
        later: dict[int, list[Request]] = {}
        for request in requests:
            later.setdefault(rng.randrange(15), []).append(request)
        aborts = {rng.randrange(1, 25): rng.choice(requests).request_id for _ in range(4)}
        drain(self.make_engine(toy_model, **self.fuzz_options(rng)), [], later, aborts)
        for request, tokens in zip(requests, expected, strict=True):
            if request.finish_reason is FinishReason.ABORT:
                assert request.output_token_ids == tokens[: request.num_output_tokens]
            else:
                assert request.output_token_ids == tokens

    def fuzz_options(self, rng: random.Random) -> dict[str, Any]:
        """EngineConfig values to draw anew for every fuzz run; a stage adds its own."""
        return {}
