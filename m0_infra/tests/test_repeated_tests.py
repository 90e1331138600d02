"""Which tests of a stage repeat those of the stage before."""

from pathlib import Path

import pytest

from m0_infra.repeated_tests import repeated_test_files
from m0_infra.stages import Stage, find_stage, load_stages

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def stages() -> dict[str, Stage]:
    found = load_stages(ROOT)
    return {name: find_stage(found, name) for name in ("m3_paged", "m4_flash")}


def write(root: Path, stage: str, code: str = "x = 1\n", test: str = "import STAGE.pool\n") -> Path:
    folder = root / stage
    (folder / "tests").mkdir(parents=True)
    (folder / "pool.py").write_text(code)
    file = folder / "tests" / "test_pool.py"
    file.write_text(test.replace("STAGE", stage))
    return file


def test_same_test_of_the_same_file_is_repeated(tmp_path, stages) -> None:
    files = [write(tmp_path, "m3_paged"), write(tmp_path, "m4_flash")]
    assert repeated_test_files(tmp_path, stages, files) == {files[1]}


def test_nothing_is_repeated_in_a_run_of_one_stage(tmp_path, stages) -> None:
    files = [write(tmp_path, "m3_paged"), write(tmp_path, "m4_flash")]
    assert repeated_test_files(tmp_path, stages, files[1:]) == set()


@pytest.mark.parametrize("change", [{"code": "x = 2\n"}, {"test": "import STAGE.pool, os\n"}])
def test_other_code_or_another_test_is_no_repetition(tmp_path, stages, change) -> None:
    files = [write(tmp_path, "m3_paged"), write(tmp_path, "m4_flash", **change)]
    assert repeated_test_files(tmp_path, stages, files) == set()


def test_test_without_a_file_of_its_name_is_run_everywhere(tmp_path, stages) -> None:
    files = [write(tmp_path, "m3_paged"), write(tmp_path, "m4_flash")]
    for file in files:
        (file.parents[1] / "pool.py").unlink()
    assert repeated_test_files(tmp_path, stages, files) == set()


def test_kernels_of_later_stages_are_tested_once_in_this_checkout() -> None:
    files = sorted(ROOT.glob("m*_*/tests/test_*.py"))
    repeated = {
        file.relative_to(ROOT).as_posix()
        for file in repeated_test_files(ROOT, load_stages(ROOT), files)
    }
    assert "m5_chunked/tests/test_flash_attention.py" in repeated
    assert "m5_chunked/tests/test_engine_contract.py" not in repeated
    assert not any(name.startswith("m1_") for name in repeated)
