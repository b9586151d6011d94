"""The blocks of a model as they are called, and adaptive caching of their residuals by definition, slowly.

What runs a model step by step and says which steps it computed is a :class:`Peer`: :func:`reference` here, and other
libraries' own implementations in ``peers.py``.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from zoo import ZOO, build, first_tensor, inputs_of, sweep_over, trajectory

# The lists of blocks that diffusers' hooks look for, too.
LISTS = ("blocks", "transformer_blocks", "single_transformer_blocks", "layers", "visual_transformer_blocks",
         "temporal_transformer_blocks")  # fmt: skip
MAIN = "hidden_states"

# One model of each kind; all of them with CACHEPASS_ZOO=1, which takes some ten minutes more.
KINDS = (
    "FluxTransformer2DModel",  # two streams, two lists of blocks
    "CogVideoXTransformer3DModel",  # the streams are joined behind the blocks
    "WanTransformer3DModel",  # one stream, text by cross-attention
    "SD3Transformer2DModel",  # the last block returns no text
    "Flux2Transformer2DModel",  # streams that are joined between the lists
    "HunyuanDiT2DModel",  # long skips replace the stream
    "Lumina2Transformer2DModel",  # a graph break in front of the blocks
    "HunyuanVideo15Transformer3DModel",  # a graph break in every block
)
MODELS = tuple(sweep_over(ZOO, KINDS))

Decide = Callable[[int, float | None], bool]
Forecast = Callable[[list[tuple[int, torch.Tensor]], int], torch.Tensor]


class NoPeer(Exception):
    """This implementation cannot run this model; the message says why."""


class Peer:
    """A model under some adaptive cache, called step by step, eager."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.computed: list[bool] = []  # of every step of this run: whether the middle blocks were
        self.distances: list[float | None] = []  # what was measured; None: nothing was

    def __call__(self, **call: Any) -> torch.Tensor:
        self._begin(call)
        with torch.no_grad():
            result = first_tensor(self.model(**call))
        computed, distance = self._seen()
        self.computed.append(computed)
        self.distances.append(distance)
        return result

    def reset(self) -> None:
        """The next call begins a new run."""
        self.computed, self.distances = [], []

    def _begin(self, call: dict[str, Any]) -> None:
        """Before a step."""

    def _seen(self) -> tuple[bool, float | None]:
        """What is known of the step that just ran."""
        raise NotImplementedError


@dataclass
class Block:
    """A block as it is called."""

    module: torch.nn.Module
    leaf: torch.nn.Module  # the last module that runs inside it: only where the block is truly computed
    inputs: dict[str, torch.Tensor]  # by parameter; the main stream's is MAIN whatever the block calls it
    outputs: tuple[Any, ...]
    streams: tuple[str | None, ...] = ()  # the parameter as which each output goes on
    fused: tuple[str, ...] = ()  # the streams in front of it that its main input is the concatenation of


def _bound(module: torch.nn.Module, args: Any, kwargs: Any) -> dict[str, torch.Tensor]:
    arguments = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    if MAIN not in tensors and tensors:
        tensors[MAIN] = tensors.pop(next(iter(tensors)))
    return tensors


def _outputs(output: Any) -> tuple[Any, ...]:
    return tuple(output) if isinstance(output, (tuple, list)) else (output,)


def _same(a: Any, b: torch.Tensor) -> bool:
    return a is b or (isinstance(a, torch.Tensor) and a.shape == b.shape and torch.equal(a, b))


