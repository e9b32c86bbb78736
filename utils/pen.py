"""What the sample heroes are drawn with: colours, smooth lines, a pen, backgrounds and light."""

import colorsys
import math
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps


def hsv(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, min(max(saturation, 0), 1), min(max(value, 0), 1))
    return round(255 * red), round(255 * green), round(255 * blue)


def near(
    rng: random.Random, hue: float, saturation: float, value: float, spread: float = 0.04
) -> tuple[int, int, int]:
    """A colour around this one: a hero's costume comes in many shades."""
    return hsv(
        hue + rng.uniform(-spread, spread),
        saturation + rng.uniform(-0.12, 0.12),
        value + rng.uniform(-0.12, 0.08),
    )


def usual(rng: random.Random, hue: float) -> float:
    """The hue that a costume is known for; one in six is of another."""
    return hue if rng.random() < 5 / 6 else rng.random()


def darker(colour: tuple[int, int, int], factor: float = 0.7) -> tuple[int, int, int]:
    return tuple(round(channel * factor) for channel in colour)


def lighter(colour: tuple[int, int, int], factor: float = 0.45) -> tuple[int, int, int]:
    return tuple(round(channel + (255 - channel) * factor) for channel in colour)


def path(text: str, x: float = 0, y: float = 0) -> list[tuple[float, float]]:
    """The points written in `text` as "dx dy, dx dy", from (x, y)."""
    pairs = (pair.split() for pair in text.split(","))
    return [(x + float(dx), y + float(dy)) for dx, dy in pairs]


def both(text: str, x: float, y: float = 0) -> list[tuple[float, float]]:
    """A symmetrical outline around the upright line at x; `text` is its right half, from the top down."""
    right = path(text, x, y)
    return right + [(2 * x - px, py) for px, py in reversed(right) if px != x]


def polar(x: float, y: float, radius: float, angle: float) -> tuple[float, float]:
    return x + radius * math.cos(angle), y + radius * math.sin(angle)


def spline(t: float, a: float, b: float, c: float, d: float) -> float:
    """Between b and c, with a before and d behind them, at 0 <= t < 1 (Catmull-Rom)."""
    return 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)


def curve(points, closed: bool = False, steps: int = 10) -> list[tuple[float, float]]:
    """A smooth line through the points (Catmull-Rom)."""
    points = list(points)
    ends = [points[-1], *points, points[0], points[1]] if closed else [points[0], *points, points[-1]]
    smooth = []
    for corners in zip(ends, ends[1:], ends[2:], ends[3:], strict=False):
        axes = list(zip(*corners, strict=True))
        smooth += [tuple(spline(step / steps, *axis) for axis in axes) for step in range(steps)]
    return smooth if closed else [*smooth, points[-1]]


class Pen:
    """Cartoon shapes with dark outlines on a transparent square; coordinates and widths in hundredths of
    its side, y downwards."""

    INK = (28, 20, 34)

    def __init__(self, side: int):
        self.unit = side / 100
        self.image = Image.new("RGBA", (side, side))
        self.canvas = ImageDraw.Draw(self.image)

    def at(self, points):
        return [(x * self.unit, y * self.unit) for x, y in points]

    def shape(self, points, fill, ink: float = 0.8):
        """A polygon; half of the outline lies outside."""
        points = self.at(points)
        if ink:
            width = max(1, round(2 * ink * self.unit))
            self.canvas.line([*points, points[0], points[1]], self.INK, width, joint="curve")
        self.canvas.polygon(points, fill)

    def blob(self, points, fill, ink: float = 0.8):
        self.shape(curve(points, closed=True), fill, ink)

    def oval(self, x, y, rx, ry, fill, angle: float = 0, ink: float = 0.8):
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        outline = []
        for step in range(48):
            across, down = rx * math.cos(2 * math.pi * step / 48), ry * math.sin(2 * math.pi * step / 48)
            outline.append((x + across * cos - down * sin, y + across * sin + down * cos))
        self.shape(outline, fill, ink)

    def line(self, points, width: float, fill=INK):
        points = self.at(points)
        self.canvas.line(points, fill, max(1, round(width * self.unit)), joint="curve")
        for x, y in (points[0], points[-1]):
            radius = width * self.unit / 2
            self.canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill)

    def limb(self, points, start: float, end: float, fill, ink: float = 0.8):
        """A smooth tube that tapers from `start` to `end` (widths)."""
        smooth = curve(points, steps=24)
        for extra, colour in ((2 * ink, self.INK), (0, fill)):
            for step, (x, y) in enumerate(self.at(smooth)):
                radius = (start + (end - start) * step / (len(smooth) - 1) + extra) * self.unit / 2
                self.canvas.ellipse((x - radius, y - radius, x + radius, y + radius), colour)

    def glow(self, x, y, rx, ry, fill, strength: float):
        """A soft light behind what is drawn next."""
        side = self.image.width
        mask = Image.new("L", (side // 8, side // 8))
        unit = self.unit / 8
        box = ((x - rx) * unit, (y - ry) * unit, (x + rx) * unit, (y + ry) * unit)
        ImageDraw.Draw(mask).ellipse(box, round(255 * strength))
        mask = mask.filter(ImageFilter.GaussianBlur(side / 130)).resize((side, side))
        self.image.alpha_composite(Image.merge("RGBA", (*Image.new("RGB", (side, side), fill).split(), mask)))


def draw_background(width: int, height: int, rng: random.Random) -> Image.Image:
    """A gradient of two random colours, then hills, a city, rays, bubbles, blots or nothing before it."""
    ends = [hsv(rng.random(), rng.uniform(0.15, 0.75), rng.uniform(0.3, 1)) for _ in range(2)]
    turn = rng.choice([0, 0, 90, 180])
    gradient = ImageOps.colorize(Image.linear_gradient("L").rotate(turn), *ends)
    picture = gradient.resize((width, height)).convert("RGB")
    canvas, hue = ImageDraw.Draw(picture), rng.random()
    draw = rng.choice([hills, city, rays, bubbles, blots, None])
    if draw:
        draw(canvas, width, height, hue, rng)
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.008) * width))


