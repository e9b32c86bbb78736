"""The sample heroes: cartoons in four classes, all in them decided by a generator that the caller seeds.

datasets.py draws them where there is no data.  Colours, light and pose vary: only shapes give the class away.
"""

import math
import random

from PIL import Image, ImageChops, ImageFilter, ImageOps

from utils.pen import Pen, both, curve, darker, draw_background, light, lighter, near, path, polar, usual


def draw_picture(name: str, rng: random.Random, widest: int = 700, noise: float = 9) -> Image.Image:
    """A hero in a random pose, scale, colour and light before a random background, 200 to `widest` px wide
    and high."""
    width = rng.randint(200, widest)
    height = min(max(round(width * rng.uniform(0.8, 1.25)), 200), widest)
    picture = draw_background(width, height, rng)
    side = round(min(width, height) * rng.uniform(0.85, 1.1))
    hero = draw_hero(name, side, rng)
    x = (width - side) // 2 + round(width * rng.uniform(-0.09, 0.09))
    y = (height - side) // 2 + round(height * rng.uniform(-0.05, 0.07))
    blurred = hero.getchannel("A").filter(ImageFilter.GaussianBlur(side / 40))
    shadow = blurred.point(lambda alpha: alpha * 0.45)
    picture.paste((10, 10, 25), (x + side // 40, y + side // 30), shadow)
    picture.paste(hero, (x, y), hero)
    return light(picture, rng, noise)


def draw_hero(name: str, side: int, rng: random.Random) -> Image.Image:
    """The hero alone on a transparent square: drawn twice as large, shaded from above, turned and mirrored
    at random."""
    pen = Pen(2 * side)
    tilt = HEROES[name](pen, rng)
    hero = pen.image.resize((side, side), Image.Resampling.BOX)
    alpha = hero.getchannel("A")
    away = ImageChops.offset(alpha, -side // 28, -side // 22).filter(ImageFilter.GaussianBlur(side / 45))
    rim = ImageChops.multiply(alpha, ImageChops.invert(away)).point(lambda value: value * 0.5)
    hero.paste((15, 5, 45), (0, 0), rim)  # the side turned away from the light
    hero.putalpha(alpha)
    if rng.random() < 0.5:
        hero = ImageOps.mirror(hero)
    return hero.rotate(tilt + rng.uniform(-12, 12), Image.Resampling.BILINEAR)


def draw_pudge(pen: Pen, rng: random.Random) -> float:
    """Pudge of Dota: a mountain of stitched flesh, a small head, the hook on its chain and a cleaver."""
    skin, apron = near(rng, 0.03, 0.38, 0.78, 0.08), near(rng, rng.random(), 0.45, 0.5)
    steel = near(rng, 0.6, 0.1, 0.75)
    gore, leather = near(rng, 0.99, 0.75, 0.6, 0.03), near(rng, 0.08, 0.5, 0.35)
    lift, swing = rng.uniform(-10, 8), rng.uniform(-6, 6)
    for x, out in ((38, -3), (62, 3)):
        pen.limb([(x, 78), (x + out, 92)], 15, 12, skin)
        pen.oval(x + 1.5 * out, 95, 8, 3.5, leather)
    # the hook: its chain hangs from the fist at the right
    fist = (87 + swing / 3, 58 + lift)
    pen.limb([(72, 42), (86, 46 + lift / 2), fist], 17, 12, skin)
    links = curve([fist, (93, 65 + lift), (92 + swing / 2, 74 + lift / 2)], steps=3)
    for step, (x, y) in enumerate(links):
        pen.oval(x, y, 2.6 if step % 2 else 1.3, 1.9, steel, 80, 0.6)
    x, y = links[-1]
    hook = [(x, y), (x + 2, y + 7), (x - 1, y + 15), (x - 9, y + 17), (x - 15, y + 12), (x - 14, y + 6)]
    pen.limb(hook, 5, 1.2, steel)
    pen.shape([(x - 17, y + 9), (x - 13.6, y + 3.5), (x - 11.5, y + 9.5)], steel)
    pen.oval(*fist, 6.5, 6, skin)
    # the cleaver, raised or lowered, at the left
    hand = (13 - swing / 3, 56 - lift)
    pen.limb([(28, 42), (14, 47 - lift / 2), hand], 17, 12, skin)
    turn = rng.uniform(-25, 25)
    cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))

    def held(points):
        return [(hand[0] + px * cos - py * sin, hand[1] + px * sin + py * cos) for px, py in points]

    pen.line(held([(0, 8), (0, -6)]), 4.6)
    pen.line(held([(0, 8), (0, -6)]), 3, leather)
    pen.shape(held([(-9, -30), (6, -32), (7, -7), (-7, -7)]), steel)
    pen.shape(held([(-9, -30), (-6.4, -30.3), (-4.6, -7), (-7, -7)]), lighter(steel), 0)
    pen.shape(held([(-9, -30), (-3, -31), (-6, -23), (-5.5, -17), (-8, -14)]), gore, 0)
    pen.oval(*held([(3, -27)])[0], 1.4, 1.4, Pen.INK)
    pen.oval(*hand, 6.5, 6, skin)
    # the body
    pen.blob(both("0 31, 18 34, 30 50, 32 70, 20 85, 0 88", 50), skin, 1)
    pen.blob(both("0 79, 26 73, 24 88, 12 84, 0 93", 50), apron)
    pen.line(curve([(21, 71), (50, 79), (79, 71)]), 5.2)
    pen.line(curve([(21, 71), (50, 79), (79, 71)]), 3.6, leather)
    pen.oval(50, 78.5, 5, 4.2, steel)
    pen.line(curve([(27, 42), (50, 60), (75, 68)]), 4.8)
    pen.line(curve([(27, 42), (50, 60), (75, 68)]), 3.2, leather)
    pen.blob([(54, 47), (62, 44), (69, 49), (66, 56), (58, 57)], gore)  # the torn side shows the ribs
    for y in (47.5, 50.5, 53.5):
        pen.line(curve([(56.5, y + 1), (61, y), (66, y + 1)]), 1.3, (240, 228, 205))
    stitches(pen, curve([(30, 52), (36, 61), (34, 69)]))
    stitches(pen, curve([(44, 41), (50, 45), (57, 41)]))
    pudge_head(pen, rng, skin)
    return 0


def pudge_head(pen: Pen, rng: random.Random, skin) -> None:
    x, y = 50 + rng.uniform(-3, 3), 29 + rng.uniform(-1, 2)
    pen.blob(both("0 -16, 9 -11, 11 0, 13 7, 0 12", x, y), lighter(skin, 0.12))
    pen.blob(both("0 1.5, 9 3, 7 8, 0 9.5", x, y), (70, 20, 30))
    for step in range(6):
        left = x - 7.2 + 2.5 * step
        pen.shape([(left, y + 2.6), (left + 2.1, y + 2.6), (left + 1.2, y + 5.4)], (245, 235, 200), 0)
        pen.shape([(left + 0.4, y + 8.4), (left + 2.3, y + 8.4), (left + 1.3, y + 6)], (245, 235, 200), 0)
    eye = near(rng, 0.14, 0.5, 1)
    pen.oval(x - 4.5, y - 3.5, 2.7, 2.3, eye)
    pen.oval(x - 4.2, y - 3.2, 0.9, 0.9, Pen.INK, ink=0)
    pen.oval(x + 4.6, y - 3.8, 1.7, 1.4, eye)
    pen.oval(x + 4.6, y - 3.6, 0.7, 0.7, Pen.INK, ink=0)
    pen.line([(x - 8, y - 7.5), (x - 2, y - 5.5)], 1.5)
    pen.line([(x + 8, y - 7), (x + 2.5, y - 5.5)], 1.5)
    stitches(pen, curve([(x - 1, y - 15.5), (x + 2, y - 11), (x, y - 7)]))


def stitches(pen: Pen, line) -> None:
    pen.line(line, 0.9)
    for (x0, y0), (x1, y1) in list(zip(line, line[1:], strict=False))[2::4]:
        length = math.hypot(x1 - x0, y1 - y0) or 1
        nx, ny = -(y1 - y0) / length * 2, (x1 - x0) / length * 2
        pen.line([(x0 - nx, y0 - ny), (x0 + nx, y0 + ny)], 0.8)


CURLS = [(19, -4, 6.5), (23, 5, 6), (17, 11, 5.5), (20, -13, 6.5), (12, -20, 6.5), (4, -23, 6)]


def draw_tatsumaki(pen: Pen, rng: random.Random) -> float:
    """Tatsumaki: a small girl in a black dress, her green curls aflare in her power's light, among stones."""
    hair, skin = near(rng, 0.36, 0.72, 0.62, 0.06), near(rng, 0.07, 0.22, 0.95, 0.02)
    dress, aura = near(rng, rng.random(), 0.3, 0.17), near(rng, rng.choice([0.36, 0.45, 0.55, 0.75]), 0.5, 1)
    sway, spread = rng.uniform(-4, 4), rng.uniform(0.85, 1.15)
    pen.glow(50, 50, 38, 42, aura, rng.uniform(0.35, 0.7))
    for _ in range(rng.randint(3, 5)):
        float_stone(pen, rng)
    x, y = 50 + sway / 2, 33
    for side in (-1, 1):  # the curls behind the head, from the lowest to the crown
        for out, up, size in CURLS:
            curl(pen, (x + side * 7, y - 2), (x + side * out * spread, y - 2 + up), side, size, hair)
    for side in (-1, 1):
        foot = (50 + side * rng.uniform(3, 8), 94)
        pen.limb([(50 + side * 4, 70), (50 + side * 5, 82), foot], 5.5, 3.4, skin)
        pen.oval(foot[0] + side, 95.5, 3.6, 2, Pen.INK)
    raised = rng.random() < 0.55
    for side in (-1, 1):
        if raised:
            elbow = (50 + side * 18, 57 + rng.uniform(-3, 3))
            arm = [(50 + side * 7, 53), elbow, (50 + side * 26, 47 + rng.uniform(-6, 8))]
        else:  # hands on her hips
            arm = [(50 + side * 7, 53), (50 + side * 18, 60), (50 + side * 9, 66)]
        pen.limb(arm, 6, 5, dress)
        pen.oval(*arm[-1], 3, 2.8, skin)
        if raised:
            pen.glow(*arm[-1], 7, 7, aura, 0.5)
    left, right = path("44 49, 42 58, 43 62, 36 70, 26 78"), path("74 78, 64 70, 57 62, 58 58, 56 49")
    hem = path("30 84, 36 79, 42 86, 50 80, 58 86, 64 79, 70 84")
    pen.shape([*curve(left), *hem, *curve(right)], dress)
    for side in (-1, 1):  # the slits
        pen.shape([(50 + side * 8, 69), (50 + side * 12, 81), (50 + side * 6, 82)], skin, 0.4)
    pen.shape([(45, 47), (55, 47), (58, 52), (50, 55), (42, 52)], lighter(dress, 0.14))
    tatsumaki_head(pen, rng, (x, y), skin, hair)
    return rng.uniform(-6, 6)


def tatsumaki_head(pen: Pen, rng: random.Random, at, skin, hair) -> None:
    x, y = at
    pen.blob(both("0 -13, 12 -4, 10 6, 0 13", x, y), skin)
    iris = near(rng, 0.38, 0.8, 0.65)
    for side in (-1, 1):
        pen.oval(x + side * 5.2, y + 2, 2.9, 3.4, "white", side * 8)
        pen.oval(x + side * 4.9, y + 2.3, 1.8, 2.5, iris, ink=0.2)
        pen.oval(x + side * 4.9, y + 2.5, 0.8, 1.2, Pen.INK, ink=0)
        pen.oval(x + side * 4.9 - 0.6, y + 1.2, 0.6, 0.7, "white", ink=0)
        pen.line([(x + side * 8.6, y - 2.6), (x + side * 2.2, y - 0.6)], 1.3, darker(hair, 0.5))
    pen.line(curve([(x - 2.2, y + 8.6), (x, y + 7.8), (x + 2.2, y + 8.6)]), 0.9)
    # the fringe: pointed locks over a cap
    locks = "-13.5 2, -9.5 -4.5, -7 -1.5, -3.5 -5.5, 0.5 -1.5, 4 -5.5, 7.5 -1.8, 9.8 -4.8, 13.5 2"
    pen.shape([*path(locks, x, y), *curve(path("14.5 -6, 8 -15, 0 -17.5, -8 -15, -14.5 -6", x, y))], hair)
    pen.line(curve([(x - 9, y - 9), (x - 4, y - 13), (x + 2, y - 13.8)]), 1.2, lighter(hair))
    for side in (-1, 1):  # the curls at her cheeks
        curl(pen, (x + side * 11, y - 4), (x + side * 15, y + 9), side, 5, hair)


def curl(pen: Pen, root, tip, side: int, size: float, fill) -> None:
    """A lock from root to tip that rolls up at its end."""
    (x0, y0), (x1, y1) = root, tip
    heading = math.atan2(y1 - y0, x1 - x0)
    bend = (x0 + (x1 - x0) * 0.55 - side * (y1 - y0) * 0.1, y0 + (y1 - y0) * 0.55 + side * (x1 - x0) * 0.1)
    centre = polar(x1, y1, size * 0.7, heading - side * math.pi / 2)
    turns = [(0.7 - 0.07 * step, heading + side * math.pi * (0.5 - step / 4)) for step in range(7)]
    roll = [polar(*centre, size * radius, angle) for radius, angle in turns]
    pen.limb([root, bend, *roll], size * 1.5, size * 0.35, fill)
    pen.line(curve([bend, *roll[:3]]), size * 0.16, lighter(fill, 0.3))


def float_stone(pen: Pen, rng: random.Random) -> None:
    angle, radius, grey = rng.uniform(0, 2 * math.pi), rng.uniform(36, 44), near(rng, 0.08, 0.15, 0.55)
    centre, size = polar(50, 52, radius, angle), rng.uniform(2, 4.5)
    corners = [polar(*centre, size * rng.uniform(0.7, 1.2), math.pi * step / 3) for step in range(6)]
    pen.shape(corners, grey, 0.6)


def draw_saitama(pen: Pen, rng: random.Random) -> float:
    """Saitama: an egg of a bald head, a blank face, a plain suit with gloves and boots, a white cape."""
    suit, glove = near(rng, usual(rng, 0.14), 0.65, 0.93), near(rng, usual(rng, 0.0), 0.75, 0.8)
    skin, cape = near(rng, 0.075, 0.28, 0.96, 0.02), near(rng, rng.random(), 0.08, 0.93)
    wind, punch = rng.uniform(-10, 10), rng.random() < 0.45
    flying = path("75 72, 80 91, 64 88, 50 92, 34 88, 20 91, 25 70", wind)
    pen.blob(path("37 42, 50 39, 63 42") + flying, cape)
    for x in (33, 67):
        fold = curve([(44 + (x - 50) / 3, 50), (x + wind / 2, 70), (x + wind, 86)])
        pen.line(fold, 0.7, darker(cape, 0.75))
    step = rng.uniform(0, 4)
    for side in (-1, 1):
        leg = [(50 + side * 4.5, 66), (50 + side * (6 + step), 80), (50 + side * (6.5 + step), 90)]
        pen.limb(leg, 10.5, 8, suit)
        pen.limb([(50 + side * (6.3 + step), 83), (50 + side * (6.5 + step), 92)], 9.5, 9, glove)
        pen.oval(50 + side * (8 + step), 95, 6.5, 3, glove)
    arms = [[(38, 47), (30, 57), (31, 68)], [(62, 47), (70, 57), (69, 68)]]
    if rng.random() < 0.3:  # a fist on the hip
        arms[0] = [(38, 47), (26, 57), (36, 65)]
    if punch:
        arms.pop()
    for arm in arms:
        pen.limb(arm, 9, 7.5, suit)
        pen.limb([((arm[1][0] + arm[2][0]) / 2, (arm[1][1] + arm[2][1]) / 2), arm[2]], 9, 9, glove)
        pen.oval(*arm[-1], 5, 5.2, glove)
    pen.blob(both("0 42, 14 45, 11 57, 9 69, 0 71", 50), suit)
    pen.line([(50, 48), (50, 66)], 0.8, darker(suit))
    pen.line(curve([(43, 55), (46, 57.5), (49.2, 56)]), 0.7, darker(suit))
    pen.line(curve([(57, 55), (54, 57.5), (50.8, 56)]), 0.7, darker(suit))
    pen.line([(41, 66), (59, 66)], 4.2)
    pen.line([(41, 66), (59, 66)], 2.8, (45, 40, 45))
    pen.oval(50, 66, 3.4, 2.6, near(rng, 0.13, 0.7, 0.9))
    pen.blob(both("0 42, 10 39, 14 43, 6 45.5, 0 47.5", 50), cape)
    for x in (41, 59):
        pen.oval(x, 44.4, 1.7, 1.7, lighter(suit, 0.2))
    saitama_head(pen, rng, skin)
    if punch:
        serious_punch(pen, rng, suit, glove)
    return 0


def saitama_head(pen: Pen, rng: random.Random, skin) -> None:
    x, y = 50 + rng.uniform(-1.5, 1.5), 25 + rng.uniform(-1, 1)
    for side in (-1, 1):
        pen.oval(x + side * 13, y + 3.5, 2.5, 4, skin)
    pen.blob(both("0 -19, 10.5 -13, 13.2 -1, 11 10, 5 16, 0 17.3", x, y), skin)
    pen.oval(x - 4.5, y - 12, 4.2, 2.4, lighter(skin, 0.9), -28, 0)  # the gloss
    pen.oval(x - 8.8, y - 7.6, 1.1, 1.5, lighter(skin, 0.9), 20, 0)
    for side in (-1, 1):
        pen.oval(x + side * 5.6, y + 2, 3.3, 2.3, "white", ink=0.55)
        pen.oval(x + side * 5.4, y + 2.1, 0.9, 0.9, Pen.INK, ink=0)
        pen.line([(x + side * 8.8, y - 3.2), (x + side * 2.6, y - 3)], 0.9)
    pen.line([(x, y + 5), (x - 0.8, y + 7)], 0.7)
    pen.line([(x - 4, y + 11), (x + 4, y + 11)], 1)


def serious_punch(pen: Pen, rng: random.Random, suit, glove) -> None:
    """Straight at the viewer."""
    fx, fy, size = 66 + rng.uniform(-3, 3), 58 + rng.uniform(-6, 4), rng.uniform(12, 16)
    pen.limb([(62, 47), ((62 + fx) / 2 + 2, (47 + fy) / 2), (fx, fy)], 9, 13, suit)
    pen.oval(fx, fy, size, size * 0.92, glove)
    light_glove = lighter(glove, 0.1)
    for finger in range(4):
        middle = (fx - size * 0.58 + finger * size * 0.39, fy - size * 0.1)
        pen.oval(*middle, size * 0.24, size * 0.42, light_glove, ink=0.6)
    thumb = [(fx - size * 0.6, fy + size * 0.5), (fx + size * 0.2, fy + size * 0.36)]
    pen.limb(thumb, size * 0.36, size * 0.36, light_glove)


def draw_parovozov(pen: Pen, rng: random.Random) -> float:
    """Arkady Parovozov: a hero under steam, fist first: moustache, goggles, chimney, a wheel on the belt."""
    suit, cape = near(rng, usual(rng, 0.6), 0.65, 0.75), near(rng, usual(rng, 0.99), 0.8, 0.8)
    skin, hair = near(rng, 0.06, 0.35, 0.93, 0.02), near(rng, 0.07, 0.55, rng.choice([0.2, 0.3, 0.45]))
    brass, wind = near(rng, 0.12, 0.65, 0.9), rng.uniform(-7, 7)
    # steam from the chimney on his back
    puff = near(rng, 0.6, 0.05, 0.97)
    for x, y, size in ((70, 20, 3.4), (75.5, 15.5, 4.6), (81, 9.5, 5.6)):
        x, y = x + rng.uniform(-1, 1), y + rng.uniform(-1, 1)
        lobes = [polar(x, y, size * 0.55, angle) for angle in (0.5, 1.9, 3.1, 4.3, 5.6)]
        for ink in (0.7, 0):  # all the outlines first, so that the lobes become one cloud
            for lobe_x, lobe_y in lobes:
                pen.oval(lobe_x, lobe_y, size * 0.62, size * 0.56, puff, ink=ink)
    flying = path("74 66", wind / 2) + path("70 89, 58 95, 46 88, 34 94", wind) + path("25 66", wind / 2)
    pen.blob(path("38 42, 62 42") + flying, cape)
    pen.line(curve([(42, 60), (42 + wind / 2, 76), (46 + wind, 86)]), 0.8, darker(cape))
    pen.line(curve([(60, 60), (62 + wind / 2, 76), (58 + wind, 92)]), 0.8, darker(cape))
    iron = near(rng, 0.6, 0.15, 0.28)
    pen.shape([(61, 50), (69, 50), (72, 28), (64, 28)], iron)
    pen.shape([(62, 28.5), (74.5, 28.5), (75.5, 23.5), (61.5, 23.5)], lighter(iron, 0.15))
    pen.line([(64, 40), (70, 40)], 1.6, brass)
    for side in (-1, 1):
        pen.limb([(50 + side * 4, 66), (50 + side * 5, 79), (50 + side * 4.6, 88)], 10, 7, suit)
        pen.limb([(50 + side * 4.8, 80), (50 + side * 4.5, 91)], 8.5, 7.5, cape)
        pen.oval(50 + side * 5.5, 94, 5.2, 3.2, cape)
    hip = [(61, 48), (72, 56), (62, 64)]
    pen.limb(hip, 10, 7.5, suit)
    pen.oval(*hip[-1], 4.6, 4.4, cape)
    pen.blob(both("0 42, 16 46, 12 56, 8 68, 0 70", 50), suit)
    # the letter in its badge
    pen.oval(50, 53.5, 7, 6.4, brass)
    pen.line([(46.4, 57.4), (50, 49), (53.6, 57.4)], 1.7, darker(cape, 0.85))
    pen.line([(47.8, 54.8), (52.2, 54.8)], 1.5, darker(cape, 0.85))
    # a locomotive's wheel on the belt
    pen.line([(42, 66.5), (58, 66.5)], 4.6)
    pen.line([(42, 66.5), (58, 66.5)], 3.2, brass)
    pen.oval(50, 66.5, 5.4, 5.4, (190, 45, 40))
    for turn in range(4):
        angle = math.pi * turn / 4 + wind
        dx, dy = 4.6 * math.cos(angle), 4.6 * math.sin(angle)
        pen.line([(50 - dx, 66.5 - dy), (50 + dx, 66.5 + dy)], 0.9, (250, 240, 225))
    pen.oval(50, 66.5, 1.6, 1.6, brass, ink=0.4)
    parovozov_head(pen, rng, skin, hair, brass)
    # the fist ahead
    arm = [(38, 48), (25, 38 + rng.uniform(-2, 2)), (21 + rng.uniform(-4, 4), 17 + rng.uniform(-3, 5))]
    pen.limb(arm, 10, 9, suit)
    pen.limb([((arm[1][0] + arm[2][0]) / 2, (arm[1][1] + arm[2][1]) / 2), arm[2]], 10, 10.5, cape)
    fx, fy = arm[-1]
    pen.oval(fx, fy, 7, 6.4, cape)
    for finger in range(3):
        pen.line([(fx - 3 + 3 * finger, fy - 5.4), (fx - 3 + 3 * finger, fy - 1)], 0.8)
    return rng.uniform(-38, 5)


def parovozov_head(pen: Pen, rng: random.Random, skin, hair, brass) -> None:
    """A square jaw, a moustache, goggles, a quiff."""
    x, y = 50 + rng.uniform(-1.5, 1.5), 29
    for side in (-1, 1):
        pen.oval(x + side * 11.3, y + 1, 2.2, 3.2, skin)
    pen.blob(both("0 -13, 10 -10, 11 2, 10 11, 4 15.5", x, y), skin)
    pen.blob(path("-11.5 -4, -12 -12, -5 -18, 6 -20, 14 -15, 9 -13, 11.5 -4, 7 -9, -4 -8", x, y), hair)
    pen.line(curve([(x - 7, y - 12), (x, y - 16), (x + 7, y - 17)]), 1, lighter(hair, 0.3))
    pen.line([(x - 11.5, y - 1.5), (x + 11.5, y - 1.5)], 3.4)
    pen.line([(x - 11.5, y - 1.5), (x + 11.5, y - 1.5)], 2.2, (95, 60, 40))
    glass = near(rng, 0.53, 0.35, 0.95, 0.08)
    for side in (-1, 1):
        pen.oval(x + side * 5, y - 1.2, 4.7, 4.5, brass)
        pen.oval(x + side * 5, y - 1.2, 3.2, 3, glass, ink=0.4)
        pen.oval(x + side * 4.6, y - 0.8, 1.1, 1.3, Pen.INK, ink=0)
        pen.oval(x + side * 5 - 1.4, y - 2.4, 0.8, 0.8, "white", ink=0)
    pen.blob(both("0 5, 4 4.6, 9 7.5, 12.5 5, 10 10, 4 9.5, 0 7.6", x, y), hair, 0.6)
    pen.oval(x, y + 4, 1.9, 1.7, lighter(skin, 0.1), ink=0.5)
    pen.line(curve([(x - 2.6, y + 11.2), (x, y + 12), (x + 2.6, y + 11.2)]), 0.8)


HEROES = {"Пудж": draw_pudge, "Тацумаки": draw_tatsumaki, "Сайтама": draw_saitama}
HEROES["АркадийПаровозов"] = draw_parovozov
