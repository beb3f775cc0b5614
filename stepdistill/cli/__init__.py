"""The command line: thin wrappers that import what they need when they run."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from stepdistill import __version__
from stepdistill.cli.bench import bench
from stepdistill.cli.data import data
from stepdistill.cli.words import Config, Overrides
from stepdistill.run.errors import UserError
from stepdistill.run.guard import guarded

app = typer.Typer(
    name="stepdistill",
    help="Distil many-step diffusion and flow models into few-step ones.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(bench, name="bench")
app.add_typer(data, name="data")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for pipelines, results and report")] = Path(
        "out/demo"
    ),
    num: Annotated[int, typer.Option(help="samples of each evaluation", min=100)] = 2000,
    method: Annotated[
        list[str] | None, typer.Option(help="only these methods (may be repeated)")
    ] = None,
) -> None:
    """Distil the shipped digits teacher by every method, export, evaluate, write a report."""
    from stepdistill.commands.demo import demo as run

    run(out, num=num, methods=method)


@app.command()
def teacher(config: Config, overrides: Overrides = None) -> None:
    """Train a many-step teacher from scratch; it is saved as RUN/pipeline."""
    from stepdistill.commands.teacher import teacher as run

    _show(run(config, overrides or ()))


@app.command()
def pairs(
    config: Annotated[str, typer.Argument(help="a config; for --verify and --merge also a store")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value, or stores")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="read a store; say what is bad")] = False,
    merge: Annotated[str | None, typer.Option(help="copy the stores named into this one")] = None,
    part: Annotated[str | None, typer.Option(help="K/N: every N-th file, to merge later")] = None,
) -> None:
    """Make the pairs that a config trains on, with whoever else is at it; or check, or merge."""
    from stepdistill.commands.pair_stores import command

    _show(command(config, overrides or (), verify=verify, merge=merge, part=part))


@app.command()
def train(config: Config, overrides: Overrides = None) -> None:
    """Distil a teacher as a config says; also by `accelerate launch -m stepdistill train ...`."""
    from stepdistill.commands.train import train as run

    _show(run(config, overrides or ()))


@app.command()
def prove(
    method: Annotated[
        list[str] | None, typer.Option(help="a method to prove (may be repeated)")
    ] = None,
    all_methods: Annotated[bool, typer.Option("--all", help="prove every method")] = False,
    setting: Annotated[
        list[str] | None, typer.Option(help="only these of a method's settings (may be repeated)")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="gaussian, gmm1d, gmm2d, classes or a mixture's YAML file; each setting's own if "
            "left out"
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="seconds of all training, about; its full length if left out", min=1),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="write the rows to this file")] = None,
    out: Annotated[Path, typer.Option(help="folder of report.html")] = Path("out/proof"),
    markdown: Annotated[
        Path | None, typer.Option(help="write the tables to this file, as Markdown")
    ] = None,
    bands: Annotated[
        Path | None, typer.Option(help="write the healthy bands that the runs teach to this file")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="trainings at a time; one a core if left out", min=1)
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="replace files that are there")] = False,
) -> None:
    """Train methods on teachers in closed form and hold them to what theory says they reach."""
    if bool(method) == all_methods:
        raise UserError("prove: name methods by --method, or all of them by --all")
    from stepdistill.commands.prove import prove as run

    run(
        method or (),
        settings=setting or (),
        teacher=teacher,
        budget=budget,
        json_file=json,
        out=out,
        markdown=markdown,
        bands_file=bands,
        workers=workers,
        overwrite=overwrite,
    )


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="folder of a finished run")],
    out: Annotated[Path, typer.Option(help="folder of the pipeline")],
    steps: Annotated[int | None, typer.Option(help="steps when a user asks for none")] = None,
    overwrite: Annotated[bool, typer.Option(help="replace a pipeline that is there")] = False,
    merge: Annotated[
        Path | None, typer.Option(help="another finished run, whose student is merged with it")
    ] = None,
    share: Annotated[float, typer.Option(help="of the run's own weights when merged")] = 0.5,
    stock: Annotated[
        bool, typer.Option("--stock", help="with a scheduler of diffusers' own, where one fits")
    ] = False,
) -> None:
    """Write a run's student as a diffusers pipeline and prove that it draws the same."""
    from stepdistill.commands.export import export as write

    difference = write(
        run, out, steps=steps, overwrite=overwrite, merge=merge, share=share, stock=stock
    )
    print(f"{out}: loads in plain diffusers; largest difference {difference:.2g}")


