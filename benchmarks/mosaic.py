"""Lay pictures side by side to one large one, for sizes that no camera at hand delivers.

python benchmarks/mosaic.py OUT.png WIDTHxHEIGHT PICTURES...

Each picture is used as it is, in the order given and again from the first where they end; what
hangs over is cut off. So all detail is real, and only the seams are not.
"""

import sys
from itertools import cycle
from pathlib import Path

from PIL import Image


def mosaic(paths: list[Path], size: tuple[int, int]) -> Image.Image:
    """Fill ``size`` (w, h) row by row."""
    width, height = size
    sheet = Image.new("RGB", size)
    rest = cycle(paths)
    y = 0
    while y < height:
        x, lowest = 0, height
        while x < width:
            with Image.open(next(rest)) as picture:
                sheet.paste(picture.convert("RGB"), (x, y))
                x += picture.width
                lowest = min(lowest, picture.height)
        y += lowest  # so that no gap stays below the lower ones
    return sheet


if __name__ == "__main__":
    out, size, *names = sys.argv[1:]
    width, height = (int(side) for side in size.split("x"))
    mosaic([Path(name) for name in names], (width, height)).save(out)
