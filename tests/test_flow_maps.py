"""Networks that are told where a step ends, and the methods that train them."""

from __future__ import annotations

import copy
import inspect
import math

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from stepdistill.adapters import extra, scalars
from stepdistill.adapters.cond import Cond
from stepdistill.adapters.recompute import recompute
from stepdistill.commands.export import literal_rows
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.derivative import along, drift, slope
from stepdistill.diffusion.process import EDM, RF, VP, Process, Trig, expand
from stepdistill.diffusion.sampler import full, move, sample
from stepdistill.diffusion.timesteps import uniform_grid
from stepdistill.losses.flow_map import (
    eulerian_gap,
    lagrangian_gap,
    mixed_velocity,
    power_weighted,
    two_steps,
)
from stepdistill.oracles.denoiser import Oracle
from stepdistill.pipelines.card import model_card
from stepdistill.pipelines.folder import write_pipeline
from stepdistill.pipelines.literal_grid import LiteralGridScheduler
from stepdistill.pipelines.verify import noise_from_seeds, verify_folder
from stepdistill.proof.student import StudentAdapter
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from stepdistill.trainers.trajectory.jumps import Draw
from stepdistill.trainers.trajectory.time_weight import TimeWeight
from tests.helpers import (
    batch_of,
    dit_teacher,
    make,
    mlp_teacher,
    noise,
    run,
    scaled_linear,
    unet_teacher,
)
from tests.test_layers import TRAVELLERS_MAY_IMPORT, imports

TEACHERS = [mlp_teacher, dit_teacher, unet_teacher]
every_teacher = pytest.mark.parametrize("teacher", TEACHERS)
LABELS = Cond(torch.tensor([0, 1, 2, 0, 1, 3]))
T = torch.linspace(0.1, 1, 6)
R = T * torch.tensor([0.0, 0.9, 0.3, 0.5, 1.0, 0.2])


def stirred(den: Denoiser) -> Denoiser:
    """A student that heeds where its step ends."""
    draw = torch.Generator().manual_seed(3)
    for param in scalars.held(den.net).parameters():
        param.data += 0.2 * torch.randn(param.shape, generator=draw)
    return den


def states(den: Denoiser) -> Tensor:
    return noise(0, (6, *den.sample_shape))


# The closed form -------------------------------------------------------------------------------


def rho(t: Tensor, s: float, process: Process) -> Tensor:
    c = process.coefs(t)
    return torch.sqrt((c.alpha * s) ** 2 + c.sigma**2)


def exact(t: Tensor, r: Tensor, s: float) -> Tensor:
    """u*(x, t, r) / x of N(0, s^2) in rectified flow, its limit where r = t."""
    near = (t - r).abs() < 1e-6
    far = torch.where(near, t - 0.5, r)
    here = ((1 - t) * -(s**2) + t) / rho(t, s, RF()) ** 2
    return torch.where(near, here, (1 - rho(far, s, RF()) / rho(t, s, RF())) / (t - far))


def exact_u(y: Tensor, t: Tensor, r: Tensor, s: float) -> Tensor:
    return exact(t, r, s)[:, None] * y


@pytest.mark.parametrize(
    ("s", "t", "r", "value"),
    [(0.5, 1.0, 0.0, 0.5), (0.5, 0.8, 0.3, 0.85646), (0.5, 0.5, 0.5, 1.2)]
    + [(1.0, 1.0, 0.0, 0.0), (1.0, 0.8, 0.3, 0.15290), (1.0, 0.5, 0.5, 0.0)],
)
def test_the_flows_own_average_velocity(s, t, r, value) -> None:
    """By (1 - rho_r / rho_t) / (t - r), and by a fine walk of the exact denoiser."""
    pair = torch.tensor([[t], [r]], dtype=torch.float64)
    assert float(exact(*pair, s)) == pytest.approx(value, abs=1e-5)
    if t > r:
        oracle = Oracle(RF(), "velocity", torch.zeros(1, 1, dtype=torch.float64), s)
        x, times = (
            torch.ones(1, 1, dtype=torch.float64),
            torch.linspace(t, r, 201, dtype=torch.float64),
        )
        for now, then in zip(times, times[1:], strict=False):
            half = x - (now - then) / 2 * oracle.exact(x, now[None]).drift
            x = x - (now - then) * oracle.exact(half, (now + then)[None] / 2).drift
        assert float((1 - x.detach()) / (t - r)) == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("s", [0.5, 1.0, 1.7])
