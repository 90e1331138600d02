"""Sentences that say what a scheduler did in a step and why, made of `step_facts` alone."""

from collections.abc import Iterator, Sequence

from .step_facts import Cause, GaveWay, Limits, Outcome, Plan, Refusal, Share, Wait

_MAX_NAMES = 6
"""Requests that are named one by one; of more, the others are counted."""
_MAX_PROMPTS = 4


def tell_step(plans: Sequence[Plan], outcomes: Sequence[Outcome]) -> list[str]:
    """What one step of an engine did: what was planned, then what came out."""
    planned = {plan.number for plan in plans}
    sentences = [tell_plan(plan) for plan in plans]
    if not plans and outcomes:
        sentences.append("Nothing new is planned before the tokens under way are known.")
    return sentences + [
        tell_outcome(outcome, is_older=outcome.number not in planned or len(plans) > 1)
        for outcome in outcomes
    ]


def tell_plan(plan: Plan) -> str:
    """One sentence: who gave way, who came, what everybody computes, who waits for what."""
    parts = [
        *map(_tell_preemption, plan.gave_way),
        *(f"request {name} comes back from host memory" for name in plan.resumed),
        *_tell_decodes(plan),
        *_tell_prompts(plan),
        *_tell_resting(plan),
        *_tell_waits(plan),
    ]
    if not plan.shares:
        parts.insert(len(plan.gave_way), "nothing is computed")
    return f"Step {plan.number}: {'; '.join(parts)}."


def tell_outcome(outcome: Outcome, *, is_older: bool) -> str:
    """is_older: whether the step has to be named, because another was planned meanwhile."""
    number = len(outcome.token_ids_of)
    what = "no token comes out"
    if number:
        what = f"{_count(number, 'token')} {'comes' if number == 1 else 'come'} out"
    text = f"Of step {outcome.number}, {what}" if is_older else what.capitalize()
    for ended in outcome.ended[:_MAX_NAMES]:
        text += f"; request {ended.request_id} ends ({_END[ended.reason]})"
    if len(outcome.ended) > _MAX_NAMES:
        text += f"; {len(outcome.ended) - _MAX_NAMES} more end"
    if outcome.num_freed_blocks:
        text += f"; {_count(outcome.num_freed_blocks, 'block')} can be given out again"
        if outcome.num_kept_blocks:
            text += f", {outcome.num_kept_blocks} of them kept for later prompts until then"
    return text + "."


_END = {
    "stop": "a stop token",
    "length": "max_tokens",
    "abort": "taken back",
}


def _tell_preemption(gave: GaveWay) -> str:
    needed = f"{_count(gave.refusal.num_needed or 0, 'block')}, {gave.refusal.num_free} free"
    if gave.refusal.request_id == gave.request_id:
        why = f"it needs {needed}, and it is the last in order"
    else:
        why = f"request {gave.refusal.request_id} needs {needed}"
    held = _count(gave.num_blocks, "block")
    where = f"its {held} move to host memory" if gave.is_swapped else f"its {held} are given back"
    return f"request {gave.request_id} gives way ({why}): {where}"


def _tell_decodes(plan: Plan) -> Iterator[str]:
    names = [share.request_id for share in plan.shares if share.is_decode]
    if len(names) == 1:
        yield f"request {names[0]} decodes one token"
    elif names:
        yield f"{_name(names)} decode one token each"


def _tell_prompts(plan: Plan) -> Iterator[str]:
    prompts = [share for share in plan.shares if not share.is_decode]
    for share in prompts[:_MAX_PROMPTS]:
        yield _tell_prompt(plan, share)
    rest = prompts[_MAX_PROMPTS:]
    if rest:
        num_tokens = sum(share.num_scheduled_tokens for share in rest)
        yield f"{_count(len(rest), 'more request')} compute {_count(num_tokens, 'token')}"


def _tell_prompt(plan: Plan, share: Share) -> str:
    number, behind = share.num_scheduled_tokens, share.num_computed_tokens
    is_again = share.num_tokens > share.num_prompt_tokens
    kind = "token" if is_again else "prompt token"
    if share.is_last and behind == 0:
        what = f"all of its {_count(number, kind)}" if number > 1 else f"its one {kind}"
    elif share.is_last:
        last = f"last {number:,}" if number > 1 else "last one"
        what = f"the {last} of its {_count(share.num_tokens, kind)}"
    else:
        what = f"{_count(number, kind)} of its {share.num_tokens:,}"
    text = f"request {share.request_id} gets {what}{_found(plan, share)}"
    if is_again:
        text += ", which it lost when it gave way"
    if not share.is_last:
        text += f" because {_why_chunk(plan, share)}"
    return text