def blocks_of(model: torch.nn.Module, call: dict[str, Any]) -> list[Block]:
    """The entries of the model's lists of blocks in the order of their calls, seen in one call of the plain model."""
    called: list[Block] = []
    leaves: list[torch.nn.Module] = []

    def record(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        called.append(Block(module, leaves[-1], _bound(module, args, kwargs), _outputs(output)))

    handles = []
    entries = [
        block
        for name, child in model.named_children()
        if name in LISTS and isinstance(child, torch.nn.ModuleList)
        for block in child
    ]
    for block in entries:
        handles.append(block.register_forward_hook(record, with_kwargs=True))
        for leaf in block.modules():
            if not list(leaf.children()):
                handles.append(leaf.register_forward_pre_hook(lambda module, _: leaves.append(module)))
    with torch.no_grad():
        model(**call)
    for handle in handles:
        handle.remove()
    if not called:
        raise NoPeer("no top-level list of blocks by the names that are looked for")
    if len({id(block.module) for block in called}) != len(called):
        raise NoPeer("a block is called more than once")
    _name_streams(called)
    return called


def _name_streams(called: list[Block]) -> None:
    for block, following in itertools.pairwise(called):
        names = [
            next((name for name, value in following.inputs.items() if _same(out, value)), None) for out in block.outputs
        ]
        if any(names):
            block.streams = tuple(names)
    for i, block in enumerate(called):
        alike = [b.streams for b in called[:i] if type(b.module) is type(block.module) and b.streams]
        if not block.streams and alike:  # the last of its list: as those before it
            block.streams = alike[-1]
        elif not block.streams:
            block.streams = tuple(_by_shape(out, block) for out in block.outputs)
    for block, following in itertools.pairwise(called):
        if MAIN in block.streams and not any(_same(out, following.inputs[MAIN]) for out in block.outputs):
            following.fused = _fused(dict(zip(block.streams, block.outputs, strict=True)), following.inputs[MAIN])


def _by_shape(output: Any, block: Block) -> str | None:
    names = [
        name
        for name in (MAIN, "encoder_hidden_states")
        if isinstance(output, torch.Tensor) and name in block.inputs and block.inputs[name].shape == output.shape
    ]
    return names[0] if len(names) == 1 or (len(block.outputs) == 1 and names) else None


def _fused(streams: dict[str | None, Any], value: torch.Tensor) -> tuple[str, ...]:
    names = [name for name, part in streams.items() if name is not None and isinstance(part, torch.Tensor)]
    for order in (names, names[::-1]):
        parts = [streams[name] for name in order]
        if (
            len(parts) == 2
            and parts[0].ndim == value.ndim == 3
            and parts[0].shape[2] == parts[1].shape[2]
            and _same(torch.cat(parts, dim=1), value)
        ):
            return tuple(order)
    return ()


def relative_l1(value: torch.Tensor, kept: torch.Tensor) -> float:
    return float((value - kept).abs().mean() / kept.abs().mean())


@dataclass
class _Run:
    """What is kept from step to step."""

    step: int = -1
    kept: torch.Tensor | None = None
    history: dict[int, list[tuple[int, torch.Tensor]]] = field(default_factory=dict)


class Reference(Peer):
    """Every block is computed at every step; on predicted ones the middle blocks' outputs are replaced."""

    def __init__(
        self, model: torch.nn.Module, call: dict[str, Any], first: int, last: int, decide: Decide, forecast: Forecast
    ) -> None:
        super().__init__(model)
        self.blocks = blocks_of(model, call)
        end = len(self.blocks) - last - 1
        if end < first:
            raise NoPeer(f"of {len(self.blocks)} blocks none is left between the first {first} and the last {last}")
        self._decide, self._forecast, self._first, self._end = decide, forecast, first, end
        self._state = _Run()
        self._input: dict[str, torch.Tensor] = {}
        self._base: dict[str | None, torch.Tensor] = {}
        self.residual: torch.Tensor | None = None  # of the first blocks, at this step
        self._now: tuple[bool, float | None] = (True, None)
        self._pair(self.blocks[first - 1] if first else None)
        self.blocks[0].module.register_forward_pre_hook(self._enter, with_kwargs=True)
        if first:
            self.blocks[first - 1].module.register_forward_hook(self._measure)
        self.blocks[end].module.register_forward_hook(self._leave)

    def _pair(self, before: Block | None) -> None:
        """Every output of the last middle block has a stream in front of the middle blocks, or there is no peer."""
        start, end = self.blocks[0], self.blocks[self._end]
        base = start.inputs if before is None else dict(zip(before.streams, before.outputs, strict=True))
        if MAIN not in base or (before is not None and base[MAIN].shape != start.inputs[MAIN].shape):
            raise NoPeer("the first blocks do not return the stream that they take")
        orders = [block.fused for block in self.blocks[self._first : self._end + 1] if block.fused]
        self._order = orders[0] if orders else ()
        for name, output in zip(end.streams, end.outputs, strict=True):
            if isinstance(output, torch.Tensor):
                if name not in base:
                    raise NoPeer(f"an output of {type(end.module).__name__} is no stream in front of the middle blocks")
                if self._stream(name, base, output).shape != output.shape:
                    raise NoPeer(
                        f"{name} is {tuple(output.shape)} behind the middle blocks, "
                        f"{tuple(base[name].shape)} in front of them"
                    )

    def _stream(self, name: str | None, base: dict[Any, torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        if name == MAIN and self._order and base[name].shape != output.shape:
            return torch.cat([base[part] for part in self._order], dim=1)
        return base[name]

    def _enter(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        self._input = _bound(module, args, kwargs)
        if not self._first:
            self._base = {**self._input}
            self._choose(None)

    def _measure(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self._base = dict(zip(self.blocks[self._first - 1].streams, _outputs(output), strict=True))
        self.residual = self._base[MAIN] - self._input[MAIN]
        kept = self._state.kept
        self._choose(None if kept is None else relative_l1(self.residual, kept))
        if self._now[0]:
            self._state.kept = self.residual

    def _choose(self, distance: float | None) -> None:
        compute = self._decide(self._state.step, distance) or not self._state.history
        self._now = (compute, distance)

    def _leave(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        replaced = list(_outputs(output))
        for i, (name, value) in enumerate(zip(self.blocks[self._end].streams, replaced, strict=True)):
            if not isinstance(value, torch.Tensor):  # SD3's last block has no text to return
                continue
            base, history = self._stream(name, self._base, value), self._state.history.setdefault(i, [])
            if self._now[0]:
                history.append((self._state.step, value - base))
            else:
                replaced[i] = base + self._forecast(history, self._state.step)
        return type(output)(replaced) if isinstance(output, (tuple, list)) else replaced[0]

    def _begin(self, call: dict[str, Any]) -> None:
        self._state.step += 1

    def _seen(self) -> tuple[bool, float | None]:
        return self._now

    def reset(self) -> None:
        super().reset()
        self._state = _Run()


def reuse(history: list[tuple[int, torch.Tensor]], _step: int) -> torch.Tensor:
    """The last computed residual again."""
    return history[-1][1]


def reference(
    name: str, *, first: int, last: int, decide: Decide, forecast: Forecast = reuse, layers: int | None = None
) -> Reference:
    """Adaptive caching by definition: the middle blocks are all but the ``first`` and the ``last`` ones.

    ``decide(step, distance)`` says whether to compute; it is asked at every step (of a new run from 0 on), and with
    nothing to predict from the answer does not matter. ``distance``: how far the residual of the first blocks is from
    the one of the last computed step; None without first blocks, or without such a step. ``forecast(history, step)``:
    the residual of one stream over the middle blocks, from those of the computed steps.
    """
    return Reference(build(name, layers=layers), inputs_of(name), first, last, decide, forecast)


@dataclass(frozen=True)
class Mixed:
    """A threshold at which a run both computes and predicts."""

    threshold: float
    computed: tuple[bool, ...]
    margin: float  # of any distance to the threshold, relative: rounding must not decide

    _cache: ClassVar[dict[Any, Mixed]] = {}

    @property
    def changes(self) -> int:
        return sum(a != b for a, b in itertools.pairwise(self.computed))


def mixed(name: str, *, first: int = 1, steps: int = 9, layers: int | None = None) -> Mixed:
    """A threshold with computed and predicted steps in turn, as far as can be from every distance it is compared with.

    What the first blocks return does not depend on what was decided before, so that one plain run tells all of them.
    """
    key = (name, first, steps, layers)
    if key not in Mixed._cache:
        plain = reference(name, first=first, last=0, decide=lambda *_: True, layers=layers)
        residuals: list[torch.Tensor] = []
        for _, call in trajectory(name, steps):
            plain(**call)
            assert plain.residual is not None
            residuals.append(plain.residual)
        pairs = [[relative_l1(b, a) for b in residuals] for a in residuals]
        distances = sorted(pairs[i][j] for i in range(steps) for j in range(i + 1, steps))
        middles = [(a * b) ** 0.5 for a, b in itertools.pairwise(distances) if a > 0]
        found = [
            run
            for run in (_simulated(pairs, threshold) for threshold in middles)
            if sum(run.computed) >= 3 and run.computed.count(False) >= 2
        ]
        if not found:
            raise NoPeer("no threshold at which a run both computes and predicts")
        Mixed._cache[key] = max(found, key=lambda run: (run.margin > 0.02, min(run.changes, 4), run.margin))
    return Mixed._cache[key]


def mixed_threshold(name: str, *, first: int = 1, steps: int = 9, layers: int | None = None) -> float:
    return mixed(name, first=first, steps=steps, layers=layers).threshold


def _simulated(pairs: list[list[float]], threshold: float) -> Mixed:
    computed, last, margin = [True], 0, float("inf")
    for step in range(1, len(pairs)):
        distance = pairs[last][step]
        margin = min(margin, abs(distance - threshold) / threshold)
        computed.append(distance > threshold)
        last = step if computed[-1] else last
    return Mixed(threshold, tuple(computed), margin)
