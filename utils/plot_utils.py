"""Charts: the rows of benchmark_results.csv, and of what end_to_end.py writes -> PNG.  A pure reader.

A chart shows every method of a machine, in whichever environment it was measured.  What was tried and not
measured stays visible: as a gap, as a mark at the foot of the panel and in the note under it.
"""

import dataclasses
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils.measure.schema import BASELINE
from utils.report import analysis, chart_style
from utils.report.chart_style import GREY, INK, bar_look, dress, feet_of, leader, sheet, style, thousands
from utils.report.names import FAMILIES, family
from utils.report.tables import read_serving, short
from utils.report.words import figure, is_of_photos, times, with_labels, without_figures

AXIS = {"image_size": "image size (px)", "batch_size": "batch size (images)"}
MARK = {"out_of_memory": "OOM", "mismatch": "wrong", "ok": "no baseline"}
LEGEND = dict(frameon=False, fontsize=9)


def in_order(rows: pd.DataFrame) -> pd.DataFrame:
    """With `label`, without the figures of rows that are not ok, methods in the charts' order."""
    rows = with_labels(without_figures(rows.reset_index(drop=True)))
    families = [*FAMILIES, *rows.backend.map(family)]
    rank = {name: (families.index(family(name)), chart_style.look_of(name)) for name in rows.backend}
    return rows.sort_values("backend", key=lambda names: names.map(rank), kind="stable")


def looks_of(rows: pd.DataFrame, column: str) -> dict[str, dict]:
    """Label -> style of each method with a value; the same method of a further environment is fainter."""
    looks, seen = {}, set()
    for row in rows[rows[column].notna()].drop_duplicates("label").itertuples():
        looks[row.label] = style(row.backend, row.precision)
        looks[row.label] |= {"alpha": 0.5} if row.backend in seen else {}
        seen.add(row.backend)
    return looks


def sweeps_of(rows: pd.DataFrame) -> list[str]:
    return rows.sort_index().sweep.unique().tolist()


# ---- figures against image size and batch size


@dataclasses.dataclass
class Chart:
    """One kind of chart: the column that it draws and how it splits into panels."""

    column: str
    unit: str
    x: str
    panel: str  # a panel for each value of this column
    finding: Callable[[pd.DataFrame, str], str]
    bars: bool = False


CHARTS = {
    "fps_vs_image_size.png": Chart("fps", "images/s", "image_size", "batch_size", leader),
    "fps_vs_batch_size.png": Chart("fps", "images/s", "batch_size", "image_size", chart_style.batching),
    "speedup_vs_image_size.png": Chart("speedup", "speedup", "image_size", "batch_size", leader, bars=True),
    "memory_vs_batch_size.png": Chart(
        "gpu_memory_mb", "GPU MB", "batch_size", "image_size", chart_style.memory
    ),
}


def panels_of(chart: Chart, rows: pd.DataFrame) -> list[tuple[int, pd.DataFrame]]:
    """The value and the rows of each panel; one with a single point a method only where there is no other."""
    panels = list(rows.groupby(chart.panel))
    several = [(value, panel) for value, panel in panels if panel[chart.x].nunique() > 1]
    return several or panels


def series(panel: pd.DataFrame, label: str, chart: Chart, ticks: list[int]) -> tuple:
    """One method's rows, one for each tick, and the distances to the ends of their intervals: 0 without."""
    own = panel[panel.label == label].drop_duplicates(chart.x).set_index(chart.x).reindex(ticks)
    value, ends = own[chart.column], (own.get(f"{chart.column}_{end}", np.nan) for end in ("low", "high"))
    return own, np.nan_to_num([np.abs(value - end) for end in ends])


