"""Segmenting many files: what is written, what is reported, and that one fault stays alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyModel
from PIL import Image
from samples import pattern
from support import machine_says

from tokenstep.config import DENSE, Thresholds
from tokenstep.data.pictures import read_picture
from tokenstep.errors import TokenstepError
from tokenstep.model.segmenter import Segmenter
from tokenstep.serve.files import SegmentJob, segment_files

REDUCED = Thresholds(merge=(0.0, 0.5), exits=(0.34, 0.34), spare=1)
KINDS = ("labels.png", "overlay.jpg", "tokens.jpg")


@pytest.fixture
def model(tiny_model: TinyModel) -> Segmenter:
    return tiny_model(cells=2)


def draw(folder: Path, sizes: list[tuple[int, int]]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"p{number:03}.png" for number in range(len(sizes))]
    for path, (h, w) in zip(paths, sizes, strict=True):
        Image.fromarray(pattern(h, w)).save(path)
    return paths


def labels_in(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in folder.glob("*.labels.png")}


# --- what comes out ---------------------------------------------------------------------------


def test_one_entry_and_three_pictures_each_in_order(tmp_path: Path, model: Segmenter) -> None:
    sizes = [(33, 50), (64, 20), (1, 1)]
    paths = draw(tmp_path / "in", sizes)
    entries = list(segment_files(model, paths, SegmentJob(tmp_path / "out", REDUCED)))
    assert [entry["file"] for entry in entries] == [str(path) for path in paths]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"{path.stem}.{kind}" for path in paths for kind in KINDS
    }
    for entry, (h, w) in zip(entries, sizes, strict=True):
        assert (entry["height"], entry["width"]) == (h, w)
        tokens = entry["tokens"]
        assert tokens["grid"] == -(-h // 8) * -(-w // 8)
        assert tokens["end"] + sum(tokens["halted"].values()) == tokens["start"] <= tokens["grid"]
        assert set(tokens["halted"]) == {"1", "2"}
        assert set(entry["gmac"]) >= {"dense", "used"}
        assert set(entry["milliseconds"]) >= {"read", "policy", "embed", "decode", "write"}
        assert sum(entry["classes"].values()) == pytest.approx(1, abs=1e-4)
        with Image.open(tmp_path / "out" / f"{entry['name']}.labels.png") as labels:
            assert labels.size == (w, h) and labels.mode == "P"
            counts = np.bincount(np.asarray(labels).ravel(), minlength=3) / (h * w)
        assert counts == pytest.approx(list(entry["classes"].values()), abs=1e-5)


@pytest.mark.parametrize("thresholds", [REDUCED, DENSE])
def test_batches_of_mixed_sizes_equal_single_pictures(
    tmp_path: Path, model: Segmenter, thresholds: Thresholds
) -> None:
    sizes = [(33, 50), (64, 20), (64, 20), (1, 70), (40, 40), (9, 9), (50, 33)]
    paths = draw(tmp_path / "in", sizes)
    for batch in (1, 3):
        list(
            segment_files(model, paths, SegmentJob(tmp_path / f"{batch}", thresholds, batch=batch))
        )
    single, batched = labels_in(tmp_path / "1"), labels_in(tmp_path / "3")
    assert single.keys() == batched.keys() and len(single) == len(sizes)
    for name, labels in single.items():
        assert np.array_equal(labels, batched[name]), name


def test_a_picture_scaled_down_keeps_its_size(tmp_path: Path, model: Segmenter) -> None:
    (path,) = draw(tmp_path / "in", [(30, 90)])
    job = SegmentJob(tmp_path / "out", REDUCED, max_side=45)
    (entry,) = segment_files(model, [path], job)
    assert (entry["width"], entry["height"], entry["scaled_to"]) == (90, 30, [45, 15])
    assert entry["tokens"]["grid"] == 6 * 2
    assert labels_in(tmp_path / "out")["p000.labels.png"].shape == (30, 90)
    job = SegmentJob(tmp_path / "out", REDUCED, max_side=90)
    assert "scaled_to" not in next(segment_files(model, [path], job))


def test_comparing_reports_the_dense_model_beside(tmp_path: Path, model: Segmenter) -> None:
    paths = draw(tmp_path / "in", [(33, 50)])
    for thresholds in (DENSE, REDUCED):
        job = SegmentJob(tmp_path / "out", thresholds, compare=True)
        (entry,) = segment_files(model, paths, job)
        same = entry["dense"]["same_pixels"]
        assert same == 1 if thresholds is DENSE else 0 <= same <= 1
        assert set(entry["dense"]["milliseconds"]) <= set(entry["milliseconds"])


def test_a_picture_that_cannot_be_written_leaves_none_of_its_files(
    tmp_path: Path, model: Segmenter
) -> None:
    paths, out = draw(tmp_path / "in", [(20, 30)] * 2), tmp_path / "out"
    (out / "p000.tokens.jpg").mkdir(parents=True)  # a folder has the name of its last file
    failed, fine = segment_files(model, paths, SegmentJob(out, REDUCED))
    assert "p000.tokens.jpg" in failed["error"] and failed["name"] == "p000"
    assert {path.name for path in out.iterdir() if path.is_file()} == {
        f"{fine['name']}.{kind}" for kind in KINDS
    }


# --- faults -----------------------------------------------------------------------------------


def test_large_pictures_are_cut_where_it_is_asked_for(tmp_path: Path, model: Segmenter) -> None:
    paths = draw(tmp_path / "in", [(40, 150), (40, 100), (300, 40)])

    def windows(job: SegmentJob) -> list[int]:
        return [entry["windows"] for entry in segment_files(model, paths, job)]

    out = tmp_path / "out"
    assert windows(SegmentJob(out, REDUCED, batch=3)) == [1, 1, 1]
    asked = windows(SegmentJob(out, REDUCED, batch=3, tile=128))
    assert asked[1] == 1 < asked[0] < asked[2]


def test_what_does_not_fit_in_memory_is_cut_into_windows_of_2048_px(
    tmp_path: Path, model: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = draw(tmp_path / "in", [(20, 2100), (20, 90), (2100, 20)])

    def windows(out: str, **options: int) -> list[int]:
        job = SegmentJob(tmp_path / out, REDUCED, batch=3, **options)
        return [entry["windows"] for entry in segment_files(model, paths, job)]

    assert windows("whole") == [1, 1, 1]
    assert windows("asked", tile=2048) == [2, 1, 2]
    machine_says(monkeypatch, {"/proc/meminfo": "MemAvailable: 1 kB\n"})
    assert windows("cut") == [2, 1, 2]
    asked, cut = labels_in(tmp_path / "asked"), labels_in(tmp_path / "cut")
    assert all(np.array_equal(labels, cut[name]) for name, labels in asked.items())


@pytest.mark.parametrize("batch", [1, 4])
def test_unreadable_pictures_have_an_error_and_the_others_go_on(
    tmp_path: Path, model: Segmenter, batch: int
) -> None:
    paths = draw(tmp_path / "in", [(20, 20)] * 5)
    paths[1].write_text("no picture")
    paths[4].unlink()
    out = tmp_path / "out"
    entries = list(segment_files(model, paths, SegmentJob(out, REDUCED, batch=batch)))
    assert [entry["file"] for entry in entries] == [str(path) for path in paths]
    assert ["error" in entry for entry in entries] == [False, True, False, False, True]
    for number in (1, 4):
        assert str(paths[number]) in entries[number]["error"]
    assert len(labels_in(out)) == 3


def test_a_picture_that_cannot_be_written_has_an_error(tmp_path: Path, model: Segmenter) -> None:
    paths = draw(tmp_path / "in", [(20, 20)] * 3)
    (tmp_path / "out" / "p001.overlay.jpg").mkdir(parents=True)  # so nothing can take its place
    entries = list(segment_files(model, paths, SegmentJob(tmp_path / "out", REDUCED)))
    assert ["error" in entry for entry in entries] == [False, True, False]
    assert "p001.overlay.jpg" in entries[1]["error"] and "written" in entries[1]["error"]
    assert str(paths[1]) in entries[1]["error"]
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


class Failing:
    """A model that fails where a picture of a width is in the batch, and else is as it is."""

    def __init__(self, model: Segmenter, width: int, fault: BaseException) -> None:
        self.model, self.width, self.fault = model, width, fault

    def __getattr__(self, name: str) -> object:
        return getattr(self.model, name)

    def segment_batch(self, images: list[torch.Tensor], *, thresholds: Thresholds) -> list[object]:
        if any(image.shape[2] == self.width for image in images):
            raise self.fault
        return list(self.model.segment_batch(images, thresholds=thresholds))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (TokenstepError("the model produced NaN"), "NaN"),
        (MemoryError(), "memory"),
        (torch.OutOfMemoryError("CUDA out of memory\nmany lines"), "memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory"),
    ],
)
def test_a_fault_of_the_model_stays_with_its_picture(
    tmp_path: Path, model: Segmenter, fault: Exception, reason: str
) -> None:
    paths = draw(tmp_path / "in", [(20, 20), (20, 30), (20, 20)])
    job = SegmentJob(tmp_path / "out", REDUCED, batch=3)
    entries = list(segment_files(Failing(model, 30, fault), paths, job))
    assert ["error" in entry for entry in entries] == [False, True, False]
    message = entries[1]["error"]
    assert reason in message and str(paths[1]) in message and "\n" not in message


def test_weights_that_are_not_finite_are_reported(tmp_path: Path, model: Segmenter) -> None:
    paths = draw(tmp_path / "in", [(20, 20)])
    with torch.no_grad():
        model.encoder.norm.weight.fill_(float("nan"))
    (entry,) = segment_files(model, paths, SegmentJob(tmp_path / "out", DENSE))
    assert "NaN" in entry["error"] and not labels_in(tmp_path / "out")


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), RuntimeError("a bug")])
def test_a_stop_leaves_whole_files_only(
    tmp_path: Path, model: Segmenter, fault: BaseException
) -> None:
    paths = draw(tmp_path / "in", [(20, 20)] * 4 + [(20, 30)] + [(20, 20)] * 4)
    job = SegmentJob(tmp_path / "out", REDUCED)
    with pytest.raises(type(fault)):
        list(segment_files(Failing(model, 30, fault), paths, job))
    left = list((tmp_path / "out").iterdir())
    assert left and not [path for path in left if path.name.startswith(".")]
    for path in left:
        read_picture(path)


# --- memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_only_a_few_batches_are_read_ahead(tmp_path: Path, model: Segmenter, batch: int) -> None:
    def ahead(done: int) -> list[Path]:
        """The pictures that may have been read when the entry of number ``done`` comes."""
        return draw(tmp_path / "in", [(8, 8)] * min(24, done + 4 * batch))

    paths = [tmp_path / "in" / f"p{number:03}.png" for number in range(24)]
    ahead(1)
    entries = segment_files(model, paths, SegmentJob(tmp_path / "out", REDUCED, batch=batch))
    for done, entry in enumerate(entries, start=1):
        assert "error" not in entry, "read before it was there"
        ahead(done + 1)
    assert done == 24


def test_who_stops_listening_stops_the_work(tmp_path: Path, model: Segmenter) -> None:
    paths = draw(tmp_path / "in", [(8, 8)] * 24)
    entries = segment_files(model, paths, SegmentJob(tmp_path / "out", REDUCED))
    next(entries)
    entries.close()
    assert len(labels_in(tmp_path / "out")) < 6
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("kind", KINDS)
def test_no_picture_is_overwritten_by_the_result_of_another(
    tmp_path: Path, model: Segmenter, kind: str
) -> None:
    (first,) = draw(tmp_path, [(20, 24)])
    second = tmp_path / f"p000.{kind}"
    Image.fromarray(pattern(30, 34)).save(second)
    before = second.read_bytes()
    (tmp_path / "link").symlink_to(tmp_path)
    done = list(segment_files(model, [first, second], SegmentJob(tmp_path / "link", DENSE)))
    assert second.read_bytes() == before
    assert [one["name"] for one in done] == ["p000_png", second.stem]
    assert all((tmp_path / f"p000_png.{kind}").is_file() for kind in KINDS)
