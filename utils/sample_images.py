"""The sample that is drawn where there are no images: four heroes, of whom only shapes tell the class."""

import colorsys
import math
import random
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from utils import images
from utils.images import SPLITS, is_sample, visible_files
from utils.utils import UserError, write_atomic

COUNTS = {"train": 18, "test": 25}  # per class; 5 epochs at 224 to 512 px: 12 minutes on 2 slow cores
LAYOUT = "put images into {data}/train/<class>/ and {data}/test/<class>/, or name another folder with --data"

# Name, hue, saturation and value in 0..1.
COLOURS = """
    ink .75 .4 .12; white .13 .05 .97; skin .06 .33 .9; steel .6 .12 .72; iron .6 .15 .3; brown .08 .55 .38
    yellow .14 .65 .92; red .99 .75 .78; blue .6 .65 .75; green .36 .7 .6; black .7 .3 .17"""
# Shapes, those behind first; * draws the mirror image, too.  Numbers are hundredths of the side, y downwards:
# oval: centre, radii; tube: radii at both ends, points; blob (smooth) and area: points.
HEROES = {
    "Пудж": """
        *tube skin 7 6  62 78  65 92;  *oval brown 66 95  8 4;  *tube skin 9 6  70 42  86 46  87 60
        tube steel 1 1  88 62  92 77;  tube steel 2.6 .7  92 77  94 84  90 91  82 91  78 84
        area steel 5 24  20 22  20 51  7 51;  tube brown 2 2  13 51  13 66;  *oval skin 87 60  6.5 6
        blob skin 50 31  69 35  81 52  82 70  70 85  50 88  30 85  18 70  19 52  31 35
        blob green 25 74  50 79  75 74  74 88  50 93  26 88;  tube brown 2 2  20 70  50 78  80 70
        oval steel 50 78  5 4;  blob red 54 46  66 44  70 50  62 58;  *tube ink .6 .6  30 52  36 61  34 69
        blob skin 50 12  59 17  63 36  50 42  37 36  41 17;  oval red 50 34  8 4
        *oval white 54.5 25  2.4 2.4;  *oval ink 54.5 25  1.1 1.4;  *area white 42 32  46 37  49 32""",
    "Тацумаки": """
        *tube green 4 1  54 28  73 36  78 42  82 37;  *tube green 4 1  54 26  76 25  81 30  85 24
        *tube green 4 1  54 22  72 14  79 17  80 10;  *tube green 4 1  54 20  62 5  69 8  69 2
        *tube skin 2.6 1.8  54 70  55 82  56 94;  *oval ink 57 95  4 2
        *tube black 3 2.5  56 52  68 60  79 50;  *oval skin 79 50  3 3
        area black 44 48  43 62  27 80  36 79  43 86  50 80  57 86  64 79  73 80  57 62  56 48
        oval skin 50 34  11 12
        blob green 35 36  37 22  50 15  63 22  65 36  58 29  54 31  50 28  46 31  42 29
        *oval white 55 35  3.2 3.2;  *oval ink 55 35  1.5 1.9
        *tube green 3 1  62 27  66 38  69 45  72 41""",
    "Сайтама": """
        blob white 38 42  62 42  76 70  82 91  50 88  18 91  24 70;  *tube yellow 5 4  54 66  57 80  57 90
        *tube red 4.7 4.5  57 83  57 92;  *oval red 58 95  6.5 3
        *tube yellow 4.5 3.8  62 47  70 57  69 66;  *oval red 69 68  5 5.5
        blob yellow 50 42  64 45  60 60  59 71  41 71  40 60  36 45;  tube ink 1.4 1.4  41 66  59 66
        oval yellow 50 66  3.4 2.6;  *oval skin 63 28  2.5 4
        blob skin 50 6  61 13  62 32  50 42  38 32  39 13;  oval white 45 13  4 2
        *area red 58 44  64 44  61 49;  *oval white 55.6 27  2.8 2.8;  *oval ink 55.6 27  1.3 1.7
        tube ink .6 .6  46 36  54 36""",
    "АркадийПаровозов": """
        oval white 82 8  6 5;  oval white 75 14  5 4.5;  oval white 69 20  4 4
        blob red 38 42  62 42  75 66  70 92  50 88  30 92  25 66;  area iron 61 50  70 50  72 25  63 25
        *tube blue 5 3.5  54 66  55 79  55 88;  *tube red 4.2 3.8  55 80  55 91;  *oval red 55 94  5 3
        tube blue 5 4  61 48  74 56  63 65;  oval red 62 65  5 4.5
        blob blue 50 42  66 46  61 58  58 70  42 70  39 58  34 46;  oval yellow 50 53  7 6.5
        area red 45 57  50 48  55 57  50 53;  oval red 50 66  5.5 5.5;  tube white .6 .6  46 66  54 66
        tube white .6 .6  50 62  50 70;  blob skin 50 16  61 20  60 38  50 45  40 38  39 20
        blob brown 38 25  40 14  52 9  64 14  62 25  56 20  44 20;  *oval yellow 55 28  5 5
        *oval white 55 28  3 3;  *oval ink 55 28  1.4 1.8;  *blob brown 50 35  56 33  63 35  58 39
        tube blue 5 4.5  38 48  26 38  21 20;  tube red 5 5.3  23 29  21 20;  oval red 21 18  7 6.5""",
}


