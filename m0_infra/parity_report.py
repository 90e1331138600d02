"""What a comparison with Transformers found, as a table and as JSON."""

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class PromptParity:
    """How one prompt went."""

    num_prompt_tokens: int
    num_reference_tokens: int
    num_compared_tokens: int
    """Less than the reference's where the paths parted at a near tie, which rounding may decide."""
    mismatch: str | None
    """Where and how the tokens, or the ids of the prompt, differ although they must not; None if
    they agree."""
    max_logit_difference: float
    """Over all steps and the whole vocabulary, along the reference's tokens."""


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """The outcome over all prompts."""

    stage: str
    model: str
    dtype: str
    device: str
    tolerance: float
    """Of a logit."""
    near_tie: float
    """Tokens were not compared from where the likeliest logits are this close and they differ."""
    prompts: tuple[PromptParity, ...]

    @property
    def passed(self) -> bool:
        return all(
            prompt.mismatch is None and prompt.max_logit_difference <= self.tolerance
            for prompt in self.prompts
        )

    def to_json(self) -> str:
        return json.dumps({"passed": self.passed, **asdict(self)}, indent=2) + "\n"

    def __str__(self) -> str:
        lines = [f"{'prompt':>6}{'in':>6}{'out':>6}{'compared':>10}{'max |dlogit|':>14}  tokens"]
        for index, prompt in enumerate(self.prompts):
            excess = "" if prompt.max_logit_difference <= self.tolerance else "  LOGITS DIFFER"
            lines.append(
                f"{index:>6}{prompt.num_prompt_tokens:>6}{prompt.num_reference_tokens:>6}"
                f"{prompt.num_compared_tokens:>10}{prompt.max_logit_difference:>14.2e}"
                f"  {prompt.mismatch or 'equal'}{excess}"
            )
        num_compared = sum(prompt.num_compared_tokens for prompt in self.prompts)
        num_tokens = sum(prompt.num_reference_tokens for prompt in self.prompts)
        worst = max(prompt.max_logit_difference for prompt in self.prompts)
        lines.append(
            f"{'PASSED' if self.passed else 'FAILED'}: {self.stage} against Transformers, "
            f"{self.dtype} on {self.device}: {len(self.prompts)} prompts, {num_compared} of "
            f"{num_tokens} tokens compared, max |dlogit| {worst:.2e} (tolerance {self.tolerance})"
        )
        return "\n".join(lines)
