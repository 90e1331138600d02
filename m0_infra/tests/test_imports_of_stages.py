"""The rules of imports, tried out: bookkeeping runs where torch cannot be imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from m0_infra.import_rules import HOST_FILES
from m0_infra.stages import stage_folders

ROOT = Path(__file__).parents[2]
STAGES = stage_folders(ROOT)


@pytest.mark.parametrize("stage", STAGES)
def test_bookkeeping_runs_without_torch(stage):
    modules = [Path(file).stem for file in sorted(HOST_FILES) if (ROOT / stage / file).is_file()]
    code = "import sys\nsys.modules['torch'] = None  # any import of it raises\n"
    code += "".join(f"import {stage}.{module}\n" for module in modules)
    code += f"assert {stage}.EngineConfig and {stage}.SamplingParams(max_tokens=2)\n"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)
