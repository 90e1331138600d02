"""Readers for published requests: Azure CSV, Mooncake and MT-Bench JSONL, ShareGPT JSON."""

import csv
import gzip
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

MOONCAKE_BLOCK_SIZE = 512
"""Tokens that one entry of `hash_ids` stands for; only the last one may be partial."""

_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True)
class TraceRow:
    """One request of a trace."""

    arrival_s: float
    """Seconds since the first row of the file."""
    input_len: int
    output_len: int
    hash_ids: tuple[int, ...] = ()
    """Mooncake only: one id per block of the prompt; equal ids are equal blocks."""
    prompt_token_ids: tuple[int, ...] = ()
    """The prompt, where the trace has texts; otherwise only its length is known."""


@dataclass(frozen=True)
class Conversation:
    """First question and first answer of a ShareGPT entry."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Selection:
    """The rows of a trace that a workload uses, and what became of the others."""

    rows: tuple[TraceRow, ...]
    report: dict[str, int]
    """num_rows_in_file, num_dropped_empty, num_dropped_too_long, num_after_head."""


def read_azure(path: str | Path) -> list[TraceRow]:
    """Read `TIMESTAMP,ContextTokens,GeneratedTokens` (Azure LLM inference trace; may be .gz).

    ValueError names the file, the line and what was expected there. Rows come back in order of
    arrival.
    """
    with _open_text(path) as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if tuple(header) != _AZURE_COLUMNS:
            _refuse(path, 1, f"the header {','.join(_AZURE_COLUMNS)}", ",".join(header))
        parsed = [_azure_row(path, reader.line_num, cells) for cells in reader if cells]
    if not parsed:
        _refuse(path, 2, "at least one row after the header", "the end of the file")
    parsed.sort(key=lambda row: row[0])
    start = parsed[0][0]
    return [
        TraceRow((moment - start).total_seconds(), input_len, output_len)
        for moment, input_len, output_len in parsed
    ]


def read_mooncake(path: str | Path) -> list[TraceRow]:
    """Read one JSON object a line: timestamp (ms), input_length, output_length, hash_ids.

    `path` may be .gz. ValueError names the file, the line and what was expected there.
    """
    rows = []
    with _open_text(path) as file:
        for line_number, line in enumerate(file, start=1):
            if line.strip():
                rows.append(_mooncake_row(path, line_number, line))
    if not rows:
        _refuse(path, 1, "at least one JSON object", "the end of the file")
    rows.sort(key=lambda row: row.arrival_s)
    start = rows[0].arrival_s
    return [replace(row, arrival_s=row.arrival_s - start) for row in rows]


def read_sharegpt(path: str | Path) -> tuple[list[Conversation], int]:
    """Read a list of {"conversations": [{"from", "value"}, …]}; `path` may be .gz.

    Returns the first human turn and the answer to it, for every entry that has both and neither
    empty, and the number of entries that have not. ValueError names the file and the entry.
    """
    with _open_text(path) as file:
        try:
            entries = json.load(file)
        except json.JSONDecodeError as error:
            _refuse(path, error.lineno, "a JSON list of conversations", error.msg)
    if not isinstance(entries, list):
        _refuse(path, 1, "a JSON list of conversations", type(entries).__name__)
    found = [_first_exchange(path, index, entry) for index, entry in enumerate(entries)]
    conversations = [conversation for conversation in found if conversation is not None]
    return conversations, len(found) - len(conversations)


def read_turns(path: str | Path) -> list[tuple[str, ...]]:
    """Read one JSON object a line with "turns": what a user asks one after the other.

    The schema of MT-Bench's questions; other fields are ignored, `path` may be .gz. ValueError
    names the file, the line and what was expected there.
    """
    with _open_text(path) as file:
        found = [
            _turns(path, line_number, line)
            for line_number, line in enumerate(file, start=1)
            if line.strip()
        ]
    if not found:
        _refuse(path, 1, "at least one JSON object", "the end of the file")
    return found


def spread_arrivals(
    rows: Sequence[TraceRow], slot_s: float, uniform: Iterator[float]
) -> list[TraceRow]:
    """Undo a coarse clock: place the rows of each `slot_s` seconds uniformly inside them.

    Mooncake's arrivals are multiples of 3 s, so replaying them as they are sends bursts that
    nobody sent. Rows are sorted by arrival and stay in that order. `uniform` yields numbers in
    [0, 1), one per row.
    """
    slots: dict[int, list[TraceRow]] = {}
    for row in rows:
        slots.setdefault(int(row.arrival_s // slot_s), []).append(row)
    spread = []
    for slot, members in slots.items():
        offsets = sorted(next(uniform) for _ in members)
        spread += [
            replace(row, arrival_s=(slot + offset) * slot_s)
            for row, offset in zip(members, offsets, strict=True)
        ]
    return spread


def select_rows(
    rows: Sequence[TraceRow], *, num: int | None, max_input: int | None, max_output: int | None
) -> Selection:
    """Drop rows that cannot run or are longer than allowed, then keep the first `num`.

    A contiguous head, not a sample: taking rows at random would destroy arrivals and prefix
    reuse. The first row that is kept arrives at 0.
    """
    runnable = [row for row in rows if row.input_len > 0 and row.output_len > 0]
    short = [
        row
        for row in runnable
        if (max_input is None or row.input_len <= max_input)
        and (max_output is None or row.output_len <= max_output)
    ]
    kept = short if num is None else short[:num]
    start = kept[0].arrival_s if kept else 0.0
    return Selection(
        rows=tuple(replace(row, arrival_s=row.arrival_s - start) for row in kept),
        report={
            "num_rows_in_file": len(rows),
            "num_dropped_empty": len(rows) - len(runnable),
            "num_dropped_too_long": len(runnable) - len(short),
            "num_after_head": len(short) - len(kept),
        },
    )


def _azure_row(path: str | Path, line_number: int, cells: list[str]) -> tuple[datetime, int, int]:
    try:
        timestamp, input_len, output_len = cells
        row = datetime.fromisoformat(timestamp), int(input_len), int(output_len)
    except ValueError:
        row = None
    if row is None or row[1] < 0 or row[2] < 0:
        expected = "a timestamp like 2023-11-16 18:15:46.6805900 and two whole numbers >= 0"
        _refuse(path, line_number, expected, ",".join(cells))
    return row


def _mooncake_row(path: str | Path, line_number: int, line: str) -> TraceRow:
    try:
        fields = json.loads(line)
        timestamp, input_len = fields["timestamp"], fields["input_length"]
        output_len, hash_ids = fields["output_length"], fields["hash_ids"]
        valid = (
            isinstance(timestamp, int | float)
            and all(isinstance(n, int) and n >= 0 for n in (input_len, output_len, *hash_ids))
            and len(hash_ids) == -(-input_len // MOONCAKE_BLOCK_SIZE)
        )
    except (json.JSONDecodeError, KeyError, TypeError):
        valid = False
    if not valid:
        expected = (
            "a JSON object with timestamp (ms), input_length, output_length (whole numbers >= 0) "
            f"and hash_ids (one whole number per {MOONCAKE_BLOCK_SIZE} tokens of input)"
        )
        _refuse(path, line_number, expected, line.strip())
    return TraceRow(timestamp / 1000, input_len, output_len, tuple(hash_ids))


def _turns(path: str | Path, line_number: int, line: str) -> tuple[str, ...]:
    try:
        turns = json.loads(line)["turns"]
    except (json.JSONDecodeError, KeyError, TypeError):
        turns = None
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t for t in turns):
        expected = 'a JSON object with "turns": a list of texts, none of them empty'
        _refuse(path, line_number, expected, line.strip())
    return tuple(turns)


def _first_exchange(path: str | Path, index: int, entry: Any) -> Conversation | None:
    try:
        turns = [(turn["from"], turn["value"]) for turn in entry["conversations"]]
        if not all(isinstance(value, str) for _, value in turns):
            raise TypeError
    except (KeyError, TypeError):
        expected = 'an object with "conversations": a list of {"from": str, "value": str}'
        _refuse(path, None, f"in entry {index} {expected}", json.dumps(entry, ensure_ascii=False))
    for (asker, question), (answerer, answer) in pairwise(turns):
        if asker in ("human", "user") and answerer not in ("human", "user", "system"):
            return Conversation(question, answer) if question and answer else None
    return None


def _open_text(path: str | Path) -> io.StringIO:
    """The whole file at once: a compressed one may turn out to be broken at its last byte."""
    opener: Any = gzip.open if Path(path).suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            return io.StringIO(file.read())
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read trace {path}: {error}") from error


def _refuse(path: str | Path, line_number: int | None, expected: str, got: str) -> NoReturn:
    where = f"{path}" if line_number is None else f"{path}, line {line_number}"
    shown = got if len(got) <= 80 else got[:77] + "..."
    raise ValueError(f"{where}: expected {expected}, got {shown!r}")
