"""The README's table of modules is the order in which they may import each other."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def rows() -> dict[str, int]:
    """Row of each module or package in the README's table, by its name below pskd."""
    text = (ROOT / "README.md").read_text()
    table = text[text.index("## How it is laid out") :].split("\n\n")[2]
    found = {}
    for row, line in enumerate(table.splitlines()):
        cell = line.split("|")[1].replace("in `pskd/`", "")
        for name in re.findall(r"`(?:pskd/)?([a-z_]+)(?:\.py|/)`", cell):
            assert name not in found, f"{name} twice"
            found[name] = row
    return found


def top(module: str) -> str:
    """`pskd.store.format` -> `store`."""
    return ([*module.split("."), ""])[1]


def imported(path: Path) -> set[str]:
    """Modules or packages right below pskd that a file imports, inside functions as well."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {top(alias.name) for alias in node.names if alias.name.startswith("pskd.")}
        if isinstance(node, ast.ImportFrom) and node.module == "pskd":
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pskd."):
            names.add(top(node.module))
    return names


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def modules() -> dict[Path, str]:
    files = [p for p in (ROOT / "pskd").rglob("*.py") if p != ROOT / "pskd" / "__init__.py"]
    return {p: p.relative_to(ROOT / "pskd").parts[0].removesuffix(".py") for p in files}


def test_every_module_is_in_the_table():
    assert set(modules().values()) | {"train"} == set(rows()) | {"recipes"}


def test_imports_point_upward_only():
    order = rows()
    for path, name in modules().items():
        if name == "recipes":
            continue
        for other in imported(path) - {name}:
            assert order[other] <= order[name], f"{path} imports {other}, which is below it"


def test_no_module_imports_itself_through_others():
    graph: dict[str, set[str]] = {}
    named = {path: dotted(path) for path in modules()}
    names = set(named.values())
    for path, module in named.items():
        graph[module] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pskd"):
                below = {f"{node.module}.{alias.name}" for alias in node.names} & names
                graph[module] |= below or {node.module}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module in done or module not in graph:
            return
        for other in graph[module]:
            visit(other, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())
