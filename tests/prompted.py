"""What the tests of networks that read prompts share: tiny networks and what holds for each."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepdistill.adapters import adapter_for
from stepdistill.adapters.cond import Cond
from stepdistill.adapters.lora import present
from stepdistill.adapters.recompute import recompute
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.derivative import slope
from stepdistill.diffusion.process import RF, Process
from stepdistill.diffusion.prompts import Prompts
from stepdistill.diffusion.sampler import Sampled, first_state, full, move, sample
from stepdistill.diffusion.timesteps import Grid
from stepdistill.run.rng import seeded
from tests.helpers import batch_of, make, noise

ENGINES = {
    "dmd2": {"guidance": 1.0, "critic_steps": 1, "steps": 2},
    "consistency": {"guidance": 1.0, "steps": 2},
    "reflow": {"guidance": 1.0, "steps": 2},
}


@dataclass(frozen=True)
class Family:
    """One network, made small.

    Args:
        name: of its class in diffusers.
        config: of the network.
        shape: of one sample (C, *S).
        cond: shapes of a sample's conditions by name.
        told: the time that the network is told of a process's times [B].
        packed: from the head's output [B, C, *S] to the network's own.
        process: what it was trained on.
        head: what its output means.
        needs: conditions that it cannot do without.
        whole: shape of a sample by the config.
        smooth: what in the config keeps the output from jumping.
    """

    name: str
    config: dict[str, Any]
    shape: tuple[int, ...]
    cond: dict[str, tuple[int, ...]]
    whole: tuple[int, ...]
    told: Callable[[Tensor], Tensor] = lambda t: 1000 * t
    packed: Callable[[Tensor], Any] = lambda h: h
    process: Callable[[], Process] = RF
    head: str = "velocity"
    needs: tuple[str, ...] = ("text",)
    smooth: dict[str, Any] = field(default_factory=dict)

    def net(self, seed: int = 0) -> Any:
        """The network, no weight of which is 0."""
        import diffusers

        with seeded(seed):
            net = getattr(diffusers, self.name)(**self.config)
            with torch.no_grad():
                for param in net.parameters():
                    param.add_(0.1 * torch.randn(param.shape))
        return net.eval()

    def denoiser(self, net: nn.Module | None = None) -> Denoiser:
        """A denoiser of small samples, of the network unless another is given."""
        net = self.net() if net is None else net
        adapter = adapter_for(self.net())
        adapter.sample_shape = lambda _: self.shape
        return Denoiser(net, self.process(), self.head, adapter=adapter)

    def conditions(self, batch: int = 2, seed: int = 1) -> Cond:
        """Conditions of a batch; of every mask the last sample's is shorter."""
        made = {
            name: noise(seed + k, (batch, *shape))
            for k, (name, shape) in enumerate(self.cond.items())
        }
        if "mask" in made:
            made["mask"] = torch.ones(made["mask"].shape, dtype=torch.long)
            made["mask"][-1, -2:] = 0
        if "guidance" in made:
            made["guidance"] = torch.full((batch,), 3.5)
        return Cond(**made)

    def noise(self, batch: int = 2, seed: int = 0) -> Tensor:
        """Noise of a batch."""
        return noise(seed, (batch, *self.shape))


def walk(
    den: Sampled, z: Tensor, grid: Grid, cond: Cond, null: Cond | None = None, scale: float = 1.0
) -> Tensor:
    """The sampler's walk, guided away from ``null`` where that is given."""
    with torch.no_grad():
        if null is None:
            return sample(den, z, grid, cond)
        x_t = first_state(den.process, z, grid[0])
        for level, end in zip(grid[:-1], grid[1:], strict=True):
            owner, t = den.at(level), full(z, level)
            own, other = (owner.raw(x_t, t, c) for c in (cond, null))
            c = den.process.coefs(t).expand(x_t)
            pred = owner.prediction(other + scale * (own - other), x_t, c)
            x_t = move(pred, den.process, full(z, end))
        return x_t


def sigmas(pipe: Any) -> Grid:
    """The grid that a pipeline of a flow has just drawn on."""
    return tuple(pipe.scheduler.sigmas.tolist())


def quiet(pipe: Any) -> Any:
    """A pipeline without a progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a share of the values' root mean square."""
    ours, theirs = ours.detach(), theirs.detach()
    assert theirs.any()
    return float((ours - theirs).abs().max() / theirs.square().mean().sqrt())


