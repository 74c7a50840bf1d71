#!/usr/bin/env python3
"""Count code lines (no blank lines, comments, docstrings), the four core files:

python bench/core_lines.py
"""

import ast
import io
import tokenize
from pathlib import Path

SKIP = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code_lines(path: Path) -> int:
    source = path.read_text(encoding="utf-8")
    docs: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            and ast.get_docstring(node) is not None
        ):
            docs.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SKIP:
            code.update(range(token.start[0], token.end[0] + 1))
    return len(code - docs)


if __name__ == "__main__":
    counts = {
        name: code_lines(Path(name)) for name in ("model.py", "data.py", "recognize.py", "train.py")
    }
    print(
        ", ".join(f"{name} {n}" for name, n in counts.items()),
        f"| total {sum(counts.values())} of at most 400",
    )
