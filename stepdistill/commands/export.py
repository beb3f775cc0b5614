"""export: a finished run as a diffusers folder that is proven to load and to draw the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.adapters import scalars
from stepdistill.adapters.cond import Cond
from stepdistill.commands.equip import teacher_of
from stepdistill.commands.export_text import export_text, kept_from, only_network, usage, walked
from stepdistill.commands.read import read_config
from stepdistill.data.degrade import raised
from stepdistill.diffusion.denoiser import Denoiser, Experts, Routed
from stepdistill.diffusion.saved import absent, pipeline_folder, stock_config
from stepdistill.diffusion.timesteps import Grid
from stepdistill.pipelines.card import model_card
from stepdistill.pipelines.folder import refuse_taken, write_pipeline
from stepdistill.pipelines.literal_grid import LiteralGridScheduler
from stepdistill.pipelines.stock import stock_scheduler
from stepdistill.pipelines.verify import noise_from_seeds, verify_folder
from stepdistill.run.assets import teacher_path
from stepdistill.run.errors import UserError
from stepdistill.run.log import read_rows
from stepdistill.run.player import difference
from stepdistill.trainers.base import Trainer
from stepdistill.trainers.trajectory.scales import ScalesConfig

SEEDS = tuple(range(8))
UNIT = 1e-6  # by how much the deviation of what a stock pipeline begins with may differ from 1


def export(
    run: str | Path,
    out: str | Path,
    *,
    steps: int | None = None,
    overwrite: bool = False,
    figures: Sequence[Mapping[str, Any]] = (),
    tolerance: float = 1e-5,
    merge: str | Path | None = None,
    share: float = 0.5,
    stock: bool = False,
) -> float:
    """Write a run's student as a pipeline folder, reload it in a clean interpreter and compare.

    Args:
        run: a finished run's folder.
        out: the folder to write.
        steps: steps when none are asked for; if None four, or the most that the student has.
        overwrite: replace a pipeline folder that is there.
        figures: measured rows for the model card; those of the run's own log if left out.
        tolerance: largest difference allowed to the training sampler's images in [0, 1].
        merge: another finished run of the same teacher, whose student is merged with this one's.
        share: of this run's weights in the merged ones.
        stock: with one of diffusers' own schedulers, where one takes the student's steps.

    Returns:
        The largest difference seen.

    Raises:
        UserError: an unfinished run, ``out`` is taken, ``merge`` or ``stock`` does not fit.
        VerificationError: the folder would draw other images than the training sampler; it is not
            written, and what was there before is left.
    """
    run, out = Path(run), Path(out)
    refuse_taken(out, overwrite)
    trainer, command = finished(run), f"stepdistill export {run} --out {out}"
    if merge is not None:
        blend(trainer, Path(merge), share)
        command += f" --merge {merge} --share {share:g}"
    elif not figures:
        figures = logged_figures(run)
    literal = scheduler_of(trainer, default_steps(trainer, steps))
    scheduler, walk = stock_of(trainer, literal) if stock else (literal, {})
    card = student_card(trainer, literal, run, out, figures, command, scheduler, walk)
    keys: dict[str, Any] = {"card": card, "overwrite": overwrite, "tolerance": tolerance}
    if trainer.teacher.prompts is not None:
        return export_text(trainer, scheduler, told_of(trainer, walk), out, **keys)
    return write(trainer, scheduler, walk, out, default=literal.config.default_steps, **keys)


def write(
    trainer: Trainer,
    scheduler: Any,
    walk: Mapping[str, Any],
    out: Path,
    *,
    default: int,
    card: str,
    overwrite: bool,
    tolerance: float,
) -> float:
    """Write our own pipeline's folder, and return the largest difference seen; see above."""
    seen = list[float]()
    write_pipeline(
        out,
        [expert.plain() for expert in members(trainer.best())],
        scheduler,
        classes=trainer.teacher.classes or None,
        null_label=trainer.teacher.null_label,
        default_steps=default,
        default_guidance=members(trainer.best())[0].scale,
        card=card,
        dtype=None,
        overwrite=overwrite,
        check=lambda folder: seen.append(proven(trainer, folder, out, tolerance)),
        extra=scalars.held(members(trainer.best())[0].net),
        settings={**settings_of(trainer), **walk},
    )
    return seen[0]


def scheduler_of(trainer: Trainer, default: int) -> LiteralGridScheduler:
    """The student's grids, of which the one of ``default`` steps is taken where none is named."""
    den = trainer.best()
    return LiteralGridScheduler(
        grids={str(n): literal_rows(den, grid) for n, grid in trainer.grids().items()},
        noise=trainer.noise,
        default_steps=default,
        clip=trainer.config.clip,
        stock=stock_config(den.process, members(den)[0].head) if trainer.flows else None,
    )


