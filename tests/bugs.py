"""Ten bugs that such libraries have had, planted to see that ``prove`` finds them.

The variable STEPDISTILL_TEST_BUG names one; the child processes of the tests plant it before they
run a command. By hand: ``STEPDISTILL_TEST_BUG=swapped_pairs python -m tests.bugs prove --all``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch

BUG = "STEPDISTILL_TEST_BUG"


def plant(name: str) -> None:
    """Plant a bug in this process, for good."""
    BUGS[name]()


def biased_phased_target() -> None:
    """The fake score of a phase takes its intermediate sample for a clean one."""
    from stepdistill.losses.distribution import Renoise

    def target(self: Renoise, head: Any, x_s: Any, e: Any, sigma_data: float = 0.5) -> Any:
        return head.output(x_s, e, self.at_t, sigma_data)

    Renoise.target = target


def no_grad_fake_score() -> None:
    """SIM's fake score runs without a graph."""
    from stepdistill.trainers.score.sim import SIMTrainer

    compare = SIMTrainer.compare

    def without(self: Any, *args: Any) -> Any:
        def denoiser(name: str) -> Any:
            den = type(self).denoiser(self, name)
            return torch.no_grad()(den) if name == "critic" else den

        self.denoiser = denoiser
        try:
            return compare(self, *args)
        finally:
            del self.denoiser

    SIMTrainer.compare = without


def unshared_exit() -> None:
    """Every process draws an exit of its own."""
    from stepdistill.run.rng import Rng
    from stepdistill.trainers.score.dmd import DMDTrainer

    generate = DMDTrainer.generate

    def apart(self: Any, batch: Any, rng: Any, **keys: Any) -> Any:
        class Own(Rng):
            def integer(own, stream: str, high: int) -> int:  # noqa: N805
                return (super().integer(stream, high) + self.rank) % high

        return generate(self, batch, Own(rng.seed, rng.step, rng.turn), **keys)

    DMDTrainer.generate = apart


def swapped_pairs() -> None:
    """Noise and image of a pair come from neighbouring places of the batch."""
    from stepdistill.data.pairs.store import PairStore

    batch = PairStore.batch

    def swapped(self: Any, *args: Any) -> Any:
        z, x, label = batch(self, *args)
        return z.roll(1, dims=0), x, label

    PairStore.batch = swapped


def averaged_on_critic_steps() -> None:
    """The student's average moves after every player's update."""
    from stepdistill.run.player import Player
    from stepdistill.trainers.base import Trainer

    step, train = Player.step, Trainer.step
    playing: list[Any] = []

    def moved(self: Any) -> None:
        step(self)
        for other in playing[-1].players.values():
            if other is not self and other.ema is not None:
                torch._foreach_lerp_(other.averages, other.params, other.ema_weight())

    def noted(self: Any, *args: Any) -> Any:
        playing.append(self)
        return train(self, *args)

    Player.step, Trainer.step = torch.no_grad()(moved), noted


def guided_twice() -> None:
    """The teacher's guided output is guided once more."""
    from stepdistill.losses.guides import Teacher

    once = Teacher.scales

    def twice(self: Any, scale: float, u: Any) -> Any:
        return once(self, scale * scale, u)

    Teacher.scales = twice


def one_cell_off() -> None:
    """The image a step ahead is compared as if it were two steps ahead."""
    from stepdistill.trainers.trajectory.consistency import ConsistencyTrainer

    times = ConsistencyTrainer.times

    def later(self: Any, batch: Any, rng: Any) -> Any:
        t, r = times(self, batch, rng)
        grid = self.config.pairs.grid(self.span)
        return t, (r - (grid[0] - grid[1])).clamp_min(0)

    ConsistencyTrainer.times = later


def half_coefficients() -> None:
    """The process's coefficients are kept in float16."""
    from stepdistill.diffusion.process import RF, Coefs

    coefs = RF.coefs

    def rough(self: Any, t: Any) -> Coefs:
        c = coefs(self, t)
        parts = (c.alpha, c.sigma, c.d_alpha, c.d_sigma)
        return Coefs(*(part.half().to(part) for part in parts))

    RF.coefs = rough


def stale_target() -> None:
    """The averaged target network is never moved."""
    from stepdistill.trainers.base import Trainer
    from stepdistill.trainers.trajectory.consistency import ConsistencyTrainer

    ConsistencyTrainer.step = Trainer.step


def wrong_axes() -> None:
    """A distance sums over the batch too."""
    from stepdistill.losses import distance

    distance.sum_square = lambda delta: delta.square().sum().expand(len(delta))


BUGS: dict[str, Callable[[], None]] = {
    bug.__name__: bug
    for bug in (
        biased_phased_target,
        no_grad_fake_score,
        unshared_exit,
        swapped_pairs,
        averaged_on_critic_steps,
        guided_twice,
        one_cell_off,
        half_coefficients,
        stale_target,
        wrong_axes,
    )
}

if __name__ in ("__main__", "__mp_main__"):  # the second: workers that prove starts
    plant(os.environ[BUG])
    if __name__ == "__main__":
        from stepdistill.cli import main

        sys.exit(main())
