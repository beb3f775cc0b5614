"""Forward-mode rules of what networks are made of, for calls with dual numbers.

torch's own rules give what has no tangent, such as a network's weights, a tangent of zeros, and
reckon with its shape in Python, which costs more than the arithmetic of small layers and, on a GPU,
keeps it waiting. The rules here leave such tangents out; what they do not know is torch's business.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import make_dual, unpack_dual
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Rule = Callable[..., Any]


class Duals(TorchFunctionMode):
    """A context in which torch's functions take dual numbers by the rules here.

    It is entered within :func:`torch.autograd.forward_ad.dual_level`. Results may have a graph, of
    value and tangent.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """A call of ``func``, by its rule where it has one that fits."""
        rule = RULES.get(func)
        found = NotImplemented if rule is None else rule(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if found is NotImplemented else found


def _parts(x: Any) -> tuple[Any, Tensor | None]:
    """The value and the tangent, if it has one."""
    if not isinstance(x, Tensor):
        return x, None
    both = unpack_dual(x)
    return both.primal, both.tangent


def _moves(*fixed: Any) -> bool:
    """Whether any of these has a tangent."""
    return any(_parts(x)[1] is not None for x in fixed)


def _mapped(func: Callable[..., Tensor]) -> Rule:
    """The rule of a map that is linear in its first argument but for a bias, its third."""

    def rule(x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **keys: Any) -> Any:
        value, tangent = _parts(x)
        if tangent is None or _moves(weight, bias):
            return NotImplemented
        moved = func(tangent, weight, None, *args, **keys)
        return make_dual(func(value, weight, bias, *args, **keys), moved)

    return rule


def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    return _normed(x, (*x.shape[: -len(normalized_shape)], -1), weight, bias, eps)


def _group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    wide = (-1, *(1,) * (x.dim() - 2))
    scale, shift = (None if part is None else part.view(wide) for part in (weight, bias))
    return _normed(x, (len(x), num_groups, -1), scale, shift, eps)


def _normed(
    x: Tensor, rows: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Any:
    """The rule of a norm to mean 0 and deviation 1 along each row of x, seen in that shape."""
    value, tangent = _parts(x)
    if tangent is None or _moves(weight, bias):
        return NotImplemented
    seen, moved = value.reshape(rows), tangent.reshape(rows)
    centred = seen - seen.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = centred * scale
    along = (y * moved).mean(-1, keepdim=True)
    moved = scale * (moved - moved.mean(-1, keepdim=True) - y * along)
    y, moved = y.view(value.shape), moved.view(value.shape)
    if weight is not None:
        y, moved = y * weight, moved * weight
    return make_dual(y if bias is None else y + bias, moved)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **keys: Any,
) -> Any:
    (q, q_t), (k, k_t), (v, v_t) = map(_parts, (query, key, value))
    if not _moves(query, key, value) or _moves(attn_mask) or dropout_p or any(keys.values()):
        return NotImplemented
    by = q.shape[-1] ** -0.5 if scale is None else scale
    q = q * by
    scores = q @ k.mT
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    shares, moved = torch.softmax(scores, dim=-1), torch.zeros_like(q[..., :1])
    if q_t is not None:
        moved = moved + (q_t * by) @ k.mT
    if k_t is not None:
        moved = moved + q @ k_t.mT
    moved = shares * moved
    out = (moved - shares * moved.sum(-1, keepdim=True)) @ v
    return make_dual(shares @ v, out if v_t is None else out + shares @ v_t)


def _sum(func: Rule, sign: int) -> Rule:
    """The rule of x + y or, with -1 for the sign of y, x - y, where one alone has a tangent."""

    def rule(x: Any, y: Any, **keys: Any) -> Any:
        (one, one_t), (other, other_t) = _parts(x), _parts(y)
        if keys or (one_t is None) == (other_t is None):
            return NotImplemented
        made = func(one, other)
        tangent: Any = one_t if other_t is None else sign * other_t
        return make_dual(made, tangent.expand(made.shape).to(made))

    return rule


def _product(x: Any, y: Any) -> Any:
    (one, one_t), (other, other_t) = _parts(x), _parts(y)
    if (one_t is None) == (other_t is None):
        return NotImplemented
    return make_dual(one * other, one * other_t if one_t is None else one_t * other)


def _quotient(x: Any, y: Any, **keys: Any) -> Any:
    (one, one_t), (other, other_t) = _parts(x), _parts(y)
    if keys or one_t is None or other_t is not None:
        return NotImplemented
    return make_dual(one / other, one_t / other)


_PLUS, _MINUS = _sum(operator.add, 1), _sum(operator.sub, -1)
RULES: dict[Callable[..., Any], Rule] = {
    functional.linear: _mapped(functional.linear),
    functional.conv1d: _mapped(functional.conv1d),
    functional.conv2d: _mapped(functional.conv2d),
    functional.conv3d: _mapped(functional.conv3d),
    functional.layer_norm: _layer_norm,
    functional.group_norm: _group_norm,
    functional.scaled_dot_product_attention: _attention,
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _PLUS),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _product),
    **dict.fromkeys((torch.sub, Tensor.sub, Tensor.__sub__), _MINUS),
    Tensor.__rsub__: lambda x, y: _MINUS(y, x),
    **dict.fromkeys((torch.div, Tensor.div, Tensor.__truediv__), _quotient),
}
"""Rules by torch's functions; one gives NotImplemented where it does not fit."""
