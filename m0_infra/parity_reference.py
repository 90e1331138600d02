"""The oracle: what Transformers generates greedily, and the logits that made it do so."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Reference:
    """Transformers' greedy continuation of one prompt."""

    prompt_token_ids: list[int]
    output_token_ids: list[int]
    logits: torch.Tensor
    """[num_output_tokens, vocab_size] float32 on the host; row i chose output token i."""

    @property
    def top_gaps(self) -> list[float]:
        """Per output token, how far the likeliest logit is above the second."""
        top = self.logits.topk(2, dim=-1).values
        gaps: list[float] = (top[:, 0] - top[:, 1]).tolist()
        return gaps


def read_prompts(path: Path, num_prompts: int) -> list[str]:
    """`num_prompts` texts, evenly spaced over a file of one {"text": …} per line.

    Evenly spaced, so that a small number still has prompts of every kind and length. ValueError
    if the file holds fewer.
    """
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not 1 <= num_prompts <= len(lines):
        raise ValueError(
            f"num_prompts must be between 1 and {len(lines)}, the prompts in {path}; "
            f"got {num_prompts}"
        )
    picked = [lines[i * len(lines) // num_prompts] for i in range(num_prompts)]
    return [json.loads(line)["text"] for line in picked]


def load_reference_model(directory: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Transformers' model; `generate` will be greedy, ended only by the model's own tokens."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()
    eos_token_ids = model.generation_config.eos_token_id
    # A published generation config may ask for sampling or penalties: nothing of it may stay.
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=eos_token_ids)
    return model


@torch.inference_mode()
def greedy_reference(model: Any, prompt_token_ids: list[int], max_tokens: int) -> Reference:
    """Continue one prompt, alone, with at most `max_tokens` tokens, end token included."""
    result = model.generate(
        torch.tensor([prompt_token_ids], device=model.device),
        attention_mask=torch.ones(1, len(prompt_token_ids), dtype=torch.int64, device=model.device),
        max_new_tokens=max_tokens,
        # One prompt needs no padding; without a number generate would say that it picked one.
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return Reference(
        prompt_token_ids=prompt_token_ids,
        output_token_ids=result.sequences[0, len(prompt_token_ids) :].tolist(),
        logits=torch.cat(result.logits).float().cpu(),
    )
