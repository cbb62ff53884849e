"""Draw street.jpg, the picture of the README: a street as a camera behind a windscreen sees it.

Nothing in it is photographed. It is drawn by the project, under the same licence as the project.
`python examples/make_street.py` (numpy and Pillow, 20 seconds) writes it beside this file.

The world is in metres: x to the right, y up from the ground, z ahead of the camera. Sky, ground
and house fronts are planes, coloured pixel by pixel; the rest is polygons, the farthest first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Array = NDArray[Any]
Colour = Iterable[float]
Pair = tuple[float, float]
Point = tuple[float, float, float]

WIDTH, HEIGHT, FINE = 960, 720, 2  # drawn FINE times as large, then scaled down
FOCAL, CENTRE_X, HORIZON, EYE = 800 * FINE, 465 * FINE, 352 * FINE, 1.45
KERB_LEFT, KERB_RIGHT, WALL_LEFT, WALL_RIGHT, END = -2.7, 6.2, -5.6, 9.4, 130.0
SHOP, ROOF = 3.5, 1.7  # height of a ground floor, and of a roof above its eaves

rng = np.random.default_rng(20)


def make_noise(slope: float, side: int = 1024) -> Array:
    """Return (side, side) noise that tiles, of mean 0 and deviation 1; a steep slope is smooth."""
    f = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side))
    f[0, 0] = np.inf
    tile = np.fft.ifft2(np.fft.fft2(rng.standard_normal((side, side))) / f**slope).real
    return np.asarray((tile - tile.mean()) / tile.std(), np.float32)


GRAIN, ROUGH, SMOOTH = make_noise(0.2), make_noise(1.0), make_noise(1.7)


def look_up(tile: Array, u: Array, v: Array, per_metre: float) -> Array:
    """Return the tile's values at the points (u, v), in metres."""
    side = len(tile)
    return tile[(v * per_metre).astype(np.int64) % side, (u * per_metre).astype(np.int64) % side]


def blend(under: Array, colour: Colour | Array, weight: Array) -> Array:
    """Mix a colour, or one colour per pixel, over (n, 3) pixels by weights (n,) in 0..1."""
    return under + (np.asarray(colour, np.float32) - under) * weight[:, None].astype(np.float32)


def hazy(rgb: Array, z: Array) -> Array:
    """Fade (n, 3) colours towards the horizon's, the farther the more."""
    return blend(rgb, (206, 214, 219), 1 - np.exp(-z / 420))


# ------------------------------------------------------------------ planes: sky, ground, houses


def paint_sky(dx: Array, dy: Array) -> Array:
    """Return (n, 3) colours for rays that rise by dy and turn by dx per metre ahead."""
    blue = np.clip(dy / 0.45, 0, 1) ** 0.9
    rgb = blend(np.full((len(dx), 3), (251, 254, 254), np.float32), (170, 220, 248), blue)
    far = 1 / (dy + 0.2)
    cloud = look_up(SMOOTH, dx * far + 9, far + 3, 90) + 0.15 * look_up(ROUGH, dx * far, far, 90)
    return blend(rgb, (252, 252, 252), np.clip(0.3 + 0.4 * cloud, 0, 0.9))


def paint_end(x: Array, y: Array) -> Array:
    """Return (n, 3) colours of the hedge that closes the street."""
    tone = 66 + 12 * look_up(ROUGH, x, y, 12) + 12 * look_up(GRAIN, x, y, 1)
    return np.asarray(tone[:, None] * (0.98, 1.0, 0.88), np.float32)


