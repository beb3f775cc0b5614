"""xformers' attention: used when it is asked for, CUDA is there and it is installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from stepdistill.run.errors import UserError


def enable_xformers(net: nn.Module, device: torch.device) -> None:
    """Switch a diffusers network to xformers' memory-efficient attention.

    Raises:
        UserError: CUDA, the package or the network's support for it is missing.
    """
    if device.type != "cuda":
        raise UserError("xformers=true needs a CUDA device; set xformers=false")
    if find_spec("xformers") is None:
        raise UserError('xformers=true: install it with pip install "stepdistill[xformers]"')
    switch: Any = getattr(net, "enable_xformers_memory_efficient_attention", None)
    if switch is None:
        raise UserError(f"xformers=true: {type(net).__name__} does not support it")
    try:
        switch()
    except (ImportError, ValueError, NotImplementedError, RuntimeError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"xformers=true: this build of xformers does not work: {why}") from error
