"""How charts look and what they say: a colour for each backend, a marker for each variant, titles."""

import io
import textwrap
import typing
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image

from utils.report import analysis
from utils.report.names import FAMILIES, family, parts
from utils.report.words import SAMPLE, batches, figure, times
from utils.utils import write_atomic

WIDTH, DPI = 10.0, 150  # inches, dots per inch; shown about 850 pixels wide on GitHub
INK, GREY = "#222222", "#666666"
MARKERS = ["o", "s", "D", "P"]  # of a plain method, another variant of it, in a CUDA graph, both
FILLS = {"FP32": ("none", "-"), "TF32": ("top", ":"), "BF16": ("bottom", ":"), "INT8": ("left", "-.")}


def style(row) -> dict:
    """How a line looks: colour for the backend, marker for the variant, fill and dashes for the precision."""
    _, precision, extras = parts(row.backend, row.precision)
    graph = "graph" in extras
    fill, dashes = FILLS.get(precision, ("full", "--"))
    marker = dict(marker=MARKERS[2 * graph + (len(extras) > graph)], markersize=6.5, fillstyle=fill)
    marker |= dict(markerfacecoloralt="white")  # else lines shine through the other half
    colour = FAMILIES.get(family(row.backend), ("", GREY))[1]
    return marker | dict(color=colour, linestyle=dashes, linewidth=1.2)


def dress(ax, x_label: str, y_label: str) -> None:
    """What every panel has: units, plain figures on its axes, a light grid."""
    ax.set_xlabel(x_label, color=INK)
    ax.set_ylabel(y_label, color=INK)
    ax.tick_params(labelsize=8.5, color=GREY, labelcolor=INK)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:,.6g}")
        if axis.get_scale() == "log":
            axis.set_major_locator(LogLocator(subs=[1, 2, 5]))
            axis.set_minor_formatter("")
    ax.grid(axis="y", color="#dddddd", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def sheet(height: float, title: str, small_print: list[str]):
    """A figure and its part for panels, `height` inches high, under the title and over the small print."""
    lines = [line for text in small_print for line in textwrap.wrap(text, 140)]
    size = WIDTH, height + 0.7 + 0.2 * len(lines)
    fig = Figure(figsize=size, dpi=DPI, facecolor="white", layout="constrained")
    fig.supxlabel("\n".join(lines), fontsize=9, color=GREY, x=0.01, ha="left")
    part: typing.Any = fig.subfigures(1, 1)
    part.suptitle(textwrap.fill(title, 84), fontsize=13, fontweight="bold", color=INK, x=0.01, ha="left")
    return fig, part


def legend(part, ax, columns: int = 3) -> None:
    """The panel's methods under all panels."""
    handles = ax.get_legend_handles_labels()
    part.legend(*handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def write_png(fig: Figure, path: Path) -> None:
    fig.savefig(drawn := io.BytesIO(), format="png")
    few = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)  # a third of the bytes
    few.save(png := io.BytesIO(), "PNG", optimize=True)
    write_atomic(path, png.getvalue())


def feet_of(rows: pd.DataFrame, environments: dict) -> list[str]:
    """A line of hardware and versions for each sweep; a last one where networks saw the drawn sample only."""
    known = {sweep: environments.get(sweep, {}) for sweep in rows.sort_index().sweep}
    feet = [f"{sweep}: " * (len(known) > 1) + facts.get("short", "") for sweep, facts in known.items()]
    drawn = [sweep for sweep, facts in known.items() if facts.get("sample_data")]
    whose = "" if len(drawn) == len(known) else f" ({', '.join(drawn)})"
    return feet + ([f"{SAMPLE.capitalize()}{whose}"] if drawn else [])


def leader(rows: pd.DataFrame) -> str:
    """The fastest and where; no winner where the first are indistinguishable."""
    lead = analysis.leaders(rows)
    if not lead:
        return "Nothing was measured"
    best = lead[0]
    where = f"{figure(best.fps)} images/s at {best.image_size} px, batch {best.batch_size}"
    if any(pd.isna(row.fps_low) for row in lead):
        return f"One round supports no verdict: {best.label} {where}"
    if len(lead) > 1:
        return f"{' and '.join(row.label for row in lead)} are indistinguishable: up to {where}"
    return f"{best.label} is fastest: {where}" + (f", {times(best)} PyTorch FP32" if times(best) else "")


def batching(rows: pd.DataFrame) -> str:
    """What a larger batch gains."""
    ok = analysis.measured(rows)
    return (batches(ok) if len(ok) else "") or leader(rows)


def memory(rows: pd.DataFrame) -> str:
    most = rows.loc[rows.gpu_memory_mb.idxmax()]
    where = f"at {most.image_size} px, batch {most.batch_size}"
    return f"{most.label} takes most GPU memory: {figure(most.gpu_memory_mb)} MB {where}"
