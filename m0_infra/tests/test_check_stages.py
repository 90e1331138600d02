"""check-stages passes honest stages and names every kind of dishonesty."""

import pytest

from m0_infra.check_stages import check_stages
from m0_infra.code_lines import count_code_lines
from m0_infra.stages import StageError, find_stage, load_stages
from m0_infra.tests.conftest import SHOW


def problems(checkout):
    return check_stages(checkout.root).problems


def the_problem(checkout):
    (problem,) = problems(checkout)
    return problem


def test_honest_stages_pass_and_sizes_are_told(checkout):
    report = check_stages(checkout.root)
    assert report.problems == ()
    first, second, third = report.sizes
    assert (first.num_lines_added, first.num_lines_removed) == (0, 0)
    assert (second.num_lines_added, second.num_lines_removed) == (1, 1)
    assert (third.num_lines_added, third.num_lines_removed) == (1, 0)
    assert third.num_code_lines == second.num_code_lines + 1
    assert "m2_two" in str(report) and "+1 -1" in str(report)


def test_undeclared_file_that_differs_by_a_byte_is_found(checkout):
    checkout.write("m2_two/engine.py", checkout.read("m2_two/engine.py") + "\n")
    found = problems(checkout)
    assert any(p.startswith("m2_two/engine.py is changed") for p in found)
    # The third stage's copy is now the odd one out as well.
    assert any(p.startswith("m3_three/engine.py is changed") for p in found)


def test_declared_file_that_does_not_differ_is_found(checkout):
    for stage in ("m2_two", "m3_three"):
        checkout.write(f"{stage}/scheduler.py", checkout.read("m1_one/scheduler.py"))
    assert "m2_two/scheduler.py is identical" in the_problem(checkout)


@pytest.mark.parametrize("file", ["engine.py", "scheduler.py"])
def test_missing_file_is_found(checkout, file):
    (checkout.root / "m3_three" / file).unlink()
    assert f"m3_three/{file} is removed" in the_problem(checkout)


def test_declared_file_that_nobody_has_is_found(checkout):
    checkout.replace("m0_infra/stages.toml", '"scheduler.py"', '"scheduler.py", "gone.py"')
    assert "m2_two/gone.py is missing" in the_problem(checkout)


@pytest.mark.parametrize("file", ["extra.py", "kernels/extra.cu"])
def test_undeclared_added_file_is_found(checkout, file):
    checkout.write(f"m3_three/{file}", "extra = 1\n")
    assert f"m3_three/{file} is added" in the_problem(checkout)


def test_declared_removal_is_honest_and_a_false_one_is_found(checkout):
    checkout.replace(
        "m0_infra/stages.toml", 'added = ["block', 'removed = ["engine.py"]\nadded = ["block'
    )
    assert "m3_three/engine.py is identical" in the_problem(checkout)
    (checkout.root / "m3_three/engine.py").unlink()
    assert problems(checkout) == ()


def test_readme_tests_and_packaging_may_differ(checkout):
    checkout.write("m2_two/README.md", "other")
    checkout.write("m2_two/pyproject.toml", "[project]\n")
    checkout.write("m2_two/tests/test_two.py", "import pytest\n")
    checkout.write("m2_two/__pycache__/engine.cpython-311.pyc", "x")
    assert problems(checkout) == ()


def test_budget_counts_code_lines_only(checkout):
    checkout.replace(
        "m0_infra/stages.toml", "[m1_one]\nmax_code_lines = 50", "[m1_one]\nmax_code_lines = 12"
    )
    assert "m1_one/ has 13 code lines, its budget is 12" in the_problem(checkout)


def test_stage_without_folder_is_not_checked_and_undeclared_folder_is_found(checkout):
    (checkout.root / "m3_three").rename(checkout.root / "m4_four")
    assert the_problem(checkout).startswith("m4_four/ is not declared")


