"""When each request of a workload arrives, and with which prompt."""

import heapq
from collections.abc import Sequence

from ..request import Request, SamplingParams
from ..workloads.workload import Workload, WorkloadRequest


def make_request(
    source: WorkloadRequest,
    prompt_token_ids: Sequence[int],
    *,
    seed: int,
    max_tokens: int | None = None,
    logprobs: int | None = None,
    id_prefix: str = "",
) -> Request:
    """A greedy request that ignores end-of-sequence tokens, as the workload asks for it.

    The last three arguments are for what warm-up and gate need otherwise.
    """
    return Request(
        request_id=id_prefix + source.request_id,
        prompt_token_ids=list(prompt_token_ids),
        sampling_params=SamplingParams(
            temperature=0.0,
            max_tokens=source.output_len if max_tokens is None else max_tokens,
            ignore_eos=True,
            logprobs=logprobs,
        ),
        seed=seed,
    )


def stand_in_prompt(source: WorkloadRequest) -> tuple[int, ...]:
    """As many tokens as the whole prompt has; where its history is not known yet, its own again."""
    own = source.prompt_token_ids
    num_repeats = -(-source.num_prompt_tokens // len(own))
    return (own * num_repeats)[: source.num_prompt_tokens]


class Arrivals:
    """The requests that have not arrived yet; truthy while one of them has a time to do so.

    A request that follows another gets its prompt when that one is finished, and its time when the
    client has made a request of it: what that takes is not the engine's.
    """

    def __init__(self, workload: Workload, seed: int) -> None:
        self._seed = seed
        self._place = {source.request_id: i for i, source in enumerate(workload.requests)}
        self._followers: dict[str, list[WorkloadRequest]] = {}
        self._due: list[tuple[float, int, Request]] = []
        """A heap of (seconds after the start, place in the workload, request)."""
        self._ready: list[tuple[WorkloadRequest, Request]] = []
        """Followers that are made and have no time yet."""
        for source in workload.requests:
            if source.follows is None:
                request = make_request(source, source.prompt_token_ids, seed=seed)
                self._add(source, request, source.arrival_s)
            else:
                self._followers.setdefault(source.follows, []).append(source)

    def __bool__(self) -> bool:
        return bool(self._due)

    @property
    def next_s(self) -> float:
        """When the next request is due; IndexError if none is."""
        return self._due[0][0]

    def pop_due(self, now_s: float) -> list[Request]:
        """Those whose time has come, in order of arrival."""
        requests = []
        while self._due and self._due[0][0] <= now_s:
            requests.append(heapq.heappop(self._due)[2])
        return requests

    def finish(self, done: WorkloadRequest, prompt: Sequence[int], output: Sequence[int]) -> None:
        """Make the requests that follow `done`, now that its answer is known; see `start_ready`.

        Nothing is copied for a request that nobody follows: this is called while the clock runs.
        """
        for source in self._followers.pop(done.request_id, ()):
            history = (*prompt, *output)[: source.history_len]
            request = make_request(source, (*history, *source.prompt_token_ids), seed=self._seed)
            self._ready.append((source, request))

    def start_ready(self, now_s: float) -> None:
        """Those that were made arrive now, or when their time to think is over."""
        for source, request in self._ready:
            self._add(source, request, now_s + source.arrival_s)
        self._ready.clear()

    def _add(self, source: WorkloadRequest, request: Request, due_s: float) -> None:
        request.arrival_time = due_s
        heapq.heappush(self._due, (due_s, self._place[source.request_id], request))
