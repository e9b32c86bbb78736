"""Charts: the rows of benchmark_results.csv -> PNG.  A pure reader: it measures and judges nothing.

What was not measured stays visible: as a gap, as a mark at the foot of the panel and in the note under it.
"""

import dataclasses
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from utils.measure.schema import BASELINE
from utils.report import analysis, serving_plots
from utils.report.chart_style import (
    BACKEND_COLOUR,
    DPI,
    GREY,
    INK,
    WIDTH,
    bar_look,
    dress,
    heading,
    lie_down,
    log_ticks,
    look_of,
    note,
    sheet,
    style,
    write_png,
)
from utils.report.chart_titles import batching, feet_of, leader, memory, not_measured, roofline_finding
from utils.report.tables import read_serving
from utils.report.words import family, figure, label, without_figures

AXIS = {"image_size": "image size (px)", "batch_size": "batch size (images)"}
MARK = {"out_of_memory": "OOM", "mismatch": "wrong", "ok": "no baseline"}


# ---- the rows


def in_order(rows: pd.DataFrame) -> pd.DataFrame:
    """With `label`, without the figures of rows that are not ok, backends in the charts' order."""
    rows = without_figures(rows.reset_index(drop=True))
    rows["label"] = [label(row.backend, row.precision) for row in rows.itertuples()]
    families = [*BACKEND_COLOUR, *rows["backend"].map(family)]
    rank = {backend: (families.index(family(backend)), look_of(backend)) for backend in rows["backend"]}
    return rows.sort_values("backend", key=lambda names: names.map(rank), kind="stable")


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


def series(panel: pd.DataFrame, label: str, chart: Chart, ticks: list[int]) -> tuple[pd.DataFrame, object]:
    """One backend's rows, one for each tick, and the distances to the ends of their intervals, if any."""
    own = panel[panel["label"] == label].drop_duplicates(chart.x).set_index(chart.x).reindex(ticks)
    low, high = f"{chart.column}_low", f"{chart.column}_high"
    if low not in own:
        return own, None
    return own, np.clip([own[chart.column] - own[low], own[high] - own[chart.column]], 0, None)


def draw_lines(ax, chart: Chart, panel: pd.DataFrame, looks: dict, ticks: list[int]) -> None:
    """A line per backend with its intervals; a cross at the foot where one was tried and has no value."""
    crosses, places = dict.fromkeys(ticks, 0), range(len(ticks))
    for name, look in looks.items():
        own, error = series(panel, name, chart, ticks)
        ax.errorbar(places, own[chart.column], yerr=error, elinewidth=1, capsize=2, label=name, **look)
        for i in np.flatnonzero(own[chart.column].isna() & own["status"].notna()):
            height = 0.05 + 0.08 * crosses[ticks[i]]
            crosses[ticks[i]] += 1
            ax.plot(i, height, "x", color=look["color"], transform=ax.get_xaxis_transform(), zorder=5)
    ax.set_xlim(-0.3, len(ticks) - 0.7)