def draw_background(width: int, height: int, rng: random.Random) -> Image.Image:
    """A gradient of two random colours, and before it up to 20 bubbles, out of focus."""
    ends = [hsv(rng.random(), rng.uniform(0.15, 0.75), rng.uniform(0.3, 1)) for _ in range(2)]
    ramp = Image.linear_gradient("L").rotate(rng.choice([0, 90, 180])).resize((width, height))
    picture = ImageOps.colorize(ramp, ends[0], ends[1])
    canvas, hue = ImageDraw.Draw(picture), rng.random()
    for _ in range(rng.randint(0, 20)):
        x, y, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.03, 0.18) * width
        colour = hsv(hue + rng.uniform(-0.15, 0.15), rng.uniform(0.2, 0.7), rng.uniform(0.35, 1))
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), colour)
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.008) * width))


def draw_hero(name: str, side: int, rng: random.Random) -> Image.Image:
    """The hero alone on a transparent square: drawn twice as large, bent, mirrored and turned at random."""
    image = Image.new("RGBA", (2 * side, 2 * side))
    canvas, unit, ink = ImageDraw.Draw(image), side / 50, side / 64
    colours = {}
    for colour, *base in entries(COLOURS):
        hue, saturation, value = map(float, base)
        spread = 0.5 if rng.random() < 0.2 else 0.05  # some wear costumes of any colour
        shade = saturation + rng.uniform(-0.12, 0.12), value + rng.uniform(-0.12, 0.08)
        colours[colour] = hsv(hue + rng.uniform(-spread, spread), *shade)
    bend, slow, start = ([rng.uniform(*ends) for _ in "xy"] for ends in ((-3, 3), (14, 22), (0, 6)))
    for kind, colour, *numbers in entries(HEROES[name]):
        for mirrored in (True, False) if kind.startswith("*") else (False,):
            points, radii = trace(kind.strip("*"), np.array(numbers, dtype=float))
            if mirrored:
                points = points * [-1, 1] + [100, 0]
            points = (points + bend * np.sin(points[:, ::-1] / slow + start)) * unit
            if len(radii):
                for margin, fill in ((ink, colours["ink"]), (0, colours[colour])):
                    low, high = points - radii * unit - margin, points + radii * unit + margin
                    for box in np.hstack([low, high]).tolist():
                        canvas.ellipse(box, fill)
            else:
                corners = [(x, y) for x, y in points.tolist()]
                canvas.line([*corners, *corners[:2]], colours["ink"], round(2 * ink), "curve")
                canvas.polygon(corners, colours[colour])
    image = image.resize((side, side), Image.Resampling.BOX)
    image = ImageOps.mirror(image) if rng.random() < 0.5 else image
    return image.rotate(rng.uniform(-16, 16), Image.Resampling.BILINEAR)


def entries(table: str) -> list[list[str]]:
    return [entry.split() for entry in table.replace("\n", ";").split(";") if entry.strip()]


