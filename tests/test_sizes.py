"""Files and functions stay short enough to be read in one go."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*(ROOT / "trainer").rglob("*.py"), *(ROOT / "serving").rglob("*.py")])
FILE_LINES, FUNCTION_LINES = 350, 40


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """From `def` to the last line, without decorators and docstring: what has to be understood at once."""
    first = function.body[0]
    documented = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and first is not function.body[-1]
    )
    assert function.end_lineno is not None
    assert first.end_lineno is not None
    return function.end_lineno - function.lineno + 1 - documented * (first.end_lineno - first.lineno + 1)


def test_no_file_is_too_long() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: lines for name, lines in lengths.items() if lines > FILE_LINES} == {}
    assert len(lengths) > 50


def test_no_function_is_too_long() -> None:
    long = {
        f"{path.relative_to(ROOT)}, {function.name}": lines_of(function)
        for path in SOURCES
        for function in functions(ast.parse(path.read_text()))
        if lines_of(function) > FUNCTION_LINES
    }
    assert long == {}


def test_how_lines_are_counted() -> None:
    text = '@decorated\ndef outer():\n    """Docs."""\n\n    async def inner():\n        pass\n'
    assert {one.name: lines_of(one) for one in functions(ast.parse(text))} == {"outer": 4, "inner": 2}
