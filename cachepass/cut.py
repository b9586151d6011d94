"""Cuts: what is forecast, and what a decision looks at."""

from .recipe.cut import BlockOutput, BlockResidual, Blocks, Cut, Latents, ModelOutput, ModuleOutput, Modules, Probe

__all__ = [
    "BlockOutput",
    "BlockResidual",
    "Blocks",
    "Cut",
    "Latents",
    "ModelOutput",
    "ModuleOutput",
    "Modules",
    "Probe",
]
