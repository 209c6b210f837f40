"""Runs a notebook's cells in this process; as a program, writes their output into the file.

python -m tests.support.notebooks docs/notebooks/first-steps.ipynb
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def run_notebook(path: Path, name: str = "notebook") -> tuple[dict[str, Any], list[str]]:
    """Runs a notebook as Jupyter does: one cell after the other, in one module.

    Args:
        path: The notebook.
        name: Of the module, which is there while the cells run.

    Returns:
        The names that the cells defined, and for every code cell what it printed and its last
        expression's value.
    """
    module = sys.modules[name] = ModuleType(name)
    printed = []
    try:
        for cell in code_cells(json.loads(path.read_text("utf-8"))):
            printed.append(_run("".join(cell["source"]), vars(module)))
    finally:
        del sys.modules[name]
    return vars(module), printed


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells that hold code."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def _run(source: str, names: dict[str, Any]) -> str:
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(tree, "cell", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)  # noqa: S307
            if value is not None:
                out.write(f"{value!r}\n")
    return out.getvalue()


def main(path: Path) -> None:
    """Writes the output of every cell into the notebook."""
    _, printed = run_notebook(path)
    notebook = json.loads(path.read_text("utf-8"))
    for number, (cell, text) in enumerate(zip(code_cells(notebook), printed, strict=True), 1):
        # In Jupyter the cells are of the module __main__.
        lines = text.replace("notebook:", "__main__:").splitlines(keepends=True)
        stream = {"name": "stdout", "output_type": "stream", "text": lines}
        cell |= {"execution_count": number, "outputs": [stream] if lines else []}
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