def draw_bars(ax, chart: Chart, panel: pd.DataFrame, looks: dict, ticks: list[int]) -> None:
    """Groups of bars with their values, a line at 1x, and the reason where a bar is missing."""
    step = 0.84 / len(looks)
    where = dict(xytext=(0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=9, color=INK)
    where["rotation"] = 90 if len(ticks) * len(looks) > 12 else 0
    ax.axhline(1, color=INK, linewidth=1, zorder=2)
    for k, (name, look) in enumerate(looks.items()):
        own, error = series(panel, name, chart, ticks)
        at = np.arange(len(ticks)) - 0.42 + step * (k + 0.5)
        ax.bar(at, own["speedup"], step * 0.92, label=name, **bar_look(look))
        ax.errorbar(at, own["speedup"], yerr=error, fmt="none", ecolor=INK, capsize=2)
        for x, row in zip(at, own.itertuples(), strict=True):
            top = np.nanmax([0, row.speedup, row.speedup_high])
            text = f"{row.speedup:.1f}" if pd.notna(row.speedup) else MARK.get(row.status, row.status)
            if isinstance(text, str):  # no text where nothing was tried
                ax.annotate(text, (x, top), **where)
    ax.set_xlim(-0.5, len(ticks) - 0.5)


def shape(chart: Chart, panels: int) -> tuple[int, int]:
    """Rows and columns of panels."""
    columns = 1 if chart.bars else max(1, min(panels, 4 if chart.shared else 3))
    return -(-panels // columns), columns


def draw_block(part, chart: Chart, title: str, block: pd.DataFrame) -> None:
    """One sweep: panels beside each other, the legend to their right, the note under them."""
    shown = block[block["backend"] != BASELINE] if chart.bars else block
    looks, ticks = looks_of(shown, chart.column), sorted(block[chart.x].unique())
    heading(part, title + chart.finding(block, chart.column))
    crosses = not chart.bars and block.loc[block["label"].isin(list(looks)), chart.column].isna().any()
    if missing := not_measured(block, "fps" if chart.bars else chart.column):
        note(part, f"Not measured{' (×)' if crosses else ''}: {missing}")
    if not looks:
        part.subplots().axis("off")  # without any panel the note would lie over the footer
        return
    values = sorted(block[chart.panel].unique())
    rows, columns = shape(chart, len(values))
    grid = part.subplots(rows, columns, squeeze=False, sharey=chart.shared)
    for ax in grid.flat[len(values) :]:
        ax.axis("off")
    for k, (ax, value) in enumerate(zip(grid.flat, values, strict=False)):
        (draw_bars if chart.bars else draw_lines)(ax, chart, block[block[chart.panel] == value], looks, ticks)
        ax.set_title(f"{value} px" if chart.panel == "image_size" else f"batch {value}", fontsize=10.5)
        ax.set_xticks(range(len(ticks)), list(map(str, ticks)))
        ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.6g}"))
        first, last = k % columns == 0, k + columns >= len(values)
        dress(ax, AXIS[chart.x] if last else "", chart.unit if first else "")
    for ax in grid.flat[:1] if chart.shared else grid.flat:  # once all is drawn
        ax.set_ylim(0, ax.get_ylim()[1] * (1.12 if chart.bars else 1))  # above bars stand their values
    legend(part, looks, shown.groupby("label")[chart.column].max(), chart.bars)


def legend(part, looks: dict, peaks: pd.Series, bars: bool) -> None:
    """To the right of the panels: of lines the highest first, of bars in their own order."""
    handles = []
    for name in looks if bars else sorted(looks, key=lambda name: -peaks[name]):
        text, look = textwrap.fill(name, 22), looks[name]
        handles.append(Patch(**bar_look(look), label=text) if bars else Line2D([], [], **look, label=text))
    part.legend(handles=handles, frameon=False, fontsize=10, loc="outside right center")


def draw(chart: Chart, rows: pd.DataFrame, environments: dict[str, dict]) -> Figure:
    """The whole chart, a subfigure for each sweep, since each has a baseline of its own."""
    ordered = in_order(rows)
    parts, heights = blocks(ordered) or [("", ordered)], []
    for _, block in parts:
        looks = looks_of(block, chart.column)
        panels = block[chart.panel].nunique() if looks else 0
        lines = max(2.6 * shape(chart, panels)[0], 0.36 * len(looks))
        heights.append(1.2 + (2.1 * panels if chart.bars else lines))
    fig, subfigures = sheet(heights, feet_of(list(rows["sweep"].unique()), environments))
    for part, (title, block) in zip(subfigures, parts, strict=True):
        draw_block(part, chart, title, block)
    return fig


# ---- the roofline


def draw_roofline(rows: pd.DataFrame, environments: dict[str, dict]) -> Figure | None:
    """Rate of operations against operations per byte, a panel for each sweep; None without ceilings."""
    known = [name for name, facts in environments.items() if facts.get("ceilings")]
    rows = in_order(rows[rows["sweep"].isin(known)])
    parts = blocks(rows[rows["pct_measured_peak"].notna()])
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
    used = {name: ceilings["tflops"][name] for name in block["precision"].unique()}
    bandwidth = ceilings["gb_per_s"] / 1000
    left = block["flops_per_byte"].min() / 3
    right = max(block["flops_per_byte"].max(), max(used.values()) / bandwidth) * 1.5
    roof = dict(color=GREY, linewidth=1.2, zorder=1)
    for name, peak in used.items():
        ax.plot([left, peak / bandwidth, right], [left * bandwidth, peak, peak], **roof)
        at, side, shift = (left, "left", 3) if peak / bandwidth < left else (right, "right", -3)
        where = dict(xytext=(shift, 3), textcoords="offset points", ha=side, fontsize=9)
        ax.annotate(f"{name} matrix product: {figure(peak)} TFLOP/s", (at, peak), **where)
    slope = f"slope: copy at {figure(ceilings['gb_per_s'])} GB/s"
    ax.text(0.02, 0.94, slope, transform=ax.transAxes, fontsize=9, color=INK)
    for name, look in looks_of(block, "tflops").items():
        look = look | {"linestyle": "none"}
        for row in block[block["label"] == name].itertuples():
            size = 3.5 + 1.2 * np.log2(row.batch_size)
            ax.plot(row.flops_per_byte, row.tflops, **look | {"markersize": size}, alpha=0.85)
        ax.plot([], [], **look, label=textwrap.fill(name, 22))
    ax.set(xscale="log", yscale="log", xlim=(left, right))
    ax.set_ylim(block["tflops"].min() / 2, max(used.values()) * 2)
    dress(ax, "operations per byte (FLOP/B), every layer's input, output and weights moved once", "TFLOP/s")
    log_ticks(ax.xaxis, ax.yaxis)
    sizes = dict(title="larger marks: larger batches", title_fontsize=9)
    ax.figure.legend(loc="outside right center", frameon=False, **sizes)


# ---- the ladder


def draw_ladder(rows: pd.DataFrame, environments: dict[str, dict]) -> Figure | None:
    """Every method at one size and batch, the slowest at the foot, each with its gain over the one below."""
    parts = [(title, analysis.ladder(block)) for title, block in blocks(in_order(rows))]
    parts = [(title, rungs) for title, rungs in parts if len(rungs) > 1]
    if not parts:
        return None
    feet = feet_of([rungs["sweep"].iloc[0] for _, rungs in parts], environments)
    fig, subfigures = sheet([1.3 + 0.48 * len(rungs) for _, rungs in parts], feet)
    for part, (title, rungs) in zip(subfigures, parts, strict=True):
        heading(part, title + leader(rungs, "speedup"))
        draw_rungs(part.subplots(), rungs)
    return fig


def draw_rungs(ax, rungs: pd.DataFrame) -> None:
    """Horizontal bars; under a method's name what it adds, at its end images/s and gain."""
    names = []
    for y, row in enumerate(rungs.itertuples()):
        ax.barh(y, row.fps, 0.7, **bar_look(style(row.backend, row.precision)))
        ends = np.clip([[row.fps - row.fps_low], [row.fps_high - row.fps]], 0, None)
        ax.errorbar(row.fps, y, xerr=ends, fmt="none", ecolor=INK, capsize=2)
        adds = "the baseline" if row.backend == BASELINE else textwrap.fill(row.adds, 54)
        names.append(f"{row.label}\n{adds}".strip())
        gain = f", {row.gain:.2f}x the one below{' (level)' if row.level is True else ''}"
        text = f"{figure(row.fps)} images/s{gain if row.gain > 0 else ''}"
        text = "wrong results" if row.status == "mismatch" else text
        end = np.nanmax([0, row.fps, row.fps_high])
        ax.annotate(text, (end, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
    lie_down(ax, names, "images/s", rungs["fps"].max() * 1.75)


# ---- files


def draw_all(rows: pd.DataFrame, environments: dict[str, dict], results: Path) -> list[Path]:
    """Write every chart and return the paths; a chart of what was not read is removed."""
    figures = {name: draw(chart, rows, environments) for name, chart in CHARTS.items()}
    if not analysis.measured(rows)["gpu_memory_mb"].notna().any():
        figures["memory_vs_batch_size.png"] = None
    figures["ladder.png"] = draw_ladder(rows, environments)
    figures["roofline.png"] = draw_roofline(rows, environments)
    for name, draw_serving in serving_plots.CHARTS.items():
        table = read_serving((results / name).with_suffix(".csv"))
        figures[name] = None if table is None or table.empty else draw_serving(table, environments)
    paths = []
    for name, fig in figures.items():
        if fig is None:
            (results / name).unlink(missing_ok=True)
        else:
            write_png(fig, results / name)
            paths.append(results / name)
    return paths


def draw_comparison(both: pd.DataFrame, title: str, path: Path) -> None:
    """A second table's throughput over a first's, with 95 % intervals; `both` as findings.ratios() gives."""
    fig = Figure(figsize=(WIDTH, 1.3 + 0.24 * len(both)), dpi=DPI, layout="constrained")
    ax, names = fig.add_subplot(), []
    several = both.get("sweep", pd.Series()).nunique() > 1
    for y, row in enumerate(both.itertuples()):
        look = style(row.backend, row.precision_after) | {"linestyle": "none"}
        who = f"{row.sweep}: " * several + label(row.backend, row.precision_after)
        names.append(f"{who}, {row.image_size} px, batch {row.batch_size}")
        ax.plot([row.fps_ratio_low, row.fps_ratio_high], [y, y], color=look["color"], linewidth=2)
        ax.plot(row.fps_ratio, y, **look)
    ax.axvline(1, color=INK, linewidth=1)
    ax.set_yticks(range(len(both)), names)
    ax.invert_yaxis()
    dress(ax, "throughput, second / first (right of 1: the second is faster)", "")
    ax.grid(axis="x", color="#dddddd", linewidth=0.7)
    heading(fig, title)
    write_png(fig, path)
