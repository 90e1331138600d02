"""The `profile` command on a real engine."""

import json

import pytest

from folovllm.cli.main import main
from folovllm.testing.toy_models import toy_families, write_toy_model
from m2_batching import LLM


@pytest.fixture(scope="module")
def toy_directory(tmp_path_factory):
    return write_toy_model(toy_families()[0], tmp_path_factory.mktemp("toy"))


def test_profile_lists_the_operators_of_both_steps(toy_directory, tmp_path, capsys) -> None:
    output = tmp_path / "profile.json"
    command = f"profile --model {toy_directory} --batch-size 3 --context-len 20 --device cpu"
    engine = "--max-model-len 256 --kv-cache-bytes 16MiB --max-num-batched-tokens 256"
    assert main(LLM, [*command.split(), *engine.split(), "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    num_layers = 2
    for step in ("decode", "prompt"):
        counts = {row["name"]: row["count"] for row in result[step]["kernels"]}
        assert counts["aten::baddbmm"] == counts["aten::silu"] == num_layers
        assert result[step]["num_launches"] == sum(counts.values())
        assert 0 < result[step]["step_s"] < 60
    printed = capsys.readouterr().out
    assert "aten::baddbmm" in printed and "per layer" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch-size 3 --context-len 20 --max-num-seqs 2", "3 requests never decoded together"),
        ("--output .", "is a directory"),
        ("--context-len 250", "max_model_len is 256"),
    ],
)
def test_profile_that_cannot_run_is_refused(toy_directory, capsys, flags, message) -> None:
    command = f"profile --model {toy_directory} --device cpu --kv-cache-bytes 16MiB"
    assert main(LLM, [*command.split(), "--max-model-len", "256", *flags.split()]) == 2
    assert message in capsys.readouterr().err
