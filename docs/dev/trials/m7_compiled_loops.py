"""What the compiler makes of the int4 kernel's loop on a Hopper; needs triton and no GPU.

    PYTHONPATH=.:shared python docs/dev/trials/m7_compiled_loops.py OUT.json

For every tile of the stage, with symmetric weights in groups of 128 and bfloat16: machine
instructions of a warp in the loop, per weight that the loop handles and lane that handles it, and
how many of them multiply matrices; shared memory of a program; spilled registers. They are counted
in the code for compute capability 9.0, and say nothing about time.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

from m7_gptq import int4_matmul
from m7_gptq.int4_matmul import Tile

CAPABILITY, WARP = 90, 32
RUN, SAME_GROUP = 32, 4
POINTERS = {
    "x_ptr": "*bf16", "words_ptr": "*i16", "scales_ptr": "*fp16", "out_ptr": "*bf16",
    "partial_ptr": "*fp32", "num_arrived_ptr": "*i32",
}  # fmt: skip
SIZES = ("num_inputs", "num_outputs", "num_runs", "num_groups")
"""Multiples of 16, as those of a large model are."""
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)([^;]*);")


def compile_tile(tile: Tile) -> Any:
    constants: dict[str, Any] = {
        "zeros_ptr": None, "bias_ptr": None, "HAS_ZEROS": False, "HAS_BIAS": False,
        "TILE_OUT": int4_matmul._TILE_OUT, "BLOCK_OUT": tile.num_outputs, "ROWS": tile.num_rows,
        "RUN": RUN, "GROUP_SIZE": 4 * RUN, "SAME_GROUP": SAME_GROUP, "IS_SPLIT": False,
        "NUM_STAGES": tile.num_stages, "IN_PAIRS": True, "OVERLAP": True,
    }  # fmt: skip
    names = int4_matmul._product_kernel.arg_names
    types = dict.fromkeys(constants, "constexpr") | POINTERS
    types |= dict.fromkeys((*SIZES, "num_rows"), "i32")
    place = {name: (index,) for index, name in enumerate(names)}
    source = ASTSource(
        int4_matmul._product_kernel,
        {name: types[name] for name in names},
        {place[name]: value for name, value in constants.items()},
        {place[name]: [["tt.divisibility", 16]] for name in (*POINTERS, *SIZES)},
    )
    options = {"num_warps": tile.num_warps, "launch_pdl": True}
    return triton.compile(source, target=GPUTarget("cuda", CAPABILITY, WARP), options=options)


def longest_loop(code: str) -> list[str]:
    """Names of the instructions between the farthest jump back and where it leads."""
    found = [(int(at, 16), name, rest) for at, name, rest in INSTRUCTION.findall(code)]
    jumps = [
        (int(to[1], 16), at)
        for at, name, rest in found
        if name.startswith("BRA") and (to := re.search(r"0x([0-9a-f]+)", rest))
    ]
    start, end = max((jump for jump in jumps if jump[0] < jump[1]), key=lambda j: j[1] - j[0])
    return [name.split(".")[0] for at, name, _ in found if start <= at <= end]


def disassemble(kernel: Any) -> str:
    program = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(program), "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def describe(tile: Tile) -> dict[str, Any]:
    kernel = compile_tile(tile)
    loop = longest_loop(disassemble(kernel))
    counts = Counter(loop)
    weights_per_lane = tile.num_outputs * 4 * RUN / (tile.num_warps * WARP)
    return {
        "tile": tile._asdict(),
        "instructions": len(loop),
        "instructions_per_weight": round(len(loop) / weights_per_lane, 2),
        "matrix_instructions": {name: counts[name] for name in ("HMMA", "HGMMA") if counts[name]},
        "spills": counts["LDL"] + counts["STL"],
        "shared_bytes": kernel.metadata.shared,
    }


def main(out_file: str) -> None:
    tiles = [describe(tile) for tile in int4_matmul._TILES.values()]
    for tile in tiles:
        print(tile)
    results = {"triton": triton.__version__, "compute_capability": CAPABILITY / 10, "tiles": tiles}
    Path(out_file).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
