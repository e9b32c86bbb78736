"""How charts look: one colour per backend and one marker per variant, the same in every chart."""

import io
import textwrap
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator
from PIL import Image

from utils.report.words import family, label
from utils.utils import write_atomic

WIDTH, DPI = 10.0, 150  # inches, dots per inch; shown about 850 pixels wide on GitHub
INK, GREY = "#222222", "#666666"
BLUE, SKY, ORANGE, PURPLE, GREEN = "#0072B2", "#56B4E9", "#E69F00", "#CC79A7", "#009E73"  # Okabe and Ito's
VERMILION = "#D55E00"  # theirs, too
BACKEND_COLOUR = {  # charts list them in this order
    "pytorch": BLUE,
    "torch-compile": SKY,
    "onnx": ORANGE,
    "openvino": VERMILION,
    "torch-tensorrt": PURPLE,
    "tensorrt": GREEN,
}
LOOKS = [  # marker, line style and hatch of a bar, and the variants that have them; the last is any other
    ("o", "-", None, [""]),
    ("s", "--", "//", ["tf32", "channels-last", "nhwc", "static"]),
    ("^", "-.", "\\\\", ["fp16", "bf16"]),
    ("D", ":", "..", ["graph", "fp16-graph", "nhwc-graph"]),
    ("P", "-.", "xx", ["static-graph"]),
    ("v", (0, (5, 1)), "--", ["int8"]),
    ("<", (0, (3, 1, 1, 1)), "++", ["int8-graph"]),
    (">", (0, (5, 1, 1, 1)), "**", ["int8-static-graph"]),
    ("X", (0, (1, 1)), "oo", []),
]
HATCH = {marker: hatch for marker, _, hatch, _ in LOOKS}


def look_of(backend: str) -> int:
    """Which of LOOKS a backend has."""
    variant = backend.removeprefix(family(backend)).removeprefix("-")
    return next((k for k, look in enumerate(LOOKS) if variant in look[-1]), len(LOOKS) - 1)


def style(backend: str, precision: str) -> dict:
    """How a line looks; open markers are FP32; an unknown variant takes its backend's colour."""
    marker, dashes, *_ = LOOKS[look_of(backend)]
    colour = BACKEND_COLOUR.get(family(backend), GREY)
    face = "white" if label(backend, precision).split(",")[0].endswith("FP32") else colour
    look = dict(color=colour, marker=marker, linestyle=dashes, markersize=5.5, markerfacecolor=face)
    return look | {"linewidth": 1.8 if marker == "o" else 1.2}


def bar_look(look: dict) -> dict:
    """The bar that goes with a line: its colour, and a hatch for its marker."""
    return dict(facecolor=look["color"], hatch=HATCH.get(look["marker"]), edgecolor="white", linewidth=0)


def dress(ax, x_label: str, y_label: str) -> None:
    """What every panel has: units, a light grid."""
    ax.set_xlabel(x_label, color=INK)
    ax.set_ylabel(y_label, color=INK)
    ax.tick_params(labelsize=10, color=GREY, labelcolor=INK)
    ax.grid(axis="y", color="#dddddd", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def log_ticks(*axes) -> None:
    """1, 2, 5, 10, ... in plain figures."""
    for axis in axes:
        axis.set_major_locator(LogLocator(subs=[1, 2, 5]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter("")


def lie_down(ax, names: list[str], unit: str, right: float) -> None:
    """What horizontal bars have: a name for each, and thousands apart."""
    dress(ax, unit, "")
    ax.grid(visible=False, axis="y")
    ax.set_yticks(range(len(names)), names, fontsize=8.5)
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.set_xlim(0, right)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.6g}"))


def heading(part, text: str) -> None:
    part.suptitle(textwrap.fill(text, 84), fontsize=13, fontweight="bold", color=INK, x=0.01, ha="left")


def note(part, text: str) -> None:
    """Small print under the panels."""
    part.supxlabel(textwrap.fill(text, 135), fontsize=9, color=INK, x=0.01, ha="left")


def sheet(heights: list[float], feet: list[str]):
    """A figure with a subfigure for each height, in inches, and the footer's lines at the bottom."""
    size = WIDTH, sum(heights) + 0.2 * len(feet)
    fig = Figure(figsize=size, dpi=DPI, facecolor="white", layout="constrained")
    fig.supxlabel("\n".join(feet), fontsize=9, color=GREY, x=0.01, ha="left")
    return fig, fig.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]


def write_png(fig: Figure, path: Path) -> None:
    fig.savefig(drawn := io.BytesIO(), format="png")
    few = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)  # a third of the bytes
    few.save(png := io.BytesIO(), "PNG", optimize=True)
    write_atomic(path, png.getvalue())
