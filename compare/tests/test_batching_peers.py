"""The adapters of vLLM and nano-vllm against stand-ins of those packages."""

import enum
import json
import os
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from compare.peers import nano_vllm_peer, vllm_peer, vllm_settings  # noqa: E402
from compare.peers.peer import PeerLLM, PeerModel, main  # noqa: E402
from compare.peers.vllm_worker import MeasuredWorker  # noqa: E402
from folovllm.model.config import ModelConfig  # noqa: E402
from folovllm.request import Request, SamplingParams  # noqa: E402
from folovllm.testing.toy_models import toy_families, write_toy_model  # noqa: E402
from folovllm.workloads.workload import make_workload  # noqa: E402

FACTS = PeerModel(
    config=ModelConfig.preset("qwen3-0.6b"),
    device=torch.device("cpu"),
    dtype=torch.bfloat16,
    num_parameters=1,
)


def make_request(name, max_tokens=2):
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=2)
    return Request(request_id=name, prompt_token_ids=[1, 2, 3], sampling_params=params)


def run_to_end(engine):
    tokens: dict[str, list[int]] = {}
    while engine.has_unfinished_requests():
        for token in engine.step().tokens:
            tokens.setdefault(token.request_id, []).append(token.token_id)
    return tokens


class FakeMode(enum.IntEnum):
    VLLM_COMPILE = 3


class SyncMPClient:
    """Named as vLLM's client of a core in another process."""

    def __init__(self):
        self.was_shut_down = False

    def shutdown(self):
        self.was_shut_down = True


class FakeLLMEngine:
    """Gives every request one token a step, 10 and counting, like vLLM's DELTA outputs."""

    def __init__(self):
        self.vllm_config = SimpleNamespace(
            cache_config=SimpleNamespace(
                num_gpu_blocks=10, block_size=16, enable_prefix_caching=True, cache_dtype="auto"
            ),
            scheduler_config=SimpleNamespace(
                max_num_seqs=1024, max_num_batched_tokens=16384, async_scheduling=True
            ),
            compilation_config=SimpleNamespace(mode=FakeMode.VLLM_COMPILE),
        )
        self.engine_core = SyncMPClient()
        self.requests, self.params, self.aborted = {}, {}, []
        self.num_resets, self.num_failed_resets = 0, 0
        self.cached: set[tuple[int, ...]] = set()
        """Prompts that a prefix cache would find."""
        self.found: list[str] = []

    def add_request(self, request_id, prompt, params):
        assert list(prompt) == ["prompt_token_ids"]
        if tuple(prompt["prompt_token_ids"]) in self.cached:
            self.found.append(request_id)
        self.cached.add(tuple(prompt["prompt_token_ids"]))
        self.requests[request_id], self.params[request_id] = 10, params

    def abort_request(self, request_ids):
        self.aborted += request_ids
        for name in request_ids:
            self.requests.pop(name)

    def reset_prefix_cache(self):
        if self.num_failed_resets:
            self.num_failed_resets -= 1
            return False
        self.num_resets += 1
        self.cached.clear()
        return True

    def step(self):
        outputs = []
        for name, token_id in list(self.requests.items()):
            entry = SimpleNamespace(logprob=-0.1, rank=1)
            other = SimpleNamespace(logprob=-2.0, rank=2)
            completion = SimpleNamespace(
                token_ids=[token_id], logprobs=[{99: other, token_id: entry}]
            )
            outputs.append(SimpleNamespace(request_id=name, outputs=[completion]))
            self.requests[name] += 1
            if self.requests[name] == 10 + self.params[name].max_tokens:
                del self.requests[name]
        return outputs


class FakeLLM:
    """vLLM's LLM: an engine, `generate`, and calls into the worker by name."""

    def __init__(self, **options):
        self.options = options
        self.llm_engine = FakeLLMEngine()
        self.generated: list[SimpleNamespace] = []
        self.tokens_missing = 0
        self.worker = {
            "folovllm_reset_peak_memory": None,
            "folovllm_peak_memory_bytes": 3 << 30,
            "folovllm_attention_backends": ["FLASH_ATTN"],
        }

    def collective_rpc(self, method):
        return [self.worker[method]]

    def generate(self, prompts, params, *, use_tqdm):
        assert use_tqdm is False
        self.generated += params
        found = [p for p in prompts if tuple(p["prompt_token_ids"]) in self.llm_engine.cached]
        self.llm_engine.found += ["generate"] * len(found)
        return [
            SimpleNamespace(
                outputs=[SimpleNamespace(token_ids=[0] * (p.max_tokens - self.tokens_missing))]
            )
            for p in params
        ]


@pytest.fixture
def fake_vllm(monkeypatch):
    package, params = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    made = []
    vars(package)["SamplingParams"] = lambda **options: SimpleNamespace(**options)

    def make(**options):
        made.append(FakeLLM(**options))
        return made[-1]

    vars(package)["LLM"] = make
    vars(package)["__version__"] = "0.26.0"
    vars(params)["RequestOutputKind"] = SimpleNamespace(DELTA="delta")
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", params)
    monkeypatch.setattr(vllm_peer, "_RESET_INTERVAL_S", 0.0)
    return made


@pytest.fixture
def llm(fake_vllm):
    return FakeLLM()


@pytest.fixture
def engine(llm):
    return vllm_peer.VllmEngine(vllm_peer.EngineConfig(), llm, FACTS)


def test_vllm_requests_are_greedy_to_the_full_length_and_tokens_come_back(llm, engine):
    engine.add_request(make_request("a"))
    params = llm.llm_engine.params["a"]
    assert (params.temperature, params.ignore_eos, params.max_tokens) == (0.0, True, 2)
    output = engine.step()
    logprobs = output.tokens[0].logprobs
    assert logprobs is not None and logprobs.top == ((10, -0.1), (99, -2.0))
    assert output.stats.num_kv_tokens_capacity == 160
    assert run_to_end(engine) == {"a": [11]}
    assert engine.model_runner.kv_cache.num_bytes == 160 * FACTS.kv_bytes_per_token


def test_vllm_abort_reaches_vllm_once(llm, engine):
    engine.add_request(make_request("a"))
    for _ in range(2):
        engine.abort_request("a")
    assert llm.llm_engine.aborted == ["a"] and not engine.has_unfinished_requests()


def test_vllm_config_says_what_vllm_chose(engine):
    config = engine.config
    assert (config.max_num_seqs, config.max_num_batched_tokens) == (1024, 16384)


def test_vllm_prefix_cache_is_emptied_as_soon_as_vllm_can(llm, engine):
    llm.llm_engine.num_failed_resets = 3
    engine.reset_prefix_cache()
    assert llm.llm_engine.num_resets == 1
    llm.llm_engine.num_failed_resets = 10**6
    with pytest.raises(RuntimeError, match="did not empty its prefix cache"):
        engine.reset_prefix_cache()


def test_vllm_generate_is_asked_for_the_same_and_must_give_it(llm, engine):
    workload = make_workload("fixed:batch=3,input=4,output=5", vocab_size=50)
    assert engine.generate(workload.requests) > 0
    assert [vars(params) for params in llm.generated] == [
        {"temperature": 0.0, "max_tokens": 5, "ignore_eos": True, "detokenize": False}
    ] * 3
    assert llm.llm_engine.num_resets == 1
    llm.tokens_missing = 1
    with pytest.raises(RuntimeError, match="gave 12 tokens"):
        engine.generate(workload.requests)


def test_vllm_memory_is_that_of_the_core_or_unknown(llm, capsys):
    memory = vllm_peer.CoreMemory(vllm_peer._asker(llm))
    memory.reset()
    assert memory.peak_bytes() == 3 << 30
    llm.worker.clear()
    assert memory.peak_bytes() is None
    assert "did not answer folovllm_peak_memory_bytes" in capsys.readouterr().err


def test_worker_tells_its_attention_and_its_memory(monkeypatch):
    calls = []
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    groups = [
        SimpleNamespace(backend=SimpleNamespace(get_name=lambda name=name: name))
        for name in ("B", "A", "B")
    ]
    worker = MeasuredWorker()
    worker.model_runner = SimpleNamespace(attn_groups=[groups[:1], groups[1:]])
    assert worker.folovllm_attention_backends() == ["A", "B"]
    worker.folovllm_reset_peak_memory()
    assert calls == ["synchronize", "reset_peak_memory_stats"]
    assert worker.folovllm_peak_memory_bytes() == 7
    name = f"{MeasuredWorker.__module__}.{MeasuredWorker.__qualname__}"
    assert name == vllm_peer.WORKER_EXTENSION