@app.command()
def sample(
    pipeline: Annotated[str, typer.Argument(help="a pipeline folder or hub name")],
    out: Annotated[Path, typer.Option(help="folder for the images")],
    steps: Annotated[
        int | None, typer.Option(help="sampling steps; the pipeline's own if left out, or 4", min=1)
    ] = None,
    num: Annotated[
        int | None, typer.Option(help="of images; 16, or as many as small", min=1)
    ] = None,
    images: Annotated[Path | None, typer.Option(help="folder of small pictures to enlarge")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="what to draw, in turn (may be repeated)")
    ] = None,
    seed: Annotated[int, typer.Option(help="seed; image i depends on it and on i alone")] = 0,
    guidance: Annotated[float | None, typer.Option(help="classifier-free guidance")] = None,
    batch_size: Annotated[int, typer.Option(help="images a call", min=1)] = 250,
    overwrite: Annotated[bool, typer.Option(help="replace images that are there")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option(help="run the pipeline file that travels in the folder")
    ] = False,
) -> None:
    """Draw images from any diffusers pipeline, with a grid of them."""
    from stepdistill.commands.sample import sample as run

    options = {} if guidance is None else {"guidance_scale": guidance}
    run(
        pipeline,
        out,
        steps=steps,
        num=num,
        images=images,
        prompts=prompt or (),
        seed=seed,
        batch_size=batch_size,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        options=options,
    )


@app.command()
def eval(  # noqa: A001
    target: Annotated[str, typer.Argument(help="a pipeline folder, hub name or image folder")],
    reference: Annotated[
        str, typer.Option(help="digits, fashion-mnist, fashion-mnist-test, or a folder of images")
    ] = "digits",
    steps: Annotated[str, typer.Option(help="numbers of steps, as 1,2,4")] = "1,2,4",
    num: Annotated[int, typer.Option(help="samples of each evaluation", min=2)] = 2000,
    metrics: Annotated[
        str,
        typer.Option(
            help="of fd, kid, pr, diversity, fid, clip, straightness, psnr, feature_distance"
        ),
    ] = "fd,kid,diversity",
    features: Annotated[
        str | None, typer.Option(help="feature space: digits, fashion-mnist, pixels or inception")
    ] = None,
    clip_model: Annotated[
        str, typer.Option(help="open_clip model/weights, or local-dir:FOLDER")
    ] = "ViT-B-32/laion2b_s34b_b79k",
    seed: Annotated[int, typer.Option(help="seed of the samples")] = 0,
    guidance: Annotated[
        float | None, typer.Option(help="classifier-free guidance; the pipeline's own if left out")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="teacher for the rows beside; the card's own if left out")
    ] = None,
    teacher_steps: Annotated[int, typer.Option(help="the teacher's many steps", min=1)] = 32,
    batch_size: Annotated[int, typer.Option(help="images a call", min=1)] = 250,
    json: Annotated[Path | None, typer.Option(help="write the rows to this file")] = None,
    overwrite: Annotated[bool, typer.Option(help="replace the json file")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option(help="run the pipeline file that travels in the folder")
    ] = False,
) -> None:
    """Figures of a pipeline or image folder, the teacher's row beside each."""
    from stepdistill.commands.evaluate import evaluate_command

    evaluate_command(
        target,
        reference=reference,
        steps=steps,
        num=num,
        metrics=metrics,
        features=features,
        clip_model=clip_model,
        seed=seed,
        guidance=guidance,
        teacher=teacher,
        teacher_steps=teacher_steps,
        batch_size=batch_size,
        json_file=json,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )


@app.command()
def methods() -> None:
    """List the methods."""
    from stepdistill.commands.methods import methods as run

    run()


@app.command()
def schema(method: Annotated[str, typer.Argument(help="a method")]) -> None:
    """Print the JSON schema of a method's config, by which editors complete it."""
    from stepdistill.commands.methods import schema as run

    print(run(method))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="folder of a run, finished or not")],
    out: Annotated[Path | None, typer.Option(help="the page; RUN/report.html if left out")] = None,
    overwrite: Annotated[bool, typer.Option(help="replace a page that is there")] = False,
) -> None:
    """Write a run's page: its facts, samples, curves, and ratios against their healthy bands."""
    from stepdistill.commands.run_report import report as write

    print(write(run, out, overwrite=overwrite))


@app.command()
def doctor() -> None:
    """Say what this machine has and what will not work on it."""
    from stepdistill.commands.doctor import doctor as run

    raise typer.Exit(run())


def _show(path: Path | str) -> None:
    """Print a result once, however many processes made it."""
    if os.environ.get("RANK", "0") == "0":
        print(path)


def _version(asked: bool) -> None:
    if asked:
        print(f"stepdistill {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print and leave")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> int:
    """Run the command line; 0 done, 1 a check fell short, 2 bad input, 130 and 143 on signals."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # what went wrong is told in one line
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    return guarded(lambda: app(standalone_mode=False))