def _found(plan: Plan, share: Share) -> str:
    started = next((s for s in plan.started if s.request_id == share.request_id), None)
    if started is None or not started.num_found_tokens:
        return ""
    if started.parent_id is not None:
        return f" (the others are those of request {started.parent_id}, which has the same prompt)"
    return f" (the first {started.num_found_tokens:,} were found in the prefix cache)"


def _why_chunk(plan: Plan, share: Share) -> str:
    limits = plan.limits
    budget = f"{limits.max_num_batched_tokens:,} tokens is the budget"
    if share.num_scheduled_tokens == limits.max_chunk_tokens:
        return f"chunks are at most {_count(share.num_scheduled_tokens, 'token')}"
    if limits.target_step_ms is not None:
        return f"a step is to take {limits.target_step_ms:g} ms, and {budget}"
    if len(plan.shares) == 1 and not plan.resting:
        return budget
    return f"{budget} of all together"


def _tell_resting(plan: Plan) -> Iterator[str]:
    if not plan.resting:
        return
    names = _name(plan.resting)
    verb = "waits" if len(plan.resting) == 1 else "wait"
    if plan.limits.mixes_prompts_and_decodes:
        are = "is" if len(plan.resting) == 1 else "are"
        yield f"{names} {are} done with planning, the last token is on its way"
    else:
        yield f"{names} {verb} a step, because prompts start and decodes go without them here"


def _tell_waits(plan: Plan) -> Iterator[str]:
    waits = [wait for wait in plan.waits if wait.cause is not None]
    for wait in waits[:_MAX_PROMPTS]:
        yield f"request {wait.request_id} waits: {_why_wait(plan.limits, wait)}"
    told = {wait.request_id for wait in waits[:_MAX_PROMPTS]}
    told |= {gave.request_id for gave in plan.gave_way}
    num_behind = plan.num_waiting - len(told)
    if num_behind > 0 and told:
        yield f"{num_behind:,} more {'waits' if num_behind == 1 else 'wait'} behind"


def _why_wait(limits: Limits, wait: Wait) -> str:
    budget = _count(limits.max_num_batched_tokens or 0, "token")
    match wait.cause:
        case Cause.NO_ROOM:
            assert wait.refusal is not None
            return _why_no_room(wait.refusal)
        case Cause.NO_PLACE if limits.max_num_seqs is None:
            return "one request runs at a time here"
        case Cause.NO_PLACE:
            return f"{limits.max_num_seqs} may run at once, and so many do"
        case Cause.NO_BUDGET:
            return f"the budget of {budget} is given out"
        case Cause.TOO_LONG_FOR_BUDGET:
            return (
                f"its {_count(wait.num_tokens, 'token')} beside the others that start are more "
                f"than the budget of {budget}"
            )
        case Cause.TOO_LONG_IF_PADDED:
            return f"padded to the longest prompt, one more is too much for the budget of {budget}"
        case Cause.PARENT_STARTS:
            return f"request {wait.other_id} has to compute the prompt that they share first"
        case Cause.OTHERS_FIRST:
            return f"request {wait.other_id} is before it"
        case Cause.PREEMPTION:
            return "nobody comes in a step in which somebody had to give way"
    raise RuntimeError(f"no words for {wait.cause}")


def _why_no_room(refusal: Refusal) -> str:
    if refusal.num_needed is None:
        return "every slot of the KV cache is taken"
    needed = f"{_count(refusal.num_needed, 'block')} needed"
    if refusal.num_needed == 0:
        needed = "all blocks found, none needed"
    if refusal.num_spare:
        needed += f" and {refusal.num_spare} to stay free so that those who run can grow"
    return f"{needed}, {refusal.num_free} free"


def _name(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"request {names[0]}"
    if len(names) > _MAX_NAMES:
        first = ", ".join(names[: _MAX_NAMES - 1])
        return f"requests {first} and {len(names) - _MAX_NAMES + 1} more"
    return f"requests {', '.join(names[:-1])} and {names[-1]}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
