"""A caching method of one's own: dense steps at both ends of a run, sparse ones between, and a damped line in the gaps.

For models whose outputs change fastest where a run begins and ends. The computed steps lie at Chebyshev nodes, which
crowd there; what is skipped is extrapolated from the last two outputs, ``h_0 + d * k / gap * (h_0 - h_1)``.

    from custom_method import chebyshev

    torch.compile(model, backend="cached_inductor", options={"cache": chebyshev(steps=50, computed=20)})
"""

import math
from dataclasses import dataclass

from cachepass import Group, Part, Recipe
from cachepass.cut import Modules
from cachepass.forecast import Forecast, ForecastRule
from cachepass.schedule import Schedule


@dataclass(frozen=True)
class ChebyshevNodes(Schedule):  # when
    steps: int  # of a run
    computed: int  # nodes; nodes that round to the same step are one computed step

    def nodes(self):
        places = ((1 - math.cos(math.pi * i / (self.computed - 1))) / 2 for i in range(self.computed))
        return {round((self.steps - 1) * place) for place in places}

    def predicts(self, step, past, distance=None):
        return step.index < self.steps and step.index not in self.nodes()


@dataclass(frozen=True)
class DampedLine(ForecastRule):  # what stands in
    damping: float = 1.0  # 1 continues the line through the last two outputs, 0 repeats the last one
    form = Forecast("line", history=2)

    def derive(self, nodes, at):
        slope = self.damping * (at - nodes[0]) / (nodes[0] - nodes[1])
        return 1.0 + slope, -slope


def chebyshev(steps=50, computed=20, damping=1.0, cut=Modules("block")):  # noqa: B008 (a frozen value)
    return Recipe((Group("chebyshev", ChebyshevNodes(steps, computed), (Part(cut, DampedLine(damping)),)),))
