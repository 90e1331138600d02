"""The requests that wait, in their order; any of them may leave before its turn."""

import heapq

from .request import Request


class RequestQueue:
    """Hands out the lowest `place` first; every operation is O(log n), amortised.

    A heap of places. Taking a place out of the middle of a heap means looking at all of it, so a
    request that leaves before its turn leaves its place behind, until that comes to the top or
    most places are such.
    """

    def __init__(self) -> None:
        self._places: list[tuple[int, int]] = []
        """A heap; some of them may belong to nobody."""
        self._requests: dict[tuple[int, int], Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def first(self) -> Request:
        """The request whose turn it is; IndexError if nobody waits."""
        while self._places[0] not in self._requests:
            heapq.heappop(self._places)
        return self._requests[self._places[0]]

    def push(self, request: Request) -> None:
        heapq.heappush(self._places, request.place)
        self._requests[request.place] = request

    def pop(self) -> Request:
        """Take `first` out."""
        request = self.first
        self.remove(request)
        return request

    def remove(self, request: Request) -> None:
        """Take a request out that may or may not be there."""
        self._requests.pop(request.place, None)
        if len(self._places) > 2 * len(self._requests):
            self._places = sorted(self._requests)  # which is a heap