def trace(kind: str, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points (N, 2) around a shape, or of a tube's middle line with the radii (N, 1)."""
    points, radii = numbers.reshape(-1, 2), np.empty(0)
    if kind == "oval":
        angles = np.arange(32) * math.pi / 16
        points = points[0] + points[1] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    elif kind == "tube":
        (first, last), points = points[0], points[1:]
        points = smooth(np.concatenate([points[:1], points, points[-1:]]))
        radii = np.linspace(first, last, len(points))[:, None]
    elif kind == "blob":
        points = smooth(np.concatenate([points[-1:], points, points[:2]]))
    return points, radii


def smooth(points: np.ndarray) -> np.ndarray:
    """A curve through all points but the first and the last (Catmull-Rom)."""
    a, b, c, d = (points[k : len(points) - 3 + k, None] for k in range(4))
    t = np.linspace(0, 1, 16)[:, None]
    cubic = (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3
    return (b + ((c - a) * t + cubic) / 2).reshape(-1, 2)


def light(picture: Image.Image, rng: random.Random, noise: float) -> Image.Image:
    """Coloured light falling off to one side, and a camera's noise of up to `noise` grey levels."""
    numbers, (width, height) = np.random.default_rng(rng.getrandbits(64)), picture.size
    angle, fall = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.35)
    across, down = np.linspace(-1, 1, width) * math.cos(angle), np.linspace(-1, 1, height) * math.sin(angle)
    lamp = np.array(hsv(rng.random(), rng.uniform(0, 0.18), 1)) / 255 * rng.uniform(0.8, 1.15)
    grain = numbers.normal(0, rng.uniform(0, noise), (height, width, 1))
    pixels = np.asarray(picture) * (1 + fall * (across + down[:, None]))[..., None] * lamp + grain
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def hsv(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    r, g, b = colorsys.hsv_to_rgb(hue % 1, min(max(saturation, 0), 1), min(max(value, 0), 1))
    return round(255 * r), round(255 * g), round(255 * b)


def has_data(data: Path) -> bool:
    """Whether any file or hidden class is the user's, or of a whole sample: an interrupted one is no data."""
    if any(path.is_dir() for split in SPLITS for path in (data / split).glob(".*")):
        return True
    part = data / "sample.part"
    found = [path for path in visible_files(data) if part not in path.parents and path.name != "SAMPLE.txt"]
    if not part.is_dir():
        return bool(found)
    return not images.drawn_hashes(data).issuperset(images.content_hashes(found))


def draw_sample(data: Path, seed: int = 0, counts: dict[str, int] = COUNTS) -> None:
    """Draw the sample heroes into `data`, the same ones for the same seed; nothing where they are already.

    They are drawn in data/sample.part and then moved into place; until that is gone, they are drawn anew.
    Raises UserError rather than touch a user's images.
    """
    part = data / "sample.part"
    if has_data(data):
        if is_sample(data):
            return
        mend = "draw the sample elsewhere: python datasets.py --draw-sample --data sample"
        raise UserError(f"{data} already holds images, which are not mixed with drawn ones; {mend}")
    print(f"no images in {data}: drawing the sample heroes; {LAYOUT.format(data=data)}", flush=True)
    shutil.rmtree(part, ignore_errors=True)
    wanted = [(split, name, index) for split in SPLITS for name in HEROES for index in range(counts[split])]
    files = images.in_threads(lambda what: draw_file(part, seed, *what), wanted, "drawing")
    named = zip(images.content_hashes(files), files, strict=True)
    lines = [f"{digest} {images.relative_name(part, path)}\n" for digest, path in named]
    head = f"Drawn by datasets.py (seed {seed}). What is made with these is marked as sample data."
    write_atomic(data / "SAMPLE.txt", f"{head}\n\n{''.join(lines)}")
    for path in files:
        target = data / path.relative_to(part)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)  # train/ may be a mount or a link to another disk
    shutil.rmtree(part)


def draw_file(folder: Path, seed: int, split: str, name: str, index: int) -> Path:
    """Draw a hero in random pose, colour and light before a random background, 200 px wide or more.

    All is decided by (seed, split, class, index).  Every fourth one is a PNG, smaller, since it reads slowly.
    """
    rng = random.Random(f"{seed}/{split}/{name}/{index}")  # by the text's SHA-512: the same on every system
    png = index % 4 == 3
    widest, noise = (400, 0) if png else (700, 9)
    width = rng.randint(200, widest)
    height = min(max(round(width * rng.uniform(0.8, 1.25)), 200), widest)
    picture = draw_background(width, height, rng)
    side = round(min(width, height) * rng.uniform(0.85, 1.1))
    x = (width - side) // 2 + round(width * rng.uniform(-0.09, 0.09))
    y = (height - side) // 2 + round(height * rng.uniform(-0.05, 0.07))
    hero = draw_hero(name, side, rng)
    picture.paste(hero, (x, y), hero)
    picture = light(picture, rng, noise)
    path = folder / split / name / f"{name} {index + 1:02d}.{'png' if png else 'jpg'}"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=rng.randint(75, 95))  # a JPEG's; PNG knows none
    return path
