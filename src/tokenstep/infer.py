"""Segment many picture files: read ahead of the model, write behind it, one report at the end."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import perf_counter

import numpy as np
from PIL import Image

from tokenstep.config import DENSE, Settings
from tokenstep.draw import overlay, palette_image, token_map
from tokenstep.errors import TokenstepError
from tokenstep.pictures import read_picture, write_whole
from tokenstep.result import Result
from tokenstep.segmenter import StepSegmenter

Report = dict[str, object]


@dataclass(frozen=True, slots=True)
class _Read:
    """A picture that was read, or why not."""

    path: Path
    image: Image.Image | None
    error: str | None
    milliseconds: float


@dataclass(frozen=True)
class SegmentJob:
    """What to do with each picture.

    ``max_side`` scales larger pictures down before the model (their label map is scaled back to
    the picture's size); ``compare`` also runs the dense model and reports its time and how many
    pixels agree.
    """

    out: Path
    settings: Settings
    batch: int = 1
    max_side: int | None = None
    compare: bool = False


def segment_files(model: StepSegmenter, paths: Sequence[Path], job: SegmentJob) -> Iterator[Report]:
    """Segment files and write ``NAME.labels.png``, ``NAME.overlay.jpg`` and ``NAME.tokens.jpg``.

    Yields one entry per picture in the order of ``paths``; a picture that cannot be read or
    written has an ``error`` and the others go on.
    """
    names = output_names(paths)
    with ThreadPoolExecutor(2) as readers, ThreadPoolExecutor(2) as writers:
        waiting: list[tuple[Report, Future[float] | None]] = []
        reads = _ahead(readers, paths, 2 * job.batch)
        for group in _batched(reads, job.batch):
            waiting += _segment_group(model, group, job, names=names, writers=writers)
            # One batch is written while the next one is segmented.
            while len(waiting) > job.batch:
                yield _finished(*waiting.pop(0))
        while waiting:
            yield _finished(*waiting.pop(0))


def output_names(paths: Sequence[Path]) -> dict[Path, str]:
    """A distinct output name for each picture: its stem, or more of its path where stems clash."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in paths:
        name, parts = path.stem, list(path.parent.parts)
        if name in taken:
            name = path.name.replace(".", "_")
        while name in taken and parts:
            name = f"{parts.pop().strip('/')}_{name}"
        if name in taken:
            raise TokenstepError(f"{path}: is given twice; name each picture once")
        taken.add(name)
        names[path] = name
    return names


def _ahead(pool: ThreadPoolExecutor, paths: Sequence[Path], count: int) -> Iterator[_Read]:
    """Read pictures in order, up to ``count`` ahead of the one that is asked for."""
    rest = iter(paths)
    futures = [pool.submit(_read, path) for path in islice(rest, count)]
    while futures:
        yield futures.pop(0).result()
        futures += [pool.submit(_read, path) for path in islice(rest, 1)]


def _batched(reads: Iterator[_Read], size: int) -> Iterator[list[_Read]]:
    """Groups of ``size``, the last one maybe smaller."""
    while group := list(islice(reads, size)):
        yield group


def _read(path: Path) -> _Read:
    start = perf_counter()
    try:
        image = read_picture(path)
    except TokenstepError as error:
        return _Read(path, None, str(error), 0.0)
    return _Read(path, image, None, (perf_counter() - start) * 1000)


def _segment_group(
    model: StepSegmenter,
    group: Sequence[_Read],
    job: SegmentJob,
    *,
    names: dict[Path, str],
    writers: ThreadPoolExecutor,
) -> list[tuple[Report, Future[float] | None]]:
    """Segment the readable pictures of a group as one batch and start writing them."""
    good = [(read, read.image) for read in group if read.image is not None]
    entries: dict[Path, tuple[Report, Future[float] | None]] = {
        read.path: ({"file": str(read.path), "error": read.error}, None)
        for read in group
        if read.image is None
    }
    images = [_fit(image, job.max_side) for _, image in good]
    results = model.segment_batch(images, settings=job.settings) if images else []
    dense = model.segment_batch(images, settings=DENSE) if images and job.compare else None
    for index, ((read, image), result) in enumerate(zip(good, results, strict=True)):
        report = {"file": str(read.path), **_report(result, image, read.milliseconds)}
        if dense is not None:
            agreement = float((dense[index].labels == result.labels).mean())
            report["dense"] = {
                "milliseconds": {
                    stage: round(time, 2) for stage, time in dense[index].milliseconds.items()
                },
                "same_pixels": round(agreement, 5),
            }
        future = writers.submit(_write, result, image, job.out, names[read.path])
        entries[read.path] = (report, future)
    return [entries[read.path] for read in group]


def _report(result: Result, image: Image.Image, read_milliseconds: float) -> Report:
    report = result.report()
    times = report["milliseconds"]
    assert isinstance(times, dict)
    report["milliseconds"] = {"read": round(read_milliseconds, 2), **times}
    if (report["width"], report["height"]) != image.size:
        report["scaled_to"] = [report["width"], report["height"]]
        report["width"], report["height"] = image.size
    return report


def _finished(report: Report, future: Future[float] | None) -> Report:
    """Wait until a picture is written; a failure becomes the entry's error."""
    if future is None:
        return report
    try:
        written = future.result()
    except TokenstepError as error:
        return {"file": report["file"], "error": str(error)}
    times = report["milliseconds"]
    assert isinstance(times, dict)
    return {**report, "milliseconds": {**times, "write": round(written, 2)}}


def _fit(image: Image.Image, max_side: int | None) -> Image.Image:
    """The picture, scaled down if its long side is over ``max_side``."""
    if max_side is None or max(image.size) <= max_side:
        return image
    factor = max_side / max(image.size)
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _write(result: Result, image: Image.Image, out: Path, name: str) -> float:
    """Write the three pictures of a result; returns milliseconds."""
    start = perf_counter()
    height, width = result.labels.shape
    labels = palette_image(result.labels, result.palette)
    tokens = token_map(
        image if image.size == (width, height) else image.resize((width, height)),
        level=result.tokens.level,
        layer=result.tokens.layer,
        patch=result.patch,
        depth=result.tokens.depth,
    )
    if labels.size != image.size:
        labels = labels.resize(image.size, Image.Resampling.NEAREST)
    classes = overlay(image, np.asarray(labels), names=result.class_names, palette=result.palette)
    write_whole(out / f"{name}.labels.png", lambda path: labels.save(path, optimize=False))
    write_whole(out / f"{name}.overlay.jpg", lambda path: classes.save(path, quality=90))
    write_whole(out / f"{name}.tokens.jpg", lambda path: tokens.save(path, quality=90))
    return (perf_counter() - start) * 1000
