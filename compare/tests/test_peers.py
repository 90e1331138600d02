import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from compare.peers import hf  # noqa: E402
from compare.peers.batch_progress import BatchProgress  # noqa: E402
from compare.peers.checkpoint import (  # noqa: E402
    checkpoint,
    count_parameters,
    hf_config,
    save_checkpoint,
)
from compare.peers.peer import main, require_benchmark_request  # noqa: E402
from folovllm.model.config import ModelConfig  # noqa: E402
from folovllm.model.loader import load_model  # noqa: E402
from folovllm.request import Request, SamplingParams  # noqa: E402


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A tiny Llama whose end-of-sequence ids are every token: only an engine that ignores them
    reaches the full length."""
    folder = tmp_path_factory.mktemp("toy")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, initializer_range=0.5,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.generation_config.eos_token_id = list(range(97))
    model.save_pretrained(folder)
    return folder


def make_request(request_id="a", prompt=(3, 4, 5), **params):
    settings = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True, **params}
    return Request(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        sampling_params=SamplingParams(**settings),
    )


def start(folder, **options):
    return hf.start(
        str(folder), load_format="auto", dtype="float32", device="cpu", seed=0,
        config=hf.EngineConfig(max_model_len=32), **options,
    )  # fmt: skip


def greedy(folder, prompt, num_tokens):
    """Greedy tokens by whole forward passes, without a cache and without `generate`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = list(prompt)
    for _ in range(num_tokens):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_hf_runs_one_request_after_the_other_to_the_full_length(toy):
    prompts = {"a": (3, 4, 5), "b": (9, 8, 7, 6)}
    outputs: dict[str, list[int]] = {name: [] for name in prompts}
    scheduled, waiting = [], []
    with start(toy) as llm:
        for name, prompt in prompts.items():
            llm.engine.add_request(make_request(name, prompt, logprobs=2))
        while llm.engine.has_unfinished_requests():
            output = llm.engine.step()
            (token,) = output.tokens
            outputs[token.request_id].append(token.token_id)
            scheduled.append(output.stats.num_scheduled_tokens)
            waiting.append(output.stats.num_waiting)
            assert token.logprobs.rank == 1
            assert token.logprobs.top[0] == (token.token_id, token.logprobs.logprob)
            assert token.logprobs.top[1][1] <= token.logprobs.logprob
        assert llm.engine.model_runner.kv_cache.num_bytes == 0
    assert outputs == {name: greedy(toy, prompt, 6) for name, prompt in prompts.items()}
    assert scheduled == [3, 1, 1, 1, 1, 1, 4, 1, 1, 1, 1, 1]
    assert waiting == [1] * 6 + [0] * 6


def test_hf_request_can_be_aborted_in_any_state_and_the_next_one_runs(toy):
    with start(toy) as llm:
        for name in ("running", "waiting", "last"):
            llm.engine.add_request(make_request(name))
        llm.engine.step()
        for name in ("running", "waiting", "unknown"):
            llm.engine.abort_request(name)
        tokens = []
        while llm.engine.has_unfinished_requests():
            tokens += [token.token_id for token in llm.engine.step().tokens]
    assert tokens == greedy(toy, (3, 4, 5), 6)


def test_hf_error_inside_generate_reaches_the_caller(toy):
    with start(toy) as llm:
        llm.engine.add_request(make_request(prompt=(3, 5000)))  # not in the vocabulary
        with pytest.raises(IndexError):
            llm.engine.step()
        assert not llm.engine.has_unfinished_requests()


def test_hf_refuses_an_id_in_use_and_a_request_that_cannot_fit(toy):
    with start(toy) as llm:
        llm.engine.add_request(make_request())
        with pytest.raises(ValueError, match="in use"):
            llm.engine.add_request(make_request())
        with pytest.raises(ValueError, match="max_model_len=32"):
            llm.engine.add_request(make_request("long", max_tokens=30))


@pytest.mark.parametrize(
    "params", [{"temperature": 1.0}, {"ignore_eos": False}, {"stop": "x"}, {"stop_token_ids": [1]}]
)
def test_peer_refuses_what_it_does_not_translate(params):
    with pytest.raises(ValueError, match="greedily"):
        require_benchmark_request(make_request(**params), 100)


def bench(toy, tmp_path, *arguments, **options):
    output = tmp_path / "hf.json"
    command = ["bench", "--model", str(toy), "--device", "cpu", "--dtype", "float32"]
    command += ["--workload", "fixed:batch=2,input=8,output=4", "--output", str(output)]
    status = main("hf", hf.EngineConfig, hf.start, [*command, *arguments], **options)
    return status, json.loads(output.read_text()) if output.exists() else None


