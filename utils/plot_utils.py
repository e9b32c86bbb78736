"""Charts: the rows of benchmark_results.csv -> PNG.  A pure reader: it measures and judges nothing.

One colour per backend and one marker per variant, the same in every chart.  What was not measured stays
visible: as a gap, as a mark at the foot of the panel and in the note under it.
"""

import dataclasses
import io
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from utils import findings
from utils.captions import batching, feet_of, leader, memory, not_measured, roofline_finding
from utils.report import NAMES, family, figure, label
from utils.schema import BASELINE
from utils.utils import write_atomic

WIDTH, DPI = 10.0, 150  # inches, dots per inch; shown about 850 pixels wide on GitHub
INK, GREY = "#222222", "#666666"
BLUE, SKY, ORANGE, PURPLE, GREEN = "#0072B2", "#56B4E9", "#E69F00", "#CC79A7", "#009E73"  # Okabe and Ito's
BACKEND_STYLE = {  # backend: colour, marker, line style; charts list them in this order
    "pytorch": (BLUE, "o", "-"),
    "pytorch-tf32": (BLUE, "s", "--"),
    "pytorch-fp16": (BLUE, "^", "-."),
    "pytorch-fp16-graph": (BLUE, "D", ":"),
    "torch-compile": (SKY, "o", "-"),
    "onnx": (ORANGE, "o", "-"),
    "onnx-nhwc": (ORANGE, "s", "--"),
    "onnx-nhwc-graph": (ORANGE, "D", ":"),
    "torch-tensorrt": (PURPLE, "o", "-"),
    "torch-tensorrt-graph": (PURPLE, "D", ":"),
    "tensorrt": (GREEN, "o", "-"),
    "tensorrt-graph": (GREEN, "D", ":"),
    "tensorrt-static": (GREEN, "s", "--"),
    "tensorrt-static-graph": (GREEN, "P", "-."),
    "tensorrt-int8": (GREEN, "v", (0, (5, 1))),
}
HATCH = dict(zip("s^DPvX", ["//", "\\\\", "..", "xx", "--", "oo"], strict=True))  # of a bar, for the marker
AXIS = {"image_size": "image size (px)", "batch_size": "batch size (images)"}
MARK = {"out_of_memory": "OOM", "mismatch": "wrong", "ok": "no baseline"}


def style(backend: str, precision: str) -> dict:
    """How a line looks; open markers are FP32; an unknown variant takes its backend's colour."""
    known = BACKEND_STYLE.get(family(backend), (GREY, "X", (0, (1, 1))))
    colour, marker, dashes = BACKEND_STYLE.get(backend, (known[0], "X", (0, (1, 1))))
    face = "white" if label(backend, precision).split(",")[0].endswith("FP32") else colour
    look = dict(color=colour, marker=marker, linestyle=dashes, markersize=5.5, markerfacecolor=face)
    return look | {"linewidth": 1.8 if backend in NAMES else 1.2}


# ---- the rows


def in_order(rows: pd.DataFrame) -> pd.DataFrame:
    """With `label`, the figures of every row that is not ok blanked, backends in the charts' order."""
    rows = rows.reset_index(drop=True)
    rows["precision"] = rows["precision"].fillna("").astype(str)
    rows["label"] = [label(*names) for names in zip(rows["backend"], rows["precision"], strict=True)]
    figures = ["mean_ms", "fps", "fps_low", "fps_high", "gpu_memory_mb"]
    for column in [*figures, "speedup", "speedup_low", "speedup_high"]:
        rows[column] = pd.to_numeric(rows[column]).astype(float).where(rows["status"] == "ok")
    order = {backend: index for index, backend in enumerate(BACKEND_STYLE)}
    return rows.sort_values("backend", key=lambda names: names.map(order).fillna(len(order)), kind="stable")


