"""Paint one product photograph: studio backdrop, shadow, shaped and patterned cloth, light, noise.

Colours are float32 RGB in 0..255. The canvas is SCALE times the picture both ways.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from deploy.rendered.shapes import KNITTED, RIGID, SHAPES, STANDING, TURNABLE, Part, shape

WIDTH, HEIGHT = 240, 320
SCALE = 2  # canvas pixels per picture pixel, both ways
EDGE = 2  # mask pixels per canvas pixel: smooth edges without a larger canvas
QUALITY = 88
ROWS, COLS = HEIGHT * SCALE, WIDTH * SCALE

Rgb = tuple[int, int, int]
Window = tuple[slice, slice]

PATTERNS = ("plain", "striped", "checked", "polka dot", "floral")
OPACITY = {"seam": 0.75, "crease": 0.28, "shine": 0.26, "sheen": 0.3, "warm": 0.12, "glow": 0.45}
SOFT_EDGED = {"crease": 1.5, "shine": 5, "sheen": 3, "warm": 9, "glow": 16}
BACKDROPS = (
    (236, 233, 228),
    (226, 231, 236),
    (238, 228, 224),
    (226, 234, 228),
    (232, 228, 238),
    (240, 235, 222),
    (222, 226, 228),
)
LIGHT_ACCENTS = ((246, 243, 236), (242, 232, 208), (220, 230, 242))
DARK_ACCENTS = ((44, 52, 84), (74, 66, 70), (158, 62, 56), (48, 98, 96))
PETALS = ((250, 240, 232), (246, 186, 190), (250, 214, 120), (206, 66, 84), (150, 120, 190))
LEAF = (92, 128, 84)


@dataclass(frozen=True)
class Look:
    """What a product looks like: its kind, main colour and pattern."""

    kind: str
    colour: Rgb
    pattern: str = "plain"


@dataclass
class Scene:
    """A photograph being painted, with everything its parts share."""

    canvas: np.ndarray  # (ROWS, COLS, 3)
    across: np.ndarray  # (ROWS, COLS) product x of every canvas pixel, in picture pixels
    down: np.ndarray  # (ROWS, COLS) product y
    folds: np.ndarray  # (ROWS, COLS) light on the folds of the cloth, about 1
    palette: dict[str, np.ndarray]  # paint -> (3,)
    pose: np.ndarray  # (2, 2) product to picture
    centre: np.ndarray  # (2,) canvas pixels
    motif: Motif
    knitted: bool


@dataclass(frozen=True)
class Motif:
    """The pattern of one product: its sort, size in pixels, turn and second colours."""

    sort: str
    period: float
    upright: bool
    share: float
    accent: np.ndarray
    petal: np.ndarray
    jitter: np.ndarray  # (32, 32, 3): shift across, shift down and turn of each flower


def photograph(look: Look, rng: np.random.Generator) -> bytes:
    """Draw a product and return the picture as JPEG bytes, WIDTH x HEIGHT pixels."""
    if look.kind not in SHAPES:
        raise ValueError(f"cannot draw a {look.kind!r}; the kinds are {', '.join(SHAPES)}")
    if look.pattern not in PATTERNS:
        raise ValueError(f"no pattern {look.pattern!r}; the patterns are {', '.join(PATTERNS)}")
    scene = _scene(look, rng)
    parts = shape(look.kind)
    _drop_shadow(scene, parts, standing=look.kind in STANDING)
    for part in parts:
        _paint(scene, part)
    sharp = Image.fromarray(np.clip(scene.canvas, 0, 255).astype(np.uint8))
    grain = 1.6 * rng.standard_normal((HEIGHT, WIDTH, 1), np.float32)
    grained = np.clip(np.asarray(sharp.reduce(SCALE)) + grain + 0.5, 0, 255)
    picture = Image.fromarray(grained.astype(np.uint8))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def _scene(look: Look, rng: np.random.Generator) -> Scene:
    """Set up the studio: the product's pose, its colours and print, and the empty backdrop."""
    turn = np.radians(rng.normal(0, 1.2 if look.kind in STANDING else 3.5))
    width, height = rng.uniform(0.86, 0.98) * rng.uniform(0.96, 1.04, 2)
    if look.kind in TURNABLE and rng.random() < 0.5:
        width = -width
    cos, sin = np.cos(turn), np.sin(turn)
    pose = np.array([[cos * width, -sin * height], [sin * width, cos * height]])
    centre = np.array([COLS / 2, ROWS / 2]) + rng.normal(0, 5, 2)
    y, x = np.mgrid[0:ROWS, 0:COLS].astype(np.float32)
    back = np.linalg.inv(pose) / SCALE
    x, y = x - float(centre[0]), y - float(centre[1])
    across, down = (float(a) * x + float(b) * y for a, b in back)
    drape = _clouds(rng, 4, 8) + 0.6 * _clouds(rng, 9, 14)
    folds = 1 + (0.012 if look.kind in RIGID else 0.05) * drape
    if look.kind not in RIGID:
        across, down = across + 1.1 * drape, down + 1.4 * drape
    return Scene(
        _backdrop(rng),
        across,
        down,
        folds,
        _palette(look, rng),
        pose,
        centre,
        _motif(look, rng),
        look.kind in KNITTED,
    )


