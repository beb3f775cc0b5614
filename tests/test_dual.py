"""Our forward-mode rules against torch's own, and their gradients against differences.

Torch 2.14's own gradient of a layer norm's tangent is wrong: it holds mean and deviation constant.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepdistill.adapters.cond import Cond
from stepdistill.diffusion.derivative import drift, rate
from stepdistill.diffusion.dual import RULES, Duals
from stepdistill.run.assets import load_teacher

RNG = torch.Generator().manual_seed(0)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=RNG, dtype=torch.float64)


W, KERNEL, BIAS, WIDE = drawn(5, 6), drawn(4, 3, 3, 3), drawn(4), drawn(2, 6, 1, 1)
SCALE, SHIFT = drawn(6), drawn(6)
CASES = {
    "linear": (lambda x: F.linear(x, W), (2, 3, 6)),
    "linear with bias": (lambda x: F.linear(x, W, bias=SCALE[:5]), (2, 6)),
    "conv2d": (lambda x: F.conv2d(x, KERNEL, BIAS, stride=2, padding=1), (2, 3, 6, 6)),
    "conv2d without bias": (lambda x: F.conv2d(x, KERNEL, None, 1, (1, 1)), (2, 3, 4, 4)),
    "conv1d": (lambda x: F.conv1d(x, KERNEL[..., 0], BIAS), (2, 3, 6)),
    "conv3d": (lambda x: F.conv3d(x, KERNEL[..., None]), (2, 3, 4, 4, 2)),
    "layer norm": (lambda x: F.layer_norm(x, (6,), SCALE, SHIFT, 1e-6), (2, 3, 6)),
    "layer norm of two": (lambda x: F.layer_norm(x, (3, 6)), (2, 3, 6)),
    "group norm": (lambda x: F.group_norm(x, 3, SCALE, SHIFT, eps=1e-3), (2, 6, 4, 4)),
    "group norm of strides": (
        lambda x: F.group_norm(x.transpose(1, 3), 2, SCALE, None),
        (2, 4, 4, 6),
    ),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x.cos(), x.sin()), (2, 2, 5, 4)),
    "attention of a scale": (
        lambda x: F.scaled_dot_product_attention(x, x * 2, x.exp(), scale=0.3),
        (2, 2, 5, 4),
    ),
    "causal attention": (
        lambda x: F.scaled_dot_product_attention(x, x.cos(), x.sin(), is_causal=True),
        (2, 2, 5, 4),
    ),
    "masked attention": (
        lambda x: F.scaled_dot_product_attention(x, x.cos(), x.sin(), attn_mask=W[:, :5] > -1),
        (2, 2, 5, 4),
    ),
    "biased attention": (
        lambda x: F.scaled_dot_product_attention(x, x.cos(), x.sin(), W[:, :5]),
        (2, 2, 5, 4),
    ),
    "attention of what is held": (
        lambda x: F.scaled_dot_product_attention(KERNEL[:2, :2], x, x.exp()),
        (2, 2, 5, 3),
    ),
    "attention to what is held": (
        lambda x: F.scaled_dot_product_attention(x, KERNEL[:2, :2], KERNEL[2:, 1:]),
        (2, 2, 5, 3),
    ),
    "sums": (lambda x: (WIDE + x + WIDE).add(1) + torch.add(x, SCALE[:4]), (2, 6, 3, 4)),
    "sums that widen": (lambda x: x + W[:, None], (6,)),
    "a weighed sum": (lambda x: torch.add(x, SCALE, alpha=2), (2, 6)),
    "differences": (lambda x: (SCALE - x) + (x - SHIFT) + (1 - x) + x.sub(SCALE), (2, 6)),
    "products": (lambda x: SCALE * x * SHIFT * 3 + (2 * x).mul(SCALE) + x * x, (2, 6)),
    "products that widen": (lambda x: x * W[:, None], (6,)),
    "quotients": (lambda x: x / SCALE + 1 / (2 + x.square()) + SCALE / x.exp(), (2, 6)),
}


def ours(func, x: Tensor, way: Tensor) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level(), Duals(), sdpa_kernel(SDPBackend.MATH):
        both = forward_ad.unpack_dual(func(forward_ad.make_dual(x, way)))
    assert both.tangent is not None
    return both.primal, both.tangent


def height(func, x: Tensor, way: Tensor) -> Tensor:
    value, tangent = ours(func, x, way)
    return value.square().sum() + tangent.square().sum()


@pytest.mark.parametrize(("func", "shape"), CASES.values(), ids=list(CASES))
def test_a_rule_is_torch_s_own(func, shape) -> None:
    x, way = drawn(*shape).requires_grad_(), drawn(*shape)
    found = ours(func, x, way)
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.func.jvp(func, (x,), (way,))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    other = drawn(*shape)
    (slope,) = torch.autograd.grad(height(func, x, way), x)
    with torch.no_grad():
        near, far = (height(func, x + step * other, way) for step in (1e-6, -1e-6))
    torch.testing.assert_close((slope * other).sum(), (near - far) / 2e-6, rtol=1e-5, atol=1e-5)


def test_weights_that_move_are_left_to_torch() -> None:
    x, way = drawn(2, 6), drawn(5, 6)
    moved = ours(lambda w: F.linear(x, w), W, way)[1]
    torch.testing.assert_close(moved, x @ way.T)


def test_numbers_without_tangent_are_as_outside() -> None:
    x = drawn(2, 6)
    with forward_ad.dual_level(), Duals():
        torch.testing.assert_close(F.linear(x, W), x @ W.T)
        assert forward_ad.unpack_dual(x + x).tangent is None


@pytest.mark.parametrize("teacher", ["digits-dit", "digits-unet"])
def test_a_network_s_layers_never_leave_the_rules(teacher, monkeypatch) -> None:
    """Torch's own are asked for nothing that costs a detour, as a product with a weight does."""
    left: list[str] = []

    class Told(Duals):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            rule = RULES.get(func)
            found = NotImplemented if rule is None else rule(*args, **(kwargs or {}))
            if rule is not None and found is NotImplemented:
                held = [a for a in args if isinstance(a, Tensor)]
                some = [forward_ad.unpack_dual(a).tangent is not None for a in held]
                if any(some) and not all(some):
                    left.append(getattr(func, "__name__", str(func)))
            return func(*args, **(kwargs or {})) if found is NotImplemented else found

    monkeypatch.setattr("stepdistill.diffusion.derivative.Duals", Told)
    den = load_teacher(teacher)
    x = drawn(2, *den.sample_shape).float()
    rate(den, x, torch.tensor([0.3, 0.6]), Cond(torch.tensor([0, 1])), x, drift)
    assert left == []
