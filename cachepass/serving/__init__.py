"""Serving: what an engine needs on the host to step many requests through one model.

    requests   Request: what each of its steps will do; Row: one step of one; Call: rows to call the model with
    scheduler  StepScheduler: requests come and go -> the next Call
    policies   which rows, of those that are ready: CatchUp, FirstCome, Together, or one of your own
    costs      seconds of a call, by phase and rows: typical ones, or measured
    marks      a model and a number of steps -> what each step will do
    simulate   arrivals, a scheduler and costs -> throughput and latencies, without a model

Nothing here knows a tensor, and only ``marks`` asks a model; importing the room does not import torch.
"""

from .costs import Cost, MeasuredCosts, typical_cost
from .marks import phases_of
from .policies import CatchUp, FirstCome, Policy, Together
from .requests import Call, Request, Row
from .scheduler import StepScheduler
from .simulate import Simulated, arrivals, simulate

__all__ = [
    "Call",
    "CatchUp",
    "Cost",
    "FirstCome",
    "MeasuredCosts",
    "Policy",
    "Request",
    "Row",
    "Simulated",
    "StepScheduler",
    "Together",
    "arrivals",
    "phases_of",
    "simulate",
    "typical_cost",
]