def _clouds(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    """Smooth noise over the canvas with rows x cols bumps, about -2..2."""
    grid = Image.fromarray(rng.standard_normal((rows, cols)).astype(np.float32))
    return np.asarray(grid.resize((COLS, ROWS), Image.Resampling.BICUBIC))


def _backdrop(rng: np.random.Generator) -> np.ndarray:
    """A softly lit paper sweep in a light tint, (ROWS, COLS, 3)."""
    tint = np.array(BACKDROPS[rng.integers(len(BACKDROPS))], np.float32) + rng.uniform(-5, 3)
    y = np.linspace(0, 1, ROWS, dtype=np.float32)[:, None]
    x = np.linspace(0, 1, COLS, dtype=np.float32)[None, :]
    spot = np.exp(-((x - rng.uniform(0.3, 0.6)) ** 2 + (y - rng.uniform(0.2, 0.45)) ** 2) / 0.35)
    sweep = 1 / (1 + np.exp(-(y - rng.uniform(0.7, 0.8)) / 0.04))
    light = 0.87 + 0.14 * spot - 0.035 * sweep
    return light[..., None] * tint


def _palette(look: Look, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The colour of every paint for a product of this look."""
    main = np.array(look.colour, np.float32)
    dark = main.mean() < 70
    seam = main + 48 if dark else main * 0.62
    metal = ((206, 208, 212), (208, 172, 108), (120, 122, 128))[rng.integers(3)]
    wood = ((168, 120, 74), (120, 78, 48), (206, 168, 120))[rng.integers(3)]
    fixed = {
        "white": (246, 244, 238),
        "dark": (42, 40, 42),
        "metal": metal,
        "wood": wood,
        "darkwood": tuple(0.6 * v for v in wood),
        "leather": (150, 98, 58),
        "shine": (255,) * 3,
        "sheen": (200, 214, 230),
        "warm": (255, 240, 196),
        "glow": (255, 246, 220),
        "ink": (56, 54, 58),
        "glass": ((40, 42, 50), (74, 52, 40), (48, 66, 62))[rng.integers(3)],
        "face": ((244, 242, 236), (44, 46, 56), (234, 226, 208))[rng.integers(3)],
        "zipper": metal,
        "base": wood,
        "cup": (226, 220, 210),
        "elastic": (58, 54, 56),
    }
    colours = {name: np.array(rgb, np.float32) for name, rgb in fixed.items()}
    if colours["face"].mean() < 90:
        colours["ink"] = colours["white"]
    return colours | {
        "cloth": main,
        "plain": main * 0.97,
        "rib": main * 0.86 + 4,
        "deep": main * 0.78 + 3,
        "inside": main * 0.5 + 4,
        "seam": seam,
        "fringe": main * 0.92,
        "accent": _accent(main, rng),
        "crease": seam,
    }


def _accent(main: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A second colour that stands out from the main one."""
    choices = np.array(DARK_ACCENTS if main.mean() > 150 else LIGHT_ACCENTS, np.float32)
    return choices[rng.integers(len(choices))]


def _motif(look: Look, rng: np.random.Generator) -> Motif:
    """Choose the size and second colours of a product's pattern."""
    main = np.array(look.colour, np.float32)
    sizes = {"striped": (11, 18), "checked": (16, 25), "polka dot": (12, 19), "floral": (25, 33)}
    petals = np.array(PETALS, np.float32)
    contrast = np.abs(petals - main).sum(axis=1)
    return Motif(
        sort=look.pattern,
        period=rng.uniform(*sizes.get(look.pattern, (10, 11))),
        upright=rng.random() < 0.3,
        share=rng.uniform(0.28, 0.42),
        accent=_accent(main, rng),
        petal=petals[rng.choice(np.argsort(contrast)[-3:])],
        jitter=rng.uniform(-1, 1, (32, 32, 3)).astype(np.float32),
    )


def _drop_shadow(scene: Scene, parts: tuple[Part, ...], *, standing: bool) -> None:
    """Darken the backdrop behind the product, and on the floor below it when it stands."""
    whole = Image.new("L", (COLS, ROWS))
    pen = ImageDraw.Draw(whole)
    for part in parts:
        for loop in part.loops if part.paint not in OPACITY else ():
            _trace(pen, _place(scene, loop), part.stroke * SCALE)
    soft = np.asarray(whole.filter(ImageFilter.GaussianBlur(9 * SCALE)), np.float32) / 255
    shift = 3 if standing else 7
    scene.canvas *= 1 - 0.34 * np.roll(soft, (shift * SCALE, shift), axis=(0, 1))[..., None]
    if standing:
        left, top, right, bottom = whole.getbbox()
        # Only the lowest sixth touches the floor: a mug's handle must not throw a pool of its own.
        feet = whole.crop((left, bottom - (bottom - top) // 6, right, bottom))
        flat = feet.resize((right - left, 22 * SCALE))
        floor = Image.new("L", (COLS, ROWS))
        floor.paste(flat, (left + 4 * SCALE, bottom - 10 * SCALE))
        pool = np.asarray(floor.filter(ImageFilter.GaussianBlur(5 * SCALE)), np.float32) / 255
        scene.canvas *= 1 - 0.55 * pool[..., None]


def _paint(scene: Scene, part: Part) -> None:
    """Paint one part over the canvas: its contact shadow, then its colour in the light."""
    depth = part.options.get("d", 0.0)
    blur = SOFT_EDGED.get(part.paint, 0.0)
    window, mask = _mask(scene, part, margin=SCALE * (2 * max(depth, blur, 2) + part.stroke))
    opacity = OPACITY.get(part.paint, 1.0)
    view = scene.canvas[window]
    light = np.ones((1, 1), np.float32)
    if depth and not blur:
        soft = _blurred(mask, depth * SCALE)
        near = np.asarray(mask.filter(ImageFilter.BoxBlur(4 * SCALE)), np.float32) / 255
        view *= 1 - 0.3 * np.roll(near, (2 * SCALE, SCALE), axis=(0, 1))[..., None]
        step = max(1, round(depth * SCALE * 0.5))
        slope = np.roll(soft, (-step, -step), (0, 1)) - np.roll(soft, (step, step), (0, 1))
        light = 0.3 * slope + 0.2 * soft + 0.82
    elif blur:
        mask = Image.fromarray((_blurred(mask, blur * SCALE) * 255).astype(np.uint8))
    if part.options.get("tube"):
        light = light * _tube(mask)
    if part.paint in ("cloth", "plain", "rib", "deep"):
        light = light * scene.folds[window]
    colour = (
        _cloth(scene, part, window)
        if part.paint in ("cloth", "rib")
        else (scene.palette[part.paint])
    )
    cover = np.asarray(mask, np.float32)[..., None] * (opacity / 255)
    # The second term lets light show on black, where multiplying alone would leave nothing.
    view += cover * (colour * light[..., None] + 26 * (light[..., None] - 1) - view)


def _place(scene: Scene, loop: np.ndarray) -> np.ndarray:
    """Where a loop (N, 2) of product points lies on the canvas."""
    return loop @ scene.pose.T * SCALE + scene.centre


def _trace(pen: ImageDraw.ImageDraw, loop: np.ndarray, stroke: float) -> None:
    """Fill a closed loop, or stroke an open one with round ends."""
    points = [tuple(point) for point in loop]
    if not stroke:
        pen.polygon(points, fill=255)
        return
    pen.line(points, fill=255, width=max(1, round(stroke)), joint="curve")
    for x, y in (points[0], points[-1]):
        pen.ellipse((x - stroke / 2, y - stroke / 2, x + stroke / 2, y + stroke / 2), fill=255)


def _mask(scene: Scene, part: Part, margin: float) -> tuple[Window, Image.Image]:
    """The part's coverage as an 8-bit image, and the window of the canvas that it fills."""
    loops = [_place(scene, loop) for loop in part.loops]
    every = np.concatenate(loops)
    low = np.maximum(every.min(axis=0) - margin, 0).astype(int)
    high = np.minimum(every.max(axis=0) + margin, (COLS, ROWS)).astype(int)
    width, height = high - low
    big = Image.new("L", (int(width) * EDGE, int(height) * EDGE))
    pen = ImageDraw.Draw(big)
    for loop in loops:
        _trace(pen, (loop - low) * EDGE, part.stroke * SCALE * EDGE)
    return (slice(low[1], high[1]), slice(low[0], high[0])), big.reduce(EDGE)


def _blurred(mask: Image.Image, radius: float) -> np.ndarray:
    """A mask blurred by a radius in canvas pixels, as float32 in 0..1."""
    return np.asarray(mask.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255


def _tube(mask: Image.Image) -> np.ndarray:
    """The light across an upright cylinder that fills the mask, (1, width)."""
    left, _, right, _ = mask.getbbox()
    x = (np.arange(mask.width, dtype=np.float32) - left) / max(1, right - left) * 2 - 1
    return (1.08 - 0.34 * (x + 0.35) ** 2)[None, :]


def _cloth(scene: Scene, part: Part, window: Window) -> np.ndarray:
    """The cloth's colour with its pattern in a window of the canvas, (rows, cols, 3)."""
    u = scene.across[window]
    v = scene.down[window] + part.options.get("s", 0.0) * np.abs(u)
    colour = np.broadcast_to(scene.palette[part.paint], (*u.shape, 3))
    if part.paint == "cloth":
        for weight, ink in _layers(scene.motif, u, v):
            colour = colour + weight[..., None] * (ink - colour)
    if scene.knitted or part.paint == "rib":
        ribs = np.sin(u * 2.1 + (0.0 if part.paint == "rib" else 1.2 * np.abs(np.sin(v))))
        colour = colour * (1 + 0.05 * ribs)[..., None]
    return colour


def _band(x: np.ndarray, period: float, share: float) -> np.ndarray:
    """Soft-edged stripes: 1 over a share of every period of x, else 0."""
    wave = np.abs((x / period) % 1 - 0.5) * 2
    return np.clip((wave - 1 + share) * period + 0.5, 0, 1)


def _layers(motif: Motif, u: np.ndarray, v: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The inks of a pattern from bottom to top: how much covers each pixel, and its colour."""
    if motif.sort == "striped":
        return [(_band(u if motif.upright else v, motif.period, motif.share), motif.accent)]
    if motif.sort == "checked":
        weave = _band(u, motif.period, 0.42) + _band(v, motif.period, 0.42)
        return [(0.42 * weave, motif.accent)]
    if motif.sort == "polka dot":
        x = u / motif.period
        y = v / motif.period + 0.5 * (np.floor(x) % 2)
        away = np.hypot(x % 1 - 0.5, y % 1 - 0.5) * motif.period
        return [(np.clip(motif.period * 0.26 - away + 0.5, 0, 1), motif.accent)]
    if motif.sort == "floral":
        return _flowers(motif, u, v)
    return []


def _flowers(motif: Motif, u: np.ndarray, v: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Five-petalled flowers with yellow hearts, and leaves between them."""
    x, y = u / motif.period, v / motif.period
    y = y + 0.5 * (np.floor(x) % 2)
    jitter = motif.jitter[np.floor(y).astype(int) % 32, np.floor(x).astype(int) % 32]
    dx = (x % 1 - 0.5 - 0.1 * jitter[..., 0]) * motif.period
    dy = (y % 1 - 0.5 - 0.1 * jitter[..., 1]) * motif.period
    away = np.hypot(dx, dy)
    size = motif.period * (0.32 + 0.05 * jitter[..., 2])
    petals = size * (0.74 + 0.26 * np.cos(5 * np.arctan2(dy, dx) + 3 * jitter[..., 2]))
    lx = (x + 0.5) % 1 - 0.5
    ly = (y + 0.25) % 1 - 0.5
    leaf = np.hypot((lx + ly) * 1.4, (lx - ly) * 3.2) * motif.period
    green = np.array(LEAF, np.float32)
    heart = np.array((232, 184, 72), np.float32)
    return [
        (np.clip(motif.period * 0.24 - leaf, 0, 1), green),
        (np.clip(petals - away + 0.5, 0, 1), motif.petal),
        (np.clip(size * 0.3 - away + 0.5, 0, 1), heart),
    ]
