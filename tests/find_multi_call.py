"""Which pipelines of diffusers call a denoiser more than once per step, read from their sources.

    python tests/find_multi_call.py          a table of them
    python tests/find_multi_call.py --all    with those that call it once

A step is a turn of the innermost loop over timesteps or, in a modular pipeline, a call of a block that is given the
step (``i`` and ``t``). Nothing is imported and nothing runs, so that optional dependencies do not matter. What is
counted is the most that one way through the step's branches can make; ``n`` stands for a loop inside of the step.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DENOISER = re.compile(r"(\w+_)?(transformer|unet|prior|dit|denoiser)(_\d+|_model)?|current_model|guider_model")
LATENTS = re.compile(r"(hidden_states|\w*latents?\w*|sample|x|model_input|\w*noisy\w*)")
TIME = re.compile(r"(\w*timesteps?\w*|t|sigmas?|\w*time|step_index|progress)")
LOOP_OF_STEPS = re.compile(r"\b(\w*timesteps?\w*|\w*sigmas|num_inference_steps|num_steps|ts)\b")


@dataclass(frozen=True)
class Found:
    """What the step of one class does.

    Attributes:
        place: The module below ``diffusers``.
        name: The class.
        calls: Of a denoiser, at most, in one step.
        loop: Some of them are made in a loop inside of the step.
        guider: That loop goes over the batches of a guider.
        contexts: Call sites inside a ``cache_context``, and all of them.
        tells_timestep: The step sets ``_current_timestep``.
        anew: Conditioning arguments that are made in the step, by the names of the model's parameters.
    """

    place: str
    name: str
    calls: int
    loop: bool
    guider: bool
    contexts: tuple[int, int]
    tells_timestep: bool
    anew: tuple[str, ...]

    @property
    def several(self) -> bool:
        return self.calls > 1 or self.loop

    @property
    def silent(self) -> bool:
        """Some call is made in no context."""
        return self.contexts[0] < self.contexts[1]


@dataclass(frozen=True)
class Site:
    """A call of a denoiser in the source."""

    call: ast.Call
    named: bool  # inside a cache_context


class Step:
    """The calls that one turn of a loop makes."""

    def __init__(self, body: list[ast.stmt], methods: dict[str, ast.FunctionDef], aliases: set[str]) -> None:
        self._methods, self._aliases, self._entered = methods, aliases, set[str]()
        self.sites: list[Site] = []
        self.loop = self.guider = False
        self.calls = self._block(body, named=False)
        self.body = body

    def _block(self, body: list[ast.stmt], *, named: bool) -> int:
        return sum(self._statement(statement, named=named) for statement in body)

    def _statement(self, node: ast.stmt, *, named: bool) -> int:
        """The most calls that a statement can make."""
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            return 0
        if isinstance(node, ast.If):
            branches = self._block(node.body, named=named), self._block(node.orelse, named=named)
            return self._expressions(node.test, named=named) + max(branches)
        if isinstance(node, ast.With):
            opens = named or any("cache_context" in ast.unparse(item.context_expr) for item in node.items)
            return self._block(node.body, named=opens)
        if isinstance(node, (ast.For, ast.While)):
            inside = self._block(node.body, named=named)
            self.loop |= inside > 0
            self.guider |= inside > 0 and isinstance(node, ast.For) and "guider" in ast.unparse(node.iter)
            return inside
        if isinstance(node, ast.Try):
            return self._block([*node.body, *node.orelse, *node.finalbody], named=named)
        return self._expressions(node, named=named)

    def _expressions(self, node: ast.AST, *, named: bool) -> int:
        count = 0
        for call in (child for child in ast.walk(node) if isinstance(child, ast.Call)):
            if is_denoiser(call.func, self._aliases):
                self.sites.append(Site(call, named))
                count += 1
            elif (name := own_method(call.func)) in self._methods and name not in self._entered:
                self._entered.add(name)  # one that calls itself would never end
                method = self._methods[name]
                outer, self._aliases = self._aliases, self._aliases | aliases_in(method)
                count += self._block(method.body, named=named)
                self._aliases = outer
                self._entered.discard(name)
        return count

    def anew(self) -> Iterator[str]:
        """Conditioning arguments that the step makes."""
        made = {name for statement in self.body for name in made_in(statement)}
        for site in self.sites:
            for keyword in site.call.keywords:
                name, value = keyword.arg, keyword.value
                if name is None or LATENTS.fullmatch(name) or TIME.fullmatch(name) or name == "return_dict":
                    continue
                if makes(value) or (isinstance(value, ast.Name) and value.id in made):
                    yield name


def is_denoiser(function: ast.expr, aliases: set[str]) -> bool:
    if isinstance(function, ast.Attribute):
        return bool(DENOISER.fullmatch(function.attr)) and "text" not in function.attr
    return isinstance(function, ast.Name) and function.id in aliases


def own_method(function: ast.expr) -> str | None:
    """``self.name``."""
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == "self":
        return function.attr
    return None


def aliases_in(function: ast.FunctionDef) -> set[str]:
    """Local names of a denoiser."""
    found = set[str]()
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values = [node.value.body, node.value.orelse] if isinstance(node.value, ast.IfExp) else [node.value]
            if any(isinstance(value, ast.Attribute) and is_denoiser(value, set()) for value in values):
                found.add(node.targets[0].id)
    return found


def makes(value: ast.expr) -> bool:
    """An expression that gives another tensor object each time: a call, arithmetic, or a slice."""
    return any(isinstance(node, (ast.Call, ast.BinOp, ast.Subscript)) for node in ast.walk(value))


def made_in(statement: ast.stmt) -> Iterator[str]:
    """Names that a statement binds to something new. What a user's callback returns is not the pipeline's making."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Assign) and makes(node.value) and "callback_outputs" not in ast.unparse(node.value):
            for target in node.targets:
                yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name))


