"""Forecasts: a predicted value is ``sum_j w_j * h_j`` over the last outputs kept, newest first.

The graph knows only a ``Forecast``: the number of outputs kept and, where they never change, the weights. Everything
else about a method's mathematics ends here as a few host numbers. A ``ForecastRule`` is such mathematics as a value:
``Taylor(order=2)`` has a ``form``, which is the graph's part, and gives the weights for any positions of the outputs.
"""

from .differences import Hermite, Taylor, taylor_weights
from .fitted import Fit, Fitted
from .form import REUSE, ZEROS, Forecast, taylor
from .interpolation import Extrapolate, Lagrange, Linear, Newton
from .modes import DMD
from .rule import ForecastRule, Gram, Reuse, Spacing, Zeros
from .spectral import Chebyshev

__all__ = [
    "DMD",
    "REUSE",
    "ZEROS",
    "Chebyshev",
    "Extrapolate",
    "Fit",
    "Fitted",
    "Forecast",
    "ForecastRule",
    "Gram",
    "Hermite",
    "Lagrange",
    "Linear",
    "Newton",
    "Reuse",
    "Spacing",
    "Taylor",
    "Zeros",
    "taylor",
    "taylor_weights",
]
