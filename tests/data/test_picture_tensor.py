"""Pictures in memory are treated as their files are."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from samples import pattern

from tokenstep.data import pictures
from tokenstep.errors import TokenstepError

ORIENTATION = 0x0112


def image_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("kind", ["turned", "16 bit", "clear", "palette", "CMYK", "unread file"])
def test_a_pil_image_is_treated_as_its_file_is(tmp_path: Path, kind: str) -> None:
    image = Image.fromarray(pattern(9, 14))
    exif = Image.Exif()
    if kind == "turned":
        exif[ORIENTATION] = 6
    elif kind == "16 bit":
        image = Image.fromarray(np.arange(126, dtype=np.uint16).reshape(9, 14) * 500)
    elif kind == "clear":
        image.putalpha(Image.fromarray(pattern(9, 14)[..., 0]))
    elif kind == "palette":
        image = image.convert("P")
    elif kind == "CMYK":
        image = image.convert("CMYK")
    path = tmp_path / ("a.tif" if kind == "CMYK" else "a.png")
    image.save(path, exif=exif)
    with Image.open(path) as opened:
        in_memory = opened if kind in ("turned", "unread file") else image
        given = pictures.picture_tensor(in_memory)
    assert torch.equal(given, pictures.picture_tensor(str(path)))
    assert torch.equal(given, pictures.picture_tensor(path))
    assert given.shape == ((3, 14, 9) if kind == "turned" else (3, 9, 14))


def test_arrays_and_tensors_come_back_as_they_are() -> None:
    pixels = pattern(9, 14)
    locked = pixels.copy()
    locked.flags.writeable = False
    for array in (pixels, locked, pixels[::-1, ::-1], np.asfortranarray(pixels), pixels[::2]):
        tensor = pictures.picture_tensor(array)
        assert tensor.dtype == torch.uint8 and np.array_equal(image_of(tensor), array)
        tensor += 1  # its own memory
        assert np.array_equal(pixels, pattern(9, 14))
    whole = torch.from_numpy(pixels).permute(2, 0, 1)
    for tensor in (whole, whole / 255, (whole / 255).half(), (whole / 255).double()):
        assert torch.equal(pictures.picture_tensor(tensor), tensor)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((4, 4), np.int64),
        np.zeros((3, 5, 6), np.uint8),
        np.full((4, 4, 3), 2, np.float32),
        np.zeros((0, 4, 3), np.uint8),
        torch.zeros(4, 4, dtype=torch.uint8),
        torch.zeros(4, 4, 3, dtype=torch.uint8),
        torch.zeros(1, 3, 4, 4),
        torch.zeros(3, 0, 4),
        torch.zeros(3, 4, 4, dtype=torch.int64),
        torch.zeros(3, 4, 4, dtype=torch.bool),
        torch.full((3, 4, 4), 255.0),
        torch.full((3, 4, 4), -0.5),
        torch.full((3, 4, 4), float("nan")),
        torch.full((3, 4, 4), float("inf")),
        torch.zeros(3, 4, 4).index_fill(2, torch.tensor([3]), float("nan")),
        Image.new("F", (4, 4)),
        Image.new("I", (4, 4)),
        Image.new("RGB", (0, 4)),
        None,
        7,
        [[1, 2, 3]],
    ],
)
def test_other_forms_are_refused_in_one_line(wrong: object) -> None:
    with pytest.raises(TokenstepError) as caught:
        pictures.picture_tensor(wrong)
    message = str(caught.value)
    assert "\n" not in message and ("give" in message or "picture is" in message or ";" in message)


def test_a_damaged_file_behind_a_pil_image(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with (
        Image.open(tmp_path / "a.png") as image,
        pytest.raises(TokenstepError, match="60 x 40 pixels, mode RGB: cannot be decoded"),
    ):
        pictures.picture_tensor(image)
