"""Counter-based randomness: statistics, independence, and the same rows however a batch is cut."""

from __future__ import annotations

import math
import time

import pytest
import torch

from stepdistill.run.rng import Rng, _mix_tensor, _signed, mix

RNG = Rng(seed=3, step=5, turn=1)
MANY = 200_000


def everyone(count: int = MANY) -> torch.Tensor:
    return torch.arange(count)


def test_splitmix64_reference_values() -> None:
    """The published generator's first outputs from state 0."""
    weyl = 0x9E3779B97F4A7C15
    outputs = [mix(weyl * k) for k in (1, 2, 3, 4, 5)]
    assert outputs == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
        0xF88BB8A8724C81EC,
        0x1B39896A51A8749B,
    ]


def test_tensor_finaliser_is_the_integer_one() -> None:
    values = [0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15]
    got = _mix_tensor(torch.tensor([_signed(v) for v in values]))
    assert got.tolist() == [_signed(mix(v)) for v in values]


def test_words_are_splitmix_from_the_sample_s_place() -> None:
    """bits() equals the scalar definition, so no device or batch shape can change it."""
    weyl, key = 0x9E3779B97F4A7C15, RNG.key("z")
    got = RNG.bits("z", torch.tensor([0, 7]), 3)
    for row, index in enumerate((0, 7)):
        start = mix(index * weyl + key)
        assert got[row].tolist() == [_signed(mix(start + k * weyl)) for k in (1, 2, 3)]


def test_first_numbers_never_change() -> None:
    """A change here breaks resuming and the reproduction of every published run."""
    normal = Rng(0).normal("z", torch.arange(2), (3,))
    expected = [[-0.51165682, -0.35592291, 0.40872583], [-2.45818925, 2.07658863, -0.36558926]]
    torch.testing.assert_close(normal, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    uniform = Rng(0).uniform("t", torch.arange(2))
    torch.testing.assert_close(uniform, torch.tensor([0.68923444, 0.84296781]))
    labels = Rng(0).integers("label", torch.arange(8), 10)
    assert labels.tolist() == [4, 9, 2, 4, 6, 0, 9, 0]


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 5), (1, 8, 8)])
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_the_cut_of_a_batch_does_not_matter(shape, parts) -> None:
    index = torch.arange(16)
    whole = RNG.normal("z", index, shape)
    pieces = [RNG.normal("z", part, shape) for part in index.chunk(parts)]
    assert torch.equal(torch.cat(pieces), whole)
    shuffled = torch.tensor([9, 2, 15, 0])
    assert torch.equal(RNG.normal("z", shuffled, shape), whole[shuffled])
    assert torch.equal(RNG.uniform("t", shuffled), RNG.uniform("t", index)[shuffled])
    assert torch.equal(RNG.integers("l", shuffled, 7), RNG.integers("l", index, 7)[shuffled])


def test_asking_twice_gives_the_same_and_changes_nothing() -> None:
    index = torch.arange(4)
    before = index.clone()
    assert torch.equal(RNG.normal("z", index, (6,)), RNG.normal("z", index, (6,)))
    assert torch.equal(index, before)


def test_torch_s_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    RNG.normal("z", torch.arange(4), (6,))
    assert torch.equal(torch.get_rng_state(), state)


def moments(x: torch.Tensor) -> None:
    """Mean, variance, skewness and kurtosis of a standard normal, within 4 standard errors."""
    n = x.numel()
    x = x.double()
    for power, value, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert float((x**power).mean()) == pytest.approx(value, abs=4 * (variance / n) ** 0.5)


def test_normal_statistics() -> None:
    x = RNG.normal("z", everyone(20_000), (10,))
    moments(x)
    moments(x[:, 0])  # over samples
    moments(RNG.normal("z", torch.tensor([0]), (200_000,)))  # within one
    assert x.dtype == torch.float32
    assert float(x.abs().max()) < 6.8  # 32 bits of radius


def test_normal_distribution_function() -> None:
    x = RNG.normal("z", everyone(), (1,)).flatten().double().sort().values
    places = (torch.arange(MANY, dtype=torch.float64) + 0.5) / MANY
    gap = (torch.special.ndtr(x) - places).abs().max()
    assert float(gap) < 1.95 / MANY**0.5  # Kolmogorov's test at 0.1 %


