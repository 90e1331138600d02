"""The least time that a step can take on this machine, by what it was seen to do at most."""

from typing import NamedTuple

import torch

from ...hardware import Ceilings, measure_ceilings
from ...model.cost import ModelCost, StepWork, model_cost
from ...model.transformer import CausalLM
from .step_facts import Plan


class Roofline(NamedTuple):
    """Time by bytes or by operations, whichever is more."""

    cost: ModelCost
    ceilings: Ceilings

    def least_s(self, plan: Plan) -> float:
        """Of one step; every request counts by itself, also where several read the same blocks."""
        work = step_work(plan)
        by_bytes_s = self.cost.step_bytes(work) / self.ceilings.copy_bytes_per_s
        return max(by_bytes_s, self.cost.step_flops(work) / self.ceilings.matmul_flops_per_s)


def step_work(plan: Plan) -> StepWork:
    """A query attends to all that was computed before and, within its share, up to itself."""
    shares = plan.shares
    return StepWork(
        num_tokens=sum(s.num_scheduled_tokens for s in shares),
        num_logits_rows=sum(s.is_last for s in shares),
        num_cached_tokens_read=sum(s.num_computed_tokens for s in shares),
        num_attention_pairs=sum(
            s.num_scheduled_tokens * s.num_computed_tokens
            + s.num_scheduled_tokens * (s.num_scheduled_tokens + 1) // 2
            for s in shares
        ),
    )


def measure_roofline(model: CausalLM) -> Roofline | None:
    """Takes about two seconds on CUDA and one on a CPU; None if there is no memory to do it in."""
    try:
        return Roofline(model_cost(model), measure_ceilings(model.device))
    except torch.OutOfMemoryError:
        return None
    finally:
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
