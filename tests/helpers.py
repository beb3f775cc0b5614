"""What several tests share: quadrature, small networks and teachers, configs of every method."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stepdistill.adapters.mlp import MLPAdapter, VectorMLP
from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.process import EDM, RF, VP, Process, Trig
from stepdistill.diffusion.timesteps import Grid
from stepdistill.eval.runner import Row
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Trainer
from stepdistill.trainers.find import trainer

MEAN, STD = 0.5, 1.3  # the target of the convergence runs
SEEING = {"yonos"}  # methods for networks that are fed a picture
SMALL_NETWORK = {"type": "UNet2DModel", "config": {}}  # what a config must name; not built here
EXACT = {"derivative": "jvp"}  # differences would enlarge a difference in rounding
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "add": {"default": {"student_steps": 2, "guidance": 1.5}},
    "consistency": {
        "ect": {},
        "grid": {
            "pairs": {"kind": "grid", "steps": 6, "skip": 2},
            "solver": "heun",
            "target": "ema",
            "guidance_range": (1.0, 3.0),
        },
        "data": {"solver": "data", "pairs": {"kind": "grid", "steps": 6}},
        "levels": {
            "solver": "data",
            "pairs": {"kind": "ect", "stages": 2, "k": 8},
            "weight": {"kind": "inverse_gap", "levels": True},
        },
    },
    "dcm": {
        "adversarial": {
            "semantic_share": 0.5,
            "pairs": {"kind": "grid", "steps": 6},
            "guidance": 1.5,
            "target": "ema",
            "adversary": {"r1": 1.0},
        },
    },
    "denoising": {"flow": {"network": SMALL_NETWORK}},
    "dmd": {
        "one_step": {"guidance": 2.0},
        "two_steps": {"student_steps": 2, "critic_steps": 2},
        "exits": {"student_steps": 3, "critic_steps": 2, "critic_rollout": False},
    },
    "flash_dmd": {
        "preferences": {
            "preference": {"reward": "brightness", "candidates": 2, "updates": 1},
            "critic_follows": 0.0,  # it would move the fake score whatever its gradient is
        },
    },
    "flow_map": {
        "lsd": {"form": "lsd", "diagonal": 0.25},
        "lsd, semi": {"form": "lsd", "gradient": "semi", "diagonal": 0.25},
        "esd, semi": {"form": "esd", "gradient": "semi", "diagonal": 0.25},
        "esd": {"form": "esd", "diagonal": 0.25},
        "psd_m": {"form": "psd_m", "diagonal": 0.25},
        "images": {"form": "esd", "velocity": "data", "gradient": "semi", "diagonal": 0.5},
        "divided anywhere": {
            "form": "psd_u",
            "guidance": 1.5,
            "diagonal": 0.5,
            "adaptive": True,
        },
    },
    "flash_wam": {
        "two groups": {
            "groups": (1, 3),
            "families": ("preserving", "linear"),
            "shares": (1.0, 0.5),
            "pairs": {"kind": "grid", "steps": 6},
            "target": "ema",
        },
    },
    "gdd": {"frozen": {"freeze": ("blocks.*",)}},
    "hyper_sd": {
        "adversarial": {
            "end": "random",
            "pairs": {"kind": "grid", "steps": 16},
            "guidance": 1.5,
            "adversary": {"student": 0.1, "r1": 1.0},
        },
    },
    "kd": {
        "features": {"student_steps": 2, "metric": "huber", "perceptual": {}, "guidance": 1.5},
        "walk": {"student_steps": 3, "states": "walk"},
    },
    "ladd": {"teacher": {"student_steps": 2, "discriminator_steps": 2, "adversary": {"r1": 1.0}}},
    "crd": {"tilted by a reward": {"group_size": 2, "student_steps": 2, "guidance": 1.5}},
    "lcm": {
        "adapters": {
            "embedding": False,
            "target": "stop_gradient",
            "pairs": {"kind": "grid", "steps": 4},
            "metric": "l2",
        },
    },
    "mdt_dist": {
        "both": {"guidance": 1.5},
        "difference": {
            "derivative": "difference",
            "difference_step": 0.1,
            "d_norm": True,
            "matching": 0.2,
            "distillation": 0.2,
        },
    },
    "mean_flow": {
        "teacher": {"diagonal": 0.25, "power": 0.5, "power_floor": 1.0} | EXACT,
        "guides itself": {"velocity": "data", "guidance": 2.0, "label_drop": 0.3} | EXACT,
        "difference": {
            "derivative": "central",
            "difference_step": 0.1,
            "guidance": 1.5,
            "diagonal": 0.5,
            "power": 0.5,
            "power_floor": 1.0,
        },
    },
    "opd": {
        "noise": {"guidance": 2.0, "student_steps": 2, "denominator": "flow"},
        "diverse": {"guidance": 2.0, "student_steps": 1, "terms": ({"kind": "diversity"},)},
    },
    "perflow": {"guided": {"guidance": 1.5, "points": None, "solver": {"kind": "dpm"}}},
    "phased_dmd": {
        "default": {},
        "no_rollout": {"critic_rollout": False, "critic_steps": 2, "phase_steps": 3},
    },
    "reflow": {"huber": {}, "heun": {"update": "heun"}},
    "rcm": {
        "guided": {"guidance": 1.5, "critic_steps": 2, "own_steps": 2, "regularizer": 0.5}
        | {"alone": 0}
        | EXACT,
    },
    "sana_sprint": {"teacher": {"guidance": 1.5, "guidance_range": (1.0, 3.0)} | EXACT},
    "scm": {
        "difference": {"guidance": 1.5, "derivative": "difference", "normal": "clamp"},
        "semi": {
            "derivative": "semi",
            "difference_step": 0.2,
            "normal": "none",
            "adaptive": False,
            "guidance_range": (1.0, 2.0),
        },
    },
    "scott": {
        "adversarial": {
            "adversary": {"student": 0.4, "r1": 1.0},
            "start": 0.9,
            "pairs": {"kind": "grid", "steps": 6},
            "guidance": 1.5,
        },
    },
    "sida": {"adversarial": {"adversary": {"from_step": 0}}},
    "slim_flow": {"distil": {"stage": "distil", "guidance": 1.5, "perceptual": {}}},
    "tbcm": {
        "walks": {"points": 2, "norm_floor": 1.0, "guidance_range": (1.0, 3.0)} | EXACT,
        "plain tangent": {"points": 2, "adaptive": False, "guidance": 1.5} | EXACT,
    },
    "tcm": {
        "averaged": {
            "pairs": {"kind": "ect", "stages": 2},
            "target": "ema",
            "guidance": 1.5,
            "boundary": 0.6,
        },
    },
    "twin_flow": {"teacher": {"guidance": 1.5, "c": 1.0, "short": 0.1}},
    "sim": {"score": {}, "full": {"form": "full", "guidance": 1.5, "critic_steps": 2}},
}
"""Settings of the contract tests beside those of a trainer's proofs: method -> variant -> config
keys. Of two that have one name it is these."""


def cases(method: str) -> dict[str, dict[str, Any]]:
    """The variants in which a method is tested: its proofs', and those of :data:`VARIANTS`; its
    defaults where there are none."""
    own = {name: dict(proof.keys) for name, proof in trainer(method).proofs.items()}
    return own | VARIANTS.get(method, {}) or {"default": {}}


def scaled_linear() -> Tensor:
    """The table of alphas_cumprod of Stable Diffusion, fp64 [1000]."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0)


