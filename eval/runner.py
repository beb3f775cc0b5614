"""One row of figures for each set of samples, all against one reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from stepdistill.data.images import DataConfig, ImageSet, open_data
from stepdistill.eval.clip import ClipScorer, class_captions
from stepdistill.eval.diversity import mean_pairwise_distance
from stepdistill.eval.features import FeatureExtractor, extract
from stepdistill.eval.fid import CleanFid, Moments
from stepdistill.eval.frechet import Stats, frechet_distance
from stepdistill.eval.images import save_images
from stepdistill.eval.kid import kid
from stepdistill.eval.paired import feature_distance, psnr
from stepdistill.eval.prdc import precision_recall
from stepdistill.run.errors import UserError

PAIRED = ("psnr", "feature_distance")  # of samples that stand for a real picture each
METRICS = ("fd", "kid", "pr", "diversity", "fid", "clip", "straightness", *PAIRED)
_RECORDED = ("stepdistill", "torch", "diffusers", "clean-fid", "open_clip_torch")


class Row(BaseModel):
    """Figures of one model at one number of steps; what was not asked for is None.

    ``fd``, ``kid``, ``precision`` and ``recall`` are in the feature space ``features``;
    ``diversity`` is the mean pairwise pixel distance of the samples; ``fid`` is clean-fid's;
    ``straightness`` is of the flow's paths, whatever the steps of the samples. ``psnr``, in
    decibels, and ``feature_distance``, in that feature space, are means over pictures that are made
    large, against the real ones.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    method: str
    steps: int | None
    reference: str
    features: str
    feature_sha: str
    num: int
    seed: int | None
    fd: float | None = None
    kid: float | None = None
    kid_se: float | None = None
    precision: float | None = None
    recall: float | None = None
    diversity: float | None = None
    fid: float | None = None
    fid_mode: str | None = None
    clip: float | None = None
    clip_model: str | None = None
    straightness: float | None = None
    psnr: float | None = None
    feature_distance: float | None = None
    train_seconds: float | None = None
    versions: dict[str, str] = {}


class Reference:
    """A set of real images with all that is computed from it, each once and kept in memory.

    Args:
        data: the images, or a folder of them.
        extractor: the feature space.
        fid: how FID is computed, if it is asked for.
        batch_size: images a pass.
    """

    def __init__(
        self,
        data: ImageSet | Path,
        extractor: FeatureExtractor,
        *,
        fid: CleanFid | None = None,
        batch_size: int = 256,
    ) -> None:
        self.data = open_data(DataConfig(source=str(data))) if isinstance(data, Path) else data
        self.extractor, self.fid, self._batch_size = extractor, fid, batch_size

    @cached_property
    def features(self) -> Tensor:
        """Features [M, D] of all images."""
        return torch.cat([extract(self.extractor, images) for images in self._batches()])

    @cached_property
    def stats(self) -> Stats:
        """Their mean and covariance."""
        return Stats.of(self.features)

    @cached_property
    def moments(self) -> Moments:
        """Inception's moments by clean-fid, of the images as they are compared: at this size."""
        with TemporaryDirectory() as folder:
            for place, images in enumerate(self._batches()):
                save_images(images, Path(folder) / str(place))
            return self.clean_fid().moments(Path(folder))

    def clean_fid(self) -> CleanFid:
        """The tool for FID.

        Raises:
            UserError: it was not given.
        """
        if self.fid is None:
            raise UserError("fid was asked for, but the reference was opened without it")
        return self.fid

    def _batches(self) -> Iterator[Tensor]:
        for start in range(0, len(self.data), self._batch_size):
            stop = min(start + self._batch_size, len(self.data))
            yield self.data.load(range(start, stop))[0]


