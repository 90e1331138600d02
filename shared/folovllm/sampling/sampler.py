"""Choosing the next token of every row of a batch, on the device, by each request's own rules.

Order of operations for a row, as in vLLM v1:

1. log-probabilities to report are of the raw logits, whatever the steps below do;
2. float32; nothing but `allowed_token_ids`, or what `structured_outputs` can go on with;
   `logit_bias`; no end of a bad word; no stop token while fewer than `min_tokens` are out;
3. repetition penalty (prompt and output), then frequency and presence penalties (output);
4. temperature 0: argmax, the lowest id among equals; the rest concerns the other rows;
5. temperature, `min_p`, `top_k`, `top_p`;
6. a draw from what is left, by Gumbel-max with counter-based noise (see `kernels.random`).

A plain batch (steps 4 and 6 alone) copies and edits nothing: the kernel reads the model's logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ..interfaces import SamplerOutput, TokenLogprobs
from ..kernels.random import ChooseTokensFn, select_choose_tokens
from ..request import Request
from .logprobs import Logprobs
from .prompt_logprobs import PromptLogprobs
from .tensors import SamplingTensors
from .token_history import TokenHistory
from .token_masks import TokenMasks

_SEED_LIMIT = 1 << 64


@dataclass(frozen=True)
class SampledTokens:
    """The choices of one step, still on the device."""

    choices: torch.Tensor
    """[2, num_rows] int64: the token ids, and 1 where a token could be chosen at all."""
    logprobs: Logprobs | None

    @property
    def token_ids(self) -> torch.Tensor:
        """[num_rows] int64."""
        return self.choices[0]

    def to_host(self, prompt_logprobs: PromptLogprobs | None = None) -> SamplerOutput:
        """Wait for the device and fetch everything; see `TokensOnTheWay.wait`."""
        return self.send_to_host(prompt_logprobs=prompt_logprobs).wait()

    def send_to_host(
        self, num_rows: int | None = None, prompt_logprobs: PromptLogprobs | None = None
    ) -> "TokensOnTheWay":
        """Queue the transfer behind what the device has to do, and return at once.

        num_rows: how many rows count, where those behind them are padding.
        prompt_logprobs: of the same step, queued already.
        """
        if self.logprobs is None:
            # A copy also where the device is the host: a replayed graph writes its own anew.
            fetched = self.choices.clone() if self.choices.device.type == "cpu" else self.choices
        else:
            # float64 holds every id, rank and float32 exactly.
            parts = (self.choices.to(torch.float64).flatten(), self.logprobs.values.flatten())
            fetched = torch.cat(parts)
        # A copy on a CPU too: the next step may write its choices where these are. Pinned memory
        # is not handed to anybody else by torch before the copy is done.
        is_cuda = fetched.device.type == "cuda"
        on_host = torch.empty(fetched.shape, dtype=fetched.dtype, pin_memory=is_cuda)
        on_host.copy_(fetched, non_blocking=True)
        copied = None
        if is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        num_rows = self.choices.shape[1] if num_rows is None else num_rows
        return TokensOnTheWay(on_host, num_rows, self.logprobs, copied, prompt_logprobs)


@dataclass(frozen=True)
class TokensOnTheWay:
    """The choices of one step on their way to the host."""

    fetched: torch.Tensor
    """On the host once `copied` has happened: the choices, or with log-probabilities both, flat."""
    num_rows: int
    logprobs: Logprobs | None
    copied: torch.cuda.Event | None
    """None where there is nothing to wait for."""
    prompt_logprobs: PromptLogprobs | None = None

    def wait(self) -> SamplerOutput:
        """The tokens, once they are here; their requests get `prompt_logprobs` meanwhile.

        RuntimeError, naming the rows, if a row had NaN logits or no token above -inf.
        """
        if self.copied is not None:
            self.copied.synchronize()
        if self.prompt_logprobs is not None:
            self.prompt_logprobs.record()
        num_rows = self.num_rows
        if self.logprobs is None:
            token_ids, is_valid = self.fetched[:, :num_rows].tolist()
            logprobs: list[TokenLogprobs | None] = [None] * num_rows
        else:
            flat = self.fetched.numpy()
            token_ids, is_valid = flat[: 2 * num_rows].astype(np.int64).reshape(2, -1).tolist()
            logprobs = self.logprobs.unpack(flat[2 * num_rows :])
        if not all(is_valid):
            rows = [row for row, valid in enumerate(is_valid) if not valid]
            raise RuntimeError(
                f"no token can be chosen in rows {rows} of {num_rows}: their logits hold NaN or "
                f"are all -inf (a broken model or kernel, or every token forbidden)"
            )
        return SamplerOutput(token_ids, logprobs)


class LogitsParts(Protocol):
    """Of logits whose columns several processes share; see the model's."""

    @property
    def num_columns(self) -> int: ...
    @property
    def choose_tokens(self) -> ChooseTokensFn: ...
    def gather(self, logits: torch.Tensor) -> torch.Tensor: ...