def test_the_three_conditions_hold_at_the_flow(s) -> None:
    t, r = (torch.rand(2, 64, generator=torch.Generator().manual_seed(0)).double().sort(0)[0]).flip(
        0
    )
    y, one = noise(1, (64, 3)).double(), torch.ones(64, dtype=torch.float64)
    u, way = exact_u(y, t, r, s), (t - r)[:, None]
    landed = y - way * u
    _, u_r = torch.func.jvp(lambda r: exact_u(y, t, r, s), (r,), (one,))
    assert lagrangian_gap(u, u_r, exact_u(landed, r, r, s), way).abs().max() < 1e-6
    v = exact_u(y, t, t, s)
    _, u_s = torch.func.jvp(lambda y, t: exact_u(y, t, r, s), (y, t), (v, one))
    assert eulerian_gap(u, u_s, v, way).abs().max() < 1e-6
    for share in (0.5, 0.2):
        m = r + share * (t - r)
        first = exact_u(y, t, m, s)
        second = exact_u(y - (t - m)[:, None] * first, m, r, s)
        assert (u - two_steps(first, second, torch.tensor(share))).abs().max() < 1e-6
    wrong = u + 0.1
    assert lagrangian_gap(wrong, u_r, exact_u(y - way * wrong, r, r, s), way).abs().max() > 0.01


class ExactNet(nn.Module):
    """The flow map of N(0, s^2) in any process, for a student's place; a shift makes it wrong."""

    def __init__(self, s: float, process: Process) -> None:
        super().__init__()
        self.s, self.process, self.shape = s, process, (2,)
        self.shift, self.values = nn.Parameter(torch.zeros(())), None

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        way = self.values["end"]
        c, s = self.process.coefs(t), self.process.flow_time(t)
        return exact_u(x / expand(c.alpha + c.sigma, x), s, s - way, self.s) + self.shift


class ExactAdapter(StudentAdapter):
    def extend(self, net, numbers) -> None:
        pass

    def numbers(self, net) -> tuple[str, ...]:
        return ("end",)


class Exact(Denoiser):
    """An exact student; its raw output is u."""

    def raw(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        with self.told(t, cond):
            u = self.adapter(self.called(), x_t, t, cond)
        c = self.process.coefs(t).expand(x_t)
        x = (x_t - c.sigma * u) / (c.alpha + c.sigma)
        return self.head.output(x, x + u, c, self.process.sigma_data)


def exact_student(s: float, process: Process) -> Exact:
    return Exact(ExactNet(s, process), process, "velocity", adapter=ExactAdapter())


def made_exact(method: str, process: Process, **keys):
    from stepdistill.trainers.find import trainer

    oracle = Oracle(process, "velocity", torch.zeros(1, 2), 0.6)
    config = {"method": method, "run": "unused", "teacher": "unused", "steps": 6}
    cls = trainer(method)
    uniform = {"kind": "uniform", "low": 0.02, "high": 0.98}
    config = cls.Config(**{**config, "batch_size": 64, "t": uniform, **keys})
    return cls(config, oracle, initial=exact_student(0.6, process))


PROCESSES = {"rf": RF(), "vp": VP(scaled_linear()), "edm": EDM(), "trig": Trig()}


@pytest.mark.parametrize("process", list(PROCESSES))
@pytest.mark.parametrize(
    ("method", "keys"),
    [("flow_map", {"form": form}) for form in ("lsd", "esd", "psd_m", "psd_u")]
    + [("flow_map", {"form": form, "gradient": "semi"}) for form in ("lsd", "esd")]
    + [("mean_flow", {"power": 0.0})],
    ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())),
)
def test_the_flow_has_no_loss_and_another_map_has(method, keys, process) -> None:
    made = made_exact(method, PROCESSES[process], diagonal=0.25, **keys)
    batch = batch_of(made, 0)
    assert float(made.loss(batch, Rng(0).at(0)).value) < 2e-5
    made.student.net.shift.data += 0.3
    assert float(made.loss(batch, Rng(0).at(0)).value) > 0.02