def test_settings_are_those_that_vllm_tells(llm, fake_vllm, monkeypatch):
    for name in list(os.environ):
        if name.startswith("VLLM_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_USE_DEEP_GEMM", "0")
    monkeypatch.setenv("VLLM_CACHE_ROOT", os.sep + "somewhere")
    told = vllm_settings.describe_settings(llm.llm_engine, [["FLASH_ATTN"]])
    assert told["version"] == "0.26.0"
    assert told["core_in_own_process"] is True
    assert told["async_scheduling"] is True and told["enable_prefix_caching"] is True
    assert told["max_num_batched_tokens"] == 16384
    assert told["compilation_mode"] == "VLLM_COMPILE"
    assert told["cudagraph_mode"] is None
    assert told["attention_backends"] == ["FLASH_ATTN"]
    assert told["sampling"] == {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
    assert told["environment"] == {"VLLM_USE_DEEP_GEMM": "0"}
    json.dumps(told)
    llm.llm_engine.engine_core = type("InprocClient", (), {})()
    told = vllm_settings.describe_settings(llm.llm_engine, None)
    assert told["core_in_own_process"] is False and told["attention_backends"] is None


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy_model(toy_families()[0], tmp_path_factory.mktemp("toy"))


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ({}, {"max_model_len": 2048}),
        (
            {"max_model_len": 64, "kv_cache_bytes": 1 << 20, "max_num_seqs": 8},
            {"max_model_len": 64, "kv_cache_memory_bytes": 1 << 20, "max_num_seqs": 8},
        ),
    ],
)
def test_vllm_is_started_with_its_own_defaults_and_shut_down(
    fake_vllm, toy, monkeypatch, given, passed
):
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    monkeypatch.setattr(vllm_peer, "resolve_device", lambda _: torch.device("cuda"))
    config = vllm_peer.EngineConfig(**given)
    with vllm_peer.start(
        str(toy), load_format="auto", dtype="float32", device="cuda", seed=3, config=config
    ) as peer:
        (made,) = fake_vllm
        assert made.options == passed | {
            "model": str(toy),
            "dtype": "float32",
            "seed": 3,
            "skip_tokenizer_init": True,
            "worker_extension_cls": vllm_peer.WORKER_EXTENSION,
        }
        assert peer.settings is not None and peer.memory is not None
        assert peer.settings["async_scheduling"] is True
        assert peer.settings["attention_backends"] == ["FLASH_ATTN"]
        assert peer.memory.peak_bytes() == 3 << 30
        assert not made.llm_engine.engine_core.was_shut_down
    assert made.llm_engine.engine_core.was_shut_down
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ


@pytest.mark.parametrize(
    ("workload", "is_offline"),
    [
        ("fixed:batch=2,input=8,output=4", True),
        ("poisson:rate=1000,num=2,input=8,output=4", False),
        ("prefix-hit:prompt=8,num=1,output=4", False),
        ("multi-turn:conversations=1,turns=2,system=2,question=3,output=4", False),
    ],
)
def test_vllm_rates_are_those_of_generate_where_all_requests_are_there_at_once(
    llm, engine, tmp_path, workload, is_offline
):
    @contextmanager
    def start(model, **_):
        yield PeerLLM(
            engine=engine,
            model=FACTS,
            tokenizer=None,
            memory=vllm_peer.CoreMemory(vllm_peer._asker(llm)),
            generate=lambda requests: engine.generate(requests) * 0 + 0.25,
            settings={"version": "0.26.0"},
        )

    output = tmp_path / "vllm.json"
    command = ["bench", "--model", "toy", "--workload", workload, "--output", str(output)]
    assert main("vllm", vllm_peer.EngineConfig, start, command) == 0
    result = json.loads(output.read_text())
    assert result["peer"] == {"version": "0.26.0"}
    assert result["sampling"] == {"temperature": 0.0, "ignore_eos": True}
    assert result["engine_config"]["max_num_seqs"] == 1024
    assert result["peak_memory_bytes"]["total"] == 3 << 30
    assert result["workload"]["num_output_tokens"] == 8
    assert ("rates_from" in result) is is_offline
    if is_offline:
        assert result["duration_s"] == 0.25 and result["output_tokens_per_s"] == 32.0
        by_steps = result["rates_by_steps"]
        assert by_steps["duration_s"] == pytest.approx(
            sum(result["steps"]["duration_s"]), rel=0.5, abs=0.01
        )
        assert by_steps["output_tokens_per_s"] == pytest.approx(8 / by_steps["duration_s"])
    # Neither run found the prompts of a run before it.
    assert [name for name in llm.llm_engine.found if not name.startswith(("warmup", "gate"))] == []