class Sampler:
    """Turns logits into tokens; it may see requests in any order, and any of them in any step.

    What it keeps of a request between steps is a copy on the device of the tokens of those with
    penalties, brought up to date from the request itself.
    """

    def __init__(
        self, vocab_size: int, device: torch.device, parts: LogitsParts | None = None
    ) -> None:
        """parts: where this process computes some columns of the logits, and others the rest."""
        self.vocab_size = vocab_size
        self.device = device
        self._parts = parts
        choose_from_all = select_choose_tokens(device)
        self.choose_tokens: ChooseTokensFn = (
            choose_from_all if parts is None else parts.choose_tokens
        )
        """Greedily or by temperature alone; what a captured graph calls."""
        self.num_columns = vocab_size if parts is None else parts.num_columns
        """Of the logits that this process computes."""
        self._history = TokenHistory(device)
        self._masks = TokenMasks(vocab_size)

    def validate(self, request: Request) -> None:
        """Raise ValueError if this vocabulary cannot serve the request; for `add_request`."""
        params = request.sampling_params
        name = f"request {request.request_id}"
        if not 0 <= request.seed < _SEED_LIMIT:
            raise ValueError(f"{name}: seed must be in [0, 2**64), got {request.seed}")
        for setting in ("logprobs", "prompt_logprobs"):
            num_asked = getattr(params, setting)
            if num_asked is not None and num_asked > self.vocab_size:
                raise ValueError(
                    f"{name}: {setting}={num_asked} is more than the vocabulary of "
                    f"{self.vocab_size} tokens; ask for fewer"
                )
        bad_ids = [token_id for word in request.bad_words_token_ids for token_id in word]
        for setting, token_ids in (
            ("logit_bias", params.logit_bias or {}),
            ("allowed_token_ids", params.allowed_token_ids or ()),
            ("bad_words_token_ids", bad_ids),
        ):
            for token_id in token_ids:
                if not 0 <= token_id < self.vocab_size:
                    raise ValueError(
                        f"{name}: {setting} names token {token_id}, but token ids of this model "
                        f"are in [0, {self.vocab_size})"
                    )
        for token_id, bias in (params.logit_bias or {}).items():
            if abs(bias) > torch.finfo(torch.float32).max:
                raise ValueError(f"{name}: logit_bias {bias} of token {token_id} exceeds float32")
        self._require_a_possible_token(request)

    def _require_a_possible_token(self, request: Request) -> None:
        """ValueError if the rules that forbid tokens may leave none."""
        params = request.sampling_params
        allowed = params.allowed_token_ids
        forbidden = {word[-1] for word in request.bad_words_token_ids}
        if params.min_tokens:
            forbidden |= request.stop_token_ids
        if not forbidden.issuperset(range(self.vocab_size) if allowed is None else allowed):
            return
        raise ValueError(
            f"request {request.request_id}: together, allowed_token_ids, bad_words and "
            f"min_tokens={params.min_tokens} (which forbids stop tokens) forbid every token of the "
            f"vocabulary; allow more tokens, or forbid fewer"
        )

    def prepare(self, requests: Sequence[Request]) -> SamplingTensors:
        """Collect the rules of a step and upload them in one copy; row i is for `requests[i]`.

        Reads how many tokens each request has now: call it when a row's output position is known,
        once per step. A batch of greedy requests without further wishes uploads nothing.
        ValueError as `validate` for a seed or a biased token id that is out of range.
        """
        try:
            return SamplingTensors.collect(requests, self._masks, self._history)
        except (IndexError, OverflowError):
            for request in requests:
                self.validate(request)
            raise

    def collect_noise(self, requests: Sequence[Request]) -> list[np.ndarray] | None:
        """What sampling by temperature alone needs, for whoever samples inside a captured graph.

        The arrays of `Noise`, row i for `requests[i]`; an empty list if all are greedy; None if
        some request has other rules or wants log-probabilities, which `prepare` and `sample` serve.
        """
        return SamplingTensors.collect_noise(requests)

    def sample(self, logits: torch.Tensor, tensors: SamplingTensors) -> SampledTokens:
        """Choose a token per row of logits [num_rows, num_columns], of any float dtype.

        Does not change `logits`, nor wait for the device.
        """
        if logits.shape != (tensors.num_rows, self.num_columns):
            raise ValueError(
                f"logits are {tuple(logits.shape)}, but the prepared batch has {tensors.num_rows} "
                f"rows over {self.num_columns} tokens; prepare() the requests of these rows"
            )
        choose_tokens = self.choose_tokens
        if self._parts is not None and not tensors.has_only_temperature:
            # The processes have the same requests, so all of them come here or none.
            logits = self._parts.gather(logits)
            choose_tokens = select_choose_tokens(logits.device)
        edited = tensors.edit(logits)
        noise = tensors.noise
        if noise is None:
            choices = choose_tokens(edited)
        else:
            choices = choose_tokens(edited, noise.temperatures, noise.seeds, noise.positions)
        query = tensors.logprobs
        return SampledTokens(choices, query.compute(logits, choices[0]) if query else None)
