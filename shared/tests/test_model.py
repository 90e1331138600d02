"""Configuration, weights and the transformer itself."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from folovllm.kernels.reference import causal_attention
from folovllm.model.collectives import Alone
from folovllm.model.config import ModelConfig, kv_bytes_per_token
from folovllm.model.cost import ModelCost, model_cost
from folovllm.model.loader import load_model, resolve_device
from folovllm.model.ranks import ALONE, Ranks
from folovllm.model.transformer import CausalLM
from folovllm.testing.toy_models import ToyFamily, reference_logits, toy_families, write_toy_model

FAMILIES = {family.name: family for family in toy_families()}


@pytest.fixture(scope="module", params=toy_families(), ids=lambda family: family.name)
def toy_directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family: ToyFamily = request.param
    return write_toy_model(family, tmp_path_factory.mktemp(family.name))


@pytest.fixture
def qwen_directory(tmp_path: Path) -> Path:
    return write_toy_model(FAMILIES["qwen3"], tmp_path)


def logits_of(model: CausalLM, token_ids: list[int]) -> torch.Tensor:
    def attend(layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return causal_attention(q, k, v)

    input_ids = torch.tensor(token_ids)
    return model.compute_logits(model(input_ids, torch.arange(len(token_ids)), attend))


def test_logits_equal_transformers(toy_directory: Path) -> None:
    token_ids = [(7 * i) % 199 for i in range(150)]
    (expected,) = reference_logits(toy_directory, [token_ids[:1]], [token_ids[1:]])
    actual = logits_of(load_model(toy_directory), token_ids)[:-1]
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_logits_are_written_where_the_caller_wants_them(toy_directory: Path) -> None:
    """A captured graph has one buffer for all batch sizes, and reads its first rows."""
    model = load_model(toy_directory)
    size = (3, model.config.hidden_size)
    hidden = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(model.device)
    expected = model.compute_logits(hidden)
    buffer = torch.full((5, 199), torch.nan, dtype=model.dtype, device=model.device)
    written = model.compute_logits(hidden, buffer[:3])
    assert written.data_ptr() == buffer.data_ptr()
    assert torch.equal(buffer[:3], expected)
    assert buffer[3:].isnan().all()


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_optional_biases_of_llama_are_loaded(tmp_path: Path, bias: str) -> None:
    family = ToyFamily("biased", "llama", {bias: True})
    directory = write_toy_model(family, tmp_path)
    token_ids = list(range(20))
    (expected,) = reference_logits(directory, [token_ids[:1]], [token_ids[1:]])
    actual = logits_of(load_model(directory), token_ids)[:-1]
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_sharded_checkpoint_equals_the_single_file(qwen_directory: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    sharded = tmp_path / "sharded"
    hf_model = AutoModelForCausalLM.from_pretrained(qwen_directory, dtype=torch.float32)
    hf_model.save_pretrained(sharded, max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    single, several = load_model(qwen_directory), load_model(sharded)
    expected = dict(single.named_parameters())
    actual = dict(several.named_parameters())
    assert expected.keys() == actual.keys()
    for name, parameter in expected.items():
        assert torch.equal(parameter, actual[name]), name


def test_missing_and_unexpected_and_misshapen_weights_are_all_listed(qwen_directory: Path) -> None:
    path = qwen_directory / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
    tensors["model.norm.weight"] = torch.zeros(3)
    save_file(tensors, path)
    with pytest.raises(ValueError) as caught:
        load_model(qwen_directory)
    assert "missing: model.layers.1.mlp.up_proj.weight" in str(caught.value)
    assert "unexpected: model.layers.7.mlp.up_proj.weight" in str(caught.value)
    assert "model.norm.weight is [3], expected [64]" in str(caught.value)


def test_missing_shard_is_named(qwen_directory: Path) -> None:
    index = {"weight_map": {"a": "model-00001.safetensors", "b": "model-00002.safetensors"}}
    (qwen_directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"model-00001.safetensors, model-00002"):
        load_model(qwen_directory)


def test_pickled_weights_are_refused(qwen_directory: Path) -> None:
    (qwen_directory / "model.safetensors").unlink()
    (qwen_directory / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin.*safetensors only"):
        load_model(qwen_directory)


def test_shards_without_their_index_are_named(qwen_directory: Path) -> None:
    whole = qwen_directory / "model.safetensors"
    whole.rename(qwen_directory / "model-00001-of-00002.safetensors")
    message = r"has model-00001-of-00002.safetensors, but neither .* model.safetensors.index.json"
    with pytest.raises(FileNotFoundError, match=message):
        load_model(qwen_directory)


@pytest.mark.parametrize(
    ("name", "message"),
    [("toy.gguf", "is a GGUF file.*config.json"), ("model.safetensors", "is a file.*give ")],
)
def test_single_file_as_a_model_is_refused(qwen_directory: Path, name: str, message: str) -> None:
    path = qwen_directory / name
    path.touch()
    with pytest.raises(FileNotFoundError, match=message):
        load_model(path)


def test_directory_with_another_format_says_what_is_there(qwen_directory: Path) -> None:
    (qwen_directory / "model.safetensors").rename(qwen_directory / "model-q4.gguf")
    with pytest.raises(FileNotFoundError, match=r"found: model-q4.gguf"):
        load_model(qwen_directory)


def test_redundant_tied_head_is_accepted(qwen_directory: Path) -> None:
    path = qwen_directory / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path)
    assert load_model(qwen_directory).lm_head is not None


def write_separate_head(directory: Path) -> None:
    """A checkpoint whose config.json ties a head that its weights hold apart."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(7)
    tensors["lm_head.weight"] = torch.randn(199, 64, generator=generator)
    save_file(tensors, path, metadata={"format": "pt"})


