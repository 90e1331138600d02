"""The adapters of vLLM and nano-vllm against stand-ins of those packages."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from compare.peers import nano_vllm_peer, vllm_peer  # noqa: E402
from compare.peers.peer import PeerModel  # noqa: E402
from folovllm.model.config import ModelConfig  # noqa: E402
from folovllm.request import Request, SamplingParams  # noqa: E402

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


class FakeVllm:
    """Gives every request one token a step, 10 and counting, like vLLM's DELTA outputs."""

    vllm_config = SimpleNamespace(cache_config=SimpleNamespace(num_gpu_blocks=10, block_size=16))

    def __init__(self):
        self.requests, self.params, self.aborted = {}, {}, []

    def add_request(self, request_id, prompt, params):
        assert prompt == {"prompt_token_ids": [1, 2, 3]}
        self.requests[request_id], self.params[request_id] = 10, params

    def abort_request(self, request_ids):
        self.aborted += request_ids

    def step(self):
        outputs = []
        for name, token_id in self.requests.items():
            entry = SimpleNamespace(logprob=-0.1, rank=1)
            other = SimpleNamespace(logprob=-2.0, rank=2)
            completion = SimpleNamespace(
                token_ids=[token_id], logprobs=[{99: other, token_id: entry}]
            )
            outputs.append(SimpleNamespace(request_id=name, outputs=[completion]))
            self.requests[name] += 1
        return outputs


@pytest.fixture
def fake_vllm(monkeypatch):
    package, params = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    vars(package)["SamplingParams"] = lambda **options: SimpleNamespace(**options)
    vars(params)["RequestOutputKind"] = SimpleNamespace(DELTA="delta")
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", params)
    return FakeVllm()


def test_vllm_requests_are_greedy_to_the_full_length_and_tokens_come_back(fake_vllm):
    engine = vllm_peer.VllmEngine(vllm_peer.EngineConfig(), fake_vllm, FACTS)
    engine.add_request(make_request("a"))
    params = fake_vllm.params["a"]
    assert (params.temperature, params.ignore_eos, params.max_tokens) == (0.0, True, 2)
    output = engine.step()
    logprobs = output.tokens[0].logprobs
    assert logprobs is not None and logprobs.top == ((10, -0.1), (99, -2.0))
    assert output.stats.num_kv_tokens_capacity == 160
    assert run_to_end(engine) == {"a": [11]}
    assert engine.model_runner.kv_cache.num_bytes == 160 * FACTS.kv_bytes_per_token


def test_vllm_abort_reaches_vllm_once(fake_vllm):
    engine = vllm_peer.VllmEngine(vllm_peer.EngineConfig(), fake_vllm, FACTS)
    engine.add_request(make_request("a"))
    for _ in range(2):
        engine.abort_request("a")
    assert fake_vllm.aborted == ["a"] and not engine.has_unfinished_requests()


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
        self.scheduler = SimpleNamespace(waiting=[])
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
    [(vllm_peer, "vllm", ("EngineArgs", "LLMEngine")), (nano_vllm_peer, "nanovllm", ("LLM",))],
)
def test_cuda_peers_refuse_a_cpu_by_name(monkeypatch, peer, package, names):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # put back after the test
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
