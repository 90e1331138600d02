"""Runs a stage's engine freely, and along a given path while its logits are watched."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from folovllm.interfaces import Engine
from folovllm.request import Request, SamplingParams
from folovllm.sampling.sampler import SampledTokens
from folovllm.testing.forced_sampler import forced_tokens

from .parity_reference import Reference


@dataclass
class ForcedSampler:
    """Stands in for `Sampler`: compares the logits of each row and returns the reference token.

    So an early difference cannot lead the engine astray, and every step is compared with what
    Transformers computed for the very same tokens.
    """

    references: dict[str, Reference]
    """By request id."""
    max_differences: dict[tuple[str, int], float] = field(default_factory=dict)
    """By request id and output position: the largest absolute difference of any logit, of the row
    that came last. Chunks of a prompt leave theirs, which mean nothing, before the prompt's end."""

    def validate(self, request: Request) -> None:
        """Refuse nothing: the stage's own sampler saw the same requests in the free run."""

    def collect_noise(self, requests: Sequence[Request]) -> None:
        """There is none: the tokens are given, so nothing may be sampled inside a graph."""

    def prepare(self, requests: Sequence[Request]) -> list[tuple[str, int]]:
        """Which output position of which request each row is for."""
        return [(request.request_id, request.num_output_tokens) for request in requests]

    def sample(self, logits: torch.Tensor, rows: list[tuple[str, int]]) -> SampledTokens:
        """logits: [num_rows, vocab_size]. Records one difference per row (NaN counts as inf).

        A request that goes on after the reference's end gets the last token again and is not
        compared: the free run tells that it does not stop.
        """
        known = [
            (name, min(index, len(self.references[name].output_token_ids) - 1))
            for name, index in rows
        ]
        expected = torch.stack([self.references[name].logits[index] for name, index in known])
        difference = (logits.float() - expected.to(logits.device)).abs().amax(dim=-1)
        values = difference.nan_to_num(nan=float("inf")).tolist()
        for row, known_row, value in zip(rows, known, values, strict=True):
            if row == known_row:
                self.max_differences[row] = value
        chosen = [self.references[name].output_token_ids[i] for name, i in known]
        return forced_tokens(chosen, logits.device)


def make_requests(
    references: Sequence[Reference], max_tokens: int, eos_token_ids: frozenset[int]
) -> list[Request]:
    """One greedy request per reference; their ids are their places, "0", "1", …"""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return [
        Request(
            request_id=str(index),
            prompt_token_ids=reference.prompt_token_ids,
            sampling_params=params,
            eos_token_ids=eos_token_ids,
        )
        for index, reference in enumerate(references)
    ]


def run_engine(engine: Engine, requests: Sequence[Request]) -> dict[str, list[int]]:
    """Queue all requests, run the engine dry; return the output token ids by request id.

    RuntimeError if the engine has work and schedules none of it.
    """
    outputs: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add_request(request)
    while engine.has_unfinished_requests():
        step = engine.step()
        if step.stats.num_scheduled_tokens == 0:
            raise RuntimeError(
                f"the engine stalls: {step.stats.num_running} requests run and "
                f"{step.stats.num_waiting} wait, but a step scheduled no token"
            )
        for token in step.tokens:
            outputs[token.request_id].append(token.token_id)
    return outputs