def test_head_that_differs_from_the_embedding_is_used(qwen_directory: Path) -> None:
    write_separate_head(qwen_directory)
    token_ids = [(7 * i) % 199 for i in range(50)]
    (expected,) = reference_logits(qwen_directory, [token_ids[:1]], [token_ids[1:]])
    model = load_model(qwen_directory)
    torch.testing.assert_close(logits_of(model, token_ids)[:-1], expected, rtol=1e-3, atol=1e-3)


def test_model_with_a_head_of_its_own_counts_it(qwen_directory: Path) -> None:
    tied = load_model(qwen_directory)
    write_separate_head(qwen_directory)
    separate = load_model(qwen_directory)
    assert (tied.config.tie_word_embeddings, separate.config.tie_word_embeddings) == (True, False)
    assert separate.num_parameters - tied.num_parameters == 199 * 64


def test_tied_table_may_stand_under_the_name_of_the_head(qwen_directory: Path) -> None:
    path = qwen_directory / "model.safetensors"
    expected = load_model(qwen_directory).embed_tokens
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, path)
    model = load_model(qwen_directory)
    assert model.lm_head is model.embed_tokens
    assert torch.equal(model.embed_tokens, expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_tensor_is_refused_by_name(qwen_directory: Path, dtype: torch.dtype) -> None:
    path = qwen_directory / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"quantised.*{name} is {str(dtype)[6:]}"):
        load_model(qwen_directory)


def test_dummy_weights_come_from_the_seed(qwen_directory: Path) -> None:
    first, same, other = (
        load_model(qwen_directory, load_format="dummy", seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first.embed_tokens, same.embed_tokens)
    assert not torch.equal(first.embed_tokens, other.embed_tokens)
    assert first.embed_tokens.std() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(first.norm, torch.ones_like(first.norm))


def test_dtype_is_what_was_asked_for(qwen_directory: Path) -> None:
    model = load_model(qwen_directory, dtype="bfloat16")
    assert {parameter.dtype for _, parameter in model.named_parameters()} == {torch.bfloat16}
    assert model.num_parameter_bytes == 2 * model.num_parameters
    assert load_model(qwen_directory).dtype is torch.float32


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-32b", 32_762_123_264),
        ("llama-3.1-8b", 8_030_261_248),
    ],
)
def test_presets_have_the_published_number_of_parameters(name: str, num_parameters: int) -> None:
    from folovllm.kernels import reference

    model = CausalLM(ModelConfig.preset(name), reference, torch.bfloat16, torch.device("meta"))
    assert model.num_parameters == num_parameters