def stock_of(trainer: Trainer, literal: LiteralGridScheduler) -> tuple[Any, dict[str, Any]]:
    """A stock scheduler for the student, and the pipeline's settings by which it walks the grids.

    Raises:
        UserError: diffusers has none.
    """
    den, *others = members(trainer.best())
    if den.prompts is not None and abs(literal.init_noise_sigma - 1) > UNIT:
        raise UserError(
            "--stock: stock pipelines of prompts begin with noise of deviation 1, and this student "
            f"with {literal.init_noise_sigma:.4g}; export without it, and the folder carries the "
            "scheduler that walks its grid"
        )
    try:
        if others:
            raise ValueError("none takes one network of several")
        if den.ends:
            raise ValueError("none tells the network where its steps end")
        scheduler, walks = stock_scheduler(
            den.process, den.head, trainer.noise, trainer.grids(), trainer.config.clip
        )
        return scheduler, {"walks": walks, "start": literal.init_noise_sigma}
    except ValueError as error:
        raise UserError(
            f"--stock: of diffusers' schedulers {error}; export without it, and the folder carries "
            "the scheduler that walks its grid"
        ) from error


def proven(trainer: Trainer, folder: Path, out: Path, tolerance: float) -> float:
    """The largest difference of :func:`check`; what it refuses is not written to ``out``."""
    with kept_from(out):
        return check(trainer, folder, tolerance)


def student_card(
    trainer: Trainer,
    literal: LiteralGridScheduler,
    run: Path,
    out: Path,
    figures: Sequence[Mapping[str, Any]],
    command: str,
    scheduler: Any,
    walk: Mapping[str, Any],
) -> str:
    """The model card of a student that ``command`` exports with a scheduler and its walks."""
    config, stock = trainer.config, scheduler is not literal
    steps, use = literal.config.default_steps, None
    if trainer.teacher.prompts is not None:
        den, told = only_network(trainer), told_of(trainer, walk)
        lacks = absent(pipeline_folder(teacher_path(config.teacher)))
        use = usage(str(out), den, steps, told.get(steps, {}), own=not stock, lacks=lacks)
    return model_card(
        title=f"{config.method} student of {config.teacher}",
        folder=str(out),
        teacher=config.teacher,
        method=config.method,
        data=config.data.source if trainer.needs == "data" else "none (the teacher alone)",
        command=f"stepdistill train {run / 'config.yaml'} run=NEW\n"
        f"{command}{' --stock' if stock else ''}",
        default_steps=steps,
        classes=None if use else trainer.teacher.classes or None,
        grids=literal.config.grids,
        noise=trainer.noise,
        stock=type(scheduler).__name__ if stock else None,
        figures=figures,
        degrade=config.upscaling.get("degrade"),
        usage=use,
    )


