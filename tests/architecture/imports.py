"""What a module imports, wherever in it that stands."""

from __future__ import annotations

import ast
from collections.abc import Iterator


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a module imports, in functions, under TYPE_CHECKING and by import_module too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            yield from ((node.lineno, f"{dots}{node.module or ''}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
            "import_module",
            "__import__",
        ):
            yield node.lineno, node.args[0].value if isinstance(node.args[0], ast.Constant) else "<computed>"
