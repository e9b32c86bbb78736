"""How charts look and what they say: a colour for each backend, a marker for each variant, titles."""

import io
import re
import textwrap
import typing
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator
from PIL import Image

from utils.measure.schema import BASELINE
from utils.report import analysis
from utils.report.names import FAMILIES, family, label
from utils.report.words import SAMPLE, batches, figure, gaps, times
from utils.utils import write_atomic

WIDTH, DPI = 10.0, 150  # inches, dots per inch; shown about 850 pixels wide on GitHub
INK, GREY = "#222222", "#666666"
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

# ---- looks


def look_of(backend: str) -> int:
    """Which of LOOKS a backend has."""
    variant = backend.removeprefix(family(backend)).removeprefix("-")
    return next((k for k, look in enumerate(LOOKS) if variant in look[-1]), len(LOOKS) - 1)


def style(backend: str, precision: str) -> dict:
    """How a line looks; open markers are FP32; an unknown variant takes its backend's colour."""
    marker, dashes, *_ = LOOKS[look_of(backend)]
    colour = FAMILIES.get(family(backend), ("", GREY))[1]
    face = "white" if label(backend, precision).split(",")[0].endswith("FP32") else colour
    look = dict(color=colour, marker=marker, linestyle=dashes, markersize=5.5, markerfacecolor=face)
    return look | {"linewidth": 1.8 if marker == "o" else 1.2}


def bar_look(look: dict) -> dict:
    """The bar that goes with a line: its colour, and a hatch for its marker."""
    bar = dict(facecolor=look["color"], hatch=HATCH.get(look["marker"]), edgecolor="white", linewidth=0)
    return bar | {"alpha": look.get("alpha")}


def dress(ax, x_label: str, y_label: str) -> None:
    """What every panel has: units, a light grid."""
    ax.set_xlabel(x_label, color=INK)
    ax.set_ylabel(y_label, color=INK)
    ax.tick_params(labelsize=9.5, color=GREY, labelcolor=INK)
    ax.tick_params("x", labelsize=9)
    ax.grid(axis="y", color="#dddddd", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def thousands(axis) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def log_ticks(*axes) -> None:
    """1, 2, 5, 10, ... in plain figures."""
    for axis in axes:
        axis.set_major_locator(LogLocator(subs=[1, 2, 5]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter("")


def sheet(height: float, title: str, small_print: list[str]):
    """A figure and its part for panels, `height` inches high, under the title and over the small print."""
    lines = [line for text in small_print for line in textwrap.wrap(text, 140)]
    title = re.sub(r" (px|images/s)|(?<=batch) (?=\d)", "\u00a0\\1", title)  # no line breaks here
    size = WIDTH, height + 0.7 + 0.2 * len(lines)
    fig = Figure(figsize=size, dpi=DPI, facecolor="white", layout="constrained")
    fig.supxlabel("\n".join(lines), fontsize=9, color=GREY, x=0.01, ha="left")
    part: typing.Any = fig.subfigures(1, 1)
    part.suptitle(textwrap.fill(title, 84), fontsize=13, fontweight="bold", color=INK, x=0.01, ha="left")
    return fig, part


def write_png(fig: Figure, path: Path) -> None:
    fig.savefig(drawn := io.BytesIO(), format="png")
    few = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)  # a third of the bytes
    few.save(png := io.BytesIO(), "PNG", optimize=True)
    write_atomic(path, png.getvalue())


def feet_of(sweeps: list[str], environments: dict) -> list[str]:
    """A line of hardware and versions for each sweep; a last one where networks saw the drawn sample only."""
    known = {sweep: environments.get(sweep, {}) for sweep in sweeps}
    feet = [f"{sweep}: " * (len(known) > 1) + facts.get("short", "") for sweep, facts in known.items()]
    drawn = [sweep for sweep, facts in known.items() if facts.get("sample_data")]
    whose = "" if len(drawn) == len(known) else f" ({', '.join(drawn)})"
    return feet + ([f"{SAMPLE.capitalize()}{whose}"] if drawn else [])


# ---- titles: what was found, and the note on what is missing


def leader(rows: pd.DataFrame, column: str = "fps") -> str:
    """The fastest (or the largest speedup) and where; no winner where the first are indistinguishable."""
    lead, ok = analysis.leaders(rows, column), analysis.measured(rows)
    if not lead:
        return "Nothing was measured" if ok.empty else "No speedups: PyTorch FP32 was not measured"
    best, last = lead[0], lead[-1]
    where = f"at {best.image_size} px, batch {best.batch_size}"
    if ok.label.nunique() == 1:
        return f"Only {best.label} was measured: {value_of(best, 'fps')} {where}"
    if analysis.at(ok, best.image_size, best.batch_size).fps_low.isna().any():
        return f"One round supports no verdict: {best.label} {value_of(best, 'fps')} {where}"
    if column == "speedup" and BASELINE in [row.backend for row in lead]:
        return f"Nothing is clearly faster than PyTorch FP32 {where}"
    if len(lead) == 1:
        verb = "reaches" if column == "speedup" else "is fastest:"
        return f"{best.label} {verb} {value_of(best, column)} {where}"
    others = last.label if len(lead) == 2 else f"{len(lead) - 1} others"
    both = f"{value_of(best, column)} and {value_of(last, column)}"
    return f"{best.label} and {others} are indistinguishable: {both} {where}"


def value_of(row, column: str) -> str:
    return f"{times(row)} PyTorch FP32" if column == "speedup" else f"{figure(row.fps)} images/s"


def batching(rows: pd.DataFrame, column: str) -> str:
    """What a larger batch gains."""
    ok = analysis.measured(rows)
    return (batches(ok) if len(ok) else "") or leader(rows)


def memory(rows: pd.DataFrame, column: str) -> str:
    """Which method takes most memory, and where."""
    if rows[column].isna().all():
        return "GPU memory was not read"
    most = rows.loc[rows[column].idxmax()]
    where = f"at {most.image_size} px, batch {most.batch_size}"
    return f"{most.label} takes most GPU memory: {figure(most[column])} MB {where}"


def not_measured(rows: pd.DataFrame) -> str:
    """ "TensorRT FP16: unavailable, PyTorch FP32 (512 px batch 16): out of memory" of what was tried."""
    return ", ".join(f"{called}: {status}" for called, status, _ in gaps(rows))
