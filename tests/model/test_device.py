from __future__ import annotations

import pytest
import torch

from cigpose.model.device import choose_device


@pytest.mark.parametrize("name", ["banana", "cuda:99", "meta", "cpu:x"])
def test_a_device_that_is_not_there_is_refused_in_a_sentence(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^device '{name}' cannot be used here: torch sees .* Expected cpu, cuda"):
        choose_device(name)


def test_the_gpu_is_the_default_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == torch.device("cpu")
    for there, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert choose_device() == torch.device(expected)
    if not torch.cuda.device_count():
        with pytest.raises(ValueError, match="torch sees no CUDA GPUs"):
            choose_device("cuda")