def draw_lines(ax, chart: Chart, panel: pd.DataFrame, looks: dict, ticks: list[int]) -> None:
    """A line per method with its intervals; a cross at the foot where one was tried and has no value."""
    crosses, places = dict.fromkeys(ticks, 0), np.arange(len(ticks))
    for name, look in looks.items():
        own, error = series(panel, name, chart, ticks)
        tried, values = own.status.notna().to_numpy(), own[chart.column]
        ax.errorbar(
            places[tried], values[tried], yerr=error[:, tried], elinewidth=1, capsize=2, label=name, **look
        )
        for i in np.flatnonzero(tried & values.isna()):
            height = 0.05 + 0.08 * crosses[ticks[i]]
            crosses[ticks[i]] += 1
            ax.plot(i, height, "x", color=look["color"], transform=ax.get_xaxis_transform(), zorder=5)
    ax.set_xlim(-0.3, len(ticks) - 0.7)
    ax.set_ylim(0)


def draw_bars(ax, chart: Chart, panel: pd.DataFrame, looks: dict, ticks: list[int]) -> None:
    """Groups of bars with their values, a line at 1x, and the reason where a bar is missing."""
    step, upright = 0.9 / len(looks), len(looks) * len(ticks) > 10
    size = min(9, 72 * 9 * step / len(ticks) * 0.85)  # points: as wide as a bar
    where = dict(xytext=(0, 3), textcoords="offset points", ha="center", va="bottom", color=INK)
    where |= dict(fontsize=size, rotation=90 if upright else 0)
    ax.axhline(1, color=INK, linewidth=1, zorder=2)
    for k, (name, look) in enumerate(looks.items()):
        own, error = series(panel, name, chart, ticks)
        at = np.arange(len(ticks)) - 0.45 + step * (k + 0.5)
        ax.bar(at, own.speedup, step * 0.92, label=name, **bar_look(look))
        ax.errorbar(at, own.speedup, yerr=error, fmt="none", ecolor=INK, capsize=1.5)
        for x, row in zip(at, own.itertuples(), strict=True):
            top = np.nanmax([0, row.speedup, row.speedup_high])
            text = times(row) or "one round" if pd.notna(row.speedup) else MARK.get(row.status, row.status)
            if isinstance(text, str):  # no text where nothing was tried
                ax.annotate(text if upright else text.replace(" (", "\n("), (x, top), **where)
    ax.set_xlim(-0.5, len(ticks) - 0.5)
    room = 1 + 0.085 * size if upright else 1.25  # above bars stand their values
    ax.set_ylim(0, ax.get_ylim()[1] * room)


