"""The house: what may import what, what the rooms know of each other, how long a file may be, and one of its words."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hgad_fast"

# From the top of the house to its ground: a room may use those above it, and itself. `hgad_fast` is the package's face.
ORDER = ("importing", "environment", "terminal", "files", "data", "features", "ops", "kernels", "modules", "protocol")
ORDER += ("methods", "scoring", "training", "evaluation", "export", "models", "curation", "hgad_fast", "plugin")
ORDER += ("anomalib", "demo", "bench", "options", "commands", "cli", "__main__")


def sources() -> dict[str, Path]:
    """Return the package's files by the names of their modules."""
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("*.py")]  # rglob passes links over
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imports(module: str, path: Path, known: set[str]) -> Iterator[str]:
    """Yield the modules of the package that a file imports: anywhere, inside functions and for type checkers too."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *([node.module] if node.module else [])])
            for alias in node.names:
                target = f"{base}.{alias.name}"
                if target in known or base in known:
                    yield target if target in known else base


def graph() -> networkx.DiGraph:
    modules = sources()
    edges = networkx.DiGraph()
    edges.add_nodes_from(modules)
    for module, path in modules.items():
        edges.add_edges_from((module, used) for used in imports(module, path, set(modules)) if used != module)
    return edges


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def test_the_walk_sees_the_imports() -> None:
    """It sees all kinds: relative and absolute, of modules and of names, at the top of a file and in a function."""
    edges = graph()
    for user, used in (
        ("hgad_fast.scoring.score", "hgad_fast.scoring.maps"),  # from .maps import name
        ("hgad_fast.evaluation.evaluate", "hgad_fast.evaluation.metrics"),  # from . import module
        ("hgad_fast.modules.flow", "hgad_fast.ops"),  # from .. import package
        ("hgad_fast.cli", "hgad_fast.evaluation.report"),  # inside a function
        ("hgad_fast", "hgad_fast.models.hgad"),
    ):
        assert edges.has_edge(user, used), (user, used)
    assert len(edges) > 50 and {room(module) for module in edges} == set(ORDER)


def test_no_circle() -> None:
    assert list(networkx.simple_cycles(graph())) == []


def test_arrows_point_downwards() -> None:
    """A room uses only what stands above it; kernels use nothing of the package."""
    wrong = [
        f"{user} uses {used}"
        for user, used in graph().edges
        if room(user) != room(used) and (ORDER.index(room(user)) < ORDER.index(room(used)) or room(user) == "kernels")
    ]
    assert wrong == []


def test_only_the_face_of_the_operations_is_more_than_a_folder() -> None:
    filled = [path.parent.name for path in PACKAGE.glob("*/__init__.py") if path.read_text().strip()]
    assert filled == ["ops"]


def test_methods_are_known_in_their_rooms_alone() -> None:
    """The parts of HGAD stand in the rooms of the methods and in what measures and demonstrates them."""
    method = re.compile(
        r"n_intra_centers|mu_delta|phi_int(er|ra)|coupling|lambda[12]|StageLoss|LOSS_TERMS|\bHGAD(Model|Config)\b"
    )
    shared = ("data", "features", "protocol", "methods", "scoring", "training", "evaluation", "files", "environment")
    shared += ("importing", "terminal", "export")
    lines = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for module, path in sources().items()
        if room(module) in shared
        for number, line in enumerate(code_of(path).splitlines(), 1)
        if method.search(line) or re.search(r"(method|config\.method) (==|!=|in) ", line)
    ]
    assert lines == []


def code_of(path: Path) -> str:
    """Return a file without its docstrings and comments, its lines where they were."""
    text = path.read_text()
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for number in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[number] = ""
    return "\n".join(line.split("  # ")[0] if not line.lstrip().startswith("#") else "" for line in lines)


@pytest.mark.parametrize("folder", ["hgad_fast", "kernels"])
def test_no_file_is_longer_than_700_lines(folder: str) -> None:
    lengths = {str(path): len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.*") if path.is_file()}
    assert [name for name, length in lengths.items() if length > 700 and "__pycache__" not in name] == []


def test_one_word_for_an_image() -> None:
    word = "pict" + "ure"
    files = [
        path for folder in ("hgad_fast", "kernels", "docs", "tests", "benchmarks", "examples") for path in texts(folder)
    ]
    files += [ROOT / name for name in ("README.md", "Makefile", "setup.py", "pyproject.toml")]
    assert len(files) > 100
    assert [str(path) for path in files if word in path.read_text().lower()] == []


def texts(folder: str) -> list[Path]:
    return [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md", ".html", ".sh")]
