"""A caching method of one's own: dense steps at both ends of a run, sparse ones between, and a damped line in the gaps.

For models whose outputs change fastest where a run begins and ends. The computed steps lie at Chebyshev nodes, which
crowd there; what is skipped is extrapolated from the last two outputs, ``h_0 + d * k / gap * (h_0 - h_1)``.

    from custom_method import ChebyshevCacheConfig

    torch.compile(model, backend="cached_inductor", options={"cache": ChebyshevCacheConfig(steps=50, computed=20)})
"""

import math

from cachepass import NoMatchError
from cachepass.config import MethodConfig, cache_config
from cachepass.forecast import Forecast
from cachepass.methods import Method, Selection, Step, Target, implements


@cache_config("chebyshev")
class ChebyshevCacheConfig(MethodConfig):
    steps: int = 50  # steps of a run
    computed: int = 20  # nodes; nodes that round to the same step are one computed step
    damping: float = 1.0  # d: 1 continues the line through the last two outputs, 0 repeats the last one
    identifiers: tuple[str, ...] = ("block",)

    def check(self):
        if not 2 <= self.computed <= self.steps:
            raise self.fail("computed", f"{self.computed} is out of range", f"allowed: 2 to steps={self.steps}")


@implements(ChebyshevCacheConfig)
class Chebyshev(Method):
    def __init__(self, config):
        nodes = ((1 - math.cos(math.pi * i / (config.computed - 1))) / 2 for i in range(config.computed))
        self.config, self.computed = config, {round((config.steps - 1) * node) for node in nodes}

    def select(self, regions, model=None):  # where: which modules are cut
        chosen = [r for r in regions if any(r.matches(identifier) for identifier in self.config.identifiers)]
        if not chosen and model is None:
            raise NoMatchError("identifiers match no module", where="ChebyshevCacheConfig")
        return Selection(tuple(Target(r, "chebyshev", Forecast("line", history=2)) for r in chosen))

    def predicts(self, group, step):  # when: the schedule
        return step.index < self.config.steps and step.index not in self.computed

    def never_predicts(self, num_inference_steps):
        steps = range(1, num_inference_steps or self.config.steps)
        return None if any(self.predicts("", Step(i)) for i in steps) else "every step is a node"

    def weights(self, group, step, history, region=""):  # what stands in: the last two outputs' weights
        if len(history.steps) < 2:
            return 1.0, 0.0
        newest, older = history.steps[:2]
        slope = self.config.damping * (step.index - newest) / (newest - older)
        return 1.0 + slope, -slope
