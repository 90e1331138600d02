"""Host-side bookkeeping: where each request's keys and values live."""

import heapq

from folovllm.request import Request

from .config import EngineConfig


class KVCacheManager:
    """Hands every running request one slot of max_model_len tokens.

    The lowest free slot goes first, so that running requests stay packed at the low end and
    attention can read their slots as one contiguous slice.
    """

    def __init__(self, config: EngineConfig, num_tokens: int) -> None:
        self.slot_len = config.max_model_len
        self.num_tokens = num_tokens
        """Tokens of all slots together."""
        self.clear()

    def clear(self) -> None:
        """Take every slot from whoever holds it."""
        self.free_slots = list(range(self.num_tokens // self.slot_len))
        """A heap."""
        self.slots: dict[str, int] = {}

    @property
    def num_reserved_tokens(self) -> int:
        """A slot is reserved whole, however short its request turns out to be."""
        return len(self.slots) * self.slot_len

    def allocate_slots(self, request: Request, num_new_tokens: int) -> int | None:
        """Make room for `num_new_tokens` more tokens of `request`.

        Returns the request's slot, or None, with nothing changed, when every slot is taken.
        """
        if request.request_id not in self.slots:
            if not self.free_slots:
                return None
            self.slots[request.request_id] = heapq.heappop(self.free_slots)
        return self.slots[request.request_id]

    def free(self, request: Request) -> None:
        """Return the slot of a request that may or may not have one."""
        slot = self.slots.pop(request.request_id, None)
        if slot is not None:
            heapq.heappush(self.free_slots, slot)