def test_uniform_statistics() -> None:
    u = RNG.uniform("t", everyone())
    assert 0 < float(u.min()) < 1e-4
    assert 1 - 1e-4 < float(u.max()) < 1
    counts = torch.histc(u.double(), bins=100, min=0, max=1)
    chi2 = float(((counts - MANY / 100) ** 2 / (MANY / 100)).sum())
    assert chi2 == pytest.approx(99, abs=4 * math.sqrt(2 * 99))


def test_uniforms_never_reach_the_ends() -> None:
    """The largest and smallest words give numbers that a normal quantile takes."""
    words = torch.tensor([0, -1])
    u = ((words >> 41) & 0x7FFFFF).float().add_(0.5).mul_(2.0**-23)
    assert torch.special.ndtri(u).isfinite().all()


@pytest.mark.parametrize("high", [2, 7, 10, 1000])
def test_integer_statistics(high) -> None:
    drawn = RNG.integers("label", everyone(), high)
    counts = torch.bincount(drawn, minlength=high).double()
    assert len(counts) == high
    chi2 = float(((counts - MANY / high) ** 2 / (MANY / high)).sum())
    assert chi2 == pytest.approx(high - 1, abs=4 * math.sqrt(2 * (high - 1)))


def test_shared_integers_cover_their_range() -> None:
    drawn = [Rng(0).at(step).integer("exit", 4) for step in range(4000)]
    counts = torch.bincount(torch.tensor(drawn), minlength=4).double()
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 3 + 4 * math.sqrt(6)


OTHERS = {
    "seed": lambda index: Rng(4, 5, 1).normal("z", index, (1,)),
    "step": lambda index: Rng(3, 6, 1).normal("z", index, (1,)),
    "turn": lambda index: Rng(3, 5, 2).normal("z", index, (1,)),
    "stream": lambda index: RNG.normal("e", index, (1,)),
    "neighbour": lambda index: RNG.normal("z", index + 1, (1,)),
    "place": lambda index: RNG.normal("z", index, (2,))[:, 1:],
    "sine": lambda index: RNG.normal("z", index, (4,))[:, 2:3],
    "swapped": lambda index: Rng(5, 3, 1).normal("z", index, (1,)),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_what_differs_is_independent(other) -> None:
    """No shared numbers, no correlation of values or of squares."""
    index = everyone(50_000)
    a = RNG.normal("z", index, (1,)).flatten()
    b = other(index).flatten()
    assert float((a == b).double().mean()) < 1e-4
    for left, right in ((a, b), (a**2, b**2)):
        stack = torch.stack([left, right]).double()
        assert abs(float(torch.corrcoef(stack)[0, 1])) < 4 / len(index) ** 0.5


def test_streams_of_the_methods_are_distinct() -> None:
    names = [
        *("z", "e", "t", "label", "exit", "drop", "guidance", "critic-e"),
        *(f"fresh-{i}" for i in range(8)),
    ]
    ways = [(n, s, k, p) for n in names for s in range(10) for k in range(30) for p in range(5)]
    assert len({Rng(s, k, p).key(n) for n, s, k, p in ways}) == len(ways)


def test_cost_is_recorded(record_property) -> None:
    """Microseconds for a batch of 128 digits, beside torch's generator; for the record only."""
    index, generator = torch.arange(128), torch.Generator().manual_seed(0)

    def microseconds(draw) -> float:
        draw()
        times = []
        for _ in range(20):
            begin = time.perf_counter()
            draw()
            times.append(time.perf_counter() - begin)
        return 1e6 * sorted(times)[len(times) // 2]

    ours = microseconds(lambda: RNG.normal("z", index, (1, 8, 8)))
    theirs = microseconds(lambda: torch.randn(128, 1, 8, 8, generator=generator))
    record_property("rng_normal_us", round(ours, 1))
    record_property("torch_randn_us", round(theirs, 1))
    print(f"normal: {ours:.0f} us, torch.randn: {theirs:.0f} us")
