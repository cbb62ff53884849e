"""Segment many picture files: read ahead of the model, write behind it, one report entry each."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, islice, repeat
from pathlib import Path
from time import perf_counter
from typing import Any

from PIL import Image
from torch import Tensor

from tokenstep.config import DENSE, Spending
from tokenstep.data.draw import overlay, palette_image, token_map
from tokenstep.data.pictures import read_picture, to_tensor
from tokenstep.data.scaling import scaled_down
from tokenstep.data.whole_files import write_whole
from tokenstep.errors import TokenstepError, is_out_of_memory
from tokenstep.model.any_segmenter import AnySegmenter
from tokenstep.model.result import Result
from tokenstep.model.spending import as_keyword
from tokenstep.serve.windows import WINDOW, fits, segment_tiled

Report = dict[str, Any]

_KINDS = ("labels.png", "overlay.jpg", "tokens.jpg")  # of the files of a picture


@dataclass(frozen=True)
class SegmentJob:
    """What to do with each picture.

    ``max_side`` scales larger pictures down before the model (their label map is scaled back to
    the picture's size); ``compare`` also runs the dense model and reports its time and how many
    pixels agree. ``tile`` segments larger pictures in overlapping windows of that side; without it
    those are, in windows of 2048 px, that do not fit in memory.
    """

    out: Path
    spending: Spending
    batch: int = 1
    max_side: int | None = None
    compare: bool = False
    tile: int | None = None


@dataclass(frozen=True, slots=True)
class _Picture:
    path: Path
    name: str  # of its results
    image: Image.Image
    scaled: Tensor  # (3, h, w) uint8: what the model sees
    milliseconds: float  # reading and scaling


@dataclass(frozen=True, slots=True)
class _Segmented:
    picture: _Picture
    result: Result
    dense: Result | None  # where the job compares


def segment_files(model: AnySegmenter, paths: Sequence[Path], job: SegmentJob) -> Iterator[Report]:
    """Segment files and write ``NAME.labels.png``, ``NAME.overlay.jpg`` and ``NAME.tokens.jpg``.

    Yields one entry per picture in the order of ``paths``, whose ``name`` is the NAME of its
    files, and whose ``warnings``, if any, are what reading the picture warned of. A picture that
    cannot be read, segmented or written has an ``error`` that names it, and the others go on. All
    files of a picture are written or none, and none without an entry that is yielded. However many
    there are, some four batches are in memory at a time.
    """
    waiting: deque[Report | Future[Report]] = deque()
    with ThreadPoolExecutor(2) as readers, ThreadPoolExecutor(2) as writers:
        reads = _ahead(readers, paths, 2 * job.batch, job)
        warm = not job.compare
        try:
            while group := list(islice(reads, job.batch)):
                if not warm:
                    # What only a first call costs must not be held against either half.
                    _segment_group(model, group, job)
                    warm = True
                for done in _segment_group(model, group, job):
                    if isinstance(done, _Segmented):
                        waiting.append(writers.submit(_write, done, job.out))
                    else:
                        waiting.append(done)
                # One batch is written while the next one is segmented.
                while len(waiting) > job.batch:
                    yield _finished(waiting.popleft())
            while waiting:
                yield _finished(waiting.popleft())
        finally:
            _withdraw(waiting, job.out)


def output_names(paths: Sequence[Path], out: Path | None = None) -> list[str]:
    """A distinct name for the results of each picture, in the order of ``paths``.

    It is the picture's stem, if no earlier picture has that name (in any case, since some file
    systems tell none apart). Else the suffix joins it (``x.jpg``, ``x.png`` give ``x``, ``x_png``)
    or, of a picture in another folder, the folder (``a/x.jpg``, ``b/x.jpg`` give ``x``, ``b_x``).
    No result in ``out`` has the name of a picture there (``x.jpg``, ``x.overlay.jpg``).
    """
    names: list[str] = []
    taken = set[str]() if out is None else _names_of_results(paths, out)
    owners: dict[str, Path] = {}
    for path in paths:
        other = owners.get(path.stem.casefold())
        beside = path.stem.casefold() in taken or (
            other is not None and other.parent == path.parent
        )
        folded = ((name, name.casefold()) for name in _candidates(path, beside))
        free = (name for name, key in folded if key not in owners and key not in taken)
        names.append(next(free))
        owners[names[-1].casefold()] = path
    return names


def _names_of_results(paths: Sequence[Path], out: Path) -> set[str]:
    """The names, without regard to case, whose results in ``out`` would be one of ``paths``."""
    files = [path.resolve() for path in paths if path.name.casefold().endswith(_KINDS)]
    return {
        file.name.casefold().removesuffix(f".{kind}")
        for file in files
        for kind in _KINDS
        if file.parent == out.resolve() and file.name.casefold().endswith(f".{kind}")
    }


def missing(
    paths: Sequence[Path], faults: Mapping[str, str], out: Path | None = None
) -> list[Report]:
    """The entries of what holds no picture, with names beside those of the pictures ``paths``."""
    names = output_names([*paths, *map(Path, faults)], out)[len(paths) :]
    return [
        {"file": file, "name": name, "error": fault}
        for name, (file, fault) in zip(names, faults.items(), strict=True)
    ]


def _candidates(path: Path, beside: bool) -> Iterator[str]:
    """Names for a picture, the best first; ``beside``: its stem is taken by one in its folder."""
    full = path.name.replace(".", "_")
    yield path.stem
    if beside:
        yield full
    folders = ""
    for folder in reversed(path.parent.parts):
        if folder not in (path.anchor, ".."):
            folders = f"{folder}_{folders}"
            yield folders + path.stem
            yield folders + full
    for number in count(2):
        yield f"{folders}{full}_{number}"


def _ahead(
    pool: ThreadPoolExecutor, paths: Sequence[Path], size: int, job: SegmentJob
) -> Iterator[Report | _Picture]:
    """Read pictures in order, up to ``size`` ahead of the one that is asked for."""
    rest = zip(paths, output_names(paths, job.out), repeat(job.max_side))
    futures = deque(pool.submit(_read, *one) for one in islice(rest, size))
    while futures:
        yield futures.popleft().result()
        futures += [pool.submit(_read, *one) for one in islice(rest, 1)]


def _read(path: Path, name: str, max_side: int | None) -> Report | _Picture:
    start = perf_counter()
    try:
        image = read_picture(path)
    except TokenstepError as error:
        return _failed(path, name, str(error))
    scaled = to_tensor(scaled_down(image, max_side))
    return _Picture(path, name, image, scaled, (perf_counter() - start) * 1000)


def _segment_group(
    model: AnySegmenter, group: Sequence[Report | _Picture], job: SegmentJob
) -> list[Report | _Segmented]:
    """Segment what could be read of a group."""
    done = iter(_segment(model, [one for one in group if isinstance(one, _Picture)], job))
    return [next(done) if isinstance(one, _Picture) else one for one in group]


def _segment(
    model: AnySegmenter, pictures: Sequence[_Picture], job: SegmentJob
) -> list[Report | _Segmented]:
    """Segment a batch; if that fails, each picture alone, so that the others go on."""
    if not pictures:
        return []
    images = [picture.scaled for picture in pictures]
    tile = job.tile
    if not fits(model, images):
        if len(pictures) > 1:
            return [done for picture in pictures for done in _segment(model, [picture], job)]
        tile = WINDOW if tile is None else tile
    try:
        dense: Sequence[Result | None] = [None] * len(images)
        if job.compare:
            dense = _results(model, images, DENSE, tile)
        results = _results(model, images, job.spending, tile)
    except TokenstepError as error:
        reason = str(error)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = "does not fit in memory; give a smaller --tile, or scale it down by --max-side"
    else:
        return [_Segmented(*row) for row in zip(pictures, results, dense, strict=True)]
    if len(pictures) == 1:
        return [_failed(pictures[0].path, pictures[0].name, reason)]
    return [done for picture in pictures for done in _segment(model, [picture], job)]


def _results(
    model: AnySegmenter, images: Sequence[Tensor], spending: Spending, tile: int | None
) -> list[Result]:
    """Results of a batch, or of one picture after the other in windows of ``tile``."""
    if tile is None or all(max(image.shape) <= tile for image in images):
        return model.segment_batch(images, **as_keyword(spending))
    return [segment_tiled(model, image, side=tile, spending=spending) for image in images]


def _failed(path: Path, name: str, reason: str) -> Report:
    """The entry of a picture that failed; its ``error`` is one line that names the file."""
    error = reason if str(path) in reason else f"{path}: {reason}"
    return {"file": str(path), "name": name, "error": error}


def _finished(entry: Report | Future[Report]) -> Report:
    return entry if isinstance(entry, dict) else entry.result()


def _withdraw(waiting: Iterable[Report | Future[Report]], out: Path) -> None:
    """Remove the files of pictures whose entries nobody will get, as the run was ended."""
    for entry in waiting:
        if isinstance(entry, Future) and not entry.cancel() and entry.exception() is None:
            _remove(out, entry.result()["name"])


def _remove(out: Path, name: str) -> None:
    for kind in _KINDS:
        with suppress(OSError):  # where nothing can be written, nothing can be removed
            (out / f"{name}.{kind}").unlink(missing_ok=True)


def _write(done: _Segmented, out: Path) -> Report:
    """Write the three pictures of a result; returns the entry of the report."""
    start = perf_counter()
    path, name, image = done.picture.path, done.picture.name, done.picture.image
    result = done.result.enlarged(*image.size)
    try:
        _write_pictures(result, image, out, name)
    except TokenstepError as error:
        _remove(out, name)
        return _failed(path, name, str(error))
    report = result.report()
    stages = {"read": done.picture.milliseconds, **result.milliseconds}
    report["milliseconds"] = _rounded({**stages, "write": (perf_counter() - start) * 1000})
    seen = result.scaled_to  # where the model saw a smaller picture; the scale is of the sides
    report["scale"] = None if seen is None else round(max(seen) / max(image.size), 5)
    if "warnings" in image.info:
        report["warnings"] = image.info["warnings"]
    if done.dense is not None:
        report["dense"] = {
            "milliseconds": _rounded(done.dense.milliseconds),
            "same_pixels": round(float((done.dense.labels == done.result.labels).mean()), 5),
        }
    return {"file": str(path), "name": name, **report}


def _rounded(milliseconds: dict[str, float]) -> dict[str, float]:
    return {stage: round(time, 2) for stage, time in milliseconds.items()}


def _write_pictures(result: Result, image: Image.Image, out: Path, name: str) -> None:
    """Write label map, overlay and token map of a picture, which may have been scaled down."""
    labels = palette_image(result.labels, result.palette)
    under = image if result.scaled_to is None else image.resize(result.scaled_to)
    tokens = token_map(
        under if result.seen is None else Image.fromarray(result.seen),
        level=result.tokens.level,
        layer=result.tokens.layer,
        patch=result.patch,
        depth=result.tokens.depth,
    )
    classes = overlay(image, result.labels, names=result.class_names, palette=result.palette)
    write_whole(out / f"{name}.labels.png", lambda path: labels.save(path, optimize=False))
    write_whole(out / f"{name}.overlay.jpg", lambda path: classes.save(path, quality=90))
    write_whole(out / f"{name}.tokens.jpg", lambda path: tokens.save(path, quality=90))
