"""Host-side bookkeeping: where each request's keys and values live."""

from folovllm.request import Request

from .config import EngineConfig


class KVCacheManager:
    """There is one contiguous cache, and the running request owns it."""

    def __init__(self, config: EngineConfig, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        """Tokens the cache may grow to."""
        self.clear()

    def clear(self) -> None:
        """Take the cache from whoever holds it."""
        self.num_reserved_tokens = 0
        """Tokens it has grown to: exactly what the running request needs."""
        self.owner: str | None = None

    def allocate_slots(self, request: Request, num_new_tokens: int) -> None:
        """Make room for `num_new_tokens` more tokens of `request`."""
        if self.owner not in (None, request.request_id):
            raise RuntimeError(
                f"request {request.request_id} was scheduled while {self.owner} owns the KV "
                f"cache; this stage runs one request at a time"
            )
        self.owner = request.request_id
        self.num_reserved_tokens = request.num_computed_tokens + num_new_tokens

    def free(self, request: Request) -> None:
        """Take the cache from a request that may or may not hold it."""
        if self.owner == request.request_id:
            self.clear()