def hills(canvas, width: int, height: int, hue: float, rng: random.Random) -> None:
    x, y = width * rng.uniform(0.1, 0.9), height * rng.uniform(0.1, 0.3)
    sun = width * rng.uniform(0.05, 0.12)
    canvas.ellipse([x - sun, y - sun, x + sun, y + sun], hsv(rng.random(), 0.4, 1))
    for layer in range(3):
        heights = [height * (0.5 + 0.15 * layer + rng.uniform(-0.1, 0.1)) for _ in range(5)]
        line = curve([(width * step / 4, y) for step, y in enumerate(heights)])
        colour = hsv(hue + 0.04 * layer, 0.5, 0.75 - 0.15 * layer)
        canvas.polygon([*line, (width, height), (0, height)], colour)


def city(canvas, width: int, height: int, hue: float, rng: random.Random) -> None:
    left, across, down = 0, max(4, width // 22), max(4, height // 14)
    while left < width:
        right, top = left + width * rng.uniform(0.08, 0.18), height * rng.uniform(0.25, 0.7)
        colour = hsv(hue + rng.uniform(-0.04, 0.04), 0.35, rng.uniform(0.25, 0.6))
        canvas.rectangle([left, top, right, height], colour)
        for row in range(int(top + height * 0.04), height, down):
            for column in range(int(left + width * 0.015), int(right - width * 0.02), across):
                if rng.random() < 0.5:
                    window = [column, row, column + width // 50, row + height // 35]
                    canvas.rectangle(window, hsv(0.14, 0.4, 0.95))
        left = right


def rays(canvas, width: int, height: int, hue: float, rng: random.Random) -> None:
    x, y = width * rng.uniform(0.3, 0.7), height * rng.uniform(0.3, 0.7)
    colour, count, far = hsv(hue, 0.4, 0.95), rng.choice([8, 12, 16]), 2 * max(width, height)
    for ray in range(count):
        corners = [polar(x, y, far, 2 * math.pi * (ray + half) / count) for half in (0, 0.5)]
        canvas.polygon([(x, y), *corners], colour)


def bubbles(canvas, width: int, height: int, hue: float, rng: random.Random, round_: bool = True) -> None:
    for _ in range(rng.randint(8, 22)):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        size = rng.uniform(0.03, 0.18) * max(width, height)
        colour = hsv(hue + rng.uniform(-0.15, 0.15), rng.uniform(0.2, 0.7), rng.uniform(0.35, 1))
        if round_:
            canvas.ellipse([x - size, y - size, x + size, y + size], colour)
        else:
            canvas.polygon([polar(x, y, size * rng.uniform(0.5, 1.4), t) for t in range(6)], colour)


def blots(canvas, width: int, height: int, hue: float, rng: random.Random) -> None:
    bubbles(canvas, width, height, hue, rng, round_=False)


def light(picture: Image.Image, rng: random.Random, noise: float) -> Image.Image:
    """Coloured light falling off to one side, and a camera's noise of up to `noise` grey levels."""
    numbers = np.random.default_rng(rng.getrandbits(64))
    pixels = np.asarray(picture, dtype=np.float32)
    height, width, _ = pixels.shape
    angle, fall = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.35)
    across = np.linspace(-1, 1, width)[None, :] * math.cos(angle)
    ramp = across + np.linspace(-1, 1, height)[:, None] * math.sin(angle)
    lamp = np.array(hsv(rng.random(), rng.uniform(0, 0.18), 1)) / 255 * rng.uniform(0.8, 1.15)
    grain = numbers.normal(0, rng.uniform(0, noise), (height, width, 1))
    pixels = pixels * (1 + fall * ramp[..., None]) * lamp + grain
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
