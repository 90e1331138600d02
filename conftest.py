"""What a test run needs before any package is imported: threads, paths, Triton's interpreter."""

import importlib.util
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent

# Tests start processes in other directories: they need the paths in absolute form.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "shared")])
# The models of the tests are tiny: more threads cost more than they bring, and pytest-xdist runs
# several processes. OpenMP reads the variable once, when torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _needs_triton_interpreter() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    import torch

    return not torch.cuda.is_available()


# Triton decides at import whether its kernels are compiled or interpreted.
if _needs_triton_interpreter():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what another stage's tests in this run test already: the same bytes."""
    from m0_infra.repeated_tests import repeated_test_files
    from m0_infra.stages import load_stages

    files = {item.path for item in items}
    repeated = repeated_test_files(ROOT, load_stages(ROOT), files)
    config.hook.pytest_deselected(items=[item for item in items if item.path in repeated])
    items[:] = [item for item in items if item.path not in repeated]