def blocks(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each sweep, with its name where there are several."""
    names = rows.sort_index()["sweep"].unique()
    return [(f"{name}: " if len(names) > 1 else "", rows[rows["sweep"] == name]) for name in names]


def looks_of(block: pd.DataFrame, column: str) -> dict[str, dict]:
    """Label -> style of each backend that has at least one value."""
    found = block[block[column].notna()].drop_duplicates("label")
    return {row.label: style(row.backend, row.precision) for row in found.itertuples()}


# ---- drawing


@dataclasses.dataclass
class Chart:
    """One kind of chart: the column that it draws and how it splits into panels."""

    column: str
    unit: str
    x: str
    panel: str  # a panel for each value of this column
    finding: Callable[[pd.DataFrame, str], str]
    shared: bool = True  # one scale for all panels
    bars: bool = False


CHARTS = {
    "fps_vs_image_size.png": Chart("fps", "images/s", "image_size", "batch_size", leader, shared=False),
    "fps_vs_batch_size.png": Chart("fps", "images/s", "batch_size", "image_size", batching),
    "speedup_vs_image_size.png": Chart("speedup", "speedup", "image_size", "batch_size", leader, bars=True),
    "memory_vs_batch_size.png": Chart("gpu_memory_mb", "GPU memory (MB)", "batch_size", "image_size", memory),
}


def errors(own: pd.DataFrame, column: str):
    """Distances to the ends of the 95 % interval, as matplotlib takes them; none for columns without."""
    if f"{column}_low" not in own:
        return None
    return np.clip([own[column] - own[f"{column}_low"], own[f"{column}_high"] - own[column]], 0, None)


def draw_lines(ax, chart: Chart, panel: pd.DataFrame, looks: dict, ticks: list[int]) -> None:
    """A line per backend with its intervals; a cross at the foot where one was tried and has no value."""
    crosses = dict.fromkeys(ticks, 0)
    for name, look in looks.items():
        own = panel[panel["label"] == name].drop_duplicates(chart.x).set_index(chart.x).reindex(ticks)
        error = errors(own, chart.column)
        ax.errorbar(
            range(len(ticks)), own[chart.column], yerr=error, elinewidth=1, capsize=2, label=name, **look
        )
        for i in np.flatnonzero(own[chart.column].isna() & own["status"].notna()):
            foot_y = 0.05 + 0.08 * crosses[ticks[i]]
            crosses[ticks[i]] += 1
            ax.plot(i, foot_y, "x", color=look["color"], transform=ax.get_xaxis_transform(), zorder=5)
    ax.set_xlim(-0.3, len(ticks) - 0.7)


def draw_bars(ax, chart: Chart, panel: pd.DataFrame, looks: dict, ticks: list[int]) -> None:
    """Groups of bars with their values, a line at 1x, and the reason where a bar is missing."""
    step = 0.84 / len(looks)
    turned = len(ticks) * len(looks) > 12
    ax.axhline(1, color=INK, linewidth=1, zorder=2)
    for k, (name, look) in enumerate(looks.items()):
        own = panel[panel["label"] == name].drop_duplicates(chart.x).set_index(chart.x).reindex(ticks)
        at = np.arange(len(ticks)) - 0.42 + step * (k + 0.5)
        ax.bar(at, own[chart.column], step * 0.92, label=name, **bar_look(look))
        ax.errorbar(at, own[chart.column], yerr=errors(own, chart.column), fmt="none", ecolor=INK, capsize=2)
        tops = own["speedup_high"].fillna(own["speedup"]).fillna(0)
        for x, value, top, status in zip(at, own[chart.column], tops, own["status"], strict=True):
            text = f"{value:.1f}" if pd.notna(value) else MARK.get(status, status)
            if isinstance(text, str):  # no text where nothing was tried
                where = dict(xytext=(0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=9)
                ax.annotate(text, (x, top), color=INK, rotation=90 if turned else 0, **where)
    ax.set_xlim(-0.5, len(ticks) - 0.5)


def bar_look(look: dict) -> dict:
    """The bar that goes with a line: its colour, and a hatch for its marker."""
    return dict(facecolor=look["color"], hatch=HATCH.get(look["marker"]), edgecolor="white", linewidth=0)


def dress(ax, x_label: str, y_label: str) -> None:
    """What every panel has: units, thousands apart, a light grid."""
    ax.set_xlabel(x_label, color=INK)
    ax.set_ylabel(y_label, color=INK)
    ax.tick_params(labelsize=10, color=GREY, labelcolor=INK)
    ax.grid(axis="y", color="#dddddd", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def shape(chart: Chart, panels: int) -> tuple[int, int]:
    """Rows and columns of panels."""
    columns = 1 if chart.bars else max(1, min(panels, 4 if chart.shared else 3))
    return -(-panels // columns), columns


def draw_block(part, chart: Chart, title: str, block: pd.DataFrame) -> None:
    """One sweep: panels beside each other, the legend to their right, the note under them."""
    shown = block[block["backend"] != BASELINE] if chart.bars else block
    looks = looks_of(shown, chart.column)
    values = sorted(block[chart.panel].unique()) if looks else []
    ticks = sorted(block[chart.x].unique())
    heading(part, title + chart.finding(block, chart.column))
    note = not_measured(block, "fps" if chart.bars else chart.column)
    crosses = not chart.bars and block.loc[block["label"].isin(list(looks)), chart.column].isna().any()
    if note:
        note = textwrap.fill(f"Not measured{' (×)' if crosses else ''}: {note}", 135)
        part.supxlabel(note, fontsize=9, color=INK, x=0.01, ha="left")
    if not values:
        part.subplots().axis("off")  # without any panel the note would lie over the footer
        return
    rows, columns = shape(chart, len(values))
    grid = part.subplots(rows, columns, squeeze=False, sharey=chart.shared)
    for k, ax in enumerate(grid.flat):
        if k >= len(values):
            ax.axis("off")
            continue
        panel = block[block[chart.panel] == values[k]]
        (draw_bars if chart.bars else draw_lines)(ax, chart, panel, looks, ticks)
        ax.set_title(
            f"{values[k]} px" if chart.panel == "image_size" else f"batch {values[k]}", fontsize=10.5
        )
        ax.set_xticks(range(len(ticks)), list(map(str, ticks)))
        ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.6g}"))
        first, last = k % columns == 0, k + columns >= len(values)
        dress(ax, AXIS[chart.x] if last else "", chart.unit if first else "")
    for ax in grid.flat[:1] if chart.shared else grid.flat:  # once all is drawn
        ax.set_ylim(0, ax.get_ylim()[1] * (1.12 if chart.bars else 1))  # above bars stand their values
    legend(part, looks, shown[shown[chart.column].notna()].groupby("label")[chart.column].max(), chart.bars)


def heading(part, text: str) -> None:
    part.suptitle(textwrap.fill(text, 84), fontsize=13, fontweight="bold", color=INK, x=0.01, ha="left")


def legend(part, looks: dict, peaks: pd.Series, bars: bool) -> None:
    """To the right of the panels: of lines the highest first, of bars in their own order."""
    handles = []
    for name in looks if bars else sorted(looks, key=lambda name: -peaks[name]):
        text = textwrap.fill(name, 22)
        handle = (
            Patch(**bar_look(looks[name]), label=text) if bars else Line2D([], [], **looks[name], label=text)
        )
        handles.append(handle)
    part.legend(handles=handles, frameon=False, fontsize=10, loc="outside right center")


def sheet(heights: list[float], feet: list[str]):
    """A figure with a subfigure for each height, in inches, and the footer's lines at the bottom."""
    size = WIDTH, sum(heights) + 0.2 * len(feet)
    fig = Figure(figsize=size, dpi=DPI, facecolor="white", layout="constrained")
    fig.supxlabel("\n".join(feet), fontsize=9, color=GREY, x=0.01, ha="left")
    return fig, fig.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]


