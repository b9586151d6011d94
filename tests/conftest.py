"""What all tests share: Dynamo's caches emptied between tests, quiet diffusers, no gradients."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True, scope="session")
def _quiet_diffusers():
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
