"""Counts the lines of code in a file: blank lines, comments and docstrings are free.

Counting tokens, not text, leaves nothing to gain from golf; the idea is tinygrad's `sz.py`.
"""

import ast
import io
import tokenize

_FREE = frozenset(
    {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
)


def count_code_lines(source: str) -> int:
    """Lines that hold code. SyntaxError if `source` is not Python."""
    free_lines = _docstring_lines(ast.parse(source))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _FREE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - free_lines)


def _docstring_lines(tree: ast.AST) -> set[int]:
    """Lines of strings that stand alone as statements, also those under a field."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines
