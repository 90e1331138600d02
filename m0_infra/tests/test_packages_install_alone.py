"""Each package installs with `folovllm` and nothing else of ours, and declares what it imports."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAGES = sorted(path.parent.name for path in ROOT.glob("m[1-7]_*/__init__.py"))
# Name of the package -> its sources.
PACKAGES = {
    "folovllm": ROOT / "shared" / "folovllm",
    **{name: ROOT / name for name in ["m0_infra", *STAGES, "compare"]},
}
NOT_SOURCES = ("tests", "microbench", "results", "build", "__pycache__", "*.egg-info")
# Modules that come with a dependency.
BROUGHT_BY = {
    "huggingface_hub": "transformers",
    "tokenizers": "transformers",
    "jinja2": "torch",
    "pydantic_core": "pydantic",
    "uvloop": "uvicorn",
    "zmq": "pyzmq",
}
# Never asked for, used where somebody installed them: other engines, the driver's counters,
# FlashAttention-3, which no index has under a name of its own, and what tests call a server with.
WHERE_INSTALLED = {"vllm", "nanovllm", "pynvml", "flash_attn_interface", "httpx"}


def project_folder(package: str) -> Path:
    return ROOT / "shared" if package == "folovllm" else ROOT / package


def read_project(package: str) -> dict[str, Any]:
    text = (project_folder(package) / "pyproject.toml").read_text()
    project: dict[str, Any] = tomllib.loads(text)["project"]
    return project


def read_dependencies(package: str) -> list[str]:
    return list(read_project(package)["dependencies"])


def read_optional_dependencies(package: str) -> list[str]:
    extras = read_project(package).get("optional-dependencies", {})
    return [text for texts in extras.values() for text in texts]


def read_requirements(name: str) -> list[str]:
    lines = (ROOT / name).read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith(("#", "-r"))]


def requirement_name(requirement: str) -> str:
    matched = re.match(r"[A-Za-z0-9_.-]+", requirement)
    assert matched, requirement
    return matched[0]


def source_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*.py")):
        if not set(path.relative_to(folder).parts) & set(NOT_SOURCES):
            yield path


def pip_install(target: Path, folder: Path) -> None:
    """Install a copy of the sources: a build leaves its litter beside them."""
    copy = target.parent / f"{target.name}-sources" / folder.name
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--target", str(target), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def run_python(arguments: list[str], path: Path, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def shared_install(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if any(importlib.util.find_spec(name) is None for name in ("pip", "setuptools")):
        pytest.skip("pip and setuptools are needed to install a package")
    target = tmp_path_factory.mktemp("shared") / "site"
    pip_install(target, ROOT / "shared")
    return target


def test_shared_brings_all_its_modules_and_its_data(shared_install):
    installed = shared_install / "folovllm"
    sources = PACKAGES["folovllm"]
    expected = {path.relative_to(sources) for path in source_files(sources)}
    expected |= {path.relative_to(sources) for path in sources.glob("data/*.jsonl")}
    found = {path.relative_to(installed) for path in installed.rglob("*.*")}
    assert expected and expected <= found


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "folovllm"])
def test_package_runs_with_shared_alone_from_anywhere(package, shared_install, tmp_path):
    target = tmp_path / "site"
    shutil.copytree(shared_install, target)
    pip_install(target, ROOT / package)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    optional = [*map(requirement_name, read_optional_dependencies("folovllm"))]
    code = f"import sys; sys.modules.update(dict.fromkeys({optional}))  # none can be imported\n"
    code += f"import folovllm, {package}; print(folovllm.__file__); print({package}.__file__)\n"
    if package in STAGES:  # it gives its public names, and no others
        code += f"for name in {package}.__all__: assert getattr({package}, name)\n"
        code += f"assert not hasattr({package}, 'Missing')\n"
    places = run_python(["-c", code], target, elsewhere).splitlines()
    assert [Path(place).is_relative_to(target) for place in places] == [True, True]
    assert "usage" in run_python(["-m", package, "--help"], target, elsewhere).lower()

    installed = target / package
    expected = {path.relative_to(ROOT / package) for path in source_files(ROOT / package)}
    assert {path.relative_to(installed) for path in installed.rglob("*.py")} == expected
    ours = {path.name for path in target.iterdir()} & set(PACKAGES)
    assert ours == {"folovllm", package}


def third_party_imports(path: Path) -> set[str]:
    modules: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            modules.append(node.module)
    names = {module.split(".")[0] for module in modules}
    names -= sys.stdlib_module_names | WHERE_INSTALLED
    return {BROUGHT_BY.get(name, name) for name in names}


@pytest.mark.parametrize("package", PACKAGES)
def test_package_declares_what_it_imports_and_no_more(package):
    required = {requirement_name(text) for text in read_dependencies(package)}
    optional = {requirement_name(text) for text in read_optional_dependencies(package)}
    imported = set().union(*map(third_party_imports, source_files(PACKAGES[package])))
    assert imported - required - optional - {package} == set()
    assert (required | optional) - imported == set()


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "folovllm"])
def test_package_depends_on_shared_and_on_no_other_package_of_ours(package):
    names = {requirement_name(text) for text in read_dependencies(package)}
    assert names & set(PACKAGES) == {"folovllm"}


def test_requirements_are_the_union_of_what_the_packages_declare():
    declared = {text for package in PACKAGES for text in read_dependencies(package)}
    ours_and_torch = {*PACKAGES, "torch"}
    third_party = {text for text in declared if requirement_name(text) not in ours_and_torch}
    assert third_party == set(read_requirements("requirements.txt"))


def test_requirements_of_the_server_are_the_extras_that_it_needs():
    extras = read_project("folovllm")["optional-dependencies"]
    for extra in ("serve", "ray"):
        assert extras[extra] == read_requirements(f"requirements-{extra}.txt")


def test_requirements_of_the_book_are_its_group_of_dependencies():
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    assert groups["docs"] == read_requirements("requirements-docs.txt")


def test_pinned_versions_satisfy_the_declared_ranges():
    packaging_requirements = pytest.importorskip("packaging.requirements")
    pins = dict(text.split("==") for text in read_requirements("constraints.txt"))
    assert "torch" in pins
    texts = {text for package in PACKAGES for text in read_dependencies(package)}
    for text in texts | set(read_requirements("requirements-dev.txt")):
        requirement = packaging_requirements.Requirement(text)
        if requirement.name in pins:
            assert requirement.specifier.contains(pins[requirement.name]), text