@pytest.mark.parametrize(
    ("path", "code", "complaint"),
    [
        ("m1_one/other.py", "import pandas\n", "m1_one/other.py:1 imports pandas"),
        ("m1_one/other.py", "from m2_two import engine\n", "imports m2_two"),
        ("m1_one/other.py", "import m1_one.engine\n", "by its full name"),
        ("m1_one/other.py", "from .. import compare\n", "outside of its folder"),
        ("m1_one/other.py", "def f():\n    import m0_infra\n", "m1_one/other.py:2 imports m0"),
        ("m1_one/config.py", "import torch\n", "m1_one.config -> torch"),
        ("m1_one/block_pool.py", "from torch import nn\n", "m1_one.block_pool -> torch"),
        ("shared/folovllm/entrypoints/llm.py", "import m1_one\n", "llm.py:1 imports m1_one"),
        ("shared/folovllm/entrypoints/llm.py", "import compare.runner\n", "imports compare.runner"),
        ("shared/tests/test_llm.py", "from m0_infra import fetch\n", "imports m0_infra"),
        (
            "shared/folovllm/entrypoints/llm.py",
            "import importlib\nimportlib.import_module('m2_two.engine')\n",
            "llm.py:2 imports m2_two.engine",
        ),
        ("compare/table.py", "from m3_three.engine import x\n", "table.py:1 imports m3_three"),
    ],
)
def test_broken_import_rule_is_found(checkout, path, code, complaint):
    for stage in ("m2_two", "m3_three") if path.startswith("m1_one/") else ():
        (checkout.root / stage / "scheduler.py").unlink()
        (checkout.root / stage).rename(checkout.root / f"old_{stage}")
    checkout.write(path, code)
    assert complaint in the_problem(checkout)


def test_torch_reaching_the_scheduler_through_another_file_is_found(checkout):
    for stage in ("m1_one", "m2_two", "m3_three"):
        checkout.write(f"{stage}/tensors.py", "import torch\n")
        checkout.replace(f"{stage}/scheduler.py", "import heapq\n", "from .tensors import x\n")
    assert "m1_one/scheduler.py imports torch (m1_one.scheduler -> m1_one.tensors -> torch)" in str(
        problems(checkout)
    )


def test_torch_reaching_the_scheduler_through_shared_is_found(checkout):
    checkout.write("shared/folovllm/request.py", "from .transfer import upload\n")
    checkout.write("shared/folovllm/transfer.py", "import torch\n")
    for stage in ("m1_one", "m2_two", "m3_three"):
        checkout.replace(
            f"{stage}/scheduler.py", "import heapq\n", "from folovllm.request import Request\n"
        )
    way = "m1_one.scheduler -> folovllm.request -> folovllm.transfer -> torch"
    assert way in str(problems(checkout))


def test_torch_in_the_package_of_a_stage_is_found(checkout):
    checkout.write("m1_one/__init__.py", "from .tensors import x\n")
    checkout.write("m1_one/tensors.py", "import torch\n")
    way = "m1_one.scheduler -> m1_one.__init__ -> m1_one.tensors -> torch"
    assert way in str(problems(checkout))


@pytest.mark.parametrize(
    ("file", "code", "complaint"),
    [
        ("text/tokenizer.py", "from ..model.config import x\n", "imports folovllm.model.config"),
        ("text/tokenizer.py", "from folovllm.model import config\n", "folovllm.model.config"),
        ("text/tokenizer.py", "def f():\n    from ..model import config\n", "model.config"),
        ("request.py", "from .text import tokenizer\n", "imports folovllm.text.tokenizer"),
        ("model/config.py", "from ..sampling.sampler import x\n", "imports folovllm.sampling"),
        ("spare/thing.py", "", "spare/thing.py is in a room without a level"),
        ("text/__init__.py", "from .tokenizer import x\n", "text/__init__.py holds code"),
    ],
)
def test_room_that_imports_upwards_is_found(checkout, file, code, complaint):
    for name in ("text/tokenizer.py", "model/config.py", "sampling/sampler.py"):
        checkout.write(f"shared/folovllm/{name}", "")
    checkout.write(f"shared/folovllm/{file}", code)
    assert complaint in the_problem(checkout)


def test_room_may_import_lower_rooms_its_own_and_the_ground(checkout):
    checkout.write("shared/folovllm/request.py", "")
    checkout.write("shared/folovllm/text/__init__.py", '"""Doc."""\n')
    checkout.write("shared/folovllm/text/tokenizer.py", "from ..request import Request\n")
    checkout.write("shared/folovllm/text/detokenizer.py", "from .tokenizer import x\n")
    checkout.write("shared/folovllm/entrypoints/llm.py", "from ..text import tokenizer\n")
    assert problems(checkout) == ()


