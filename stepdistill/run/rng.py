"""Counter-based random numbers: every draw is a function of (seed, step, stream, sample index).

No generator state exists, so one process and many draw the same noise for the same global batch
and a resumed run needs nothing restored. Numbers come from SplitMix64 (Steele, Lea, Flood 2014)
used with random access: the counter of a sample starts at a hashed 64-bit place. The arithmetic
is plain wrapping int64, the same on every device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from zlib import crc32

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_WEYL, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(value: int) -> int:
    """SplitMix64's finaliser on a Python integer, modulo 2^64."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * _MIX1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX2) & _MASK
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _mix_tensor(v: Tensor) -> Tensor:
    """The same finaliser on int64 tensors, in place; masks make the shifts logical."""
    for shift, factor in ((30, _MIX1), (27, _MIX2)):
        v ^= (v >> shift) & ((1 << (64 - shift)) - 1)
        v *= _signed(factor)
    v ^= (v >> 31) & ((1 << 33) - 1)
    return v


@dataclass(frozen=True)
class Rng:
    """A source of random numbers for one seed, one step and one turn within it.

    Args:
        seed: the run's seed.
        step: training step, or any counter.
        turn: place within the step, so that two turns never share noise.
    """

    seed: int
    step: int = 0
    turn: int = 0

    def at(self, step: int, turn: int = 0) -> Rng:
        """The same seed at another step and turn."""
        return replace(self, step=step, turn=turn)

    def key(self, stream: str) -> int:
        """The 64-bit key of a named stream."""
        key = 0
        for part in (self.seed, self.step, self.turn, crc32(stream.encode())):
            key = mix((key + _WEYL) ^ mix(part))  # not symmetric in key and part
        return key

    def bits(self, stream: str, index: Tensor, count: int) -> Tensor:
        """Random 64-bit words [B, count] (int64) of the samples ``index`` [B]."""
        start = _mix_tensor(index.long() * _signed(_WEYL) + _signed(self.key(stream)))
        place = torch.arange(1, count + 1, device=index.device) * _signed(_WEYL)
        return _mix_tensor(start[:, None] + place)

    def uniform(self, stream: str, index: Tensor) -> Tensor:
        """Uniform numbers in the open interval (0, 1), fp32 [B]."""
        word = self.bits(stream, index, 1)[:, 0]
        return ((word >> 41) & 0x7FFFFF).float().add_(0.5).mul_(2.0**-23)

    def normal(self, stream: str, index: Tensor, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers, fp32 [B, *shape], by Box and Muller's transform."""
        count = math.prod(shape)
        word = self.bits(stream, index, (count + 1) // 2)
        radius = ((word >> 32) & 0xFFFFFFFF).float().add_(0.5).mul_(2.0**-32)
        radius.log_().mul_(-2).clamp_min_(0).sqrt_()
        angle = (word & 0xFFFFFFFF).float().mul_(2 * math.pi * 2.0**-32)
        both = torch.cat([radius * angle.cos(), radius * angle.sin_()], dim=1)
        return both[:, :count].reshape(len(index), *shape)

    def integer(self, stream: str, high: int) -> int:
        """One integer in [0, high), the same for every process: a shared choice."""
        return (self.key(stream) >> 11) % high

    def integers(self, stream: str, index: Tensor, high: int) -> Tensor:
        """Integers in [0, high), int64 [B]."""
        word = self.bits(stream, index, 1)[:, 0]
        return ((word >> 31) & 0xFFFFFFFF) % high


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Weights made in this context are those of a seed; other randomness goes on as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