def draw(chart: Chart, rows: pd.DataFrame, environments: dict[str, dict]) -> Figure:
    """The whole chart, a subfigure for each sweep, since each has a baseline of its own."""
    ordered = in_order(rows)
    parts, heights = blocks(ordered) or [("", ordered)], []
    for _, block in parts:
        panels = block[chart.panel].nunique() if block[chart.column].notna().any() else 0
        rows_of_panels, names = shape(chart, panels)[0], 0.36 * len(looks_of(block, chart.column))
        body = 2.1 * panels if chart.bars else max(2.6 * rows_of_panels, names * (panels > 0))
        heights.append(1.2 + body)
    fig, subfigures = sheet(heights, feet_of(list(rows["sweep"].unique()), environments))
    for part, (title, block) in zip(subfigures, parts, strict=True):
        draw_block(part, chart, title, block)
    return fig


# ---- the roofline


def draw_roofline(rows: pd.DataFrame, environments: dict[str, dict]) -> Figure | None:
    """Rate of operations against operations per byte, a panel for each sweep; None without ceilings."""
    rows = in_order(rows)
    rows = rows[(rows["status"] == "ok") & rows["pct_measured_peak"].notna()]
    known = {name for name, facts in environments.items() if facts.get("ceilings")}
    parts = blocks(rows[rows["sweep"].isin(known)])
    if not parts:
        return None
    sweeps = [block["sweep"].iloc[0] for _, block in parts]
    fig, subfigures = sheet([4.8] * len(parts), feet_of(sweeps, environments))
    for part, sweep, (title, block) in zip(subfigures, sweeps, parts, strict=True):
        heading(part, title + roofline_finding(block))
        draw_roof(part.subplots(), block, environments[sweep]["ceilings"])
    return fig


