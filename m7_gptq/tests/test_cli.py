"""The commands that only this stage has, and the model that it makes for itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from folovllm.testing.toy_models import toy_families, write_toy_model
from m7_gptq import cli, default_model
from m7_gptq.calibration import calibration_tokens, read_calibration_text
from m7_gptq.llm import LLM

WORDS = [f"word{i}" for i in range(150)]


class Words:
    """A tokenizer of one token per word."""

    def __init__(self, folder: Path) -> None: ...

    def encode(self, text: str) -> list[int]:
        return [len(word) % 199 for word in text.split()]


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(cli, "Tokenizer", Words)
    return write_toy_model(toy_families()[0], tmp_path / "toy")


def run(*words: object) -> int:
    return cli.main([*map(str, words), "--device", "cpu", "--dtype", "float32"])


def test_checkpoint_is_quantised_written_out_again_and_measured(source, tmp_path, capsys) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join("abcdefgh"[: i % 8 + 1] for i in range(400)), encoding="utf-8")
    size = ("--num-sequences", 4, "--sequence-len", 16, "--calibration", text, "--group-size", 32)
    quantised, plain = tmp_path / "q", tmp_path / "d"
    assert run("quantize", "--model", source, "--output", quantised, *size) == 0
    out, err = capsys.readouterr()
    assert "2/2" in err
    assert "error of qkv" in err
    assert f"written to {quantised}" in out
    assert run("dequantize", "--model", quantised, "--output", plain) == 0
    values, file = [], tmp_path / "found.json"
    for model in (source, quantised, plain, source):
        words = ("perplexity", "--model", model, "--text", text, "--output", file)
        capsys.readouterr()
        assert run(*words, "--window", 16) == 0
        values.append(capsys.readouterr().out)
    assert values[1] == values[2] != values[0] == values[3]
    stored = json.loads(file.read_text(encoding="utf-8"))
    assert (stored["text"], stored["window"], stored["dtype"]) == ("text.txt", 16, "float32")
    assert stored["num_windows"] > 1
    found = {m["name"]: (m["quantization"], m["perplexity"]) for m in stored["models"]}
    assert list(found) == ["q", "d", "toy"], "an entry of a model takes the place of its last one"
    assert len(stored["models"]) == 3
    assert found["q"][0]["group_size"] == 32 and found["toy"][0] is None
    assert f"perplexity {found['q'][1]:.3f}\n" == values[1]
    assert run(*words, "--window", 17) == 2
    assert "holds perplexities of another window" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--num-sequences", 9999), "the calibration text has"),
        (("--bits", 5), "bits must be 2, 3, 4 or 8, got 5"),
        (("--calibration", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_mistakes_are_one_line_and_status_2(source, tmp_path, capsys, words, message) -> None:
    assert run("quantize", "--model", source, "--output", tmp_path / "q", *words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_text_that_ships_with_the_package_is_long_enough_for_a_calibration() -> None:
    assert len(read_calibration_text()) > 150_000
    found = calibration_tokens(Words(Path()), None, 16, 512)
    assert found.shape == (16, 512)
    assert found.dtype == torch.int64


def test_embedded_model_is_quantised_once(source, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(default_model, "Tokenizer", Words)
    monkeypatch.setattr(default_model, "DEFAULT_MODEL", source)
    monkeypatch.setattr(default_model, "QUANTIZED_MODEL", tmp_path / "made")
    monkeypatch.setattr(default_model, "_NUM_SEQUENCES", 2)
    monkeypatch.setattr(default_model, "_SEQUENCE_LEN", 16)
    assert default_model.quantized_default_model() == tmp_path / "made"
    before = (tmp_path / "made" / "config.json").stat().st_mtime_ns
    llm = LLM(device="cpu", max_model_len=32)
    assert llm.model.config.quantization is not None
    assert (tmp_path / "made" / "config.json").stat().st_mtime_ns == before


def test_commands_of_every_stage_and_its_own_are_one_command_line() -> None:
    for command in ("generate", "quantize"):
        process = subprocess.run(
            [sys.executable, "-m", "m7_gptq", command, "--help"], capture_output=True, text=True
        )
        assert process.returncode == 0
        assert "--model" in process.stdout