@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen3-8b"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_processes_share_the_cost_of_a_model(name: str, size: int) -> None:
    """All but the norms, which each computes, and rows of no token."""
    from folovllm.kernels import reference

    def cost_of(ranks: Ranks) -> ModelCost:
        collectives = Alone()
        collectives.ranks, collectives.num_ranks = ranks, ranks.size
        meta = torch.device("meta")
        config = ModelConfig.preset(name)
        return model_cost(
            CausalLM(config, reference, torch.bfloat16, meta, collectives=collectives)
        )

    whole, part = cost_of(ALONE), cost_of(Ranks(1, size))
    for field in ("num_layer_parameters", "num_logits_parameters", "weight_bytes_read"):
        share = getattr(whole, field) / size
        assert share <= getattr(part, field) < 1.01 * share
    assert part.kv_bytes_per_token * size == whole.kv_bytes_per_token
    assert part.attention_flops_per_pair * size == whole.attention_flops_per_pair


def test_logits_of_no_token_are_chosen_by_nobody() -> None:
    """199 tokens in parts of 100 or so: the last part has columns for more."""
    from folovllm.kernels import reference

    collectives = Alone()
    collectives.ranks = Ranks(1, 2)
    config = replace(ModelConfig.preset("qwen3-0.6b"), vocab_size=199, num_layers=1)
    cpu = torch.device("cpu")
    model = CausalLM(config, reference, torch.float32, cpu, collectives=collectives)
    assert isinstance(model.lm_head, torch.Tensor)
    num_tokens = model.vocab_part.stop - model.vocab_part.start
    model.lm_head.zero_()[:num_tokens] = -1.0  # less than what zeros give
    hidden = torch.ones(3, config.hidden_size)
    out = torch.empty(3, len(model.lm_head))
    for logits in (model.compute_logits(hidden), model.compute_logits(hidden, out)):
        assert logits.shape[1] > num_tokens and (logits[:, num_tokens:] == -torch.inf).all()
        assert (logits[:, :num_tokens] == -config.hidden_size).all()


def test_kv_bytes_of_qwen3_06b() -> None:
    # 28 layers x 2 x 8 heads x 128 dims x 2 bytes
    assert kv_bytes_per_token(ModelConfig.preset("qwen3-0.6b"), torch.bfloat16) == 114_688


def test_eos_ids_of_the_generation_config_win(qwen_directory: Path) -> None:
    assert ModelConfig.from_directory(qwen_directory).eos_token_ids == {2, 3}
    (qwen_directory / "generation_config.json").unlink()
    assert ModelConfig.from_directory(qwen_directory).eos_token_ids == {2}


