"""Products with 4-bit weights that never exist at 16 bits in memory (Triton).

A decode step reads every weight once and is bound by that: a quarter of the bytes is a quarter of
the time, if the integers become numbers in registers, between the load and the multiplication.
Four of them share a 16-bit word, and two words a register. Nibble j of a run of W words holds W
inputs that follow each other (`pack_for_kernel`): masking one nibble of a register leaves two
neighbours, which is what a matrix instruction wants there, and the four nibbles of a run are 4 W
inputs, one operand of one product. Runs of outputs that are neighbours lie together, so that a
program reads memory in whole pieces.

From the number of rows on with which arithmetic limits, 16-bit products win: then the weights are
written out once per product, and the library multiplies.

The order within words is an idea of Marlin (Frantar et al. 2024), the integer that becomes a
number by its bits one of FasterTransformer (Kim et al. 2022); the form here is our own.
"""

from functools import lru_cache
from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from folovllm.kernels.overlap import let_next_start, overlap_options, wait_for_previous

from .gptq import QuantizedMatrix

MAX_ROWS = 256
"""Beyond, weights are written out at 16 bits. With so many that is slower on an H200; with more
it was not compared."""
_TILE_OUT = 32
"""Outputs whose runs of words are neighbours in memory."""
_MAX_RUN = 32
"""Words of a run: with groups of 128, four runs of inputs are a group."""
_MIDDLE = 8
"""The zero point of every symmetric matrix."""
_MIN_DOT = 16
"""Least inner size of a matrix instruction."""
_MIN_STEPS = 2
"""A program with fewer would do little else than fill its pipeline and meet the others."""
_MAX_SPLITS = 8


class PackedWeight(NamedTuple):
    """A matrix in the order in which the kernels read it."""

    words: torch.Tensor
    """[num_tiles, num_runs, 32, run] int16; nibble j of word [t, r, n, w] belongs to output
    32 * t + n and input (4 * r + j) * run + w; the last tile is filled with zeros"""
    scales: torch.Tensor
    """[num_outputs, num_groups] float16"""
    zeros: torch.Tensor | None
    """[num_outputs, num_groups] uint8; None: 8 everywhere"""
    order: torch.Tensor | None
    """[num_inputs] int64, the activation that each input is; None: they are in order (act order
    puts the inputs of a group beside each other)"""
    num_arrived: torch.Tensor
    """int32, zero between products: how many of the programs that share outputs are done"""
    group_size: int

    @property
    def run(self) -> int:
        return self.words.shape[3]

    @property
    def num_runs(self) -> int:
        return self.words.shape[1]

    @property
    def num_inputs(self) -> int:
        return 4 * self.num_runs * self.run


def pack_for_kernel(matrix: QuantizedMatrix) -> PackedWeight:
    """ValueError if the inputs do not fill words; 4-bit integers are taken for granted."""
    num_outputs, num_inputs = matrix.q.shape
    if num_inputs % 8:
        raise ValueError(f"{num_inputs} inputs of 4 bits do not fill words; 8 of them are a word")
    g_idx = matrix.g_idx.to(torch.int64)
    order = torch.argsort(g_idx, stable=True)
    is_ordered = bool((order == torch.arange(num_inputs, device=order.device)).all())
    sizes = torch.bincount(g_idx)
    group_size = int(sizes[0])
    run = _run_of(num_inputs, group_size if len(sizes) > 1 else num_inputs)
    q = matrix.q[:, order].to(torch.int32).view(num_outputs, -1, 4, run)
    shifts = torch.arange(0, 16, 4, device=q.device, dtype=torch.int32)
    # Nibbles do not overlap, so that their sum is their union; 16 bits of it are the word.
    words = (q << shifts[:, None]).sum(dim=2, dtype=torch.int32).to(torch.int16)
    words = torch.nn.functional.pad(words, (0, 0, 0, 0, 0, -num_outputs % _TILE_OUT))
    words = words.unflatten(0, (-1, _TILE_OUT)).transpose(1, 2)
    is_symmetric = bool((matrix.zeros == _MIDDLE).all())
    return PackedWeight(
        words=words.contiguous(),
        scales=matrix.scales.t().contiguous().to(torch.float16),
        zeros=None if is_symmetric else matrix.zeros.t().contiguous().to(torch.uint8),
        order=None if is_ordered else order,
        num_arrived=torch.zeros(_most_programs(q.device), dtype=torch.int32, device=q.device),
        group_size=group_size,
    )


