from __future__ import annotations

import pytest
import torch


@pytest.fixture
def gpu() -> torch.device:
    """The first GPU; tests that need it are skipped without."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA GPU here")
    return torch.device("cuda", 0)