def minimal_config(**overrides: Any) -> dict[str, Any]:
    config = {
        "model_type": "mistral",
        "vocab_size": 10,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return {**config, **overrides}


def test_sliding_window_counts_only_where_it_is_used() -> None:
    window = {"sliding_window": 32}
    assert ModelConfig.from_hf(minimal_config(**window)).sliding_window == 32
    mistral = {**minimal_config(), "model_type": "mistral"}
    assert ModelConfig.from_hf(mistral).sliding_window == 4096
    assert ModelConfig.from_hf({**mistral, "sliding_window": None}).sliding_window is None
    qwen = minimal_config(model_type="qwen2", **window)
    assert ModelConfig.from_hf(qwen).sliding_window is None
    assert ModelConfig.from_hf({**qwen, "use_sliding_window": True}).sliding_window == 32


def test_context_is_limited_by_positions_and_by_the_window() -> None:
    assert ModelConfig.from_hf(minimal_config(sliding_window=None)).max_context_len == 64
    assert ModelConfig.from_hf(minimal_config(sliding_window=32)).max_context_len == 32
    assert ModelConfig.from_hf(minimal_config(sliding_window=4096)).max_context_len == 64


@pytest.mark.parametrize(
    ("layers", "window"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, 32),
        ({"layer_types": ["full_attention"] * 2}, None),
        ({"max_window_layers": 1}, 32),
        ({"max_window_layers": 2}, None),
    ],
)
def test_window_of_qwen_counts_where_a_layer_has_it(
    layers: dict[str, Any], window: int | None
) -> None:
    qwen = minimal_config(model_type="qwen2", use_sliding_window=True, sliding_window=32)
    config = ModelConfig.from_hf({**qwen, "num_hidden_layers": 2, **layers})
    assert config.sliding_window == window


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_a_config_leaves_out_is_what_it_means_to_transformers(model_type: str) -> None:
    from transformers import AutoConfig

    config = {**minimal_config(model_type=model_type), "num_attention_heads": 64}
    config |= {"hidden_size": 1024}
    del config["num_key_value_heads"]
    hf_config = AutoConfig.for_model(**config)
    ours = ModelConfig.from_hf(config)
    assert ours.num_kv_heads == hf_config.num_key_value_heads
    assert ours.head_dim == (getattr(hf_config, "head_dim", None) or 16)
    assert ours.rms_norm_eps == hf_config.rms_norm_eps
    assert ours.rope.theta == hf_config.rope_parameters["rope_theta"]
    assert ours.tie_word_embeddings == hf_config.tie_word_embeddings
    eos = hf_config.eos_token_id
    assert ours.eos_token_ids == (frozenset() if eos is None else {eos})


def test_yarn_reaches_to_factor_times_the_original_context(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    yarn["original_max_position_embeddings"] = 512
    family = ToyFamily("yarn", "qwen2", {"rope_parameters": yarn})
    directory = write_toy_model(family, tmp_path)
    token_ids = [(7 * i * i) % 199 for i in range(2048)]
    (expected,) = reference_logits(directory, [token_ids[:1]], [token_ids[1:]])
    model = load_model(directory)
    assert model.config.max_context_len == 2048
    actual = logits_of(model, token_ids)[:-1]
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("quantization", ["awq", {"quant_method": "awq", "bits": 4}])
@pytest.mark.parametrize("name", ["quantization_config", "compression_config"])
def test_quantised_checkpoint_is_refused_where_matrices_are_plain(
    tmp_path: Path, name: str, quantization: Any
) -> None:
    directory = write_toy_model(toy_families()[0], tmp_path)
    config_path = directory / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config_path.write_text(json.dumps({**config, name: quantization}), encoding="utf-8")
    assert (ModelConfig.from_directory(directory).quantization or {})["quant_method"] == "awq"
    with pytest.raises(ValueError, match=r"quantised \(awq\); give an unquantised one"):
        load_model(directory)


def test_quantisation_that_autogptq_wrote_into_a_file_of_its_own_is_read(tmp_path: Path) -> None:
    directory = write_toy_model(toy_families()[0], tmp_path)
    (directory / "quantize_config.json").write_text('{"bits": 4}', encoding="utf-8")
    assert ModelConfig.from_directory(directory).quantization == {"quant_method": "gptq", "bits": 4}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"eos_token_id": "</s>"}, "list of them or null as eos_token_id, got '</s>'"),
        ({"eos_token_id": [2, "</s>"]}, r"as eos_token_id, got \[2, '</s>'\]"),
        ({"eos_token_id": True}, "as eos_token_id, got True"),
        ({"tie_word_embeddings": "false"}, "true or false as tie_word_embeddings, got 'false'"),
        ({"hidden_size": "8"}, "at least 1 as hidden_size, got '8'"),
        ({"num_hidden_layers": 0}, "at least 1 as num_hidden_layers, got 0"),
        ({"hidden_size": 9}, "hidden_size 9 is no multiple of num_attention_heads 4"),
        ({"per_layer_config": {"0": {}}}, "per_layer_config"),
        (
            {"model_type": "qwen2", "layer_types": ["linear_attention"]},
            "'linear_attention' among its layer_types",
        ),
        ({"model_type": "gpt2"}, "'gpt2' is not supported; this engine runs llama, mistral"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads"),
        ({"logits_scaling": 8.0}, "logits_scaling=8.0"),
    ],
)
def test_config_that_we_would_compute_wrongly_is_refused(
    overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(minimal_config(**overrides))


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        ("./nowhere", {}, FileNotFoundError, "m0_infra fetch"),
        ("qwen3-0.6b", {}, ValueError, "is a preset.*--load-format dummy"),
        (
            "qwen3-0.7b",
            {"load_format": "dummy"},
            ValueError,
            "llama-3.1-8b, qwen3-0.6b, qwen3-32b",
        ),
        (".", {"load_format": "pickle"}, ValueError, "load_format must be"),
        (".", {"device": "tpu"}, ValueError, "device must be auto"),
        (".", {"device": "mps"}, ValueError, "device must be auto"),
    ],
)
def test_unusable_argument_is_refused(
    model: str, options: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_model(model, **options)


def test_unknown_dtype_is_refused(qwen_directory: Path) -> None:
    with pytest.raises(ValueError, match="dtype must be auto"):
        load_model(qwen_directory, dtype="int4")


def test_directory_without_config_says_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"needs config.json, \*.safetensors"):
        load_model(tmp_path)