def test_by_differences_the_flow_has_next_to_no_loss() -> None:
    found = []
    for step in (0.02, 0.01):
        keys = {"power": 0.0, "derivative": "difference", "difference_step": step}
        made = made_exact("mean_flow", RF(), diagonal=0.25, **keys)
        found.append(float(made.loss(batch_of(made, 0), Rng(0).at(0)).value))
    assert found[1] < 1e-3
    assert found[0] / found[1] == pytest.approx(4, rel=0.3)  # of first order, and squared


@torch.no_grad()
@pytest.mark.parametrize("process", list(PROCESSES))
def test_any_number_of_steps_leads_to_the_same_images_and_keeps_the_law(process) -> None:
    student, z = exact_student(0.6, PROCESSES[process]), noise(5, (4096, 2))
    ends = [
        sample(student, z, uniform_grid(student.process, n), Cond(None)) for n in (1, 2, 3, 4, 8)
    ]
    for x in ends[1:]:
        torch.testing.assert_close(x, ends[0], rtol=0, atol=2e-3)
    assert ends[-1].std() == pytest.approx(0.6, abs=0.02)
    t, r = full(z, 0.7 * student.process.t_max), full(z, 0.2 * student.process.t_max)
    x_t = expand(rho(t, 0.6, student.process), z) * z
    landed = move(student(x_t, t, Cond(None, r)), student.process, r)
    assert landed.std(dim=0).mean() == pytest.approx(
        float(rho(r, 0.6, student.process)[0]), rel=0.03
    )


# Being told ------------------------------------------------------------------------------------


@every_teacher
def test_a_student_that_is_told_begins_as_its_teacher_to_the_bit(teacher) -> None:
    den = teacher()
    student, x = den.extended("end"), states(den)
    assert student.ends and not den.ends
    with torch.no_grad():
        for told in (LABELS, LABELS.ending(R)):
            assert torch.equal(student(x, T, told).h, den(x, T, LABELS).h)
        stirred(student)
        assert not torch.equal(student(x, T, LABELS.ending(R)).h, den(x, T, LABELS).h)
    own = dict(student.net.named_parameters())
    assert any(name.startswith(scalars.NAME) for name in own)
    assert len(student.own()) == len(own)


@every_teacher
def test_copies_are_told_by_themselves_and_the_plain_network_is_its_class_s(teacher) -> None:
    den = teacher()
    student, x, told = stirred(den.extended("end")), states(den), LABELS.ending(R)
    twin = student.twin("average")
    with torch.no_grad():
        first = student(x, T, told).h
        assert torch.equal(twin(x, T, told).h, first)
        for param in scalars.held(twin.net).parameters():
            param += 1
        assert torch.equal(student(x, T, told).h, first)
        assert not torch.equal(twin(x, T, told).h, first)
        twin.adopt(student)
        assert torch.equal(twin(x, T, told).h, first)
    plain = student.plain()
    assert type(plain) is type(den.net)
    den.net.load_state_dict(plain.state_dict(), strict=True)
    assert not any(module._forward_hooks for module in plain.modules())
    again = den.extended("end")
    again.load(student.weights())
    with torch.no_grad():
        assert torch.equal(again(x, T, told).h, first)


