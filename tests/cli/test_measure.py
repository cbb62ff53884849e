"""`tokenstep evaluate`, `calibrate` and `compare`: what they write, print and refuse."""

import json
import shutil
from pathlib import Path

import pytest
from commands import call, refused, save_model
from conftest import CLASSES
from PIL import Image
from samples import labelled_folder, save_pattern


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return save_pattern(tmp_path / "photo.png", 40, 50)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return labelled_folder(tmp_path / "tiny_set", CLASSES, [(40, 56), (17, 90)])


def test_evaluate_writes_both_halves(saved: Path, data: Path) -> None:
    target = data.parent / "new" / "eval.json"
    code, stdout, err = call("evaluate", "--model", saved, "--data", data, "--json", target)
    assert (code, err) == (0, "") and "mIoU" in stdout and "tiny_set test, 2 pictures" in stdout
    report = json.loads(target.read_text())
    assert list(report)[:5] == ["model", "data", "split", "images", "settings"]
    assert (report["model"], report["data"], report["split"]) == (str(saved), "tiny_set", "test")
    assert report["images"] == 2 and report["settings"]["merge"] == [0.0, 0.0]
    assert report["reduced"]["tokens"]["start"] < report["dense"]["tokens"]["start"]
    assert report["reduced"]["halted_share"] > report["dense"]["halted_share"] == 0
    assert set(report["dense"]["iou"]) == set(CLASSES)


def test_evaluate_prints_json_alone(
    saved: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data)
    options = ["--names", "p1", "--partition", "oracle", "--merge", "off", "--json", "-"]
    code, stdout, _ = call("evaluate", "--model", saved, "--data", ".", *options)
    report = json.loads(stdout)
    assert code == 0 and report["images"] == 1 and report["data"] == "tiny_set"
    assert report["settings"]["partition"] == "oracle" and report["settings"]["merge"] == []


def test_wrong_data(saved: Path, data: Path) -> None:
    def line(*options: object) -> str:
        return refused("evaluate", "--model", saved, *options)

    assert str(data / "no") in line("--data", data / "no")
    assert "test" in line("--data", data, "--split", "val")
    assert "zebra" in line("--data", data, "--names", "zebra")
    assert "oracle" in line("--data", data, "--partition", "zebra")
    assert str(data) in line("--data", data, "--json", data)
    assert "classes.json" in line("--data", data, "--json", data / "classes.json" / "a.json")
    label = data / "test" / "labels" / "p1.png"
    Image.new("L", (90, 17), 9).save(label)
    assert str(label) in line("--data", data) and "9" in line("--data", data)
    Image.new("L", (9, 17), 0).save(label)
    assert str(label) in line("--data", data) and "9 x 17" in line("--data", data)
    label.unlink()
    assert str(label) in line("--data", data)
    (data / "classes.json").write_text('{"names": ["sea", "land"]}')
    Image.new("L", (90, 17), 0).save(label)
    assert "sea, land" in line("--data", data) and str(data) in line("--data", data)
    (data / "classes.json").write_text("no json")
    assert "classes.json" in line("--data", data)


def test_data_without_any_label_has_no_score(saved: Path, data: Path) -> None:
    for number, size in enumerate([(56, 40), (90, 17)]):
        Image.new("L", size, 255).save(data / "test" / "labels" / f"p{number}.png")
    assert "label" in refused("evaluate", "--model", saved, "--data", data)


