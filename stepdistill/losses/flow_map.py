"""Flow maps: three conditions on the average velocity u of a step, and weights of what they miss.

In rectified flow's coordinates, y the state and s its time, a step from s to r < s lands at
X = y - (s - r) u, and u is the field v where the step has no length. Each condition alone makes X
the flow of v (Boffi et al. 2025, with the time turned round): shapes are [B, ...], and ``way`` is
the step's length s - r, expanded to them.
"""

from __future__ import annotations

from torch import Tensor


def lagrangian_gap(u: Tensor, u_r: Tensor, v: Tensor, way: Tensor) -> Tensor:
    """dX/dr less the field at X: u - (s - r) du/dr - v(X, r), 0 for the flow's own u.

    Args:
        u: average velocity of the step.
        u_r: its derivative in the time at which the step ends.
        v: the field where the step lands.
        way: the step's length.
    """
    return u - way * u_r - v


def eulerian_gap(u: Tensor, u_s: Tensor, v: Tensor, way: Tensor) -> Tensor:
    """The change of X along the field, negative: u + (s - r) du/ds - v(y, s); MeanFlow's identity.

    Args:
        u: average velocity of the step.
        u_s: its whole derivative along the field where the step begins: in the time and the state.
        v: the field there.
        way: the step's length.
    """
    return u + way * u_s - v


def two_steps(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """The average velocity of a step that is taken as two.

    Args:
        first: of the noisier one.
        second: of the one after it.
        share: of the way that the second takes, expanded.
    """
    return (1 - share) * first + share * second


def power_weighted(loss: Tensor, power: float, floor: float) -> Tensor:
    """loss / (loss + floor)^power with the denominator held constant [B] (MeanFlow, Geng 2025).

    With power 1 and no floor every sample's gradient has one length in the loss's root.
    """
    return loss / (loss + floor).detach() ** power


def mixed_velocity(
    v: Tensor, free: Tensor, own: Tensor, omega: float | Tensor, kappa: float
) -> Tensor:
    """MeanFlow's guided target omega v + (1 - omega - kappa) free + kappa own.

    Where ``own`` has come to be its mean this is guidance by omega / (1 - kappa).

    Args:
        v: the sample's own velocity z - x.
        free: the student's field without a class.
        own: its field for the class.
        omega: weight of v, one for all or a sample's own, expanded.
        kappa: weight of ``own``.
    """
    return omega * v + (1 - omega - kappa) * free + kappa * own