@every_teacher
def test_derivatives_agree_with_differences(teacher) -> None:
    """Along the flow, in the end alone, and with a graph to every weight."""
    student = stirred(teacher().extended("end"))
    x, told = states(student) * 0.5, LABELS.ending(R.clamp_min(0.05) * 0.9)
    speed, t = noise(2, tuple(x.shape)) * 0.1, T * 0.9

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a - b).norm() / b.norm())

    u, u_r = slope(student, x, t, told, drift, d_end=torch.ones(6))
    assert u_r.requires_grad and apart(u, student(x, t, told).drift) < 1e-5
    step = 2e-3
    with torch.no_grad():
        up, down = (student(x, t, LABELS.ending(told.end + h)).drift for h in (step, -step))
    assert apart(u_r.detach(), (up - down) / (2 * step)) < 1e-2
    _, whole = along(student, x, t, told, speed, drift)
    step = 1e-5 if teacher is not mlp_teacher else 1e-4
    with torch.no_grad():
        up, down = (student(x + h * speed, t + h, told).drift for h in (step, -step))
    assert apart(whole, (up - down) / (2 * step)) < 5e-2
    grads = torch.autograd.grad(u_r.square().sum(), student.own(), allow_unused=True)
    named = dict(zip(dict(student.net.named_parameters()), grads, strict=True))
    assert all(g is not None for k, g in named.items() if scalars.NAME in k and ".2.bias" not in k)


@pytest.mark.parametrize("teacher", [dit_teacher, unet_teacher])
def test_recomputed_blocks_are_told_what_they_were(teacher) -> None:
    student = stirred(teacher().extended("end"))
    x, params = states(student), student.own()

    def grads() -> list[Tensor | None]:
        loss = student(x, T, LABELS.ending(R)).h.square().sum()
        student(x, T, LABELS.ending(R / 3))  # another call before the backward pass
        return torch.autograd.grad(loss, params, allow_unused=True)

    plain = grads()
    recompute(student.net)
    for one, two in zip(plain, grads(), strict=True):
        assert (one is None) == (two is None)
        assert one is None or torch.equal(one, two)


@every_teacher
def test_a_compiled_network_is_told_too(teacher) -> None:
    student = stirred(teacher().extended("end"))
    x, wrapper = states(student), torch.compile(student.net, backend="eager")
    for end in (R, R / 2):
        with torch.no_grad():
            expected = student(x, T, LABELS.ending(end)).h
            student.route(wrapper)
            torch.testing.assert_close(student(x, T, LABELS.ending(end)).h, expected)
            student.route(None)


def test_a_network_whose_time_embedding_is_not_known_is_refused() -> None:
    oracle = Oracle(RF(), "velocity", torch.zeros(1, 2), 1.0)
    with pytest.raises(ValueError, match="not known where MixtureNet embeds its time"):
        oracle.extended("end")
    with pytest.raises(UserError, match="teacher: .*MixtureNet"):
        make("flow_map", oracle)


# Folders ---------------------------------------------------------------------------------------


def test_the_file_that_travels_stands_alone() -> None:
    found = imports(inspect.getsource(extra), {})
    assert {name.split(".")[0] for name in found} <= TRAVELLERS_MAY_IMPORT


@pytest.mark.parametrize("teacher", [dit_teacher, unet_teacher])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_written_folder_tells_its_network_where_steps_end(teacher, dtype, tmp_path) -> None:
    student = stirred(teacher().extended("end"))
    if dtype is not None:
        for param in student.net.parameters():
            param.data = param.data.to(dtype).float()
    walks = {n: uniform_grid(RF(), n) for n in (1, 2, 4)}
    grids = {str(n): literal_rows(student, walk) for n, walk in walks.items()}
    assert [row["end"] for row in grids["4"]] == pytest.approx([0.25] * 4)
    out = write_pipeline(
        tmp_path / "out",
        [student.plain()],
        LiteralGridScheduler(grids, default_steps=2),
        classes=student.classes,
        null_label=student.null_label,
        default_steps=2,
        card=model_card(
            title="",
            folder="",
            teacher="",
            method="",
            data="",
            command="",
            default_steps=2,
            grids=grids,
        ),
        dtype=dtype,
        extra=scalars.held(student.net),
    )
    assert (out / "extra" / "extra.py").is_file()
    card = (out / "README.md").read_text()
    assert "told" in card and "| 1 | model | 1000 | 1 | 0 | 1 | -1 | 1 | 0.25 |" in card
    assert list(out.glob("extra/*.safetensors"))
    seeds, labels = [1, 2, 3], [0, 1, 2]
    z, cond = noise_from_seeds(seeds, student.sample_shape, 1)[0], Cond(torch.tensor(labels))
    with torch.no_grad():
        expected = {n: sample(student, z, walk, cond) for n, walk in walks.items()}
        deaf = sample(teacher(), z, walks[2], cond)
    assert not torch.allclose(deaf, expected[2], atol=1e-3)
    assert verify_folder(out, expected, labels, seeds) < 1e-5
    if teacher is dit_teacher:
        net = DiTTransformer2DModel.from_pretrained(out / "model")
        assert net.state_dict().keys() == teacher().net.state_dict().keys()


