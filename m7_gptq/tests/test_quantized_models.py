"""Checkpoints, from the quantiser to the tokens: what is written is what is loaded and computed."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from folovllm.model.loader import load_model
from folovllm.model.weights import Checkpoint, load_file, save_safetensors
from folovllm.request import SamplingParams
from folovllm.testing.toy_models import toy_families, write_toy_model
from m7_gptq.gptq import QuantizationConfig, quantize, relative_error, round_to_nearest
from m7_gptq.llm import LLM
from m7_gptq.packing import V1, V2
from m7_gptq.perplexity import perplexity
from m7_gptq.quantize_model import (
    FIRST_TOKEN_WEIGHT,
    Job,
    LayerReport,
    Method,
    dequantize_checkpoint,
    plain_linears,
    quantize_checkpoint,
    record_hessians,
    run_in_place,
)
from m7_gptq.quantized_linear import QuantizedLinear, linears_of, random_linears_of
from m7_gptq.whole_sequences import Activations, embed

FAMILIES = toy_families()
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
PROMPTS = [[1, 2, 3, 4, 5], [7] * 9, [11, 12]]


def tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 199, (6, 32), generator=generator)


def job_of(source: Path, target: Path, **options) -> Job:
    method = options.pop("method", Method.GPTQ)
    checkpoint_format = options.pop("checkpoint_format", V1)
    first_token_weight = options.pop("first_token_weight", FIRST_TOKEN_WEIGHT)
    return Job(
        source=source,
        target=target,
        config=QuantizationConfig(**{"group_size": 32, **options}),
        method=method,
        checkpoint_format=checkpoint_format,
        first_token_weight=first_token_weight,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def answers(model: Path, **options) -> list[list[int]]:
    llm = LLM(model, dtype="float32", device="cpu", max_model_len=64, kv_cache_bytes=1 << 22)
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], GREEDY, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module", params=range(len(FAMILIES)), ids=[f.name for f in FAMILIES])
def source(request, tmp_path_factory) -> Path:
    return write_toy_model(FAMILIES[request.param], tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    return write_toy_model(FAMILIES[0], tmp_path_factory.mktemp("toy"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sym": False, "checkpoint_format": V2},
        {"desc_act": True, "group_size": 16},
        {"desc_act": True, "static_groups": True},
        {"group_size": -1, "bits": 8},
        {"method": Method.RTN, "bits": 2},
    ],
)
def test_quantised_checkpoint_answers_like_the_one_it_stands_for(source, tmp_path, options) -> None:
    quantize_checkpoint(job_of(source, tmp_path / "q", **options), tokens(), lambda report: None)
    dequantize_checkpoint(tmp_path / "q", tmp_path / "d", torch.float32)
    assert answers(tmp_path / "q") == answers(tmp_path / "d")
    plain = load_model(tmp_path / "d", dtype="float32", device="cpu")
    loaded = load_model(tmp_path / "q", dtype="float32", device="cpu", linears=linears_of)
    assert isinstance(loaded.layers[0].mlp.down_proj, QuantizedLinear)
    assert loaded.num_parameters == plain.num_parameters
    original = load_model(source, dtype="float32", device="cpu")
    for name in ("embed_tokens", "norm", "lm_head"):
        assert torch.equal(getattr(loaded, name), getattr(original, name)), "kept as it was"


@pytest.mark.parametrize(
    "options", [{}, {"bits": 2}, {"group_size": -1}, {"desc_act": True}, {"sym": False}]
)
def test_error_of_gptq_is_below_that_of_rounding_in_every_matrix_of_every_layer(
    source, tmp_path, options
) -> None:
    """Each with what the layers before it, quantised in the same way, give."""
    ours, nearest = (
        quantize_checkpoint(
            job_of(source, tmp_path / method.value, method=method, checkpoint_format=V2, **options),
            tokens(),
            lambda report: None,
        )
        for method in (Method.GPTQ, Method.RTN)
    )
    assert len(ours) == len(nearest) == 2
    for layer, other in zip(ours, nearest, strict=True):
        above = {n: (e, other.errors[n]) for n, e in layer.errors.items() if e >= other.errors[n]}
        assert above == {}, f"layer {layer.layer_idx}"
        assert min(layer.errors.values()) > 0


def test_error_is_below_that_of_rounding_on_tokens_that_no_hessian_has_seen(source) -> None:
    """The same inputs and weights for both, in every layer."""
    model = load_model(source, device="cpu", dtype="float32")
    token_ids = torch.randint(0, 199, (128, 32), generator=torch.Generator().manual_seed(1))
    seen, fresh = (embed(part, model.embed_tokens) for part in token_ids.split(64))
    config = QuantizationConfig(group_size=32)
    for layer in model.layers:
        hessians = record_hessians(layer, model.rope, seen, FIRST_TOKEN_WEIGHT)
        unseen = record_hessians(layer, model.rope, fresh)
        for name, linear in plain_linears(layer).items():
            ours = quantize(linear.weight, hessians[name], config)
            nearest = round_to_nearest(linear.weight, config)
            errors = [relative_error(linear.weight, m, unseen[name]) for m in (ours, nearest)]
            assert errors[0] < errors[1], name
            linear.weight.copy_(ours.dequantize())
        for activations in (seen, fresh):
            run_in_place(layer, model.rope, activations)


def test_layers_are_reported_as_they_are_done(one, tmp_path) -> None:
    seen: list[LayerReport] = []
    reports = quantize_checkpoint(job_of(one, tmp_path / "q"), tokens(), seen.append)
    assert seen == reports
    assert [report.layer_idx for report in reports] == [0, 1]
    assert {report.num_layers for report in reports} == {2}
    assert [*reports[0].errors] == [
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
    ]


def test_first_token_counts_more_for_keys_and_values_alone(one, tmp_path) -> None:
    model = load_model(one, dtype="float32", device="cpu")
    activations = embed(tokens(), model.embed_tokens)
    layer = model.layers[0]
    plain, weighted, first = (
        record_hessians(layer, model.rope, part, weight)
        for part, weight in (
            (activations, 1.0),
            (activations, 5.0),
            (Activations(*(tensor[:, :1] for tensor in activations)), 1.0),
        )
    )
    length = tokens().shape[1]
    for name, hessian in plain.items():
        expected = hessian
        if name == "self_attn.qkv_proj":
            expected = (length * hessian + 4.0 * first[name]) / (length + 4)
        torch.testing.assert_close(weighted[name], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="first_token_weight must be positive, got 0"):
        job_of(one, tmp_path / "q", first_token_weight=0.0)


def test_files_of_a_checkpoint_may_be_read_by_others(one, tmp_path) -> None:
    quantize_checkpoint(job_of(one, tmp_path / "q"), tokens(), lambda report: None)
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "q").glob("*.safetensors")}
    assert modes == {0o644}


def test_interrupted_run_goes_on_from_the_last_layer_that_was_done(one, tmp_path) -> None:
    def interrupt(report) -> None:
        raise KeyboardInterrupt

    job = job_of(one, tmp_path / "broken", sym=False, checkpoint_format=V2)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(job, tokens(), interrupt)
    assert not (job.target / "config.json").exists(), "an unfinished folder looks like a model"
    seen: list[LayerReport] = []
    assert len(quantize_checkpoint(job, tokens(), seen.append)) == 2
    assert [report.layer_idx for report in seen] == [1]
    whole = job_of(one, tmp_path / "whole", sym=False, checkpoint_format=V2)
    quantize_checkpoint(whole, tokens(), lambda report: None)
    for file in whole.target.glob("*.safetensors"):
        ours, theirs = load_file(job.target / file.name), load_file(file)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name


def test_unfinished_folder_of_other_settings_and_full_folders_are_refused(one, tmp_path) -> None:
    def interrupt(report) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(job_of(one, tmp_path / "q"), tokens(), interrupt)
    with pytest.raises(ValueError, match="an unfinished run with other settings"):
        quantize_checkpoint(job_of(one, tmp_path / "q", sym=False), tokens(), interrupt)
    with pytest.raises(ValueError, match="is not empty; give another output folder"):
        quantize_checkpoint(job_of(one, one), tokens(), interrupt)


def test_quantised_checkpoints_are_not_quantised_again(one, tmp_path) -> None:
    quantize_checkpoint(job_of(one, tmp_path / "q"), tokens(), lambda report: None)
    with pytest.raises(ValueError, match="is quantised already"):
        quantize_checkpoint(job_of(tmp_path / "q", tmp_path / "r"), tokens(), lambda report: None)
    with pytest.raises(ValueError, match="is not quantised"):
        dequantize_checkpoint(one, tmp_path / "d", torch.float32)
    with pytest.raises(ValueError, match="is not empty"):
        dequantize_checkpoint(tmp_path / "q", one, torch.float32)


@pytest.fixture(scope="module")
def quantised(one, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("quantised") / "q"
    quantize_checkpoint(job_of(one, target), tokens(), lambda report: None)
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "awq"}, "quantised by 'awq', and this stage reads 'gptq'"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format must be 'gptq' or 'gptq_v2'"),
        ({"bits": 5}, "bits must be 2, 3, 4 or 8"),
        ({"bits": "4"}, "must have a whole number as bits, got '4'"),
        ({"group_size": None}, "must have a whole number as group_size"),
        ({"lm_head": True}, "lm_head has 199 outputs, whose zero points do not fill words"),
        ({"lm_head": True, "dynamic": {"lm_head": {"bits": 5}}}, "bits must be 2, 3, 4 or 8"),
        ({"dynamic": {"x": {}}}, "layers of unequal bits"),
        ({"group_size": 16}, "wrong shape"),
    ],
)
def test_configs_that_cannot_be_served_are_refused(quantised, tmp_path, change, message) -> None:
    folder = shutil.copytree(quantised, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_model(folder, dtype="float32", device="cpu", linears=linears_of)


def changed(quantised: Path, target: Path, change) -> Path:
    """A copy with other tensors in its first layer."""
    folder = shutil.copytree(quantised, target)
    file = folder / "layer-00000.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_safetensors(tensors, file)
    return folder


PREFIX = "model.layers.0.self_attn."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{PREFIX}q_proj.scales"), "missing: .*q_proj.scales"),
        (
            lambda t: t.update({f"{PREFIX}q_proj.g_idx": t[f"{PREFIX}q_proj.g_idx"].flip(0)}),
            "g_idx",
        ),
        (lambda t: t[f"{PREFIX}o_proj.g_idx"].add_(9), "names groups from 9 to"),
        (lambda t: t.update({f"{PREFIX}o_proj.qweight": torch.zeros(1, 1).int()}), "wrong shape"),
        (
            lambda t: t.update({f"{PREFIX}o_proj.qweight": t[f"{PREFIX}o_proj.qweight"].float()}),
            "of another kind",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(quantised, tmp_path, change, message) -> None:
    folder = changed(quantised, tmp_path / "m", change)
    with pytest.raises(ValueError, match=message):
        load_model(folder, dtype="float32", device="cpu", linears=linears_of)


def test_stage_without_packed_matrices_refuses_the_checkpoint(quantised) -> None:
    with pytest.raises(ValueError, match=r"quantised \(gptq\)"):
        load_model(quantised, dtype="float32", device="cpu")


def test_plain_checkpoints_run_as_before(one) -> None:
    assert len(answers(one)) == len(PROMPTS)


def test_random_weights_are_packed_and_spread_like_plain_ones(one) -> None:
    model = load_model(one, load_format="dummy", device="cpu", linears=random_linears_of)
    again = load_model(one, load_format="dummy", device="cpu", linears=random_linears_of)
    weight = model.layers[0].mlp.down_proj.product.weight
    assert torch.equal(weight, again.layers[0].mlp.down_proj.product.weight)
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert weight.unique().numel() == 16
    assert LLM(one, load_format="dummy", device="cpu", max_model_len=32).model.num_parameters > 0


def test_perplexity_is_that_of_the_windows(one) -> None:
    model = load_model(one, dtype="float32", device="cpu")
    ids = tokens().flatten().tolist()
    seen: list[tuple[int, int]] = []
    value = perplexity(model, ids, 20, 3, lambda done, total: seen.append((done, total)))
    assert seen == [(3, 3)]
    reference = AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32)
    windows = torch.tensor(ids[:60]).view(3, 20)
    with torch.no_grad():
        losses = [reference(w[None], labels=w[None]).loss.item() for w in windows]
    assert math.log(value) == pytest.approx(sum(losses) / 3, rel=1e-4)
    assert perplexity(model, ids[:60], 20) == pytest.approx(value)
    with pytest.raises(ValueError, match="less than a window of 300"):
        perplexity(model, ids[:100], 300)
    with pytest.raises(ValueError, match="window must be between 2"):
        perplexity(model, ids, 1)


def test_checkpoint_names_what_it_has_and_refuses_other_names(one) -> None:
    with Checkpoint(one) as checkpoint:
        assert "model.norm.weight" in checkpoint.names
        with pytest.raises(ValueError, match="no tensor model.nothing"):
            checkpoint.get("model.nothing")