class FakeSequence:
    def __init__(self, prompt, params):
        self.token_ids, self.num_prompt_tokens = list(prompt), len(prompt)
        self.max_tokens = params.max_tokens

    @property
    def num_completion_tokens(self):
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_finished(self):
        return self.num_completion_tokens == self.max_tokens


class FakeNanoVllm:
    """As nano-vllm's LLM: a waiting queue, and steps that either prefill or decode."""

    def __init__(self):
        self.scheduler = SimpleNamespace(
            waiting=[], block_manager=SimpleNamespace(hash_to_block_id={7: 0})
        )
        self.model_runner = SimpleNamespace(kv_cache=torch.zeros(4, 5, dtype=torch.bfloat16))
        self.running = []

    def add_request(self, prompt, params):
        self.scheduler.waiting.append(FakeSequence(prompt, params))

    def step(self):
        batch = list(self.scheduler.waiting) or self.running
        self.running = [*self.running, *self.scheduler.waiting]
        self.scheduler.waiting.clear()
        for sequence in batch:
            sequence.token_ids.append(10 + sequence.num_completion_tokens)
        self.running = [sequence for sequence in self.running if not sequence.is_finished]


@pytest.fixture
def nano(monkeypatch):
    package = ModuleType("nanovllm")
    vars(package)["SamplingParams"] = lambda **options: SimpleNamespace(**options)
    monkeypatch.setitem(sys.modules, "nanovllm", package)
    config = nano_vllm_peer.EngineConfig()
    return nano_vllm_peer.NanoVllmEngine(config, FakeNanoVllm(), FACTS)


def test_nano_vllm_tokens_are_read_off_its_sequences(nano):
    nano.add_request(make_request("a", 3))
    assert nano.step().stats.num_scheduled_tokens == 3
    nano.add_request(make_request("b", 1))
    assert run_to_end(nano) == {"a": [11, 12], "b": [10]}
    assert nano.model_runner.kv_cache.num_bytes == 40


def test_nano_vllm_finds_no_prompt_of_the_gate_in_a_timed_run(nano):
    block_manager = nano._engine.scheduler.block_manager
    hashes = block_manager.hash_to_block_id
    nano.reset_prefix_cache()
    assert hashes == {}
    del block_manager.hash_to_block_id
    with pytest.raises(RuntimeError, match="does not keep its prefix cache in block_manager"):
        nano.reset_prefix_cache()


def test_nano_vllm_takes_back_a_waiting_request_and_refuses_for_a_running_one(nano):
    nano.add_request(make_request("a"))
    nano.abort_request("a")
    nano.abort_request("unknown")
    assert not nano.has_unfinished_requests()
    nano.add_request(make_request("b"))
    nano.step()
    with pytest.raises(RuntimeError, match="cannot abort"):
        nano.abort_request("b")


@pytest.mark.parametrize(
    ("peer", "package", "names"),
    [(vllm_peer, "vllm", ("LLM",)), (nano_vllm_peer, "nanovllm", ("LLM",))],
)
def test_cuda_peers_refuse_a_cpu_by_name(monkeypatch, peer, package, names):
    module = ModuleType(package)
    for name in names:
        setattr(module, name, None)
    monkeypatch.setitem(sys.modules, package, module)
    options = {"load_format": "auto", "dtype": "auto", "device": "cpu", "seed": 0}
    with (
        pytest.raises(ValueError, match="CUDA only"),
        peer.start("x", config=peer.EngineConfig(), **options),
    ):
        pass