# The methods -----------------------------------------------------------------------------------


def test_times_are_a_triangle_and_its_diagonal() -> None:
    made = make("flow_map", mlp_teacher(), batch_size=4096, diagonal=0.4)
    draw = made.draw_steps(batch_of(made, 0), Rng(0).at(0))
    same = draw.same.flatten()
    assert float(same.float().mean()) == pytest.approx(0.4, abs=0.03)
    assert bool((draw.t[same] == draw.r[same]).all()) and bool((draw.r <= draw.t).all())
    off = ~same
    assert float(draw.t[off].mean()) == pytest.approx(2 / 3, abs=0.02)
    assert float(draw.r[off].mean()) == pytest.approx(1 / 3, abs=0.02)
    assert float(draw.t[same].mean()) == pytest.approx(1 / 2, abs=0.02)


@pytest.mark.parametrize("form", ["lsd", "esd"])
def test_gradients_pass_through_derivatives_only_where_they_should(form) -> None:
    """The published forms' losses are the cheap forms', their gradients are not."""
    found = {}
    for gradient in ("through", "semi"):
        made = make("flow_map", mlp_teacher(), form=form, gradient=gradient, diagonal=0.0)
        stirred(made.student)
        with made.players["student"].turn():
            loss = made.loss(batch_of(made, 0), Rng(0).at(0)).value
            loss.backward()
        found[gradient] = (float(loss), made.players["student"].params[0].grad.clone())
    assert found["through"][0] == pytest.approx(found["semi"][0], rel=1e-4)
    assert not torch.allclose(found["through"][1], found["semi"][1], rtol=1e-2)


def test_without_length_the_data_s_own_velocity_is_learnt() -> None:
    """Of diagonal 1 every form and mean flow is flow matching: the loss by hand."""
    for method, keys in (
        *(("flow_map", {"form": form}) for form in ("lsd", "esd", "psd_m")),
        ("mean_flow", {"power": 0.0, "t": {"kind": "uniform"}}),
    ):
        made = make(method, mlp_teacher(), velocity="data", diagonal=1.0, **keys)
        batch, rng = batch_of(made, 0), Rng(0).at(0)
        t, z = rng.uniform("t", batch.index), made.z(batch, rng)
        x_t = made.process.noise(batch.x, z, t)
        h = made.teacher(x_t, t, batch.cond).h
        expected = float((h - (z - batch.x)).square().sum(dim=1).mean())
        assert float(made.loss(batch, rng).value) == pytest.approx(expected, rel=1e-4)


def test_power_weights_and_the_mixture_of_fields_by_hand() -> None:
    loss = torch.tensor([4.0, 0.5], requires_grad=True)
    weighted = power_weighted(loss, 1.0, 0.5)
    torch.testing.assert_close(weighted, torch.tensor([4 / 4.5, 0.5]))
    weighted.sum().backward()
    torch.testing.assert_close(loss.grad, torch.tensor([1 / 4.5, 1.0]))
    v, free = torch.tensor([2.0]), torch.tensor([0.5])
    own = torch.zeros(1)
    for _ in range(400):  # the student's field comes to be its target
        own = mixed_velocity(v, free, own, omega=0.2, kappa=0.92)
    torch.testing.assert_close(own, free + 0.2 / (1 - 0.92) * (v - free))


