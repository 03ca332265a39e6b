"""Where a model runs."""

from __future__ import annotations

import torch


def choose_device(device: torch.device | str | None = None) -> torch.device:
    """The device a user named, tried out.

    Args:
        device: such as "cpu" or "cuda:1"; None: the GPU if there is one.

    Raises:
        ValueError: there is no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).cpu()
    except (RuntimeError, AssertionError) as err:  # torch has no error of its own for it
        gpus = torch.cuda.device_count()
        raise ValueError(
            f"device {str(device)!r} cannot be used here: torch sees {gpus or 'no'} CUDA GPU{'s' * (gpus != 1)}. "
            "Expected cpu, cuda or cuda:N; leave it out for the GPU if there is one."
        ) from err
    return chosen
