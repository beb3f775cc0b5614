"""The commands that measure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepdistill.cli.words import Config, Overrides

bench = typer.Typer(help="Measure: a training step, a derivative, or students of one budget.")


@bench.command("step")
def bench_step(
    config: Config,
    overrides: Overrides = None,
    rounds: Annotated[int, typer.Option(help="interleaved rounds", min=3)] = 20,
    threads: Annotated[int, typer.Option(help="CPU threads; one is the steadiest", min=1)] = 1,
    markdown: Annotated[Path | None, typer.Option(help="file whose table gets a row")] = None,
) -> None:
    """Time a training step, and its memory, against the bare network passes that it needs."""
    from stepdistill.commands.bench import run

    run(config, overrides or (), rounds=rounds, threads=threads, markdown=markdown)


@bench.command("jvp")
def bench_jvp(
    config: Config,
    overrides: Overrides = None,
    rounds: Annotated[int, typer.Option(help="interleaved rounds", min=3)] = 20,
    threads: Annotated[int, typer.Option(help="CPU threads; one is the steadiest", min=1)] = 1,
    step: Annotated[
        float | None,
        typer.Option(
            help="of differences, in flow time; the config's if left out", min=1e-6, max=0.5
        ),
    ] = None,
) -> None:
    """Time a derivative along the flow by each way, its memory, and how far the ways agree."""
    from stepdistill.commands.bench_jvp import jvp

    jvp(config, overrides or (), rounds=rounds, threads=threads, step=step)


@bench.command("students")
def bench_students(
    overrides: Overrides = None,
    config: Annotated[
        list[str] | None, typer.Option(help="only these configs (may be repeated)")
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="only methods of this family, as `methods` lists them")
    ] = None,
    teacher: Annotated[str, typer.Option(help="name of the shipped teacher")] = "digits-dit",
    out: Annotated[Path, typer.Option(help="folder of runs and results")] = Path("out/students"),
    steps: Annotated[str, typer.Option(help="sampler steps of the students, by commas")] = "1",
    seconds: Annotated[float, typer.Option(help="training budget of each run", min=1)] = 300,
    seeds: Annotated[str, typer.Option(help="seeds, by commas")] = "0,1,2",
    num: Annotated[int, typer.Option(help="samples of each evaluation", min=100)] = 2000,
    record: Annotated[
        Path | None, typer.Option(help="plans and figures so far; OUT/record.json if left out")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="put the tables into this file")] = None,
    recorded: Annotated[
        bool, typer.Option("--recorded", help="train nothing: the tables of what is recorded")
    ] = False,
) -> None:
    """Distil a digits teacher by every method on one budget; what is recorded is kept."""
    from stepdistill.commands.students import students

    students(
        out,
        names=config,
        family=family,
        teacher=teacher,
        overrides=overrides or (),
        steps=steps,
        seconds=seconds,
        seeds=seeds,
        num=num,
        record=record,
        markdown=markdown,
        recorded=recorded,
    )


@bench.command("modes")
def bench_modes(
    updates: Annotated[int, typer.Option(help="of each student, over its phases", min=10)] = 400,
    seeds: Annotated[str, typer.Option(help="seeds, by commas")] = "0,1,2",
    shift: Annotated[
        float, typer.Option(help="of the times; below 1 nearer to the images", min=0.05, max=20)
    ] = 1.0,
    workers: Annotated[int, typer.Option(help="trainings at a time", min=1)] = 2,
    markdown: Annotated[Path | None, typer.Option(help="put the table into this file")] = None,
) -> None:
    """Count the modes that four-step students keep of twenty-five, with phases and without."""
    from stepdistill.commands.modes import modes

    modes(seeds=seeds, updates=updates, shift=shift, workers=workers, markdown=markdown)