def processes() -> dict[str, Process]:
    """One process of every kind."""
    return {
        "rf": RF(),
        "rf-shift": RF(shift=3.0),
        "vp": VP(scaled_linear()),
        "edm": EDM(),
        "trig": Trig(),
        "trig-1": Trig(sigma_data=1.0),
    }


def start_scale(process: Process) -> float:
    """Standard deviation of the state that a process's sampling starts from."""
    return float(process.coefs(torch.tensor([process.t_max], dtype=torch.float64)).sigma)


def karras_grid(steps: int, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> Grid:
    """``steps`` noise levels of EDM from ``high`` to ``low``, evenly spaced in t^(1/rho)."""
    ends = high ** (1 / rho), low ** (1 / rho)
    return tuple((torch.linspace(*ends, steps, dtype=torch.float64) ** rho).tolist())


def hermite(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights [count], fp64, of the mean over a standard normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


def hermite2(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes of two independent standard normals and weights, each [count^2], fp64."""
    nodes, weights = hermite(count)
    first, second = torch.meshgrid(nodes, nodes, indexing="ij")
    return first.flatten(), second.flatten(), torch.outer(weights, weights).flatten()


def gaussian_clean(x_t: Tensor, alpha: Any, sigma: Any, mean: Any, var: Any) -> Tensor:
    """E[x | x_t] for x ~ N(mean, var)."""
    return mean + alpha * var / (alpha**2 * var + sigma**2) * (x_t - alpha * mean)


class Affine(nn.Module):
    """mu + u x_t in every coordinate: the whole student of the closed-form runs (an x0 head)."""

    def __init__(self, mu: float, u: float, dim: int) -> None:
        super().__init__()
        self.mu, self.u = nn.Parameter(torch.tensor(mu)), nn.Parameter(torch.tensor(u))
        self.dim = dim

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        """Clean estimate [B, D]; time and label do not matter."""
        return self.mu + self.u * x


class AffineAdapter(MLPAdapter):
    """``net(x, time, label)`` on samples [B, D]."""

    def sample_shape(self, net: nn.Module) -> tuple[int, ...]:
        """(D,)."""
        return (net.dim,)


def small_mlp(**config: Any) -> VectorMLP:
    """A seeded VectorMLP of 4 coordinates and 3 classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VectorMLP(**{"dim": 4, "width": 16, "depth": 2, "num_classes": 3, **config})


def mlp_teacher(**config: Any) -> Denoiser:
    """A flow teacher on vectors with three classes."""
    return Denoiser(small_mlp(**config), RF(), "velocity", classes=("a", "b", "c"), null_label=3)


def dit_teacher(*, beside: int = 0) -> Denoiser:
    """A flow teacher on 8x8 images with three classes, by diffusers' DiT.

    Args:
        beside: channels of a picture that it is fed beside the state, and heeds.
    """
    from diffusers import DiTTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=1 + beside,
            out_channels=1,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=3,
            norm_num_groups=1,
        )
        with torch.no_grad():
            for param in net.parameters() if beside else ():
                param.add_(0.1 * torch.randn(param.shape))
    return Denoiser(net, RF(), "velocity", classes=("a", "b", "c"), null_label=3)


def seeing_teacher() -> Denoiser:
    """As :func:`dit_teacher`, of a network that is fed a picture beside the state."""
    return dit_teacher(beside=1)


def unet_teacher() -> Denoiser:
    """A flow teacher on 8x8 images with three classes, by diffusers' UNet with attention."""
    from diffusers import UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
            norm_num_groups=4,
            num_class_embeds=4,
        )
    return Denoiser(net, RF(), "velocity", classes=("a", "b", "c"), null_label=3)


def make(
    method: str,
    teacher: Denoiser,
    *,
    rank: int = 0,
    world: int = 1,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    **keys: Any,
) -> Trainer:
    """The trainer of a method; six steps of a batch of eight unless said otherwise.

    A method for networks that are fed a picture has one in the teacher's place.
    """
    cls = trainer(method)
    if method in SEEING:
        keys = {"data": {"degrade": {"factor": 4}}, **keys}
        teacher = teacher if teacher.beside else seeing_teacher()
    keys = {"run": "unused", "teacher": "unused", "steps": 6, "batch_size": 8, **keys}
    config = cls.Config(**{"method": method, **keys})
    return cls(config, teacher, rank=rank, world=world, autocast=autocast)


def batch_of(made: Trainer, step: int) -> Batch:
    """The batch of a step, with images and pairs for the methods that need them."""
    if made.needs == "labels":
        return made.batch(step)
    index, rng = made.batch(step).index, Rng(7).at(step)
    kept = () if made.config.kept_steps is None else (made.config.kept_steps,)
    x = rng.normal("image", index, (*kept, *made.teacher.sample_shape)).tanh()
    z = rng.normal("pair", index, made.teacher.sample_shape) if made.needs == "pairs" else None
    return made.batch(step, x=x, z=z)


def run(made: Trainer, first: int, last: int) -> None:
    """Train the steps ``first`` .. ``last - 1`` as the loop does."""
    for step in range(first, last):
        made.prepare(step)
        made.step(step, batch_of(made, step))


def saved(made: Trainer) -> tuple[dict[str, dict[str, Tensor]], dict[str, int]]:
    """What a checkpoint of a trainer holds: its tensors, copied, and the update counts."""
    tensors = {
        player: {name: value.clone() for name, value in state.items()}
        for player, state in made.state().items()
    }
    return tensors, {name: player.updates for name, player in made.players.items()}


def same(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> None:
    """Equal to the bit, names and all."""
    assert a.keys() == b.keys()
    for player in a:
        assert a[player].keys() == b[player].keys()
        for name, value in a[player].items():
            assert torch.equal(value, b[player][name]), f"{player} {name}"


def turn_gradients(made: Trainer, step: int) -> list[list[Tensor]]:
    """The gradients of every turn of a step, without updates."""
    found, batch = [], batch_of(made, step)
    for place, turn in enumerate(made.turns(step)):
        player = made.players[turn.player]
        with player.turn():
            turn.loss(batch, Rng(0).at(step, place)).value.backward()
        found.append([param.grad.clone() for param in player.params])
        player.optimizer.zero_grad(set_to_none=True)
    return found


def noise(seed: int = 0, shape: tuple[int, ...] = (16, 4)) -> Tensor:
    """Standard normal noise of a seed; 16 vectors of 4 unless said otherwise."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to ``tolerance``, or to that share of the values' size where it is above 1."""
    size = max(1.0, float(b.abs().mean()))
    torch.testing.assert_close(a / size, b / size, rtol=0, atol=tolerance)


def descend(
    loss: Callable[[Tensor, Tensor], Tensor], start: tuple[float, float], lr: float, steps: int
) -> tuple[float, float]:
    """Follow the gradient of loss(mu, u), which freezes what it should, by Adam to rest."""
    mu, u = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in start)
    optimizer = torch.optim.Adam([mu, u], lr=lr, betas=(0.0, 0.999))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss(mu, u).backward()
        optimizer.step()
    return float(mu.detach()), abs(float(u.detach()))


def figures(method: str, steps: int, fd: float, diversity: float = 5.8) -> Row:
    """A row of an evaluation: of a student, or of the teacher."""
    return Row(
        model=method,
        method=method,
        steps=steps,
        reference="digits",
        features="digits",
        feature_sha="0",
        num=2000,
        seed=0,
        fd=fd,
        diversity=diversity,
    )