def tells_timestep(body: list[ast.stmt]) -> bool:
    return any(
        isinstance(node, ast.Attribute) and node.attr == "_current_timestep" and isinstance(node.ctx, ast.Store)
        for statement in body
        for node in ast.walk(statement)
    )


def steps_of(function: ast.FunctionDef) -> Iterator[list[ast.stmt]]:
    """The bodies of a function's innermost loops over timesteps; the function's own, if it is given the step."""
    if {argument.arg for argument in function.args.args} >= {"components", "block_state", "i"}:
        yield function.body
        return
    for node in ast.walk(function):
        if not isinstance(node, (ast.For, ast.While)) or not _over_steps(node):
            continue
        if not any(
            isinstance(inner, (ast.For, ast.While)) and inner is not node and _over_steps(inner)
            for inner in ast.walk(node)
        ):
            yield node.body


def _over_steps(loop: ast.For | ast.While) -> bool:
    if isinstance(loop, ast.While):
        return bool(LOOP_OF_STEPS.search(ast.unparse(loop.test)))
    return bool(LOOP_OF_STEPS.search(ast.unparse(loop.iter)))


def classes_in(path: Path, root: Path) -> Iterator[Found]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in (child for child in tree.body if isinstance(child, ast.ClassDef)):
        methods = {child.name: child for child in node.body if isinstance(child, ast.FunctionDef)}
        found = [
            _found(path.relative_to(root), node.name, Step(body, methods, aliases_in(method)))
            for method in methods.values()
            for body in steps_of(method)
        ]
        found = [each for each in found if each is not None]
        if found:
            yield max(found, key=lambda each: (each.several, each.calls))


def _found(path: Path, name: str, step: Step) -> Found | None:
    if not step.sites:
        return None
    return Found(
        str(path.with_suffix("")),
        name,
        step.calls,
        step.loop,
        step.guider,
        (sum(site.named for site in step.sites), len(step.sites)),
        tells_timestep(step.body),
        tuple(dict.fromkeys(step.anew())),
    )


def everything() -> list[Found]:
    """Every class of the installed diffusers that calls a denoiser in a loop, by its place."""
    spec = importlib.util.find_spec("diffusers")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("diffusers is not installed: pip install 'cachepass[diffusers]'")
    root = Path(spec.origin).parent
    paths = [path for part in ("pipelines", "modular_pipelines") for path in sorted((root / part).rglob("*.py"))]
    return [found for path in paths for found in classes_in(path, root)]


def guiders() -> dict[str, int]:
    """The most calls per step that each guider asks for, by class."""
    spec = importlib.util.find_spec("diffusers")
    assert spec is not None and spec.origin is not None
    found: dict[str, int] = {}
    for path in sorted((Path(spec.origin).parent / "guiders").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                for child in node.body:
                    if (
                        isinstance(child, ast.Assign)
                        and ast.unparse(child.targets[0]) == "_input_predictions"
                        and isinstance(child.value, ast.List)
                    ):
                        found[node.name] = len(child.value.elts)
    return found


def row(found: Found) -> tuple[str, ...]:
    calls = f"{found.calls}" + (" x guider" if found.guider else " x n" if found.loop else "")
    inside, sites = found.contexts
    contexts = "each" if inside == sites else "none" if inside == 0 else f"{inside} of {sites}"
    return (
        found.place.split("/", 1)[1],
        found.name,
        calls,
        contexts,
        "yes" if found.tells_timestep else "no",
        ", ".join(found.anew) or "-",
    )


HEADER = ("module", "class", "calls", "context", "_current_timestep", "conditioning made in the step")


def table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(line[column]) for line in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="with the pipelines that call their denoiser once")
    shown = [found for found in everything() if found.several or parser.parse_args().all]
    for kind in ("pipelines", "modular_pipelines"):
        print(f"\n{kind}\n" + table([HEADER, *(row(found) for found in shown if found.place.startswith(kind + "/"))]))
    print("\nguiders\n" + table([("class", "calls"), *((name, str(calls)) for name, calls in guiders().items())]))
    silent = [found for found in shown if found.silent]
    print(f"\n{len(shown)} classes, {len(silent)} of them with a call outside any context")


if __name__ == "__main__":
    main()
