"""Which part of a model each process holds (tensor parallelism: Shoeybi et al. 2019, Megatron)."""

from dataclasses import dataclass, replace

from .config import ModelConfig

_VOCAB_MULTIPLE = 64
"""Rows of a rank's part of the embedding and the head: whole words of packed zero points."""


@dataclass(frozen=True)
class Ranks:
    """A process's place among those that hold a model together."""

    rank: int
    size: int

    def share_of_model(self, config: ModelConfig) -> ModelConfig:
        """The shape of what this rank computes: its heads, its part of every MLP.

        With more ranks than key/value heads several ranks hold the same one. ValueError where heads
        or MLPs cannot be shared out evenly.
        """
        size = self.size
        heads, kv_heads = config.num_heads, config.num_kv_heads
        even = {"attention heads": heads, "MLP columns": config.intermediate_size}
        for what, number in even.items():
            if number % size:
                raise ValueError(
                    f"tensor_parallel_size={size} does not divide this model's {number} {what}; "
                    f"give a divisor of {heads} that divides {config.intermediate_size} too"
                )
        if kv_heads % size and size % kv_heads:
            raise ValueError(
                f"tensor_parallel_size={size} and this model's {kv_heads} key/value heads are no "
                f"multiples of each other; give a divisor or a multiple of {kv_heads}"
            )
        return replace(
            config,
            num_heads=heads // size,
            num_kv_heads=max(1, kv_heads // size),
            intermediate_size=config.intermediate_size // size,
        )

    def share_of_vocab(self, vocab_size: int) -> int:
        """Rows of embedding and head that each rank holds; the last ones may be of no token."""
        if self.size == 1:
            return vocab_size
        return -(-vocab_size // (self.size * _VOCAB_MULTIPLE)) * _VOCAB_MULTIPLE

    def part(self, whole: int, share: int) -> slice:
        """Which rows, or columns, of a matrix with `whole` of them are this rank's `share`.

        Where there are fewer shares than ranks, ranks that are neighbours have the same.
        """
        num_parts = whole // share
        start = self.rank * num_parts // self.size * share
        return slice(start, start + share)

    def vocab_part(self, vocab_size: int) -> slice:
        """Likewise of the rows of embedding and head; it may have fewer rows, or none."""
        share = self.share_of_vocab(vocab_size)
        start = min(self.rank * share, vocab_size)
        return slice(start, min(start + share, vocab_size))


ALONE = Ranks(rank=0, size=1)