def _run_of(num_inputs: int, group_size: int) -> int:
    """The largest power of two up to _MAX_RUN with which runs of words fill rows and no run of
    inputs has two groups."""
    run = _MAX_RUN
    while (num_inputs // 4) % run or group_size % run:
        run //= 2
    return run


@triton.jit
def _plain_weights(words, NIBBLE: tl.constexpr, zeros, DTYPE: tl.constexpr):
    """One nibble of each word less its zero point, DTYPE: exact, at most 15 either way."""
    q = (words.to(tl.int32) >> (4 * NIBBLE)) & 0xF
    return (q - zeros[:, None]).to(DTYPE)


@triton.jit
def _unpacked(words, NIBBLE: tl.constexpr, LESS_MIDDLE: tl.constexpr, DTYPE: tl.constexpr):
    """One nibble q of each word as a number, two words at a time: 128 + q in bfloat16, 1024 + q in
    float16, have q in their last bits. LESS_MIDDLE: q - 8 instead.

    words: int16, neighbours in one register; result of their shape, DTYPE.
    """
    IS_BFLOAT16: tl.constexpr = tl.bfloat16 == DTYPE
    KIND: tl.constexpr = "bf16x2" if IS_BFLOAT16 else "f16x2"
    BASE: tl.constexpr = 0x43004300 if IS_BFLOAT16 else 0x64006400
    MIDDLE: tl.constexpr = BASE + 0x00080008
    SHIFT: tl.constexpr = 4 * NIBBLE
    SUBTRACT: tl.constexpr = f"mov.b32 t, {MIDDLE}; sub.rn.{KIND} $0, $0, t;" if LESS_MIDDLE else ""
    CODE: tl.constexpr = (
        f"{{ .reg .b32 t; shr.u32 t, $1, {SHIFT}; "
        f"lop3.b32 $0, t, 0x000f000f, {BASE}, 0xea; {SUBTRACT} }}"
    )
    if IS_BFLOAT16:  # a parameter cannot be the type of the result
        return tl.inline_asm_elementwise(CODE, "=r,r", [words], tl.bfloat16, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(CODE, "=r,r", [words], tl.float16, is_pure=True, pack=2)


@triton.jit
def _weights(words, NIBBLE: tl.constexpr, zeros, HAS_ZEROS: tl.constexpr, DTYPE: tl.constexpr):
    """`_plain_weights` by `_unpacked`."""
    weight = _unpacked(words, NIBBLE, not HAS_ZEROS, DTYPE)
    if HAS_ZEROS:
        BASE: tl.constexpr = 128.0 if tl.bfloat16 == DTYPE else 1024.0
        weight -= (zeros.to(tl.float32) + BASE).to(DTYPE)[:, None]
    return weight


@triton.jit
def _nibble(
    words,
    NIBBLE: tl.constexpr,
    zeros,
    HAS_ZEROS: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One nibble of each word less its zero point; words and result: [BLOCK_OUT, RUN]."""
    if IN_PAIRS:
        return _weights(words, NIBBLE, zeros, HAS_ZEROS, DTYPE)
    else:
        return _plain_weights(words, NIBBLE, zeros, DTYPE)


@triton.jit
def _joined(
    words,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    zeros,
    HAS_ZEROS: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """COUNT nibbles from FIRST on, inputs in their order: [BLOCK_OUT, COUNT * RUN]. Each is in
    registers of its own, so that to join them moves nothing."""
    if COUNT == 1:
        return _nibble(words, FIRST, zeros, HAS_ZEROS, IN_PAIRS, DTYPE)
    else:
        HALF: tl.constexpr = COUNT // 2
        low = _joined(words, FIRST, HALF, zeros, HAS_ZEROS, IN_PAIRS, DTYPE)
        high = _joined(words, FIRST + HALF, HALF, zeros, HAS_ZEROS, IN_PAIRS, DTYPE)
        both = tl.permute(tl.join(low, high), (0, 2, 1))
        return tl.reshape(both, (words.shape[0], COUNT * words.shape[1]))


@triton.jit
def _group(scales_ptr, zeros_ptr, groups, HAS_ZEROS: tl.constexpr):
    """Scales and zero points: [BLOCK_OUT] each."""
    scales = tl.load(scales_ptr + groups)
    if HAS_ZEROS:
        zeros = tl.load(zeros_ptr + groups).to(tl.int32)
    else:
        zeros = tl.full(groups.shape, 8, dtype=tl.int32)
    return scales, zeros


@triton.jit(do_not_specialize=["num_rows"])
def _product_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    num_arrived_ptr,
    num_rows,
    num_inputs,
    num_outputs,
    num_runs,
    num_groups,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE_OUT: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SAME_GROUP: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """BLOCK_OUT outputs of ROWS rows, over a part of the inputs: integers less zero points times x
    transposed, then scales. The scales of a group are asked for while the group before is
    multiplied; asked for when they are wanted, they would be most of a step's time.

    SAME_GROUP: so many nibbles of a run of words have one scale. IN_PAIRS: two 16-bit weights at a
    time, which Triton's interpreter cannot.
    """
    let_next_start(OVERLAP)
    outputs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    # Outputs beyond the last one are computed as the last one is, and not stored.
    place = tl.minimum(outputs, num_outputs - 1).to(tl.int64)
    first_words = place // TILE_OUT * (TILE_OUT * num_runs * RUN) + place % TILE_OUT * RUN
    word_ptrs = words_ptr + first_words[:, None] + tl.arange(0, RUN)[None, :]
    first_groups = place * num_groups
    inputs = tl.arange(0, SAME_GROUP * RUN)
    x_ptrs = x_ptr + rows.to(tl.int64)[None, :] * num_inputs + inputs[:, None]
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_OUT, ROWS], dtype=tl.float32)
    steps = tl.cdiv(num_runs, tl.num_programs(2))
    start = tl.program_id(2) * steps
    end = tl.minimum(start + steps, num_runs)
    scales, zeros = _group(
        scales_ptr, zeros_ptr, first_groups + 4 * start * RUN // GROUP_SIZE, HAS_ZEROS
    )
    wait_for_previous(OVERLAP)
    for run in tl.range(start, end, num_stages=NUM_STAGES):
        words = tl.load(word_ptrs + run * (TILE_OUT * RUN))
        for part in tl.static_range(4 // SAME_GROUP):
            first = (4 * run + part * SAME_GROUP) * RUN
            following = tl.minimum(first + SAME_GROUP * RUN, num_inputs - 1) // GROUP_SIZE
            next_scales, next_zeros = _group(
                scales_ptr, zeros_ptr, first_groups + following, HAS_ZEROS
            )
            x = tl.load(x_ptrs + first, mask=is_row[None, :], other=0.0)
            weight = _joined(
                words, part * SAME_GROUP, SAME_GROUP, zeros, HAS_ZEROS, IN_PAIRS, DTYPE
            )
            dots = tl.dot(weight, x, input_precision="ieee")
            acc += scales.to(tl.float32)[:, None] * dots
            scales, zeros = next_scales, next_zeros
    places = rows.to(tl.int64)[None, :] * num_outputs + outputs[:, None]
    mask = is_row[None, :] & (outputs < num_outputs)[:, None]
    is_last = True
    if IS_SPLIT:
        # Whoever comes last finds all parts in memory and adds them in their order: no second
        # launch, and the same sum every time. The barrier puts every thread's stores before the
        # release of the one that counts.
        part_size = num_rows.to(tl.int64) * num_outputs
        tl.store(partial_ptr + tl.program_id(2) * part_size + places, acc, mask=mask)
        tl.debug_barrier()
        meeting_ptr = num_arrived_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        is_last = tl.atomic_add(meeting_ptr, 1, sem="acq_rel") == tl.num_programs(2) - 1
        if is_last:
            tl.store(meeting_ptr, 0)
            acc = tl.zeros([BLOCK_OUT, ROWS], dtype=tl.float32)
            for split in range(tl.num_programs(2)):
                part_ptrs = partial_ptr + split * part_size + places
                acc += tl.load(part_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
    if is_last:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + place).to(tl.float32)[:, None]
        tl.store(out_ptr + places, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dequantize_kernel(
    words_ptr,
    scales_ptr,
    zeros_ptr,
    weight_ptr,
    num_outputs,
    num_runs,
    num_groups,
    group_size,
    HAS_ZEROS: tl.constexpr,
    TILE_OUT: tl.constexpr,
    RUN: tl.constexpr,
    NUM_RUNS: tl.constexpr,
):
    """NUM_RUNS runs of words of a tile of outputs, written out."""
    outputs = tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)
    is_output = outputs < num_outputs
    place = outputs.to(tl.int64)
    lanes = tl.arange(0, RUN)
    in_tile = tl.arange(0, TILE_OUT)[:, None] * RUN + lanes[None, :]
    for index in tl.static_range(NUM_RUNS):
        run = tl.program_id(1) * NUM_RUNS + index
        tile_run = tl.program_id(0).to(tl.int64) * num_runs + run
        words = tl.load(words_ptr + tile_run * (TILE_OUT * RUN) + in_tile)
        for nibble in tl.static_range(4):
            first = (4 * run + nibble) * RUN
            grid = place * num_groups + first // group_size
            scales = tl.load(scales_ptr + grid, mask=is_output, other=0.0).to(tl.float32)
            if HAS_ZEROS:
                zeros = tl.load(zeros_ptr + grid, mask=is_output, other=0).to(tl.int32)
            else:
                zeros = tl.full([TILE_OUT], 8, dtype=tl.int32)
            weight = _plain_weights(words, nibble, zeros, tl.float32) * scales[:, None]
            columns = (first + lanes)[None, :]
            out_ptrs = weight_ptr + place[:, None] * (4 * num_runs * RUN) + columns
            tl.store(out_ptrs, weight.to(weight_ptr.dtype.element_ty), mask=is_output[:, None])


class Tile(NamedTuple):
    """What a program computes, how far it reads ahead, and for how many of them an SM has room."""

    num_rows: int
    num_outputs: int
    num_warps: int
    num_stages: int
    num_per_sm: int
    step_us: float | None = None
    """What a step of one wave takes, where parts of a sum are so large that they count too."""


_PARTS_BYTES_PER_US = 3e6
"""Of the parts of a sum that several programs share: each is written and read."""

_TILES = {
    8: Tile(num_rows=8, num_outputs=32, num_warps=2, num_stages=6, num_per_sm=9),
    16: Tile(num_rows=16, num_outputs=128, num_warps=8, num_stages=4, num_per_sm=3),
    32: Tile(num_rows=32, num_outputs=64, num_warps=4, num_stages=6, num_per_sm=3),
    128: Tile(64, num_outputs=64, num_warps=4, num_stages=3, num_per_sm=3, step_us=0.89),
    MAX_ROWS: Tile(128, num_outputs=64, num_warps=4, num_stages=3, num_per_sm=2, step_us=1.05),
}
"""By the rows up to which each serves. Of the tiles that were measured on an H200 with the shapes
of an 8B model (docs/dev/trials/m7_product_ways.py) the best for the four products of a layer
together; for one row, the best in the engine."""
_FLOAT32_TILE = Tile(num_rows=16, num_outputs=32, num_warps=4, num_stages=2, num_per_sm=2)
"""For checking tokens: no matrix instruction is exact enough."""


def _tile(x: torch.Tensor, weight: PackedWeight) -> Tile:
    """Of more rows than half of MAX_ROWS, the tile that is faster for the shape."""
    if x.dtype == torch.float32:
        return _FLOAT32_TILE
    tile = next(tile for num_rows, tile in _TILES.items() if len(x) <= num_rows)
    if tile is not _TILES[MAX_ROWS]:
        return tile
    shape = (len(x), len(weight.scales), weight.num_runs)
    tiles = (tile, _TILES[MAX_ROWS // 2])
    return min(tiles, key=lambda tile: _cut(*shape, tile, x.device).cost)


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b; x: [num_rows, num_inputs] contiguous, 16-bit or float32; result in its dtype."""
    if weight.order is not None:
        x = x.index_select(1, weight.order)
    if len(x) > MAX_ROWS or weight.run < _MIN_DOT:
        return torch.nn.functional.linear(x, dequantize(weight, x.dtype), bias)
    return multiply(x, weight, bias, _tile(x, weight))


def multiply(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, tile: Tile
) -> torch.Tensor:
    """As `linear`, by the kernel and with any tile; x has its inputs in the weight's order."""
    num_rows = len(x)
    num_outputs, num_groups = weight.scales.shape
    _, splits, blocks = _cut(num_rows, num_outputs, weight.num_runs, tile, x.device)
    out = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
    partial = out
    if splits > 1:
        shape = (splits, num_rows, num_outputs)
        partial = torch.empty(shape, dtype=torch.float32, device=x.device)
    tensors = (x, weight.words, weight.scales, weight.zeros, bias, out, partial, weight.num_arrived)
    _product_kernel[(*blocks, splits)](
        *tensors,
        num_rows,
        weight.num_inputs,
        num_outputs,
        weight.num_runs,
        num_groups,
        HAS_ZEROS=weight.zeros is not None,
        HAS_BIAS=bias is not None,
        TILE_OUT=_TILE_OUT,
        BLOCK_OUT=tile.num_outputs,
        ROWS=tile.num_rows,
        RUN=weight.run,
        GROUP_SIZE=weight.group_size,
        SAME_GROUP=_num_runs_of_a_group(weight),
        IS_SPLIT=splits > 1,
        NUM_STAGES=tile.num_stages,
        IN_PAIRS=x.is_cuda and x.dtype != torch.float32,
        num_warps=tile.num_warps,
        **overlap_options(x.device),
    )
    return out


class _Cut(NamedTuple):
    """How programs share a product."""

    cost: float
    """Steps of a wave, one wave after the other; or µs, where a tile has its `step_us`."""
    splits: int
    """Programs that share the inputs of one output."""
    blocks: tuple[int, int]
    """Tiles along the outputs, and along the rows."""


@lru_cache
def _cut(num_rows: int, num_outputs: int, num_steps: int, tile: Tile, device: torch.device) -> _Cut:
    """Programs run in waves of as many as the device has room for, and every wave takes the steps
    of one program: the least product of the two, and of equals the fewest that must meet."""
    blocks = (triton.cdiv(num_outputs, tile.num_outputs), triton.cdiv(num_rows, tile.num_rows))
    num_blocks, room = blocks[0] * blocks[1], tile.num_per_sm * _num_sms(device)
    most = 1 if num_blocks > room else min(_MAX_SPLITS, max(num_steps // _MIN_STEPS, 1))
    cuts = []
    for wanted in range(1, most + 1):
        steps = triton.cdiv(num_steps, wanted)
        splits = triton.cdiv(num_steps, steps)
        cost = float(triton.cdiv(num_blocks * splits, room) * steps)
        if tile.step_us is not None:
            cost *= tile.step_us
            if splits > 1:
                cost += splits * num_rows * num_outputs * 8 / _PARTS_BYTES_PER_US
        cuts.append(_Cut(cost, splits, blocks))
    return min(cuts, key=lambda cut: (cut.cost, cut.splits))


def _most_programs(device: torch.device) -> int:
    """Blocks of a product whose inputs are split: with more of them the device is full."""
    return max(tile.num_per_sm for tile in _TILES.values()) * _num_sms(device)


@lru_cache
def _num_sms(device: torch.device) -> int:
    """Streaming multiprocessors; in the interpreter, so few that small matrices are split."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def _num_runs_of_a_group(weight: PackedWeight) -> int:
    """How many of the four runs of inputs in a run of words have one scale: 4, 2 or 1."""
    num_runs = 4
    while weight.group_size % (num_runs * weight.run) and weight.scales.shape[1] > 1:
        num_runs //= 2
    return num_runs


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """[num_outputs, num_inputs], columns in the order of the kernels (`PackedWeight.order`)."""
    num_outputs, num_groups = weight.scales.shape
    out = torch.empty((num_outputs, weight.num_inputs), dtype=dtype, device=weight.words.device)
    num_runs = gcd(weight.num_runs, 4)
    _dequantize_kernel[(len(weight.words), weight.num_runs // num_runs)](
        weight.words,
        weight.scales,
        weight.zeros,
        out,
        num_outputs,
        weight.num_runs,
        num_groups,
        weight.group_size,
        HAS_ZEROS=weight.zeros is not None,
        TILE_OUT=_TILE_OUT,
        RUN=weight.run,
        NUM_RUNS=num_runs,
    )
    return out