@pytest.mark.parametrize("folder", ["m1_one", "shared/folovllm/text"])
def test_circle_of_imports_is_found_once(checkout, folder):
    checkout.write(f"{folder}/aa.py", "from .bb import x\n")
    checkout.write(f"{folder}/bb.py", "def f():\n    from .cc import x\n")
    checkout.write(f"{folder}/cc.py", "from . import aa\n")
    package = folder.removeprefix("shared/").replace("/", ".")
    circle = f"circle of imports: {package}.aa -> {package}.bb -> {package}.cc -> {package}.aa"
    assert [p for p in problems(checkout) if p.startswith("circle")] == [circle]


def test_allowed_imports_pass(checkout):
    for stage in ("m1_one", "m2_two", "m3_three"):
        checkout.write(
            f"{stage}/runner.py",
            "import os.path\nimport numpy as np\nimport torch\nimport triton\n"
            "from folovllm.request import Request\nfrom . import engine\n",
        )
        checkout.replace(
            f"{stage}/scheduler.py",
            "import heapq\n",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .runner import x\n",
        )
    checkout.write("shared/folovllm/bench/benchmark.py", "import torch, transformers\n")
    assert problems(checkout) == ()


def test_file_that_is_not_python_is_one_problem(checkout):
    for stage in ("m1_one", "m2_two", "m3_three"):
        checkout.write(f"{stage}/engine.py", "def broken(:\n")
    assert any("m1_one/engine.py:1 is not Python" in problem for problem in problems(checkout))


def test_stage_that_does_not_say_what_shows_its_idea_is_found(checkout):
    checkout.replace("m0_infra/stages.toml", f"{SHOW}[m3", "[m3")
    assert "m2_two/ does not say what shows its idea" in the_problem(checkout)


def two_with_show(show):
    first = "[m1_one]\nmax_code_lines = 5\n"
    return f"{first}[m2_two]\nmax_code_lines = 5\nprevious = 'm1_one'\nshow = {show}\n"


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[m1_one", "is not TOML"),
        ("[m1_one]\n", "needs max_code_lines"),
        ("[m1_one]\nmax_code_lines = 5\nchange = []\n", r"unknown keys \['change'\]"),
        ("[m1_one]\nmax_code_lines = 5\nadded = 'x'\n", "must be a list"),
        ("[m1_one]\nmax_code_lines = 5\nadded = ['x']\n", "names no previous"),
        ("[m2_two]\nmax_code_lines = 5\nprevious = 'm1_one'\n", "not declared above"),
        ("[two]\nmax_code_lines = 5\n", "named like a stage"),
        ("[m1_one]\nmax_code_lines = 5\nshow = {}\n", "names no previous stage to show it on"),
        (two_with_show("'nano'"), "must be a table with workload, metrics, chart, options"),
        (two_with_show("{ workloads = 'nano' }"), "must be a table with workload"),
        (two_with_show("{ workload = 'nano' }"), "metrics in show of m2_two must be a list that"),
        (two_with_show("{ workload = 'nano', metrics = [] }"), r"not empty, got \[\]"),
        (two_with_show("{ workload = 'nano', metrics = [1], chart = 'a' }"), "must hold strings"),
        (
            two_with_show("{ workload = 'a', metrics = ['b'], chart = 'c', options = { d = 1 } }"),
            "options in show of m2_two must hold strings",
        ),
    ],
)
def test_wrong_manifest_is_refused_with_a_reason(checkout, toml, message):
    checkout.write("m0_infra/stages.toml", toml)
    with pytest.raises(StageError, match=message):
        check_stages(checkout.root)


def test_missing_manifest_says_where_to_run(tmp_path):
    with pytest.raises(StageError, match="root of a checkout"):
        check_stages(tmp_path)


def test_stage_is_found_by_short_and_full_name(checkout):
    stages = load_stages(checkout.root)
    assert find_stage(stages, "m2") is find_stage(stages, "m2_two")
    with pytest.raises(StageError, match=r"'m9'.*m1_one, m2_two"):
        find_stage(stages, "m9")


def test_blank_lines_comments_and_docstrings_are_free():
    source = '''"""Module
docstring."""

import os  # counted, its comment is not


class Thing:
    """Idea."""

    size: int = 1
    """Under a field."""

    def method(self) -> str:
        # Why.
        return """two
lines"""
'''
    assert count_code_lines(source) == 6


def test_line_breaks_inside_brackets_are_counted():
    assert count_code_lines("x = [\n    1,\n\n    2,\n]\n") == 4