def told_of(trainer: Trainer, walk: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """What calls of a stock pipeline are told for each number of steps: its scheduler's levels."""
    kind = "sigmas" if trainer.process.name == "rf" else "timesteps"
    return {int(n): {kind: list(levels)} for n, levels in walk.get("walks", {}).items()}


def logged_figures(run: Path) -> list[dict[str, Any]]:
    """The last figures that a run wrote while it trained."""
    rows = [row for row in read_rows(run) if "eval" in row]
    if not rows:
        return []
    return [{"after training steps": rows[-1]["step"], **rows[-1]["eval"]}]


def finished(run: Path) -> Trainer:
    """The trainer of a finished run, with the run's averaged weights.

    Raises:
        UserError: the folder holds no finished run.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run}: no config.yaml, so this is no run; give the folder of `run=`")
    if not (run / "student").is_dir():
        raise UserError(f"{run}: the run is not finished; `stepdistill train ... resume=auto`")
    cls, config = read_config(str(file))
    if not config.teacher:
        raise UserError(f"{run}: a teacher's run; its pipeline is {run / 'pipeline'} already")
    config = config.model_copy(
        update={"lora": None, "gradient_checkpointing": False, "student": None}
    )
    trainer = cls(config, teacher_of(config.model_copy(update={"run": run})))
    trainer.prepare(config.steps)
    for name, player in trainer.players.items():
        if name.startswith("student"):
            loaded = scalars.saved(run / name, player.best.net)
            other = difference(loaded, player.best.net.state_dict())
            if other is not None:
                raise UserError(
                    f"{run / name} is another network than teacher={config.teacher} is now: "
                    f"{other}; set the teacher back to what it was"
                )
            player.best.net.load_state_dict(loaded)
    return trainer


def blend(trainer: Trainer, other: Path, share: float) -> None:
    """Merge a finished run's student with another's: share of its weights, the rest of theirs.

    Whatever trained them, whole networks or adapters: their averaged weights, whole, are merged, as
    SwiftBrush v2 does (Dao et al. 2024).

    Raises:
        UserError: the other run is not finished, or its student is no sibling of this one.
    """
    if not 0 <= share <= 1:
        raise UserError(f"--share {share:g}: must lie between 0 and 1")
    theirs = finished(other)
    for what, here, there in (
        ("the teacher", trainer.config.teacher, theirs.config.teacher),
        ("the number of networks", len(trainer.students()), len(theirs.students())),
        ("each network's classes", routes(trainer), routes(theirs)),
        ("the sampler's grids", trainer.grids(), theirs.grids()),
        ("the sampler's noise", trainer.noise, theirs.noise),
        ("clip", trainer.config.clip, theirs.config.clip),
        ("the guidance_range that is told", told_scales(trainer), told_scales(theirs)),
    ):
        if here != there:
            raise UserError(
                f"--merge {other}: {what} must be the same in both runs, and is {there} there and "
                f"{here} here"
            )
    for mine, yours in zip(trainer.students(), theirs.students(), strict=True):
        own, others = mine.best.net.state_dict(), yours.best.net.state_dict()
        apart = difference(others, own)
        if apart is not None:
            raise UserError(f"--merge {other}: weights must be of the same shapes in both: {apart}")
        mixed = {
            name: torch.lerp(value, others[name], 1 - share) if value.is_floating_point() else value
            for name, value in own.items()
        }
        mine.best.net.load_state_dict(mixed)


def routes(trainer: Trainer) -> dict[str, int] | None:
    """The place of each label's network where the student has them shared by classes."""
    den = trainer.best()
    if not isinstance(den, Routed):
        return None
    return {str(label): place for label, place in enumerate(den.routes)}


def settings_of(trainer: Trainer) -> dict[str, Any]:
    """The pipeline's settings that follow from how the student was trained."""
    own = {"routes": routes(trainer), "guidance_range": told_scales(trainer)}
    return own | trainer.config.upscaling


def told_scales(trainer: Trainer) -> tuple[float, float] | None:
    """The range of guidance scales that a student was told while it learnt, if it was."""
    config = trainer.config
    return config.guidance_range if isinstance(config, ScalesConfig) and config.tells else None


def default_steps(trainer: Trainer, asked: int | None) -> int:
    """Those asked for, else four where the student has them, else the most that it has.

    Raises:
        UserError: the student has no grid of so many steps.
    """
    sizes = sorted(trainer.grids())
    default = (4 if 4 in sizes else sizes[-1]) if asked is None else asked
    if default not in sizes:
        known = ", ".join(map(str, sizes))
        raise UserError(f"steps={default}: this student samples in {known} steps")
    return default


def members(den: Denoiser | Experts) -> list[Denoiser]:
    """The networks of a student, in the order of the grid's expert numbers."""
    if not isinstance(den, (Experts, Routed)):
        return [den]
    return [expert for expert in den.experts if isinstance(expert, Denoiser)]


def literal_rows(den: Denoiser | Experts, grid: Grid) -> list[dict[str, float | int]]:
    """Each step of a grid as plain numbers: what the network is fed and what it means.

    Raises:
        UserError: outputs that mean different things by channel.
    """
    rows: list[dict[str, float | int]] = []
    for level, end in zip(grid, grid[1:], strict=False):
        expert = den.at(level)
        process = expert.process
        t = torch.tensor([level])
        c = process.coefs(t)
        a, b, _ = expert.head.weights(c, process.sigma_data)
        if a.numel() > 1:
            raise UserError(
                "groups: a pipeline of pictures reads all outputs in one way; export students of "
                "one group"
            )
        rows.append(
            {
                "time": float(process.network_time(t)),
                "scale": float(process.scale_input(torch.ones_like(t), t)),
                "alpha": float(c.alpha),
                "sigma": float(c.sigma),
                "a": float(a),
                "b": float(b),
                "expert": den.index_at(level) if isinstance(den, Experts) else 0,
            }
        )
        if expert.ends:
            rows[-1]["end"] = float(expert.length(t, torch.tensor([end])))
    return rows


@torch.no_grad()
def check(trainer: Trainer, out: Path, tolerance: float) -> float:
    """Hold the folder's images against the training sampler's, on every grid."""
    den, classes = trainer.best(), len(trainer.teacher.classes)
    labels = [i % classes for i in range(len(SEEDS))] if classes else None
    low, cond = None, Cond(torch.tensor(labels) if labels else None)
    if den_beside := members(den)[0].beside:
        low = small_pictures(trainer, den_beside)
        size = (trainer.teacher.sample_shape[1], trainer.teacher.sample_shape[2])
        cond = replace(cond, image=raised(low * 2 - 1, size))
    expected: dict[int, Tensor] = {}
    for n, grid in trainer.grids().items():
        draws = noise_from_seeds(SEEDS, trainer.teacher.sample_shape, n)
        expected[n] = walked(trainer, grid, cond, draws)
    return verify_folder(out, expected, labels, SEEDS, tolerance, low)


def small_pictures(trainer: Trainer, channels: int) -> Tensor:
    """Small pictures [B, C, h, w] in [0, 1] to try an export on."""
    degrade = trainer.config.data.degrade
    assert degrade is not None
    height, width = (side // degrade.factor for side in trainer.teacher.sample_shape[1:])
    (noise,) = noise_from_seeds(SEEDS, (channels, height, width), 1)
    return (noise / 4 + 0.5).clamp(0, 1)
