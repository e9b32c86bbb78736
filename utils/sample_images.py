"""The sample heroes: cartoons in four classes, all in them decided by a generator that the caller seeds.

They are drawn where there is no data.  Colours, light and pose vary: only shapes give a class away.
"""

import colorsys
import math
import random
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

INK, WHITE = (28, 20, 34), (255, 255, 255)
Colour = tuple[int, int, int]


def draw_picture(name: str, rng: random.Random, widest: int = 700, noise: float = 9) -> Image.Image:
    """A hero in random pose, colour and light before a random background, 200 to `widest` px wide."""
    width = rng.randint(200, widest)
    height = min(max(round(width * rng.uniform(0.8, 1.25)), 200), widest)
    picture = draw_background(width, height, rng)
    side = round(min(width, height) * rng.uniform(0.85, 1.1))
    hero = draw_hero(name, side, rng)
    x = (width - side) // 2 + round(width * rng.uniform(-0.09, 0.09))
    y = (height - side) // 2 + round(height * rng.uniform(-0.05, 0.07))
    shadow = hero.getchannel("A").filter(ImageFilter.GaussianBlur(side / 40)).point(lambda a: a * 0.45)
    picture.paste((10, 10, 25), (x + side // 40, y + side // 30), shadow)
    picture.paste(hero, (x, y), hero)
    return light(picture, rng, noise)


def draw_hero(name: str, side: int, rng: random.Random) -> Image.Image:
    """The hero alone on a transparent square: drawn twice as large, shaded, turned and mirrored at random."""
    pen = Pen(2 * side)
    HEROES[name](pen, rng)
    hero = pen.image.resize((side, side), Image.Resampling.BOX)
    alpha = hero.getchannel("A")
    lit = ImageChops.offset(alpha, -side // 28, -side // 22).filter(ImageFilter.GaussianBlur(side / 45))
    rim = ImageChops.multiply(alpha, ImageChops.invert(lit)).point(lambda value: value * 0.5)
    hero.paste((15, 5, 45), (0, 0), rim)  # the side turned away from the light
    hero.putalpha(alpha)
    if rng.random() < 0.5:
        hero = ImageOps.mirror(hero)
    return hero.rotate(rng.uniform(-16, 16), Image.Resampling.BILINEAR)


# ---- the pen


def near(rng: random.Random, hue: float, saturation: float, value: float, spread: float = 0.04) -> Colour:
    """A colour around this one: a hero's costume comes in many shades."""
    saturation, value = saturation + rng.uniform(-0.12, 0.12), value + rng.uniform(-0.12, 0.08)
    return hsv(hue + rng.uniform(-spread, spread), saturation, value)


def usual(rng: random.Random, hue: float) -> float:
    """The hue that a costume is known for; one in six is of another."""
    return hue if rng.random() < 5 / 6 else rng.random()


def hsv(hue: float, saturation: float, value: float) -> Colour:
    r, g, b = colorsys.hsv_to_rgb(hue % 1, min(max(saturation, 0), 1), min(max(value, 0), 1))
    return round(255 * r), round(255 * g), round(255 * b)


def mix(colour: Colour, share: float, other: Colour = WHITE) -> Colour:
    r, g, b = (round(a + (b - a) * share) for a, b in zip(colour, other, strict=True))
    return r, g, b


def path(text: str) -> list[tuple[float, float]]:
    """The points written as "x y, x y"."""
    pairs = (pair.split() for pair in text.split(","))
    return [(float(x), float(y)) for x, y in pairs]


def curve(points: list, closed: bool = False, steps: int = 10) -> list[tuple[float, float]]:
    """A smooth line through the points (Catmull-Rom)."""
    ends = [points[-1], *points, *points[:2]] if closed else [points[0], *points, points[-1]]
    smooth = []
    for a, b, c, d in zip(*(np.array(ends[k : len(ends) - 3 + k]) for k in range(4)), strict=True):
        for t in np.arange(steps) / steps:
            cubic = (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3
            smooth.append(tuple((0.5 * (2 * b + (c - a) * t + cubic)).tolist()))
    return smooth if closed else [*smooth, points[-1]]


class Pen:
    """Cartoon shapes with dark outlines on a transparent square.

    Points are texts as for path(); they, radii and widths are hundredths of the side, y downwards.
    """

    def __init__(self, side: int):
        self.unit, self.flip = side / 100, 1
        self.image = Image.new("RGBA", (side, side))
        self.canvas = ImageDraw.Draw(self.image)

    def sides(self) -> Iterator[int]:
        """For a loop whose body is drawn twice: mirrored at the middle line, then as it is."""
        for self.flip in (-1, 1):
            yield self.flip

    def to_pixels(self, points) -> list[tuple[float, float]]:
        return [((50 + self.flip * (x - 50)) * self.unit, y * self.unit) for x, y in points]

    def shape(self, points: str | list, fill: Colour, ink: float = 0.8) -> None:
        """A polygon; half of the outline lies outside."""
        points = self.to_pixels(path(points) if isinstance(points, str) else points)
        if ink:
            self.canvas.line([*points, *points[:2]], INK, max(1, round(2 * ink * self.unit)), "curve")
        self.canvas.polygon(points, fill)

    def blob(self, points: str, fill: Colour, ink: float = 0.8) -> None:
        self.shape(curve(path(points), closed=True), fill, ink)

    def body(self, half: str, fill: Colour, ink: float = 0.8) -> None:
        """A blob that is its own mirror image; `half` is its right half, from the top down."""
        right = path(half)
        self.shape(curve(right + [(100 - x, y) for x, y in right[::-1] if x != 50], closed=True), fill, ink)

    def oval(self, at: str, rx: float, ry: float, fill: Colour, ink: float = 0.8) -> None:
        ((x, y),), turn = path(at), 2 * math.pi / 48
        steps = range(48)
        self.shape([(x + rx * math.cos(k * turn), y + ry * math.sin(k * turn)) for k in steps], fill, ink)

    def line(self, points: str, width: float, fill: Colour = INK) -> None:
        self.limb(points, width, width, fill, 0)

    def limb(self, points: str, start: float, end: float, fill: Colour, ink: float = 0.8) -> None:
        """A smooth tube that tapers from `start` to `end` (widths)."""
        smooth = self.to_pixels(curve(path(points), steps=24))
        for extra, colour in ((2 * ink, INK), (0, fill)) if ink else ((0, fill),):
            for (x, y), width in zip(smooth, np.linspace(start, end, len(smooth)).tolist(), strict=True):
                radius = (width + extra) * self.unit / 2
                self.canvas.ellipse((x - radius, y - radius, x + radius, y + radius), colour)


def eyes(pen: Pen, at: str, size: float, white: Colour, iris: Colour) -> None:
    for _ in pen.sides():
        pen.oval(at, size, size, white, 0.6)
        pen.oval(at, size * 0.6, size * 0.75, iris, 0)
        pen.oval(at, size * 0.3, size * 0.4, INK, 0)


# ---- the heroes


def draw_pudge(pen: Pen, rng: random.Random) -> None:
    """Pudge of Dota: a mountain of stitched flesh with a small head, a hook on a chain and a cleaver."""
    skin, apron = near(rng, 0.03, 0.38, 0.78, 0.08), near(rng, rng.random(), 0.45, 0.5)
    steel, leather, gore = near(rng, 0.6, 0.1, 0.75), near(rng, 0.08, 0.5, 0.35), near(rng, 0.99, 0.75, 0.6)
    lift, white, mouth = rng.uniform(-8, 8), (245, 235, 200), (70, 20, 30)
    for side in pen.sides():
        pen.limb("62 78, 65 92", 15, 12, skin)
        pen.oval("66.5 95", 8, 3.5, leather)
        pen.limb(f"72 42, 86 {46 + side * lift / 2}, 87 {58 + side * lift}", 17, 12, skin)
    for link in range(5):  # the hook's chain hangs from the right fist
        pen.oval(f"{88 + link} {63 + lift + 3 * link}", 2.2 - link % 2, 2.2, steel, 0.6)
    y = 76 + lift
    pen.limb(f"92 {y}, 94 {y + 7}, 91 {y + 14}, 83 {y + 15}, 78 {y + 10}, 79 {y + 4}", 5, 1.2, steel)
    x, y, turn = 13, 58 - lift, rng.uniform(-6, 6)  # the cleaver, in the left
    pen.limb(f"{x} {y + 9}, {x} {y - 6}", 4, 4, leather)
    edge = f"{x + turn + 6} {y - 34}, {x + 7} {y - 7}, {x - 7} {y - 7}"
    pen.shape(f"{x + turn - 9} {y - 32}, {edge}", steel)
    for side in pen.sides():
        pen.oval(f"87 {58 + side * lift}", 6.5, 6, skin)
    pen.body("50 31, 68 34, 80 50, 82 70, 70 85, 50 88", skin, 1)
    pen.body("50 79, 76 73, 74 88, 62 84, 50 93", apron)
    pen.limb("21 71, 50 79, 79 71", 3.6, 3.6, leather)
    pen.oval("50 78.5", 5, 4.2, steel)
    pen.blob("54 47, 62 44, 69 49, 66 56, 58 57", gore)  # the torn side shows the ribs
    for y in (48, 51, 54):
        pen.line(f"56.5 {y + 1}, 61 {y}, 66 {y + 1}", 1.3, white)
    for stitch in ("30 52, 36 61, 34 69", "31 58, 38 55", "32 63, 39 61", "31 67, 38 67"):
        pen.line(stitch, 0.9)
    pen.body("50 13, 59 18, 61 29, 63 36, 50 41", mix(skin, 0.12))  # the head
    pen.body("50 30.5, 59 32, 57 37, 50 38.5", mouth)
    pen.shape("43 31.5, 45 34.5, 47 31.5, 49 34.5, 51 31.5, 53 34.5, 55 31.5, 56 34, 57 31.5", white, 0)
    eyes(pen, "54.5 25.5", 2.2, white, near(rng, 0.14, 0.5, 1))


def draw_tatsumaki(pen: Pen, rng: random.Random) -> None:
    """Tatsumaki: a small girl in a black dress, green curls aflare, stones afloat in her power's light."""
    hair, skin = near(rng, 0.36, 0.72, 0.62, 0.06), near(rng, 0.07, 0.22, 0.95, 0.02)
    dress = near(rng, rng.random(), 0.3, 0.17)
    for _ in range(rng.randint(3, 6)):
        angle, size = rng.uniform(0, 2 * math.pi), rng.uniform(2, 4)
        at = f"{50 + 43 * math.cos(angle)} {52 + 40 * math.sin(angle)}"
        pen.oval(at, size, size * rng.uniform(0.6, 1), near(rng, 0.08, 0.15, 0.55), 0.6)
    flare, raised, wide = rng.uniform(-3, 3), rng.random() < 0.55, rng.uniform(-3, 3)
    for _ in pen.sides():  # the curls behind the head, from the lowest to the crown
        for x, y, size in ((72, 40, 8), (76, 30, 8), (74, 20, 8), (68, 12, 8), (58, 8, 8)):
            x, y = x + flare, y + flare / 2
            tip = f"{x} {y}, {x + 4} {y - 1}, {x + 5} {y - 5}, {x + 1} {y - 6}, {x} {y - 3}"
            pen.limb(f"54 30, {(x + 54) / 2} {y + 4}, {tip}", size, 2, hair)
            pen.line(f"{(x + 54) / 2} {y + 3}, {x} {y - 0.5}, {x + 3} {y - 2}", 1, mix(hair, 0.3))
        pen.limb(f"54 70, 55 82, {56 + wide / 2} 94", 5.5, 3.4, skin)
        pen.oval(f"{57 + wide / 2} 95.5", 3.6, 2, INK)
        arm = f"68 {57 + wide}, {76 + wide / 2} {46 + wide}" if raised else "68 60, 59 66"  # or on her hips
        pen.limb(f"57 53, {arm}", 6, 5, dress)
        pen.oval(arm.split(", ")[1], 3, 2.8, skin)
    hem = "26 78, 30 84, 36 79, 42 86, 50 80, 58 86, 64 79, 70 84, 74 78"
    pen.shape(f"44 49, 42 58, 43 62, 36 70, {hem}, 64 70, 57 62, 58 58, 56 49", dress)
    pen.body("50 20, 62 29, 60 39, 50 46", skin)  # the head
    eyes(pen, "55 35", 3.2, WHITE, near(rng, 0.38, 0.8, 0.65))
    pen.line("47.8 41.6, 50 40.8, 52.2 41.6", 0.9)
    locks = "36.5 35, 40.5 28.5, 43 31.5, 46.5 27.5, 50.5 31.5, 54 27.5, 57.5 31.2, 59.8 28.2, 63.5 35"
    pen.shape(f"{locks}, 64.5 27, 58 18, 50 15.5, 42 18, 35.5 27", hair)  # pointed locks under a cap
    for _ in pen.sides():
        pen.limb("62 27, 66 34, 65 42, 69 44, 70 40", 6, 2, hair)  # the curls at her cheeks


def draw_saitama(pen: Pen, rng: random.Random) -> None:
    """Saitama: an egg of a bald head, a blank face, a plain suit with gloves and boots, a white cape."""
    suit, glove = near(rng, usual(rng, 0.14), 0.65, 0.93), near(rng, usual(rng, 0.0), 0.75, 0.8)
    skin, cape = near(rng, 0.075, 0.28, 0.96, 0.02), near(rng, rng.random(), 0.08, 0.93)
    wind, step, punch, belt = rng.uniform(-10, 10), rng.uniform(0, 4), rng.random() < 0.45, (45, 40, 45)
    low = f"{75 + wind} 72, {80 + wind} 91, {64 + wind} 88, {50 + wind} 92, {34 + wind} 88, {20 + wind} 91"
    pen.blob(f"37 42, 50 39, 63 42, {low}, {25 + wind} 70", cape)
    for _ in pen.sides():
        pen.limb(f"54.5 66, {56 + step} 80, {56.5 + step} 90", 10.5, 8, suit)
        pen.limb(f"{56.3 + step} 83, {56.5 + step} 92", 9.5, 9, glove)
        pen.oval(f"{58 + step} 95", 6.5, 3, glove)
    for side in pen.sides():
        if side < 0 or not punch:
            pen.limb("62 47, 70 57, 69 68", 9, 7.5, suit)
            pen.limb("69.5 62, 69 68", 9, 9, glove)
            pen.oval("69 68", 5, 5.2, glove)
    pen.body("50 42, 64 45, 61 57, 59 69, 50 71", suit)
    pen.limb("41 66, 59 66", 2.8, 2.8, belt)
    pen.oval("50 66", 3.4, 2.6, near(rng, 0.13, 0.7, 0.9))
    pen.body("50 42, 60 39, 64 43, 56 45.5, 50 47.5", cape)
    for _ in pen.sides():
        pen.oval("59 44.4", 1.7, 1.7, mix(suit, 0.2))
        pen.oval("63 28.5", 2.5, 4, skin)
    pen.body("50 6, 60.5 12, 63.2 24, 61 35, 55 41, 50 42.3", skin)  # the head
    pen.oval("45.5 13", 4.2, 2.2, mix(skin, 0.9), 0)  # the gloss
    eyes(pen, "55.6 27", 2.8, WHITE, WHITE)
    pen.line("46 36, 54 36", 1)
    if punch:  # straight at the viewer
        x, y, size = 66 + rng.uniform(-3, 3), 58 + rng.uniform(-6, 4), rng.uniform(12, 16)
        pen.limb(f"62 47, {(66 + x) / 2} {(47 + y) / 2}, {x} {y}", 9, 13, suit)
        pen.oval(f"{x} {y}", size, size * 0.92, glove)
        for finger in (-0.58, -0.19, 0.2, 0.59):
            pen.oval(f"{x + finger * size} {y - 1}", size * 0.24, size * 0.42, mix(glove, 0.1), 0.6)


def draw_parovozov(pen: Pen, rng: random.Random) -> None:
    """Arkady Parovozov: a hero under steam, fist first: moustache, goggles, chimney, a wheel on the belt."""
    suit, cape = near(rng, usual(rng, 0.6), 0.65, 0.75), near(rng, usual(rng, 0.99), 0.8, 0.8)
    skin, hair = near(rng, 0.06, 0.35, 0.93, 0.02), near(rng, 0.07, 0.55, rng.choice([0.2, 0.3, 0.45]))
    brass, iron, puff = near(rng, 0.12, 0.65, 0.9), near(rng, 0.6, 0.15, 0.28), near(rng, 0.6, 0.05, 0.97)
    wind, reach = rng.uniform(-7, 7), rng.uniform(-4, 4)
    for ink in (0.7, 0):  # all the outlines first, so that the lobes become one cloud
        for x, y, size in ((69, 20, 4), (74, 18, 4), (75, 12, 5), (81, 13, 4.5), (84, 7, 5.5)):
            pen.oval(f"{x} {y + wind / 4}", size, size * 0.9, puff, ink)
    low = f"{70 + wind} 89, {58 + wind} 95, {46 + wind} 88, {34 + wind} 94"
    pen.blob(f"38 42, 62 42, {74 + wind / 2} 66, {low}, {25 + wind / 2} 66", cape)
    pen.shape("61 50, 69 50, 72 28, 64 28", iron)  # the chimney on his back
    pen.shape("62 28.5, 74.5 28.5, 75.5 23.5, 61.5 23.5", mix(iron, 0.15))
    for _ in pen.sides():
        pen.limb("54 66, 55 79, 54.6 88", 10, 7, suit)
        pen.limb("54.8 80, 54.5 91", 8.5, 7.5, cape)
        pen.oval("55.5 94", 5.2, 3.2, cape)
    pen.limb("61 48, 72 56, 62 64", 10, 7.5, suit)
    pen.oval("62 64", 4.6, 4.4, cape)
    pen.body("50 42, 66 46, 62 56, 58 68, 50 70", suit)
    pen.oval("50 53.5", 7, 6.4, brass)  # a letter in its badge
    pen.shape("46 57.5, 50 48.5, 54 57.5, 52 57.5, 50 53, 48 57.5", mix(cape, 0.15, INK), 0)
    pen.limb("42 66.5, 58 66.5", 3.2, 3.2, brass)
    pen.oval("50 66.5", 5.4, 5.4, (190, 45, 40))  # a locomotive's wheel on the belt
    for spoke in ("50 62, 50 71", "45.5 66.5, 54.5 66.5", "47 63.5, 53 69.5", "47 69.5, 53 63.5"):
        pen.line(spoke, 0.9, WHITE)
    for _ in pen.sides():
        pen.oval("61.3 30", 2.2, 3.2, skin)
    pen.body("50 16, 60 19, 61 31, 60 40, 54 44.5", skin)  # the head
    pen.blob("38.5 25, 38 17, 45 11, 56 9, 64 14, 59 16, 61.5 25, 57 20, 46 21", hair)
    pen.line("38.5 27.5, 61.5 27.5", 2.6)
    eyes(pen, "55 27.8", 4.6, brass, WHITE)
    pen.body("50 34, 54 33.6, 59 36.5, 62.5 34, 60 39, 54 38.5, 50 36.6", hair, 0.6)  # the moustache
    x, y = 21 + reach, 18 - reach  # the fist ahead
    pen.limb(f"38 48, 25 38, {x} {y}", 10, 9, suit)
    pen.limb(f"{(25 + x) / 2} {(38 + y) / 2}, {x} {y}", 10, 10.5, cape)
    pen.oval(f"{x} {y}", 7, 6.4, cape)


HEROES = {"Пудж": draw_pudge, "Тацумаки": draw_tatsumaki, "Сайтама": draw_saitama}
HEROES["АркадийПаровозов"] = draw_parovozov

# ---- around them


def draw_background(width: int, height: int, rng: random.Random) -> Image.Image:
    """A gradient of two random colours; before it hills, rays, bubbles or nothing."""
    ends = [hsv(rng.random(), rng.uniform(0.15, 0.75), rng.uniform(0.3, 1)) for _ in range(2)]
    gradient = ImageOps.colorize(
        Image.linear_gradient("L").rotate(rng.choice([0, 90, 180])), ends[0], ends[1]
    )
    picture = gradient.resize((width, height)).convert("RGB")
    canvas, hue, kind = ImageDraw.Draw(picture), rng.random(), rng.choice(["hills", "rays", "bubbles", ""])
    if kind == "hills":
        for layer in range(3):
            heights = [height * (0.5 + 0.15 * layer + rng.uniform(-0.1, 0.1)) for _ in range(5)]
            line = curve([(width * step / 4, y) for step, y in enumerate(heights)])
            canvas.polygon([*line, (width, height), (0, height)], hsv(hue, 0.5, 0.75 - 0.15 * layer))
    elif kind == "rays":
        x, y, far = width * rng.uniform(0.3, 0.7), height * rng.uniform(0.3, 0.7), 2 * max(width, height)
        for degrees in range(0, 360, rng.choice([24, 30, 40])):
            box = (x - far, y - far, x + far, y + far)
            canvas.pieslice(box, degrees, degrees + 15, hsv(hue, 0.4, 0.95))
    elif kind == "bubbles":
        for _ in range(rng.randint(8, 22)):
            x, y, size = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.03, 0.18) * width
            colour = hsv(hue + rng.uniform(-0.15, 0.15), rng.uniform(0.2, 0.7), rng.uniform(0.35, 1))
            canvas.ellipse((x - size, y - size, x + size, y + size), colour)
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.008) * width))


def light(picture: Image.Image, rng: random.Random, noise: float) -> Image.Image:
    """Coloured light falling off to one side, and a camera's noise of up to `noise` grey levels."""
    numbers = np.random.default_rng(rng.getrandbits(64))
    pixels = np.asarray(picture, dtype=np.float32)
    height, width, _ = pixels.shape
    angle, fall = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.35)
    ramp = np.linspace(-1, 1, width)[None, :, None] * math.cos(angle)
    ramp = ramp + np.linspace(-1, 1, height)[:, None, None] * math.sin(angle)
    lamp = np.array(hsv(rng.random(), rng.uniform(0, 0.18), 1)) / 255 * rng.uniform(0.8, 1.15)
    grain = numbers.normal(0, rng.uniform(0, noise), (height, width, 1))
    pixels = pixels * (1 + fall * ramp) * lamp + grain
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
