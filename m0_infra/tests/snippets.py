"""Runs the snippets of a page, and finds what a page says otherwise than its snippets print.

A block of Python runs, in the names that the blocks before it on its page left. Invisible comments
make exceptions, each with its reason, in front of a block:

    <!-- skip: next "needs a server" -->
    <!-- unshown: 1.5 7.5 "what the formula gives, one sentence above" -->
    <!-- varies: "times of this machine" -->
"""

import contextlib
import io
import re
import shlex
import textwrap
from collections.abc import Iterable
from pathlib import Path
from unittest import SkipTest

from sybil import Document, Example, Region, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.abstract.lexers import LexerCollection
from sybil.parsers.markdown import CodeBlockParser, SkipParser
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer

_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?")
_SHOWN_OUTPUT = re.compile(r"\s*^ *```text\n(.*?)^ *```$", re.M | re.S)
_NEXT_PART = re.compile(r"^ *```python\n|^## ", re.M)


class _NoteParser:
    """Keeps what a comment says about the next block in the document's namespace."""

    def __init__(self, directive: str) -> None:
        self.directive = directive
        self.lexers = LexerCollection([DirectiveInHTMLCommentLexer(directive)])

    def __call__(self, document: Document) -> Iterable[Region]:
        for lexed in self.lexers(document):
            words = shlex.split(lexed.lexemes["arguments"] or "")
            if not words or " " not in words[-1]:
                raise ValueError(f"<!-- {self.directive}: … --> needs a reason in quotes")
            yield Region(lexed.start, lexed.end, words[:-1], self._keep)

    def _keep(self, example: Example) -> None:
        example.document.namespace[f"__{self.directive}__"] = example.parsed


class _Printed:
    """Runs a block, and compares what it printed with the page."""

    def __init__(self) -> None:
        self.run = PythonEvaluator()
        self.differences: list[str] = []

    def __call__(self, example: Example) -> None:
        namespace = example.document.namespace
        unshown = namespace.pop("__unshown__", [])
        varies = namespace.pop("__varies__", None) is not None
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            self.run(example)
        printed = output.getvalue()
        text = example.document.text
        exact = _SHOWN_OUTPUT.match(text, example.region.end)
        if varies:
            return
        if exact is not None:
            if textwrap.dedent(exact[1]).strip() != printed.strip():
                self.differences.append(f"line {example.line} prints\n{printed}")
            return
        next_part = _NEXT_PART.search(text, example.region.end)
        shown = text[example.region.start : next_part.start() if next_part else len(text)]
        if missing := missing_numbers(printed, f"{shown} {' '.join(unshown)}"):
            self.differences.append(f"line {example.line} prints {missing}, the page does not")


def missing_numbers(printed: str, shown: str) -> list[str]:
    """Numbers that were printed and stand nowhere in `shown`, not rounded either."""
    on_page = {number.replace(",", "") for number in _NUMBER.findall(shown)}
    missing = []
    for number in _NUMBER.findall(printed):
        value = float(number.replace(",", ""))
        if not any(_rounds_to(value, candidate) for candidate in on_page):
            missing.append(number)
    return missing


def _rounds_to(value: float, candidate: str) -> bool:
    decimals = len(candidate.partition("e")[0].partition(".")[2])
    return abs(abs(value) - abs(float(candidate))) <= 0.5000001 * 10**-decimals * (decimals > 0)


def run_page(path: Path) -> tuple[list[str], int]:
    """(what the page says wrongly, how many of its blocks ran)."""
    printed = _Printed()
    parsers = [
        CodeBlockParser("python", printed),
        SkipParser(),
        _NoteParser("unshown"),
        _NoteParser("varies"),
    ]
    document = Sybil(parsers=parsers).parse(path)
    num_run = 0
    for example in document.examples():
        with contextlib.suppress(SkipTest):
            example.evaluate()
            num_run += example.region.evaluator is printed
    return printed.differences, num_run