def draw(chart: Chart, rows: pd.DataFrame, environments: dict[str, dict]) -> Figure:
    """The whole chart: a panel for each image or batch size, the legend under them."""
    rows = in_order(rows)
    shown = rows[rows.backend != BASELINE] if chart.bars else rows
    looks = looks_of(shown, chart.column)
    panels = panels_of(chart, rows) if looks else []
    columns = 1 if chart.bars else max(1, min(len(panels), 4))
    lines = -(-len(panels) // columns)
    height = max(1, lines) * (2.9 if chart.bars else 2.7) + 0.22 * -(-len(looks) // 3)
    missing = chart_style.not_measured(rows)
    crosses = not chart.bars and rows.loc[rows.label.isin(list(looks)), chart.column].isna().any()
    note = [f"Not measured{' (×)' if crosses else ''}: {missing}"] if missing else []
    title = chart.finding(rows, chart.column)
    fig, part = sheet(height, title, [*note, *feet_of(sweeps_of(rows), environments)])
    if not looks:
        part.subplots().axis("off")
        return fig
    grid = part.subplots(lines, columns, squeeze=False)
    for ax in grid.flat[len(panels) :]:
        ax.axis("off")
    for k, (ax, (value, panel)) in enumerate(zip(grid.flat, panels, strict=False)):
        ticks = sorted(panel[chart.x].unique())
        (draw_bars if chart.bars else draw_lines)(ax, chart, panel, looks, ticks)
        ax.set_title(f"{value} px" if chart.panel == "image_size" else f"batch {value}", fontsize=10.5)
        ax.set_xticks(range(len(ticks)), list(map(str, ticks)))
        ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        thousands(ax.yaxis)
        below = k + columns >= len(panels)
        dress(ax, AXIS[chart.x] if below else "", chart.unit if k % columns == 0 else "")
    part.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, **LEGEND)
    return fig


# ---- every method at one size


def draw_horizontal(title: str, small_print: list[str], bars: list[tuple]) -> Figure:
    """Horizontal bars in images/s, the first at the foot: of each its row, its name, value, the ends of the
    interval, and what stands at its end."""
    fig, part = sheet(0.4 + 0.48 * len(bars), title, small_print)
    ax = part.subplots()
    for y, (row, _, value, low, high, text) in enumerate(bars):
        ax.barh(y, value, 0.7, **bar_look(style(row.backend, row.precision)))
        ends = np.nan_to_num([[value - low], [high - value]])
        ax.errorbar(value, y, xerr=ends, fmt="none", ecolor=INK, capsize=2)
        end = np.nanmax([0, value, high])
        ax.annotate(text, (end, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8.5)
    dress(ax, "images/s", "")
    ax.grid(visible=False, axis="y")
    ax.set_yticks(range(len(bars)), [name for _, name, *_ in bars], fontsize=8.5)
    ax.set_ylim(-0.6, len(bars) - 0.4)
    ax.set_xlim(0, np.nanmax([1, *(value for _, _, value, *_ in bars)]) * 1.75)
    thousands(ax.xaxis)
    return fig


def draw_methods(rows: pd.DataFrame, environments: dict[str, dict]) -> Figure | None:
    """Every method at one image and batch size, the slowest at the foot; under its name what a variant adds
    and its environment, at its end images/s and speedup with its interval."""
    rows, bars = analysis.all_methods(in_order(rows)), []
    if len(rows) < 2:
        return None
    sweeps = sweeps_of(rows)
    for row in rows.itertuples():
        about = ["the baseline" if row.backend == BASELINE else row.adds, row.sweep * (len(sweeps) > 1)]
        about = textwrap.fill("; ".join(filter(None, about)), 60)
        name = f"{row.label.removesuffix(f' ({row.sweep})')}\n{about}"
        text = ", ".join(filter(None, [f"{figure(row.fps)} images/s", times(row)]))
        text = "wrong results" if row.status == "mismatch" else text
        bars.append((row, name.strip(), row.fps, row.fps_low, row.fps_high, text))
    where = f"{rows.image_size.iloc[0]} px, batch {rows.batch_size.iloc[0]}: every method"
    note = f"{where}; x: speedup over PyTorch FP32 in the same environment, with its 95 % interval"
    return draw_horizontal(leader(rows), [note, *feet_of(sweeps, environments)], bars)


# ---- the roofline


def draw_roofline(rows: pd.DataFrame, environments: dict[str, dict]) -> Figure | None:
    """Rate of operations against operations per byte, under the machine's measured limits; None without."""
    limits = {sweep: facts["ceilings"] for sweep, facts in environments.items() if facts.get("ceilings")}
    rows = in_order(rows[rows.sweep.isin(limits)])
    rows = rows[rows.pct_measured_peak.notna()]
    if rows.empty:
        return None
    best, counts = rows.loc[rows.pct_measured_peak.idxmax()], rows["limit"].value_counts()
    kinds = [kind for kind in ("launch", "latency", "memory", "compute") if kind in counts]
    share = f"{figure(best.pct_measured_peak)} % of the rate of a matrix product"
    title = f"{best.label} reaches {share} at {best.image_size} px, batch {best.batch_size}"
    bottlenecks = ", ".join(f"{counts[kind]} {kind}" for kind in kinds)
    note = f"Larger marks: larger batches.  Rows by bottleneck: {bottlenecks}"
    sweeps = sweeps_of(rows)
    height = 4.4 + 0.2 * -(-rows.label.nunique() // 3)
    fig, part = sheet(height, title, [note, *feet_of(sweeps, environments)])
    draw_roof(part.subplots(), rows, [limits[sweep] for sweep in sweeps])
    part.legend(loc="outside lower center", ncols=3, **LEGEND)
    return fig


def draw_roof(ax, rows: pd.DataFrame, limits: list[dict]) -> None:
    """The highest measured roofs of the machine and the rows under them; a mark grows with its batch."""
    roofs = {name: max(one["tflops"].get(name, 0) for one in limits) for name in rows.precision.unique()}
    copied = max(one["gb_per_s"] for one in limits)
    bandwidth = copied / 1000
    left = rows.flops_per_byte.min() / 3
    right = max(rows.flops_per_byte.max(), max(roofs.values()) / bandwidth) * 1.5
    for name, peak in roofs.items():
        line = [left * bandwidth, peak, peak]
        ax.plot([left, peak / bandwidth, right], line, color=GREY, linewidth=1.2, zorder=1)
        where = dict(xytext=(-3, 3), textcoords="offset points", ha="right", fontsize=9)
        ax.annotate(f"{name} matrix product: {figure(peak)} TFLOP/s", (right, peak), **where)
    ax.text(0.02, 0.94, f"slope: copy at {figure(copied)} GB/s", transform=ax.transAxes, fontsize=9)
    for name, look in looks_of(rows, "tflops").items():
        look = look | {"linestyle": "none", "alpha": 0.85}
        for row in rows[rows.label == name].itertuples():
            size = 3.5 + 1.2 * np.log2(row.batch_size)
            ax.plot(row.flops_per_byte, row.tflops, **look | {"markersize": size})
        ax.plot([], [], **look, label=name)
    ax.set(xscale="log", yscale="log", xlim=(left, right))
    ax.set_ylim(rows.tflops.min() / 2, max(roofs.values()) * 2)
    dress(ax, "operations per byte (FLOP/B), every layer's input, output and weights moved once", "TFLOP/s")
    chart_style.log_ticks(ax.xaxis, ax.yaxis)


# ---- serving: from files to labels (end_to_end.csv), and latency under load (load.csv)


def at_usual_size(table: pd.DataFrame, environments: dict) -> tuple[pd.DataFrame, list[str]]:
    """The rows at 224 px, or the smallest size, with their label; a foot for each sweep, with the day that
    serving was measured and, beside a GPU, the threads."""
    table = with_labels(table[table.image_size == analysis.usual_size(table)].reset_index(drop=True))
    known = {}
    for sweep, part in table.groupby("sweep", sort=False):
        last, facts = part.loc[part.date.idxmax()], environments.get(sweep, {})
        day = f"{last.cores} threads, {last.date}" if facts.get("gpu") else last.date
        known[sweep] = facts | {"short": short(facts | {"date": day})} if facts else {}
    return table, feet_of(list(known), known)


def draw_end_to_end(table: pd.DataFrame, environments: dict[str, dict]) -> Figure:
    """For each method and decoder a bar from files to labels; beside it the speed of its halves alone."""
    table, feet = at_usual_size(table, environments)
    ok, bars = table[table.status == "ok"], []
    title = "Nothing from files to labels was measured"
    if len(ok):
        best = ok.loc[ok.images_per_s.idxmax()]
        title = f"From files to labels: {best.label} reaches {figure(best.images_per_s)} images/s"
    for row in table.itertuples():
        decoding, inference = figure(row.decode_images_per_s), figure(row.infer_images_per_s)
        text = f"{figure(row.images_per_s)} images/s, {row.overlap:.0%} of what its parts allow"
        text += f"\nalone: decoding {decoding}, inference {inference}"
        figures = (row.images_per_s, row.images_per_s_low, row.images_per_s_high, text)
        if row.status != "ok":
            figures = (0, 0, 0, textwrap.fill(f"{row.status}: {row.reason}", 70))
        decoder = f"{row.decoder}{', photos' * is_of_photos(row)}"
        name = f"{row.label}, batch {row.batch_size}\n{decoder}; bottleneck: {row.limit}"
        bars.append((row, name, *figures))
    size = f"{table.image_size.iloc[0]} px"
    note = f"{size}.  The percentages are of what decoding and inference allow together."
    return draw_horizontal(title, [note, *feet], bars)


def draw_load(load: pd.DataFrame, environments: dict[str, dict]) -> Figure:
    """The 99th percentile of the latency against the rate offered, with the limit."""
    load = load[load["rate"].notna() & load.p99_ms.notna()]
    load, feet = at_usual_size(load.assign(valid=load.valid.astype(str) == "True"), environments)
    rates, limit = analysis.highest_rates(load), load.max_latency_ms.iloc[0]
    title = f"No rate tried keeps 99 % of the answers within {figure(limit)} ms"
    if len(rates):
        label = load.loc[load.backend == rates.index[0], "label"].iloc[0]
        title = f"{label} answers 99 % within {figure(limit)} ms at up to {figure(rates.iloc[0])} images/s"
    size = f"{load.image_size.iloc[0]} px, single images arriving at random"
    note = f"{size}; ×: the load generator calls the run invalid"
    fig, part = sheet(4.4, title, [note, *feet])
    ax = part.subplots()
    for name, look in looks_of(load, "p99_ms").items():
        own = load[load.label == name].sort_values("rate")
        ax.plot(own["rate"], own.p99_ms, label=name, **look)
        wrong = own[~own.valid]
        ax.plot(wrong["rate"], wrong.p99_ms, "x", color=INK, markersize=9, zorder=5)
    ax.axhline(limit, color=GREY, linewidth=1.2, label=f"limit: {figure(limit)} ms")
    ax.set_yscale("log")
    ax.set_xlim(0, load["rate"].max() * 1.05)
    thousands(ax.xaxis)
    chart_style.log_ticks(ax.yaxis)
    dress(ax, "images/s offered", "p99 latency (ms)")
    part.legend(loc="outside lower center", ncols=3, **LEGEND)
    return fig


SERVING = {"end_to_end.png": draw_end_to_end, "load.png": draw_load}

# ---- files


def draw_all(rows: pd.DataFrame, environments: dict[str, dict], results: Path) -> list[Path]:
    """Write every chart and return the paths; a chart of what was not measured is removed."""
    figures: dict[str, Figure | None] = {}
    figures |= {name: draw(chart, rows, environments) for name, chart in CHARTS.items()}
    if not analysis.measured(rows).gpu_memory_mb.notna().any():
        figures["memory_vs_batch_size.png"] = None
    figures["ladder.png"] = None  # what methods.png was called in earlier versions
    figures["methods.png"] = draw_methods(rows, environments)
    figures["roofline.png"] = draw_roofline(rows, environments)
    for name, draw_serving in SERVING.items():
        table = read_serving((results / name).with_suffix(".csv"))
        figures[name] = None if table is None or table.empty else draw_serving(table, environments)
    for name, fig in figures.items():
        if fig is None:
            (results / name).unlink(missing_ok=True)
        else:
            chart_style.write_png(fig, results / name)
    return [results / name for name, fig in figures.items() if fig]


def draw_comparison(both: pd.DataFrame, title: str, path: Path) -> None:
    """A second table's throughput over a first's, with 95 % intervals; `both` as analysis.ratios() gives."""
    both = with_labels(both.assign(precision=both.precision_after, sweep=both.get("sweep", "")))
    fig, part = sheet(0.6 + 0.24 * len(both), title, [])
    ax, names = part.subplots(), []
    for y, row in enumerate(both.itertuples()):
        look: dict = style(row.backend, row.precision) | {"linestyle": "none"}
        names.append(f"{row.label}, {row.image_size} px, batch {row.batch_size}")
        ax.plot([row.fps_ratio_low, row.fps_ratio_high], [y, y], color=look["color"], linewidth=2)
        ax.plot(row.fps_ratio, y, **look)
    ax.axvline(1, color=INK, linewidth=1)
    ax.set_yticks(range(len(both)), names)
    ax.invert_yaxis()
    dress(ax, "throughput, second / first (right of 1: the second is faster)", "")
    ax.grid(axis="x", color="#dddddd", linewidth=0.7)
    chart_style.write_png(fig, path)
