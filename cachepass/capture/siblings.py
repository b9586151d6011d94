"""Siblings: the modules of one class that one graph may be called for, and what a method cuts in each of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from ..errors import ConfigError
from ..method import Method
from ..recipe.vocabulary import Region, Selection, Target


@dataclass(frozen=True)
class Siblings:
    """The regions of a graph under the path of every module that it may be called for.

    It lives as long as the graph and holds neither a module nor an input of a call.

    Attributes:
        method: Chooses among the regions.
        regions: As they were captured.
        prefix: Path of the captured module.
        prefixes: Paths of all modules of its class, it among them.
        model: Paths of all modules of the model.
        targets: What the graph cuts.
    """

    method: Method
    regions: tuple[Region, ...]
    prefix: str
    prefixes: tuple[str, ...]
    model: tuple[str, ...]
    targets: tuple[Target, ...] = ()
    _chosen: dict[str, Selection] = field(default_factory=dict, repr=False, compare=False)

    def under(self, prefix: str) -> list[Region]:
        """The regions as they are called under a prefix."""
        return [
            dataclasses.replace(region, id=self.moved(region.id, prefix), path=self.moved(region.path, prefix))
            for region in self.regions
        ]

    def moved(self, name: str, prefix: str) -> str:
        """The name under a prefix of what has this name in the captured module."""
        inside = name == self.prefix or name.startswith((f"{self.prefix}.", f"{self.prefix}@"))
        return prefix + name[len(self.prefix) :] if self.prefix and inside else name

    def chosen(self, prefix: str) -> Selection:
        """The method's choice under a prefix, told by the names of the captured regions."""
        if prefix not in self._chosen:
            moved = self.under(prefix)
            captured = {region.id: own for region, own in zip(moved, self.regions, strict=True)}
            selection = self.method.select(moved, self.model)
            targets = [
                dataclasses.replace(target, region=captured.get(target.region.id, target.region))
                for target in selection.targets
            ]
            self._chosen[prefix] = dataclasses.replace(selection, targets=tuple(targets))
        return self._chosen[prefix]

    def selection(self) -> Selection:
        """What the method chooses in any of them.

        Raises:
            ConfigError: A region has one group or forecast in one of them and another in the next.
        """
        chosen: dict[str, Target] = {}
        for prefix in self.prefixes:
            for target in self.chosen(prefix).targets:
                known = chosen.setdefault(target.region.id, target)
                if known != target:
                    raise ConfigError(
                        f"{known.region.path} and the same module of {prefix} differ in group or forecast",
                        where=type(self.method.config).__name__,
                        hint="blocks that share one compiled graph are cut alike; compile the whole model instead",
                    )
        return dataclasses.replace(self.chosen(self.prefix), targets=tuple(chosen.values()))

    def groups(self, prefix: str) -> frozenset[str]:
        """The groups that are cut under a prefix.

        Raises:
            ConfigError: One is cut in some of its modules and not in others.
        """
        chosen = {target.region.id for target in self.chosen(prefix).targets}
        wanted: dict[str, set[str]] = {}
        for target in self.targets:
            wanted.setdefault(target.group, set()).add(target.region.id)
        for regions in wanted.values():
            if chosen & regions and not regions <= chosen:
                missing = ", ".join(sorted(self.moved(region, prefix) for region in regions - chosen))
                raise ConfigError(
                    f"{prefix} is cut in some of the modules that are cut in others of its class (not in {missing}), "
                    "and they share one compiled graph",
                    where=type(self.method.config).__name__,
                    hint="write identifiers that take the same modules of every block, or whole blocks out; or compile "
                    "the whole model",
                )
        return frozenset(group for group, regions in wanted.items() if regions <= chosen)
