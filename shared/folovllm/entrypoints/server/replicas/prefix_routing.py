"""Which engine should get a prompt: the one that has run its beginning, unless it has too much."""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

Piece = bytes
"""Name of a piece of a prompt and of all before it: equal names, equal beginnings."""
PIECE_BYTES = 64
"""Of a prompt as JSON: some 16 tokens of English, as many as a block has, or 10 token ids."""
MAX_PIECES = 4096
"""Of one prompt; prompts that agree so far belong together whatever follows."""
MAX_REMEMBERED = 1 << 16
"""Pieces per engine: 4 MiB of prompts, or a million tokens."""
_LOAD_RATIO = 1.5
_BEFORE_THE_PROMPT = ("cache_salt", "chat_template_kwargs", "tools")
"""Fields that decide, besides the prompt, what an engine's prefix is."""


def prefix_pieces(body: bytes) -> list[Piece]:
    """The pieces of a call's prompt, first to last; what is behind the last whole one is left out.

    The prompt is looked at as the client sent it, before any template and tokenizer: what begins
    alike here does so there. A list of prompts is named by its first ones, a body that nobody can
    read by nothing.
    """
    try:
        content = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return []
    if not isinstance(content, dict):
        return []
    kind = next((name for name in ("messages", "prompt") if name in content), None)
    if kind is None:
        return []
    before = {name: content.get(name) for name in _BEFORE_THE_PROMPT}
    name = hashlib.blake2b(_encode([kind, before]), digest_size=8).digest()
    text = _encode(content[kind])[:-1]  # without the bracket that ends it: the next turn goes on
    pieces = []
    for end in range(PIECE_BYTES, min(len(text), MAX_PIECES * PIECE_BYTES) + 1, PIECE_BYTES):
        name = hashlib.blake2b(text[end - PIECE_BYTES : end], digest_size=8, key=name).digest()
        pieces.append(name)
    return pieces


@dataclass(eq=False)
class Placement:
    """A call on its way: the policy says where it goes, who sent it when it is over."""

    pieces: list[Piece] | None
    """Of its prompt; None for a call that has none."""
    engine: str | None = None
    is_over: bool = False


class PrefixPolicy:
    """Places calls, knowing where prompts went before and how many calls each engine has.

    An engine that has more than `max_load_gap` calls above one and a half times those of the least
    loaded one comes after those that have not: few calls are spread soon, so that a beginning that
    all prompts share becomes known everywhere, and many may be uneven before one is sent away from
    what it has cached. Among the others the longest beginning decides, then the load, then how much
    the engine remembers already. What an engine has cached is not asked for but supposed: the
    pieces of the prompts that it got last.
    """

    def __init__(self, max_load_gap: int, max_remembered: int = MAX_REMEMBERED) -> None:
        self._max_load_gap = max_load_gap
        self._max_remembered = max_remembered
        self._pieces: dict[str, OrderedDict[Piece, None]] = {}
        """Engine -> its pieces, the one used longest ago first."""
        self._calls: set[Placement] = set()
        """With prompts, and not known to be over."""

    def place(self, call: Placement, engines: Sequence[str]) -> list[str]:
        """`engines`, the best first, which is supposed to get the call; there is at least one.

        A call without a prompt goes to the same one as others without, as long as that lives.
        """
        if call.pieces is None:
            return sorted(engines)
        ranked = self._rank(call.pieces, engines)
        call.engine = ranked[0]
        self._calls.add(call)
        self._remember(call.pieces, call.engine)
        return ranked

    def keep_only(self, engines: Iterable[str]) -> None:
        """The others are gone, and what they had cached."""
        kept = set(engines)
        self._pieces = {name: pieces for name, pieces in self._pieces.items() if name in kept}

    def _rank(self, pieces: Sequence[Piece], engines: Sequence[str]) -> list[str]:
        self._calls = {call for call in self._calls if not call.is_over}
        loads = Counter(call.engine for call in self._calls)
        bound = _LOAD_RATIO * min(loads[name] for name in engines) + self._max_load_gap

        def cost(name: str) -> tuple[bool, int, int, int, str]:
            known = self._pieces.get(name, OrderedDict())
            num_known = next((n for n, p in enumerate(pieces) if p not in known), len(pieces))
            return loads[name] > bound, -num_known, loads[name], len(known), name

        return sorted(engines, key=cost)

    def _remember(self, pieces: Sequence[Piece], engine: str) -> None:
        known = self._pieces.setdefault(engine, OrderedDict())
        for piece in reversed(pieces):  # the first ends up newest: an end without it is worthless
            known[piece] = None
            known.move_to_end(piece)
        while len(known) > self._max_remembered:
            known.popitem(last=False)


def _encode(content: object) -> bytes:
    return msgspec.json.encode(content, order="deterministic")