def evaluate(
    samples: Mapping[int | None, Tensor],
    reference: Reference,
    *,
    model: str,
    method: str,
    seed: int | None = None,
    metrics: Sequence[str] = ("fd", "kid", "diversity"),
    clip: ClipScorer | None = None,
    captions: Sequence[str] | None = None,
    real: Tensor | None = None,
) -> list[Row]:
    """Figures for each set of samples, in order of steps.

    Args:
        samples: images [N, C, H, W] in [-1, 1] by number of steps (None: unknown).
        reference: what they are compared with.
        model: name of the model.
        method: how it was made.
        seed: that the samples were drawn with, for the record.
        metrics: of fd, kid, pr, diversity, fid, clip; straightness is not of samples, and left.
        clip: the scorer, if clip is asked for.
        captions: one a sample; else by class, where a sample's class is its index modulo theirs.
        real: the picture that each sample stands for.

    Raises:
        UserError: an unknown metric, or one for which there is no scorer, tool or real picture;
            samples of another shape than the reference, or too few.
    """
    for name in set(metrics) - set(METRICS):
        raise UserError(f"unknown metric {name}; known: {', '.join(METRICS)}")
    rows = []
    for steps, images in sorted(samples.items(), key=lambda item: item[0] or 0):
        if tuple(images.shape[1:]) != reference.data.shape:
            raise UserError(
                f"samples of {model} are {_shape(images.shape[1:])}, but the reference "
                f"{reference.data.name} is {_shape(reference.data.shape)}"
            )
        row = Row(
            model=model,
            method=method,
            steps=steps,
            reference=reference.data.name,
            features=reference.extractor.name,
            feature_sha=reference.extractor.sha,
            num=len(images),
            seed=seed,
            versions=_versions(),
        )
        _feature_figures(row, images, reference, metrics)
        if "diversity" in metrics:
            row.diversity = mean_pairwise_distance(images)
        if "fid" in metrics:
            row.fid, row.fid_mode = _fid(images, reference)
        if "clip" in metrics:
            row.clip, row.clip_model = _clip(images, reference, clip, captions)
        _paired_figures(row, images, reference, metrics, real)
        rows.append(row)
    return rows


def _paired_figures(
    row: Row, images: Tensor, reference: Reference, metrics: Sequence[str], real: Tensor | None
) -> None:
    """Fill in what compares each sample with the picture that it stands for."""
    for name in set(PAIRED) & set(metrics):
        if real is None:
            raise UserError(
                f"{name}: these samples stand for no real picture each; give a pipeline that makes "
                "small pictures large"
            )
    if "psnr" in metrics and real is not None:
        row.psnr = float(psnr(images, real).mean())
    if "feature_distance" in metrics and real is not None:
        row.feature_distance = float(feature_distance(reference.extractor, images, real).mean())


def _feature_figures(
    row: Row, images: Tensor, reference: Reference, metrics: Sequence[str]
) -> None:
    """Fill in what is computed from features."""
    if not {"fd", "kid", "pr"} & set(metrics):
        return
    features = extract(reference.extractor, images)
    if "fd" in metrics:
        row.fd = frechet_distance(Stats.of(features), reference.stats)
    if "kid" in metrics:
        found = kid(features, reference.features)
        row.kid, row.kid_se = found.mean, found.se
    if "pr" in metrics:
        pair = precision_recall(features, reference.features)
        row.precision, row.recall = pair.precision, pair.recall


def _fid(images: Tensor, reference: Reference) -> tuple[float, str]:
    tool = reference.clean_fid()
    if tool.name != "fid":
        raise UserError("fid was asked for, but the network that was given is not Inception")
    with TemporaryDirectory() as folder:
        save_images(images, Path(folder))
        return tool.distance(Path(folder), reference.moments), tool.mode


def _clip(
    images: Tensor, reference: Reference, clip: ClipScorer | None, captions: Sequence[str] | None
) -> tuple[float, str]:
    if clip is None:
        raise UserError("clip was asked for, but no scorer was given")
    texts = captions or class_captions(reference.data.classes, len(images))
    return float(clip.scores(images, texts).mean()), clip.name


def _versions() -> dict[str, str]:
    found = {}
    for name in _RECORDED:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
