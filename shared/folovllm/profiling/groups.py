"""Kernels of a step by what they compute, beside the least that the step must move and compute."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..hardware import Ceilings
from ..model.config import kv_bytes_per_token
from ..model.transformer import CausalLM

_PRODUCTS = (
    *("nvjet", "gemm", "gemv", "splitk", "cutlass", "_row_kernel", "_rows_"),
    *("::mm", "::addmm", "::bmm", "::baddbmm"),  # torch's operators, on a CPU
)
_PATTERNS = (
    ("attention", ("decode_kernel", "prefill_kernel", "flash", "scaled_dot_product")),
    ("norms", ("rms_norm",)),
    ("rotary embedding", ("rope",)),
    ("activation", ("silu",)),
    ("sampling", ("best_of",)),
    ("matrix products", _PRODUCTS),
)
"""Group -> parts of kernel names, in lower case; the first that fits counts."""
OTHER = "everything else"


@dataclass(frozen=True, kw_only=True)
class GroupWork:
    """What a group must do in a step: every input read once, every output written once."""

    num_bytes: int
    num_flops: int = 0

    def limit_s(self, ceilings: Ceilings) -> float:
        return max(
            self.num_bytes / ceilings.copy_bytes_per_s, self.num_flops / ceilings.matmul_flops_per_s
        )


def group_of(kernel_name: str) -> str:
    """The group that a kernel's name suggests."""
    name = kernel_name.lower()
    for group, parts in _PATTERNS:
        if any(part in name for part in parts):
            return group
    return OTHER


def group_works(
    model: CausalLM, *, num_requests: int, query_len: int, seq_len: int
) -> dict[str, GroupWork]:
    """Group -> work of a step that computes `query_len` tokens of each request of `seq_len`."""
    config, size = model.config, model.dtype.itemsize
    num_tokens = num_requests * query_len
    layers, hidden, inner = config.num_layers, config.hidden_size, config.intermediate_size
    q_size = config.num_heads * config.head_dim
    k_size = config.num_kv_heads * config.head_dim
    pairs = num_requests * (query_len * (seq_len - query_len) + query_len * (query_len + 1) // 2)
    # (inputs, outputs) of the four products of a layer
    shapes = ((hidden, q_size + 2 * k_size), (q_size, hidden), (hidden, 2 * inner), (inner, hidden))
    weights = layers * sum(i * o for i, o in shapes)
    activations = layers * num_tokens * sum(i + o for i, o in shapes)
    logits = num_requests * config.vocab_size
    head = hidden * config.vocab_size
    kv_bytes = kv_bytes_per_token(config, model.dtype)
    return {
        "matrix products": GroupWork(
            num_bytes=size * (weights + activations + head + num_requests * hidden + logits),
            num_flops=2 * (num_tokens * weights + num_requests * head),
        ),
        "attention": GroupWork(
            num_bytes=kv_bytes * (num_requests * seq_len + num_tokens)
            + size * layers * num_tokens * 2 * q_size,
            num_flops=4 * layers * q_size * pairs,
        ),
        "norms": GroupWork(num_bytes=size * (2 * layers + 1) * 4 * num_tokens * hidden),
        "rotary embedding": GroupWork(
            num_bytes=layers * num_tokens * (2 * size * (q_size + k_size) + 4 * config.head_dim)
        ),
        "activation": GroupWork(num_bytes=size * layers * num_tokens * 3 * inner),
        "sampling": GroupWork(num_bytes=size * logits),
    }


def summarise_groups(
    kernels: Sequence[dict[str, Any]], works: dict[str, GroupWork], ceilings: Ceilings
) -> list[dict[str, Any]]:
    """Rows of the table, the most expensive group first.

    A stage without attention kernels of its own computes attention by products: then these two
    are one group, since a kernel's name does not tell which product it is.
    """
    times: dict[str, float] = {}
    counts: dict[str, int] = {}
    for kernel in kernels:
        group = group_of(kernel["name"])
        times[group] = times.get(group, 0.0) + kernel["total_s"]
        counts[group] = counts.get(group, 0) + kernel["count"]
    works = dict(works)
    if "attention" not in times:
        products, attention = works["matrix products"], works.pop("attention")
        works["matrix products"] = GroupWork(
            num_bytes=products.num_bytes + attention.num_bytes,
            num_flops=products.num_flops + attention.num_flops,
        )
    rows = []
    for group, total_s in sorted(times.items(), key=lambda item: -item[1]):
        work = works.get(group)
        limit_s = work.limit_s(ceilings) if work else None
        rows.append(
            {
                "group": group,
                "count": counts[group],
                "total_s": total_s,
                "num_bytes": work.num_bytes if work else None,
                "num_flops": work.num_flops if work else None,
                "limit_s": limit_s,
                "limit_fraction": limit_s / total_s if limit_s and total_s else None,
            }
        )
    return rows
