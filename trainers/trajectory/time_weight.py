"""A learned weight of times: losses of all times count alike, whatever their sizes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stepdistill.run.errors import UserError
from stepdistill.trainers.settings import TrainConfig

OCTAVES = 4  # of each angle's waves


class TimeWeight(nn.Module):
    """A learned log weight [B] of times, which are given as angles: linear in their waves.

    Under exp(w) loss - w, as trained beside a network, it comes to -log of a time's mean loss.

    Args:
        first: the weight at first, of all times; that of losses of 1 / first is learnt then.
        times: how many angles tell a sample's times.

    Source: uncertainty weights of EDM2 (Karras et al. 2024), as sCM and flow maps use them.
    """

    def __init__(self, first: float = 1.0, times: int = 1) -> None:
        super().__init__()
        self.line = nn.Linear(2 * OCTAVES * times, 1)
        nn.init.zeros_(self.line.weight)
        nn.init.constant_(self.line.bias, math.log(first))

    @classmethod
    def beside(
        cls, config: TrainConfig, device: torch.device, first: float = 1.0, times: int = 1
    ) -> TimeWeight:
        """One that trains along with the student of a run.

        Raises:
            UserError: the student is to be compiled.
        """
        if config.compile:
            raise UserError(
                "compile: a student that trains along with a weight of times is not compiled; set "
                "adaptive=false or compile=false"
            )
        return cls(first, times).to(device)

    def forward(self, *angles: Tensor) -> Tensor:
        """The log weight at angles [B] each, in radians."""
        octaves = 2.0 ** torch.arange(OCTAVES, device=angles[0].device)
        turns = torch.cat([angle[:, None] * octaves for angle in angles], dim=1)
        out: Tensor = self.line(torch.cat([turns.cos(), turns.sin()], dim=1))
        return out[:, 0]

    def weighed(self, each: Tensor, *angles: Tensor) -> Tensor:
        """exp(w) loss - w of each sample, for losses [B] at those angles."""
        log_weight: Tensor = self(*angles)
        return log_weight.exp() * each - log_weight