def test_hf_bench_writes_the_stages_json(toy, tmp_path):
    status, result = bench(toy, tmp_path)
    assert status == 0
    assert result["stage"] == "hf"
    assert [len(tokens) for tokens in result["gate"]["tokens"]] == [4, 4]
    assert result["workload"]["num_output_tokens"] == 8
    assert set(result["host_time_s"].values()) == {None}
    assert result["engine_config"] == {"max_model_len": 2048}
    loaded = load_model(toy, dtype="float32", device="cpu")
    assert result["model"]["num_parameters"] == loaded.num_parameters


def test_hf_goes_on_with_a_conversation_from_what_it_answered(toy, tmp_path):
    workload = "multi-turn:conversations=2,turns=2,system=3,question=4,output=3-5"
    _, result = bench(toy, tmp_path, "--workload", workload)
    rows = {row["request_id"]: row for row in result["requests"]}
    for first, second in (("c0-turn1", "c0-turn2"), ("c1-turn1", "c1-turn2")):
        assert rows[second]["num_prompt_tokens"] == 7 + rows[first]["num_output_tokens"] + 4
        assert rows[second]["arrival_s"] >= rows[first]["last_token_s"]
        assert rows[second]["first_token_s"] > rows[second]["arrival_s"]
    assert len(result["gate"]["tokens"]) == 2
    assert set(result["ttft_by_group_s"]) == {"turn 1", "turn 2"}


def test_peer_whose_tokens_cannot_be_compared_says_why(toy, tmp_path):
    _, result = bench(toy, tmp_path, gate_not_comparable="a reason")
    assert result["gate"] == {"tokens": [], "top2_gaps": [], "not_comparable": "a reason"}


def test_peer_names_a_mistake_and_exits_with_2(toy, tmp_path, capsys):
    assert bench(toy, tmp_path, "--max-model-len", "4")[0] == 2
    assert "max_model_len=4" in capsys.readouterr().err


def test_peer_that_cannot_be_imported_exits_with_3(toy, tmp_path, capsys):
    def absent(*_, **__):
        raise ImportError("No module named 'engine'")

    command = ["bench", "--workload", "nano"]
    assert main("absent", hf.EngineConfig, absent, command) == 3
    assert "No module named 'engine'" in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["qwen3-0.6b", "llama-3.1-8b"])
def test_config_of_a_preset_reads_back_as_the_same_shape(preset):
    config = ModelConfig.preset(preset)
    assert ModelConfig.from_hf(hf_config(config, "bfloat16")) == config


def test_dummy_weights_of_a_peer_are_those_of_the_stages(toy):
    options = {"load_format": "dummy", "dtype": "float32", "device": "cpu", "seed": 3}
    with checkpoint(str(toy), **options) as folder:
        saved = load_model(folder, dtype="float32", device="cpu")
        num_parameters = count_parameters(folder, saved.config)
        made = folder
    stage = load_model(toy, **options)
    theirs = dict(stage.named_parameters())
    for name, mine in saved.named_parameters():
        assert torch.equal(mine, theirs[name]), name
    assert num_parameters == stage.num_parameters
    assert not made.exists()


def test_dummy_without_a_model_is_refused():
    options = {"load_format": "dummy", "dtype": "auto", "device": "cpu", "seed": 0}
    with pytest.raises(ValueError, match="preset"), checkpoint(None, **options):
        pass


def test_saved_checkpoint_gives_transformers_the_same_greedy_tokens(toy, tmp_path):
    save_checkpoint(load_model(toy, dtype="float32", device="cpu"), tmp_path)
    assert greedy(tmp_path, (3, 4, 5), 8) == greedy(toy, (3, 4, 5), 8)


def test_progress_of_a_batching_peer_counts_prompts_with_their_first_token():
    progress = BatchProgress(100)
    for name in ("a", "b"):
        progress.add(make_request(name, max_tokens=2))
    first = progress.advance([("a", 7, None)]).stats
    assert (first.num_scheduled_tokens, first.num_running, first.num_waiting) == (3, 1, 1)
    assert first.num_kv_tokens_live == 3
    second = progress.advance([("a", 8, None), ("b", 9, None)])
    assert second.stats.num_scheduled_tokens == 1 + 3
    assert [token.finish_reason is not None for token in second.tokens] == [True, False]
    with pytest.raises(ValueError, match="in use"):
        progress.add(make_request("b"))
    assert progress.drop("b") and not progress.drop("b") and len(progress) == 0