def test_mean_flow_guides_itself_where_it_should() -> None:
    made = make("mean_flow", mlp_teacher(), velocity="data", guidance=2.5, label_drop=0.5)
    batch = batch_of(made, 0)
    kept = made.dropped(batch, Rng(0).at(0)).cond.label
    assert set(kept.tolist()) <= {0, 1, 2, 3} and 3 in kept.tolist()
    x_t, t = noise(0, (4, 4)), torch.tensor([0.2, 0.8, 0.2, 0.74])
    cond = Cond(torch.tensor([0, 1, 3, 2]))
    straight = noise(1, (4, 4))
    draw = Draw(x_t, t, t, torch.ones(4, 1, dtype=torch.bool), straight, torch.zeros(4, 1), cond)
    v = made.field(draw)
    assert torch.equal(v[1:3], straight[1:3])  # too noisy, and without a label
    own, free = (made.teacher(x_t, t, Cond(label)).h for label in (cond.label, torch.full((4,), 3)))
    expected = 0.2 * straight + (1 - 0.2 - 0.92) * free + 0.92 * own
    torch.testing.assert_close(v[[0, 3]], expected[[0, 3]])


@pytest.mark.parametrize(
    ("method", "keys", "told"),
    [
        ("flow_map", {"velocity": "data", "diagonal": 0.0}, "diagonal: .* set diagonal=0.75"),
        ("flow_map", {"form": "psd_m", "diagonal": 0.0}, "diagonal: .* set diagonal=0.75"),
        ("flow_map", {"velocity": "data", "guidance": 2.0}, "guidance: velocity=data .*mean_flow"),
        ("flow_map", {"compile": True}, "compile: .* gradient=semi"),
        ("flow_map", {"gradient_checkpointing": True}, "gradient_checkpointing: .* gradient=semi"),
        ("flow_map", {"lora": {"rank": 2}}, "lora: .* lora=null"),
        ("flow_map", {"scratch": True}, "scratch: .* scratch=false"),
        ("mean_flow", {"guided_times": (0.9, 0.1)}, "guided_times: .*first"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(method, keys, told) -> None:
    with pytest.raises(UserError, match=told):
        make(method, mlp_teacher(), **keys)


def test_a_student_from_scratch_is_told_too() -> None:
    made = make("mean_flow", mlp_teacher(), velocity="data", scratch=True, seed=1)
    assert made.student.ends
    own, teacher = (dict(net.named_parameters()) for net in (made.student.net, made.teacher.net))
    assert not torch.equal(own["enter.weight"], teacher["enter.weight"])
    assert copy.deepcopy(made.student).ends


def test_a_learned_weight_comes_to_the_inverse_of_each_time_s_loss() -> None:
    """Of losses that grow a hundredfold along one of the two times, in closed form -log loss."""
    weigh = TimeWeight(times=2)
    optim = torch.optim.Adam(weigh.parameters(), lr=0.02)
    one, two = torch.rand(2, 512, generator=torch.Generator().manual_seed(0)) * math.pi / 2
    each = (1 + torch.cos(2 * one)) + 0.02
    for _ in range(1500):
        optim.zero_grad()
        weigh.weighed(each, one, two).mean().backward()
        optim.step()
    with torch.no_grad():
        error, found = weigh(one, two) + each.log(), weigh.weighed(each, one, two).mean()
    assert float(error.abs().mean()) < 0.15
    assert float(found) == pytest.approx(float((1 + each.log()).mean()), abs=0.03)


def test_flow_map_weighs_its_pairs_of_times() -> None:
    """At first by 1 a coordinate; then the weight learns beside the student, and is not kept."""
    made = make("flow_map", mlp_teacher(), form="psd_m", adaptive=True, steps=40)
    plain = make("flow_map", mlp_teacher(), form="psd_m")
    batch = batch_of(made, 0)
    own, other = (one.loss(batch, Rng(0).at(0)) for one in (made, plain))
    torch.testing.assert_close(4 * own.value, other.value)
    torch.testing.assert_close(own.logs["gap"], other.value)
    run(made, 0, 8)
    assert made.weigh is not None and bool(made.weigh.line.weight.any())
    with pytest.raises(UserError, match="adaptive=false or compile=false"):
        make("flow_map", mlp_teacher(), form="psd_m", adaptive=True, compile=True)