def paint_ground(x: Array, z: Array, shade: Array) -> Array:
    """Return (n, 3) colours of road, markings, kerbs and pavements; shade (n,) is 0..1."""
    near = 1 / (1 + z / 9)
    texture = 5 * look_up(ROUGH, x, z, 33) + 5 * look_up(SMOOTH, x, z, 9)
    texture += 18 * near * look_up(GRAIN, x, z, 190)
    tyres = sum(np.exp(-(((np.abs(x - lane) - 0.75) / 0.3) ** 2)) for lane in (0.0, 4.1))
    rgb = np.array((102, 107, 114), np.float32) + (texture - 7 * tyres)[:, None]
    repair = (np.abs(x - 0.4 - 0.03 * look_up(ROUGH, z, z, 40)) < 0.45) & (np.abs(z - 12) < 1.3)
    rgb = blend(rgb, (84, 86, 90), 0.6 * repair)
    crack = np.abs(x - 3.6 - 0.25 * look_up(SMOOTH, z, z * 0, 12)) < 0.01 + 0.0005 * z
    rgb = blend(rgb, (66, 67, 70), 0.6 * crack)

    worn = np.clip(0.85 + 0.22 * look_up(ROUGH, x, z, 60), 0, 1)
    dash = (np.abs(x - 1.75) < 0.07) & ((z + 1.5) % 6 < 3.6)
    stop = (np.abs(z - 41) < 0.25) & (x > KERB_LEFT + 0.5) & (x < 1.6)
    rgb = blend(rgb, (205, 206, 203), worn * (dash | stop))
    for line in (KERB_LEFT + 0.3, KERB_LEFT + 0.5, KERB_RIGHT - 0.3, KERB_RIGHT - 0.5):
        rgb = blend(rgb, (176, 160, 92), 0.8 * worn * (np.abs(x - line) < 0.045))

    joint = ((x % 0.7 < 0.025) | (z % 0.9 < 0.03)) & (z < 30)
    paving = np.array((122, 126, 130), np.float32) + 1.5 * texture[:, None]
    paving = blend(paving, (92, 90, 87), 0.7 * joint * np.clip(2 * near, 0, 1))
    over = np.maximum(KERB_LEFT - x, x - KERB_RIGHT)  # metres beyond the kerb
    rgb = np.where(over[:, None] > 0, paving, rgb)
    rgb = blend(rgb, (150, 148, 143), 1.0 * ((over > 0) & (over < 0.16)))
    rgb = blend(rgb, (62, 62, 63), 0.8 * ((over > -0.14) & (over <= 0)))
    return rgb * (1 - 0.36 * shade)[:, None]


