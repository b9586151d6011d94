"""What all tests share: Dynamo's caches emptied between tests, quiet diffusers, no gradients."""

from __future__ import annotations

import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # one process per core: more threads would only wait for each other
    torch.set_num_threads(1)


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
