"""What the page says of a stage before anything runs, and why some of it is not there."""

from typing import Any

from ...core_messages import CoreFacts

_SHOWN_LIMITS = (
    "max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_chunk_tokens", "block_size",
    "scheduling_policy", "preemption_mode", "async_scheduling",
)  # fmt: skip

_NO_ROOFLINE = "No roofline is known for this machine: --measure-roofline finds it."


def stage_facts(stage: str, model: str, facts: CoreFacts, *, has_roofline: bool) -> dict[str, Any]:
    """Absent is what the stage does not have, with the reason.

    stage: the name of its package; has_roofline: whether one was asked for.
    """
    config = facts.engine_config
    return {
        "stage": stage,
        "model": model,
        "max_model_len": facts.max_model_len,
        "has_tokenizer": facts.tokenizer_path is not None,
        "budget": _number(config.get("max_num_batched_tokens")),
        "max_num_seqs": _number(config.get("max_num_seqs")),
        "limits": {name: config[name] for name in _SHOWN_LIMITS if name in config},
        "absent": {
            "memory": _why_no_map(config),
            "blocks": _why_no_blocks(config),
            "hit_rate": _why_no_hits(config, facts),
            "budget": _why_no_budget(config),
            "roofline": None if has_roofline else _NO_ROOFLINE,
        },
    }


def _why_no_map(config: dict[str, str]) -> str | None:
    if "max_num_seqs" in config:
        return None
    return (
        "No blocks in this stage: the keys and values of the one request that runs are one tensor "
        "per layer, which grows by concatenation. Blocks come with m3_paged."
    )


def _why_no_blocks(config: dict[str, str]) -> str | None:
    if "block_size" in config:
        return None
    return "No blocks in this stage: a whole slot per request."


def _why_no_hits(config: dict[str, str], facts: CoreFacts) -> str | None:
    if not facts.keeps_prefixes:
        return "This stage computes every prompt from its first token. m6_prefix finds prefixes."
    if config.get("enable_prefix_caching") == "False":
        return "Switched off with --no-enable-prefix-caching."
    return None


def _why_no_budget(config: dict[str, str]) -> str | None:
    if "max_num_batched_tokens" in config:
        return None
    return "No token budget in this stage: a step is one whole prompt, or one token."


def _number(text: str | None) -> int | None:
    return None if text in (None, "None") else int(text)