def test_calibrate_gives_segment_and_evaluate_their_knob(
    saved: Path, tmp_path: Path, photo: Path
) -> None:
    data = labelled_folder(tmp_path / "set", CLASSES, [(160, 240)])
    out = tmp_path / "calibrated"
    options = ["--data", data, "--split", "test"]
    search = ["--prices", "0.4,9", "--bars", "0.4", "--sample", "1", "--confirm", "3"]
    code, stdout, err = call(
        "calibrate", "--model", saved, "--half", "--out", out, *options, *search
    )
    assert (code, err) == (0, "") and "the best" in stdout and str(out) in stdout
    report = json.loads((out / "calibration.json").read_text())
    tried = report["search"]
    assert (tried["prices"], tried["bars"]) == ([0.4, 9], [0.4])
    assert (tried["sample"], tried["confirm"]) == (1, 3)
    points = report["points"]
    assert points and report["images"] == 1 and report["exits"]["1"]["temperature"] > 0
    whole, small = (path / "model.safetensors" for path in (saved, out))
    assert small.stat().st_size < 0.6 * whole.stat().st_size

    boundless = ["--model", out, "--max-loss", "100", "--out", tmp_path / "o"]
    code, stdout, err = call("segment", photo, *boundless)
    assert (code, err) == (0, "") and "operating point" in stdout
    written = json.loads((tmp_path / "o" / "report.json").read_text())
    assert written["point"] == min(points, key=lambda point: point["gmac"])
    assert written["settings"] == written["point"]["settings"]

    code, stdout, _ = call("evaluate", "--model", out, "--max-loss", "100", *options, "--json", "-")
    found = json.loads(stdout)
    assert code == 0 and found["point"] == written["point"]
    assert found["reduced"]["miou"] == pytest.approx(found["point"]["miou"], abs=1e-5)

    fixed = found["point"]["fixed"]
    (tmp_path / "budget.json").write_text(json.dumps(fixed["budget"]))
    knob = ["--max-loss", "100", "--budget", "point"]
    for budget in (knob, ["--budget", tmp_path / "budget.json"]):
        spent = ["--model", out, *budget, *options]
        code, stdout, _ = call("evaluate", *spent, "--json", "-")
        found = json.loads(stdout)
        assert code == 0 and found["settings"]["merge"] == fixed["budget"]["merge"]
        assert found["reduced"]["miou"] == pytest.approx(fixed["miou"], abs=1e-5)
        assert found["reduced"]["gmac"]["total"] == pytest.approx(fixed["gmac"], abs=1e-4)
    for wrong in ("point", tmp_path / "none.json", out / "model.safetensors"):
        assert "--budget" in refused("evaluate", "--model", saved, *options, "--budget", wrong)
    assert found["point"] is None, "the last budget is no operating point's, for all it knows"
    file = ["--budget", tmp_path / "budget.json", "--out", tmp_path / "b"]
    spent = ["--model", out, "--max-loss", "100", "--budget", "point", "--out", tmp_path / "b"]
    code, stdout, _ = call("segment", photo, *spent)
    assert code == 0 and f"budget of the operating point: {fixed['loss']:.2f}" in stdout
    told = json.loads((tmp_path / "b" / "report.json").read_text())
    assert (told["budget"], told["thresholds"]) == (fixed["budget"], None)
    assert "--max-loss" in refused("segment", photo, "--model", out, *spent[2:4], *file)
    both = ["--budget", tmp_path / "budget.json", "--merge", "off"]
    assert "--merge" in refused("evaluate", "--model", out, *options, *both)

    code, stdout, _ = call("evaluate", "--model", out, "--max-loss", "0", *options, "--json", "-")
    found = json.loads(stdout)
    assert code == 0 and found["point"] is None
    assert found["reduced"]["miou"] == found["dense"]["miou"]


@pytest.mark.parametrize("option", ["--prices", "--bars"])
def test_what_to_search_is_numbers(saved: Path, tmp_path: Path, option: str) -> None:
    data = labelled_folder(tmp_path / "set", CLASSES, [(32, 48)])
    options = ["--model", saved, "--data", data, "--split", "test", "--out", tmp_path / "o"]
    assert f"{option} few: give numbers" in refused("calibrate", *options, option, "few")


