"""The compiler takes the int4 kernel for a GPU, which the interpreter says nothing about."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

_PROGRAM = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from m7_gptq.int4_matmul import _TILE_OUT, _TILES, _product_kernel as kernel

sizes = ("num_rows", "num_inputs", "num_outputs", "num_runs", "num_groups")
pointers = {"x_ptr": "*bf16", "words_ptr": "*i16", "scales_ptr": "*fp16", "out_ptr": "*bf16",
            "partial_ptr": "*fp32", "num_arrived_ptr": "*i32"}
more = {"zeros_ptr": "*u8", "bias_ptr": "*bf16"}
for num_rows, same_group in ((8, 4), (8, 1), (128, 2)):
    tile, has_more = _TILES[num_rows], same_group < 4
    values = {"HAS_ZEROS": has_more, "HAS_BIAS": has_more, "TILE_OUT": _TILE_OUT,
              "BLOCK_OUT": tile.num_outputs, "ROWS": tile.num_rows, "RUN": 32,
              "GROUP_SIZE": 32 * same_group, "SAME_GROUP": same_group, "IS_SPLIT": True,
              "NUM_STAGES": tile.num_stages, "IN_PAIRS": True, "OVERLAP": True}
    values |= {} if has_more else dict.fromkeys(more)
    types = dict.fromkeys(values, "constexpr") | pointers | dict.fromkeys(sizes, "i32")
    types |= more if has_more else {}
    place = {name: (index,) for index, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        {name: types[name] for name in kernel.arg_names},
        {place[name]: value for name, value in values.items()},
        {place[name]: [["tt.divisibility", 16]] for name in (*pointers, *sizes[1:])},
    )
    options = {"num_warps": tile.num_warps, "launch_pdl": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.metadata.shared < 227 << 10
    print("compiled", num_rows, same_group)
"""


def test_every_kind_of_group_compiles_for_a_hopper(tmp_path) -> None:
    """In a process of its own: here kernels may be the interpreter's."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.count("compiled") == 3, done.stderr[-3000:]