class Row:
    """One side of the street: house after house, each with its own measures and colours."""

    def __init__(self, bricks: Sequence[Colour], light: float, gap: Pair) -> None:
        """Build at random from the bricks; light dims the whole row; no house stands in the gap."""
        self.light, self.gap = light, gap
        self.starts = np.cumsum(rng.uniform(6, 13, 24)).astype(np.float32)
        n = len(self.starts) + 1
        self.height = rng.uniform(7.5, 11.5, n).astype(np.float32)
        self.bay = rng.uniform(1.7, 2.6, n).astype(np.float32)
        self.floor = rng.uniform(2.6, 3.1, n).astype(np.float32)
        self.brick = np.array(bricks, np.float32)[rng.integers(0, len(bricks), n)]
        self.brick += rng.normal(0, 6, (n, 1)).astype(np.float32)
        signs = [(44, 60, 50), (110, 44, 42), (46, 52, 74), (176, 168, 150), (52, 48, 46)]
        self.sign = np.array(signs, np.float32)[rng.integers(0, len(signs), n)]
        self.glint = rng.uniform(0, 1, (64, 64)).astype(np.float32)

    def find(self, z: Array) -> tuple[NDArray[np.int64], Array]:
        """Return the house (n,) at each z, and how far along its front that is."""
        house = np.searchsorted(self.starts, z)
        return house, z - np.where(house > 0, self.starts[house - 1], 0)

    def top(self, z: Array) -> Array:
        """Return the skyline (n,): roofs and chimneys, 0 in the gap."""
        house, along = self.find(z)
        chimney = 1.3 * ((along % 17 < 1.1) & (house > 0))
        gone = (z > self.gap[0]) & (z < self.gap[1])
        return np.where(gone, 0, self.height[house] + ROOF + chimney).astype(np.float32)

    def paint(self, z: Array, y: Array) -> Array:
        """Return (n, 3) colours of the fronts, from the shops up to the chimneys."""
        house, along = self.find(z)
        eaves = self.height[house]
        stain = 7 * look_up(SMOOTH, z, y, 21) + 6 * look_up(ROUGH, z, y, 70)
        course = (y % 0.16 < 0.035) | ((z + 0.11 * (y // 0.16 % 2)) % 0.23 < 0.03)
        rgb = self.brick[house] + (stain - 9 * course / (1 + z / 25))[:, None]
        rgb = self.windows(rgb, z, y)
        pipe = (np.abs(along - 0.5) < 0.06) | (along < 0.1)
        rgb = blend(rgb, (40, 40, 42), 0.85 * pipe)
        rgb = blend(rgb, (168, 163, 152), 0.7 * (y > eaves - 0.35))
        slate = np.array((70, 72, 78), np.float32) + (stain - 8 * (y % 0.3 < 0.06))[:, None]
        rgb = np.where((y > eaves)[:, None], slate, rgb)
        rgb = np.where((y > eaves + ROOF)[:, None], self.brick[house] * 0.8, rgb)
        rgb = np.where((y < SHOP)[:, None], self.shops(z, y), rgb)
        return np.asarray(rgb * self.light, np.float32)

    def windows(self, rgb: Array, z: Array, y: Array) -> Array:
        """Put sash windows with frames and ledges into the upper floors."""
        house, along = self.find(z)
        bay, storey = along / self.bay[house], (y - SHOP) / self.floor[house]
        aside, up = np.abs(bay % 1 - 0.5), storey % 1
        wall = (y > SHOP) & (y < self.height[house] - 0.4)
        glint = self.glint[(storey.astype(int) * 7 + house * 5) % 64, bay.astype(int) % 64]
        pane = 16 + 120 * glint**3 + 34 * up + 14 * look_up(SMOOTH, z, y, 60)
        ledge = (np.abs(y - SHOP - 0.05) < 0.08) | (wall & (up < 0.05))
        rgb = blend(rgb, (206, 200, 190), 0.6 * ledge)
        rgb = blend(rgb, (58, 55, 52), 0.6 * (wall & (aside < 0.29) & (up > 0.17) & (up < 0.2)))
        rgb = blend(rgb, (226, 224, 218), 0.9 * (wall & (aside < 0.27) & (up > 0.2) & (up < 0.8)))
        glass = wall & (aside < 0.22) & (up > 0.25) & (up < 0.76)
        glass &= (aside > 0.015) & (np.abs(up - 0.5) > 0.018)
        return blend(rgb, pane[:, None] * np.array((0.92, 1.0, 1.06), np.float32), 1.0 * glass)

    def shops(self, z: Array, y: Array) -> Array:
        """Return (n, 3) colours of the ground floors: boards with letters, windows with goods."""
        house, along = self.find(z)
        bay = along / self.bay[house]
        aside = np.abs(bay % 1 - 0.5)
        glint = self.glint[house % 64, bay.astype(int) % 64]
        goods = 30 + 8 * look_up(ROUGH, z, y, 60) + 20 * look_up(SMOOTH, z, y, 90) + 10 * (y - 1.6)
        goods += 80 * ((look_up(ROUGH, z, y, 22) > 1.0) & (y < 1.9))
        goods += 40 * (look_up(ROUGH, z + 5, y, 13) > 1.5)
        tinted = np.clip(goods, 12, 190)[:, None] * np.array((1.0, 0.98, 0.95), np.float32)
        poster = glint[:, None] * (150, 90, 60) + (1 - glint)[:, None] * (170, 172, 165)
        window = (aside < 0.43) & (y > 0.55) & (y < 2.65)
        rgb = blend(0.55 * self.sign[house] + 22, tinted, 1.0 * window)
        shown = window & (aside < 0.12) & (np.abs(y - 1.5) < 0.35) & (glint > 0.45)
        rgb = blend(rgb, poster, 0.8 * shown)
        rgb = blend(rgb, self.sign[house], 1.0 * ((y > 2.75) & (y < 3.35)))
        letter = (np.abs(y - 3.05) < 0.14) & (look_up(GRAIN, along, y * 0, 9) > 0.1)
        return blend(rgb, (206, 198, 176), 0.75 * (letter & (aside < 0.45)))


def draw_planes(left: Row, right: Row) -> Image.Image:
    """Draw all that needs no polygons, as an RGB picture FINE times as large as wanted."""
    v, u = np.mgrid[0 : HEIGHT * FINE, 0 : WIDTH * FINE].astype(np.float32)
    dx, dy = ((u - CENTRE_X) / FOCAL).ravel(), ((HORIZON - v) / FOCAL).ravel()
    rgb = np.empty((len(dx), 3), np.float32)
    rgb[dy > 0] = paint_sky(dx[dy > 0], dy[dy > 0])

    x, y = dx * END, dy * END + EYE
    skyline = 7 + 1.5 * look_up(SMOOTH, x, x * 0, 9) + 0.4 * look_up(ROUGH, x, y, 20)
    seen = (y < skyline) & (y > -1)
    rgb[seen] = hazy(paint_end(x[seen], y[seen]), np.full(seen.sum(), END, np.float32))

    seen = dy < -EYE / END
    z = EYE / -dy[seen]
    x = dx[seen] * z
    shadow = WALL_LEFT + 0.66 * left.top(z * 0.97 + 3 + 0.4 * x)
    rgb[seen] = hazy(paint_ground(x, z, np.clip((shadow - x) / 0.3, 0, 1)), z)

    for row, wall in ((left, WALL_LEFT), (right, WALL_RIGHT)):
        ahead = np.where(dx * wall > 0, wall / np.where(dx * wall > 0, dx, 1), END)
        y = dy * ahead + EYE
        seen = (ahead < END) & (y > 0)
        seen[seen] = y[seen] < row.top(ahead[seen])
        rgb[seen] = hazy(row.paint(ahead[seen], y[seen]), ahead[seen])
    pixels = np.clip(rgb, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels.reshape(HEIGHT * FINE, WIDTH * FINE, 3))


# ------------------------------------------------------------------ polygons: what stands about


class Canvas:
    """Draws polygons given in metres."""

    def __init__(self, picture: Image.Image) -> None:
        """Draw on this picture from now on."""
        self.picture, self.draw = picture, ImageDraw.Draw(picture)

    def at(self, x: float, y: float, z: float) -> Pair:
        """Return the pixel that shows a point."""
        return CENTRE_X + FOCAL * x / z, HORIZON - FOCAL * (y - EYE) / z

    def fill(self, points: Sequence[Point], colour: Colour) -> None:
        """Fill a polygon."""
        far = sum(p[2] for p in points) / len(points)
        rgb = hazy(np.array([[*colour]], np.float32), np.array([far], np.float32))[0]
        red, green, blue = (int(c) for c in np.clip(rgb, 0, 255))
        self.draw.polygon([self.at(*p) for p in points], (red, green, blue))

    def flat(self, x: float, z: float, outline: Iterable[Pair], colour: Colour) -> None:
        """Fill a polygon that faces the camera at z, given as (metres right of x, height)."""
        self.fill([(x + across, y, z) for across, y in outline], colour)

    def box(self, x: Pair, y: Pair, z: float, colour: Colour) -> None:
        """Fill an upright rectangle that faces the camera."""
        self.flat(0, z, [(x[0], y[0]), (x[1], y[0]), (x[1], y[1]), (x[0], y[1])], colour)

    def disc(self, middle: Point, radius: float, colour: Colour) -> None:
        """Fill a disc that faces the camera."""
        x, y, z = middle
        self.flat(x, z, [(p, y + q) for p, q in ring(radius)], colour)

    def shadow(self, x: Pair, z: Pair, strength: float) -> None:
        """Darken a soft rectangle on the ground."""
        mask = Image.new("L", self.picture.size)
        corners = [
            self.at(p, 0, q) for p, q in ((x[0], z[0]), (x[1], z[0]), (x[1], z[1]), (x[0], z[1]))
        ]
        ImageDraw.Draw(mask).polygon(corners, int(255 * strength))
        mask = mask.filter(ImageFilter.GaussianBlur(0.08 * FOCAL / z[0]))
        self.picture.paste((24, 25, 28), (0, 0), mask)


def ring(radius: float) -> list[Pair]:
    """Return the corners of a polygon that passes for a circle about (0, 0)."""
    turns = np.linspace(0, 2 * np.pi, 28)
    return [(float(radius * np.cos(t)), float(radius * np.sin(t))) for t in turns]


# Outlines of cars from the side, from the rear to the front: metres, and heights above them.
HATCHBACK = (
    (0.0, 0.0, 0.1, 0.5, 1.2, 2.1, 3.0, 3.9, 4.05, 4.05),
    (0.28, 0.78, 0.96, 1.4, 1.47, 1.42, 0.98, 0.82, 0.6, 0.26),
)
VAN = (
    (0.0, 0.0, 0.05, 0.2, 3.4, 4.3, 5.0, 5.1, 5.1),
    (0.3, 1.0, 2.1, 2.2, 2.2, 1.25, 1.0, 0.6, 0.28),
)


def draw_car(
    canvas: Canvas, x: float, z: float, *, paint: Colour, ahead: bool = True, van: bool = False
) -> None:
    """Draw a car whose near end is at z, seen from behind (ahead) or from the front."""
    outline = list(zip(*(VAN if van else HATCHBACK), strict=True))
    length, waist = outline[-1][0], 1.25 if van else 0.98
    body = np.array([*paint], np.float32)

    def place(at: float, height: float, side: int) -> Point:
        half = 0.86 - 0.2 * max(0.0, height - 0.9) / (1.3 if van else 0.55)
        return x + side * half, height, z + (at if ahead else length - at)

    canvas.shadow((x - 0.95, x + 0.95), (z - 0.1, z + length), 0.8)
    for side in (-0.78, 0.78):
        canvas.box((x + side - 0.1, x + side + 0.1), (0, 0.5), z + 0.5, (20, 20, 22))
    panels = list(pairwise(outline))
    for (a, low), (b, high) in panels if not ahead else panels[::-1]:
        slope = abs(b - a) / (abs(b - a) + abs(high - low))
        corners = [place(a, low, -1), place(b, high, -1), place(b, high, 1), place(a, low, 1)]
        canvas.fill(corners, body * (0.62 + 0.55 * slope) + 40 * slope)
        if 0.2 < slope < 0.85 and min(low, high) > waist - 0.05:
            middle = np.mean(corners, axis=0)
            pane = [tuple(middle + 0.86 * (np.array(p) - middle)) for p in corners]
            canvas.fill(pane, (30, 35, 40) if ahead else (42, 49, 56))
    toward = -1 if x > 0 else 1
    draw_flank(canvas, outline, lambda at, y: place(at, y, toward), paint=body, waist=waist)
    draw_end(canvas, x, z, paint=body, ahead=ahead)


def draw_flank(
    canvas: Canvas,
    outline: Sequence[Pair],
    place: Callable[[float, float], Point],
    *,
    paint: Array,
    waist: float,
) -> None:
    """Draw the side of a car that is turned to the camera: body, windows, wheels."""

    def fill(corners: Iterable[Pair], colour: Colour) -> None:
        canvas.fill([place(*corner) for corner in corners], colour)

    length, roof = outline[-1][0], max(y for _, y in outline) - 0.13
    front = max(at for at, y in outline if y > waist + 0.3)
    rear = 2.4 if waist > 1 else 0.45
    fill(outline, paint * 0.8)
    fill([(0.1, 0.5), (length, 0.5), (length, 0.3), (0.1, 0.3)], paint * 0.5)
    fill([(rear, waist), (rear + 0.2, roof), (front, roof), (front + 0.7, waist)], (40, 46, 52))
    for at in (1.25, 2.2):
        if at > rear:
            fill([(at, waist), (at, roof), (at + 0.08, roof), (at + 0.08, waist)], paint * 0.6)
    for at in (0.75, length - 0.8):
        for radius, grey in ((0.36, 16), (0.31, 28), (0.2, 128), (0.07, 60)):
            fill([(at + p, 0.32 + q) for p, q in ring(radius)], (grey, grey, grey + 2))


def draw_end(canvas: Canvas, x: float, z: float, *, paint: Array, ahead: bool) -> None:
    """Draw bumper, lamps, mirrors and number plate on the end of a car that faces the camera."""
    canvas.box((x - 0.85, x + 0.85), (0.28, 0.5), z, (42, 43, 46))
    lamp, plate = ((150, 26, 22), (190, 170, 60)) if ahead else ((214, 218, 220), (214, 214, 208))
    for side in (-1, 1):
        canvas.box((x + side * 0.84, x + side * 0.6), (0.57, 0.84 if ahead else 0.74), z, lamp)
        canvas.box((x + side * 0.84, x + side * 1.02), (0.95, 1.08), z + 1.9, paint * 0.7)
    if not ahead:
        canvas.box((x - 0.5, x + 0.5), (0.56, 0.7), z, (30, 31, 34))
    canvas.box((x - 0.26, x + 0.26), (0.4, 0.51), z, plate)


def draw_person(canvas: Canvas, x: float, z: float, coat: Colour, *, stride: float = 0.2) -> None:
    """Draw somebody on foot."""
    sleeve = [0.8 * c for c in coat]
    canvas.shadow((x - 0.3, x + 0.3), (z - 0.12, z + 0.2), 0.5)
    for s in (-1, 1):
        foot, hand = s * stride, s * (0.26 + stride / 3)
        leg = [(s * 0.02, 0.9), (s * 0.17, 0.9), (foot + 0.08, 0.04), (foot - 0.07, 0.04)]
        canvas.flat(x, z, leg, (30, 32, 42))
        canvas.box((x + foot - 0.09, x + foot + 0.12), (0, 0.07), z, (18, 18, 20))
        canvas.flat(x, z, [(s * 0.2, 1.42), (s * 0.28, 1.3), (hand, 0.82), (s * 0.2, 0.85)], sleeve)
    canvas.flat(x, z, [(-0.21, 1.44), (0.21, 1.44), (0.23, 0.8), (-0.23, 0.8)], coat)
    canvas.disc((x, 1.6, z), 0.115, (168, 128, 108))
    canvas.disc((x, 1.69, z), 0.085, (40, 32, 28))


def draw_cyclist(canvas: Canvas, x: float, z: float, coat: Colour) -> None:
    """Draw somebody on a bicycle, from behind."""
    canvas.shadow((x - 0.25, x + 0.25), (z - 0.1, z + 1.6), 0.5)
    canvas.box((x - 0.03, x + 0.03), (0, 0.68), z, (24, 24, 26))
    canvas.box((x - 0.28, x + 0.28), (1.02, 1.06), z, (30, 30, 32))
    for s in (-1, 1):
        foot = 0.3 + 0.1 * s
        leg = [(s * 0.03, 0.95), (s * 0.18, 0.95), (s * 0.15, foot), (s * 0.06, foot)]
        canvas.flat(x, z, leg, (34, 36, 48))
        canvas.flat(x, z, [(s * 0.2, 1.5), (s * 0.3, 1.4), (s * 0.27, 1.05), (s * 0.2, 1.05)], coat)
    canvas.flat(x, z, [(-0.22, 1.55), (0.22, 1.55), (0.17, 0.9), (-0.17, 0.9)], coat)
    canvas.disc((x, 1.7, z), 0.12, (52, 44, 42))


def draw_post(canvas: Canvas, x: float, z: float, *, top: float, thick: float, grey: int) -> None:
    """Draw a round post with a wider foot."""
    canvas.box((x - 2 * thick, x + 2 * thick), (0, min(0.9, top / 5)), z, (grey, grey, grey + 3))
    canvas.box((x - thick, x + thick), (0, top), z, (grey, grey + 2, grey + 4))
    canvas.box((x + thick * 0.2, x + thick), (0, top), z, (0.7 * grey, 0.7 * grey, 0.7 * grey))


def draw_lamp(canvas: Canvas, x: float, z: float, reach: float) -> None:
    """Draw a street lamp whose arm reaches over the road."""
    draw_post(canvas, x, z, top=7.5, thick=0.06, grey=88)
    arm = [(-0.05, 7.4), (reach, 7.85), (reach, 7.95), (-0.05, 7.55)]
    canvas.flat(x, z, arm, (88, 92, 94))
    canvas.box((x + reach, x + reach * 1.45), (7.82, 8.0), z, (120, 124, 126))


def draw_signs(canvas: Canvas) -> None:
    """Hang signs out over the pavement, as shops do."""
    for wall, out, z, colour in (
        (WALL_LEFT, 0.9, 44, (150, 40, 40)),
        (WALL_LEFT, 0.8, 31, (40, 90, 70)),
        (WALL_LEFT, 0.9, 21, (160, 150, 130)),
        (WALL_RIGHT, -0.9, 46, (60, 74, 130)),
        (WALL_RIGHT, -0.9, 24, (36, 60, 50)),
    ):
        canvas.box((wall, wall + out), (3.4, 4.3), z, colour)
        canvas.box((wall + 0.14 * out, wall + 0.86 * out), (3.75, 3.95), z, (196, 190, 174))


def draw_signals(canvas: Canvas, light: Pair, disc: Pair) -> None:
    """Draw a traffic light and a round sign at (x, z)."""
    x, z = disc
    draw_post(canvas, x, z, top=2.6, thick=0.035, grey=120)
    canvas.disc((x, 2.45, z), 0.32, (214, 214, 210))
    canvas.disc((x, 2.45, z), 0.28, (36, 70, 160))
    canvas.box((x - 0.2, x + 0.2), (2.4, 2.5), z, (220, 220, 216))
    x, z = light
    draw_post(canvas, x, z, top=2.4, thick=0.055, grey=52)
    canvas.box((x - 0.26, x + 0.26), (2.3, 3.5), z, (22, 23, 24))
    for y, colour in ((3.2, (56, 22, 22)), (2.9, (58, 46, 20)), (2.6, (70, 240, 170))):
        canvas.disc((x, y, z), 0.11, colour)


def draw_railing(canvas: Canvas, x: float, near: float, far: float) -> None:
    """Draw a railing that runs ahead."""
    for y in (0.12, 0.98):
        rail = [(x, y, near), (x, y + 0.05, near), (x, y + 0.05, far), (x, y, far)]
        canvas.fill(rail, (40, 43, 45))
    for k, z in enumerate(np.arange(far, near, -0.25).tolist()):
        canvas.box((x, x + (0.06 if k % 8 == 0 else 0.015)), (0, 1.0), z, (46, 49, 51))


def draw_tree(canvas: Canvas, x: float, z: float, top: float, *, leafy: bool = True) -> None:
    """Grow branches from a trunk, and clouds of leaves around their ends."""
    tips: list[Pair] = []

    def grow(foot: Pair, angle: float, length: float, thick: float) -> None:
        tip = foot[0] + length * float(np.cos(angle)), foot[1] + length * float(np.sin(angle))
        across, up = -np.sin(angle) * thick / 2, np.cos(angle) * thick / 2
        ends = ((foot, -1.0), (foot, 1.0), (tip, 0.7), (tip, -0.7))
        shade = rng.uniform(34, 58)
        outline = [(px + side * across, py + side * up) for (px, py), side in ends]
        canvas.flat(x, z, outline, (shade, shade * 0.95, shade * 0.86))
        tips.append(tip)
        if length > 0.05 * top:
            for turn in rng.normal(0, 0.5, 3 if length < 0.2 * top else 4):
                upright = angle + turn - 0.12 * (angle - np.pi / 2)
                grow(tip, upright, length * rng.uniform(0.6, 0.82), thick * 0.62)

    grow((0.0, 0.0), np.pi / 2, 0.3 * top, 0.035 * top)
    crown = np.array([tip for tip in tips if tip[1] > 0.42 * top])
    leaves = crown[rng.integers(0, len(crown), 11000 if leafy else 0)]
    leaves = leaves + rng.normal(0, (0.055 * top, 0.05 * top), leaves.shape)
    for across, y in leaves.tolist():
        light = 44 + 60 * (y / top - 0.62) + 40 * across / top + rng.normal(0, 17)
        r = rng.uniform(0.003, 0.009) * top
        green = (light * 0.94, light * 1.06, light * 0.66)
        canvas.box((x + across - r, x + across + r), (y - 0.7 * r, y + 0.7 * r), z, green)


# ------------------------------------------------------------------ the scene


def draw_far(canvas: Canvas) -> None:
    """Draw what stands 30 metres ahead and farther."""
    for x in range(-16, 17, 4):
        draw_tree(canvas, x + rng.normal(0, 1), 120, rng.uniform(9, 14))
    draw_car(canvas, 3.8, 74, paint=(150, 154, 158), ahead=False)
    draw_tree(canvas, -7.5, 66, 11)
    draw_car(canvas, -0.2, 62, paint=(50, 54, 62))
    draw_lamp(canvas, KERB_LEFT - 0.5, 52, 1.2)
    draw_signs(canvas)
    draw_tree(canvas, 12.5, 38, 10)
    draw_car(canvas, 5.1, 38, paint=(128, 30, 30), ahead=False)
    draw_person(canvas, -4.2, 34, (44, 42, 48))
    draw_person(canvas, -4.8, 33, (86, 40, 38))
    draw_tree(canvas, 10.6, 33, 8)


def draw_near(canvas: Canvas) -> None:
    """Draw what stands less than 30 metres ahead."""
    draw_car(canvas, 5.1, 28, paint=(198, 200, 200), ahead=False, van=True)
    draw_car(canvas, 0.1, 27, paint=(40, 58, 104))
    draw_lamp(canvas, KERB_RIGHT + 0.6, 26, -1.2)
    draw_cyclist(canvas, -1.7, 21, (150, 60, 44))
    draw_tree(canvas, 7.6, 21, 9.5, leafy=False)
    draw_railing(canvas, KERB_LEFT - 0.3, 15, 25)
    draw_person(canvas, 8.2, 18.3, (120, 112, 100))
    draw_person(canvas, 7.6, 18, (38, 48, 72))
    draw_signals(canvas, (KERB_LEFT - 0.6, 13.5), (KERB_RIGHT + 0.9, 16.2))
    draw_car(canvas, 5.1, 14.5, paint=(168, 174, 178), ahead=False)
    draw_person(canvas, -4.0, 12.5, (92, 94, 104), stride=0.26)


def develop(picture: Image.Image) -> Image.Image:
    """Scale down, and add what a small camera adds: sharpening, glare, dim corners, noise."""
    small = picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    rgb: Array = np.asarray(small.filter(ImageFilter.UnsharpMask(1.6, 60, 0)), np.float32)
    glare = np.asarray(small.filter(ImageFilter.GaussianBlur(22)), np.float32)
    rgb = 255 - (255 - rgb) * (255 - 0.13 * np.maximum(glare - 110, 0)) / 255
    v, u = np.mgrid[-1 : 1 : HEIGHT * 1j, -1 : 1 : WIDTH * 1j]
    rgb = np.clip(rgb * (1.05 - 0.1 * (u**2 + v**2))[..., None] / 255, 0, 1)
    rgb = 0.3 * rgb.mean(axis=2, keepdims=True) + 0.7 * rgb
    rgb = 255 * (0.45 * rgb + 0.55 * rgb**2 * (3 - 2 * rgb))  # a small sensor's steep contrast
    blotch = Image.fromarray(rng.normal(0, 2.0, (HEIGHT // 2, WIDTH // 2)).astype(np.float32))
    rgb += np.asarray(blotch.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))[..., None]
    rgb += rng.normal(0, 1.8, rgb.shape)
    return Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8))


def main() -> None:
    """Draw the street and save it beside this file."""
    left = Row([(132, 120, 108), (164, 154, 138), (124, 104, 92)], 0.68, (58.0, 70.0))
    right = Row([(186, 170, 148), (212, 208, 198), (160, 134, 116)], 1.04, (29.0, 39.0))
    canvas = Canvas(draw_planes(left, right))
    draw_far(canvas)
    draw_near(canvas)
    develop(canvas.picture).save(Path(__file__).with_name("street.jpg"), quality=90)


if __name__ == "__main__":
    main()