class Knowing(nn.Module):
    """A network's stand-in that knows what was mixed, and keeps what it is told."""

    def __init__(self, family: Family, out: Any) -> None:
        super().__init__()
        self.config, self.out = family.net().config, out
        self.param = nn.Parameter(torch.zeros(()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The answer, whatever is asked."""
        self.told = kwargs | dict(enumerate(args))
        return (self.out,)


def from_stock(family: Family, stock: Callable[..., tuple[Any, Tensor]], scale: float) -> float:
    """How far our walk is from what a stock pipeline draws, on its own levels and conditions."""
    net, z = family.net(), family.noise()
    cond, null = family.conditions(), family.conditions(seed=9)
    pipe, theirs = stock(net, z, cond, null, scale)
    ours = walk(family.denoiser(net), z, sigmas(pipe), cond, null if scale > 1 else None, scale)
    found = difference(ours, theirs)
    print(f"{family.name} at {scale}: {found:.1e}")
    return found


def told_time(told: dict[Any, Any]) -> Tensor:
    """The time among what a network was told."""
    return next(told[key] for key in ("timestep", "timesteps", 1) if key in told)


def check_clean_and_noise(family: Family) -> None:
    x, z, t = family.noise(seed=3), family.noise(seed=4), torch.tensor([0.3, 0.9])
    process = family.process()
    x_t, c = process.noise(x, z, t), process.coefs(t).expand(x)
    den = family.denoiser(Knowing(family, None))
    den.net.out = family.packed(den.head.output(x, z, c))
    pred = den(x_t, t, family.conditions())
    torch.testing.assert_close(pred.x, x, rtol=0, atol=1e-5)
    torch.testing.assert_close(pred.z, z, rtol=0, atol=1e-5)
    torch.testing.assert_close(told_time(den.net.told), family.told(t))


def check_gradients(family: Family) -> None:
    """They reach the state and every parameter, also where blocks are computed again."""
    den, t = family.denoiser(), torch.tensor([0.3, 0.9])
    x_t, cond = family.noise().requires_grad_(), family.conditions()

    def gradients() -> tuple[Tensor, ...]:
        loss = den(x_t, t, cond).x.square().mean()
        return torch.autograd.grad(loss, [x_t, *den.net.parameters()])

    kept = gradients()
    assert kept[0].flatten(1).any(dim=1).all()
    recompute(den.net)
    for one, other in zip(gradients(), kept, strict=True):
        torch.testing.assert_close(one, other)


def check_gradient_is_the_slope(family: Family) -> None:
    """Nothing cuts the graph: by a difference."""
    family = replace(family, config=family.config | family.smooth)
    den, t = family.denoiser(), torch.tensor([0.3, 0.9])
    x_t, way, cond = family.noise(), family.noise(seed=5), family.conditions()
    given = x_t.clone().requires_grad_()
    weight = family.noise(seed=6)
    (grad,) = torch.autograd.grad((den(given, t, cond).h * weight).sum(), given)
    with torch.no_grad():
        high, low = ((den(x_t + e * way, t, cond).h * weight).double().sum() for e in (2e-3, -2e-3))
    slope = float((grad * way).double().sum())
    assert slope == pytest.approx(float(high - low) / 4e-3, rel=3e-2)


def check_forward_mode(family: Family) -> None:
    """Derivatives along, by the pass of their own, are those of the gradients."""
    den, cond, weight = family.denoiser(), family.conditions(), family.noise(seed=6)
    ways = {"d_x": family.noise(seed=5), "d_t": torch.tensor([0.5, -0.5])}
    given = family.noise().requires_grad_(), torch.tensor([0.3, 0.9]).requires_grad_()
    grads = torch.autograd.grad((den(*given, cond).h * weight).sum(), given)
    for (name, way), grad in zip(ways.items(), grads, strict=True):
        x_t, t = (value.detach() for value in given)
        _, tangent = slope(den, x_t, t, cond, lambda pred: pred.h, **{name: way})
        along, back = ((a * b).sum().item() for a, b in ((tangent, weight), (grad, way)))
        assert along == pytest.approx(back, rel=1e-3, abs=1e-3 * float((grad * way).norm()))


def check_features(family: Family) -> None:
    den, t, cond = family.denoiser(), torch.tensor([0.3, 0.9]), family.conditions()
    taps = den.adapter.taps(den.net), den.adapter.blocks(den.net)
    assert len(taps[0]) == 1 and 1 <= len(taps[1]) <= 4
    for names in taps:
        found = den.features(family.noise(), t, cond, names)
        assert all(len(feature) == 2 and feature.isfinite().all() for feature in found)


def check_end(family: Family) -> None:
    den, t, cond = family.denoiser(), torch.tensor([0.3, 0.9]), family.conditions()
    x_t, told = family.noise(), den.extended("end")
    plain, ending = den(x_t, t, cond).h, cond.ending(torch.zeros(2))
    assert torch.equal(told(x_t, t, ending).h, plain)
    with torch.no_grad():
        for param in told.net.extra_embedding.parameters():
            param.add_(0.1)
    moved = [told(x_t, t, cond.ending(r)).h for r in (torch.zeros(2), t / 2)]
    assert (moved[0] - moved[1]).flatten(1).abs().amax(dim=1).min() > 1e-5


def check_lora(family: Family) -> None:
    den, t, cond = family.denoiser(), torch.tensor([0.3, 0.9]), family.conditions()
    x_t, names = family.noise(), type(den.adapter).lora_targets
    plain = den(x_t, t, cond).h
    branch = den.adapt("a", rank=2, alpha=2, targets=None, seed=0)
    assert torch.equal(branch(x_t, t, cond).h, plain)
    for param in branch.own():
        param.requires_grad_(True)
    branch(x_t, t, cond).x.square().mean().backward()
    moved = [p for p in branch.own() if p.grad is not None and p.grad.any()]
    assert len(moved) == len(branch.own()) // 2  # at first those that are 0
    assert present(den.net, names) == names


def check_bf16(family: Family) -> None:
    den, t, cond = family.denoiser(), torch.tensor([0.3, 0.9]), family.conditions()
    plain = den(family.noise(), t, cond).h
    with torch.autocast("cpu", torch.bfloat16):
        x_t = family.noise().requires_grad_()
        pred = den(x_t, t, cond)
        pred.x.square().mean().backward()
    assert pred.h.dtype == torch.float32 and x_t.grad.isfinite().all()
    assert difference(pred.h, plain) < 0.5


def check_missing(family: Family) -> None:
    den, cond = family.denoiser(), family.conditions()
    for name in family.needs:
        with pytest.raises(ValueError, match=rf"{family.name}: every sample needs .*cond.{name}"):
            den(family.noise(), torch.tensor([0.3, 0.9]), replace(cond, **{name: None}))


def check_every_condition_counts(family: Family) -> None:
    den, t, cond = family.denoiser(), torch.tensor([0.3, 0.9]), family.conditions()
    plain = den(family.noise(), t, cond).h
    for name in family.cond:
        value = getattr(cond, name)
        other = value.flip(1) if name == "mask" else value + noise(7, value.shape)
        assert difference(den(family.noise(), t, replace(cond, **{name: other})).h, plain) > 1e-5


def check_batch_is_its_samples(family: Family) -> None:
    den, t, cond = family.denoiser(), torch.tensor([0.3, 0.9]), family.conditions()
    both = den(family.noise(), t, cond).h
    ones = [
        den(family.noise()[k : k + 1], t[k : k + 1], cond.rows(slice(k, k + 1))).h for k in (0, 1)
    ]
    assert difference(torch.cat(ones), both) < 1e-4


def check_shape(family: Family) -> None:
    net = family.net()
    adapter = adapter_for(net)
    assert adapter.sample_shape(net) == family.whole
    assert adapter.label_rows(net) == 0
    names = [name for name, _ in net.named_parameters()]
    assert adapter.innate and all(fnmatch.filter(names, pattern) for pattern in adapter.innate)
    assert adapter.beside(net) == family.cond.get("image", (0,))[0]


def check_wrapped(family: Family) -> None:
    den, t, cond = family.denoiser(), torch.tensor([0.3, 0.9]), family.conditions()
    plain = den(family.noise(), t, cond).h
    den.route(Wrapper(den.net))
    assert torch.equal(den(family.noise(), t, cond).h, plain)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


def train(family: Family, method: str) -> None:
    """Two steps of a method on the network itself, by numbers of prompts.

    Networks that are told guidance are told the branch's own: methods take a sample's for what the
    teacher is to be guided by.
    """
    teacher = family.denoiser()
    teacher.read(Prompts(("one", "two"), replace(family.conditions(batch=3), guidance=None)))
    made = make(method, teacher, batch_size=2, **ENGINES[method])
    made.prepare(0)
    before = [p.detach().clone() for p in made.students()[0].params]
    for step in range(2):
        logs = made.step(step, batch_of(made, step))
        assert all(value.isfinite().all() for value in logs.values())
    after = made.students()[0].params
    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))


def states(net: nn.Module) -> list[Tensor]:
    """The states, and what is beside them, that a network is about to be fed, call by call."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: Any, given: dict[str, Any]) -> None:
        kept.append(given["hidden_states"])

    net.register_forward_pre_hook(keep, with_kwargs=True)
    return kept


class Wrapper(nn.Module):
    """Calls a network, as data-parallel ones do."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.module = net

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output."""
        return self.module(*args, **kwargs)
