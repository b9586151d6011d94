"""The house: imports run one way along the spine of rooms, and no two files import each other."""

from __future__ import annotations

import ast
from pathlib import Path

import cachepass

PACKAGE = Path(cachepass.__file__).parent
# From the ground up. A room imports rooms in front of it; files that stand by themselves are rooms of their own. The
# doors (``cachepass.cut`` and its like) hand names on to users, and no room goes through them.
SPINE = (
    "_torch errors", "recipe", "config", "method", "options", "capture", "program", "gpu", "run", "backend", "inspect",
    "tuning ship", "cli integrations serving warmup testing", "cut forecast schedule", "__init__",
)  # fmt: skip
FLOOR = {room: floor for floor, rooms in enumerate(SPINE) for room in rooms.split()}


def imports() -> dict[str, set[str]]:
    """The modules of the package that each one imports, by names such as ``run.dispatch``; packages by their faces."""
    known = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for name, path in known.items():
        package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
        package = [] if name == "__init__" else package
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[: len(package) - node.level + 1] + (node.module or "").split(".")
                for alias in node.names:
                    inside, itself = ".".join(filter(None, [*base, alias.name])), ".".join(filter(None, base))
                    target = inside if inside in known else itself or "__init__"
                    assert target in known, (name, target)
                    found[name].add(target)
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_room_is_on_the_spine():
    assert {room(module) for module in imports()} == FLOOR.keys()


def test_imports_run_one_way():
    upwards = [
        f"{module} -> {target}"
        for module, targets in imports().items()
        for target in targets
        if room(module) != room(target) and FLOOR[room(module)] <= FLOOR[room(target)]
    ]
    assert not upwards, "\n".join(sorted(upwards))


def test_there_is_no_circle():
    graph = imports()
    over: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in over:
            for target in graph[module]:
                visit(target, (*way, module))
            over.add(module)

    for module in graph:
        visit(module, ())


def test_no_file_is_a_copy_or_a_backup():
    """What editors and scripts leave behind is no part of the project."""
    top = PACKAGE.parent
    left = [
        path
        for pattern in ("*.bak", "*.orig", "*.rej", "*~", "*.tmp")
        for folder in ("cachepass", "tests", "docs", "examples", "benchmarks")
        for path in (top / folder).rglob(pattern)
    ]
    assert not left


def test_files_and_functions_are_of_a_size_to_be_read():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None and node.end_lineno - node.lineno < 60, (path, node.name)