def draw_roof(ax, block: pd.DataFrame, ceilings: dict) -> None:
    """The roofs of one machine and the rows under them; a mark grows with its batch."""
    used = {name: ceilings["tflops"][name] for name in dict.fromkeys(block["precision"])}
    bandwidth = ceilings["gb_per_s"] / 1000
    left = block["flops_per_byte"].min() / 3
    right = max(block["flops_per_byte"].max(), max(used.values()) / bandwidth) * 1.5
    for name, peak in used.items():
        ax.plot(
            [left, peak / bandwidth, right],
            [left * bandwidth, peak, peak],
            color=GREY,
            linewidth=1.2,
            zorder=1,
        )
        at, side = (left, "left") if peak / bandwidth < left else (right, "right")
        where = dict(xytext=(3 if side == "left" else -3, 3), textcoords="offset points", ha=side, fontsize=9)
        ax.annotate(f"{name} matrix product: {figure(peak)} TFLOP/s", (at, peak), **where)
    ax.set_xscale("log")
    ax.set_yscale("log")
    slope = f"slope: copy at {figure(ceilings['gb_per_s'])} GB/s"
    ax.text(0.02, 0.94, slope, transform=ax.transAxes, fontsize=9, color=INK)
    for name, look in looks_of(block, "tflops").items():
        look = {**look, "linestyle": "none"}
        for row in block[block["label"] == name].itertuples():
            size = 3.5 + 1.2 * np.log2(row.batch_size)
            ax.plot(row.flops_per_byte, row.tflops, **look | {"markersize": size}, alpha=0.85)
        ax.plot([], [], **look, label=textwrap.fill(name, 22))
    ax.set_xlim(left, right)
    ax.set_ylim(block["tflops"].min() / 2, max(used.values()) * 2)
    dress(ax, "operations per byte (FLOP/B), every layer's input, output and weights moved once", "TFLOP/s")
    for side in (ax.xaxis, ax.yaxis):
        side.set_major_locator(LogLocator(subs=[1, 2, 5]))
        side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        side.set_minor_formatter("")
    ax.figure.legend(
        loc="outside right center", frameon=False, title="larger marks: larger batches", title_fontsize=9
    )


# ---- files


def draw_all(rows: pd.DataFrame, environments: dict[str, dict], results: Path) -> list[Path]:
    """Write every chart and return the paths; a chart of what was not read is removed."""
    figures = {name: draw(chart, rows, environments) for name, chart in CHARTS.items()}
    if not findings.measured(rows)["gpu_memory_mb"].notna().any():
        figures["memory_vs_batch_size.png"] = None
    figures["roofline.png"] = draw_roofline(rows, environments)
    paths = []
    for name, fig in figures.items():
        if fig is None:
            (results / name).unlink(missing_ok=True)
        else:
            write_png(fig, results / name)
            paths.append(results / name)
    return paths


def write_png(fig: Figure, path: Path) -> None:
    fig.savefig(png := io.BytesIO(), format="png", metadata={"Software": None})
    write_atomic(path, png.getvalue())


def draw_comparison(both: pd.DataFrame, title: str, path: Path) -> None:
    """A second table's throughput over a first's, with 95 % intervals: see findings.ratios()."""
    fig = Figure(figsize=(WIDTH, 1.3 + 0.24 * len(both)), dpi=DPI, layout="constrained")
    ax, names = fig.add_subplot(), []
    for y, row in enumerate(both.itertuples()):
        look = style(row.backend, row.precision_after) | {"linestyle": "none"}
        names.append(
            f"{label(row.backend, row.precision_after)}, {row.image_size} px, batch {row.batch_size}"
        )
        ax.plot([row.fps_ratio_low, row.fps_ratio_high], [y, y], color=look["color"], linewidth=2)
        ax.plot(row.fps_ratio, y, **look)
    ax.axvline(1, color=INK, linewidth=1)
    ax.set_yticks(range(len(both)), names)
    ax.invert_yaxis()
    dress(ax, "throughput, second / first (right of 1: the second is faster)", "")
    ax.grid(axis="x", color="#dddddd", linewidth=0.7)
    level = int(findings.agrees(both, "fps").sum())
    heading(fig, f"{title}: no difference in {level} of {len(both)} configurations")
    write_png(fig, path)