def test_broken_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "removed", "message"),
    [
        ({}, "hidden_size", "config.json has no 'hidden_size', which a model of type 'qwen3'"),
        ({}, "max_position_embeddings", "config.json has no 'max_position_embeddings'"),
        ({"rope_parameters": {"rope_type": "linear"}}, None, "config.json has no 'factor'"),
    ],
)
def test_incomplete_config_is_named(
    qwen_directory: Path, overrides: dict[str, Any], removed: str | None, message: str
) -> None:
    path = qwen_directory / "config.json"
    config = {**json.loads(path.read_text()), **overrides}
    config.pop(removed, None)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_model(qwen_directory)


def test_setting_of_the_generation_config_is_blamed_on_it(qwen_directory: Path) -> None:
    (qwen_directory / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ValueError, match=r"generation_config.json must have a token id.*'</s>'"):
        load_model(qwen_directory)


def test_end_that_no_logit_stands_for_is_none() -> None:
    assert ModelConfig.from_hf(minimal_config(eos_token_id=[2, 10])).eos_token_ids == {2}


def test_config_that_is_no_object_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        load_model(tmp_path)


@pytest.mark.parametrize("content", [b"\x10\x00\x00", b"<html>Not found</html>" * 9])
def test_broken_weights_file_is_named(qwen_directory: Path, content: bytes) -> None:
    (qwen_directory / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors is no whole safetensors file"):
        load_model(qwen_directory)


def test_half_downloaded_weights_file_is_named(qwen_directory: Path) -> None:
    path = qwen_directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is no whole safetensors file"):
        load_model(qwen_directory)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": []}'])
def test_broken_index_of_shards_is_named(qwen_directory: Path, content: str) -> None:
    (qwen_directory / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="index.json must be a JSON object with a weight_map"):
        load_model(qwen_directory)


def test_hub_download_failure_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> str:
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match="org/name is not a local directory.*no route"):
        load_model("org/name")


def test_hub_download_asks_for_no_pickle_and_no_code(
    monkeypatch: pytest.MonkeyPatch, qwen_directory: Path
) -> None:
    asked = {}

    def download(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(qwen_directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    load_model("org/name")
    assert not [p for p in asked["org/name"] if p.endswith((".bin", ".pt", ".py"))]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        resolve_device("cuda")


def test_cuda_index_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="'cuda:2' was asked for but torch sees 2 CUDA devices"):
        resolve_device("cuda:2")


def test_named_cuda_device_becomes_the_current_one(
    qwen_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = []

    def set_device(device: torch.device) -> None:
        chosen.append(device)
        raise InterruptedError  # nothing further can run without a GPU

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    with pytest.raises(InterruptedError):
        load_model(qwen_directory, device="cuda:1")
    assert chosen == [torch.device("cuda:1")]
    load_model(qwen_directory, device="cpu:0")
    assert len(chosen) == 1