def test_compare_writes_a_table_and_a_figure(saved: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data = labelled_folder(tmp_path / "set", CLASSES, [(40, 56), (17, 90)])
    out = tmp_path / "compared"
    options = ["--model", saved, "--data", data, "--also", saved, "--out", out]
    options += ["--reducer", "tome:share=0.1", "--reducer", "random:share=0.2"]
    code, stdout, err = call("compare", *options)
    assert (code, err) == (0, "")
    assert (out / "compare.md").read_text() == stdout
    report = json.loads((out / "compare.json").read_text())
    methods = [row["method"] for row in report["rows"]]
    assert methods[0] == "dense" and methods[-1] == f"{saved}, dense" and "STEP" in methods
    assert methods[-2] == "tome:share=0.1 random:share=0.2", "both in one row, in order"
    assert report["images"] == 2 and report["split"] == "test"
    with Image.open(out / "compare.png") as picture:
        assert picture.format == "PNG"


def test_a_reducer_stands_in_the_place_of_the_exits(saved: Path, data: Path) -> None:
    options = ["--model", saved, "--data", data, "--split", "test", "--json", "-"]
    reports = []
    for extra in ([], ["--exits", "off"], ["--reducer", "tome:share=0.3"]):
        code, stdout, err = call("evaluate", *options, *extra)
        assert (code, err) == (0, "")
        reports.append(json.loads(stdout))
    _, merging, tome = reports
    assert tome["settings"]["reducers"] == ["tome:share=0.3"] and tome["settings"]["exits"] == []
    assert tome["settings"]["merge"] == merging["settings"]["merge"]
    assert tome["reduced"]["tokens"]["start"] == merging["reduced"]["tokens"]["start"]
    assert tome["reduced"]["gmac"]["total"] < merging["reduced"]["gmac"]["total"]
    assert tome["point"] is None
    said = "merged or dropped between blocks"
    table = [
        line for line in call("evaluate", *options[:-2], *extra)[1].splitlines() if said in line
    ]
    (gone,) = (float(line.split()[-2]) for line in table)
    tokens = tome["reduced"]["tokens"]
    assert gone == pytest.approx(1 - tokens["end"] / tokens["start"], abs=1e-3)
    assert said not in call("evaluate", *options[:-2])[1], "exits halt; nothing else is gone"
    step, named = reports[0], ["--reducer", "exits:thresholds=[0.36]"]
    code, stdout, err = call("evaluate", *options, *named)
    assert (code, err) == (0, "")
    exits = json.loads(stdout)["reduced"]
    for key in ("miou", "halted_share", "gmac", "shares"):
        assert exits[key] == step["reduced"][key], "STEP's own exits, by their name"
    wrong = "exits:thresholds=[0.3,0.4]"
    assert "one threshold per exit" in refused("evaluate", *options, "--reducer", wrong)
    both = ["--reducer", "tome:share=0.3", "--exits", "off"]
    assert "leave out --exits" in refused("evaluate", *options, *both)
    assert "--reducer tom: choose from" in refused("evaluate", *options, "--reducer", "tom")
    assert "of a model that has" in refused("evaluate", *options, "--reducer", "evit")


def test_pictures_are_segmented_and_explained_with_a_reducer(
    saved: Path, photo: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    halves = ["--model", saved, "--merge", "off", "--reducer", "tome:share=0.4"]
    code, _, err = call("segment", photo, *halves, "--out", tmp_path / "o")
    assert (code, err) == (0, "")
    written = json.loads((tmp_path / "o" / "report.json").read_text())
    assert written["settings"]["reducers"] == ["tome:share=0.4"] and written["point"] is None
    (picture,) = written["images"]
    assert picture["tokens"]["end"] < picture["tokens"]["start"] == picture["tokens"]["grid"]
    code, _, err = call("explain", photo, *halves, "--out", tmp_path / "e")
    assert (code, err) == (0, "")
    assert "tome:share=0.4" in (tmp_path / "e" / "report.html").read_text()
    assert "--dense" in refused("segment", photo, *halves, "--dense")


def test_a_model_that_names_an_unknown_reducer_is_refused(
    saved: Path, photo: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    for text, said in (
        ("tom:share=0.1", "reducer tom: choose from"),
        ("exits:thresholds=[0.3,0.4]", "one threshold per exit"),
        ("evit:blocks=[9]", "of a model that has"),
    ):
        config["thresholds"]["reducers"] = [text]
        (folder / "config.json").write_text(json.dumps(config))
        message = refused("segment", photo, "--model", folder)
        assert said in message and str(folder) in message
    config["thresholds"]["reducers"] = ["exits:thresholds=[0.36]"]
    (folder / "config.json").write_text(json.dumps(config))
    code, _, _ = call("segment", photo, "--model", folder, "--exits", "off", "--out", tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert code == 0 and report["settings"]["reducers"] == []
    assert not any(report["images"][0]["tokens"]["halted"].values())
