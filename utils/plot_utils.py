"""Charts of every method of a machine, in whichever environment it was measured.  What was tried and not
measured stays visible: as a gap and in the note under the panels."""

import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils.measure.schema import BASELINE
from utils.report import analysis, chart_style
from utils.report.chart_style import GREY, INK, dress, feet_of, leader, legend, sheet, style
from utils.report.names import FAMILIES, family, label
from utils.report.tables import read_serving, short
from utils.report.words import figure, gaps, times, with_labels, without_figures

AXIS = {"image_size": "image size (px)", "batch_size": "batch size (images)"}


def in_order(rows: pd.DataFrame) -> pd.DataFrame:
    """With `label`, without the figures of rows that are not ok, methods in the charts' order."""
    rows = with_labels(without_figures(rows.reset_index(drop=True)))
    rank = {name: ([*FAMILIES, family(name)].index(family(name)), name) for name in rows.backend}
    return rows.sort_values("backend", key=lambda names: names.map(rank), kind="stable")


def looks_of(rows: pd.DataFrame, column: str) -> dict[str, dict]:
    """Label -> style of each method with a value; the same method of a further environment is fainter."""
    first = rows[rows[column].notna()].drop_duplicates("label")
    pairs = zip(first.itertuples(), first.duplicated("backend"), strict=True)
    return {row.label: style(row) | {"alpha": 0.5 if again else 1} for row, again in pairs}


def half_widths(rows: pd.DataFrame, column: str) -> np.ndarray:
    """(2, rows): the distances of a column's values to the ends of their intervals; 0 where there is none."""
    ends = [rows.get(f"{column}_{end}", rows[column]) for end in ("low", "high")]
    return np.nan_to_num(np.abs(np.array([rows[column] - end for end in ends], dtype=float)))


CHARTS = {  # column, unit, what it is drawn against, with a panel for each of the other's values; the title
    "fps_vs_image_size.png": ("fps", "images/s", "image_size", leader),
    "fps_vs_batch_size.png": ("fps", "images/s", "batch_size", chart_style.batching),
    "speedup_vs_image_size.png": ("speedup", "speedup", "image_size", leader),
    "memory_vs_batch_size.png": ("gpu_memory_mb", "GPU MB", "batch_size", chart_style.memory),
}


def draw(chart: tuple, rows: pd.DataFrame, environments: dict[str, dict]) -> Figure | None:
    """A panel for each image or batch size, in each a line for each method with its intervals, broken where
    a method was tried and has no value.  A panel with a single point a method is drawn only if all are so.
    None where GPU memory was not read."""
    (column, unit, x, title), rows = chart, in_order(rows)
    shown = rows[rows.backend != BASELINE] if column == "speedup" else rows
    looks = looks_of(shown, column)
    if not looks and column == "gpu_memory_mb":
        return None
    by_batch = x == "image_size"
    panels = list(shown.groupby("batch_size" if by_batch else "image_size")) if looks else []
    panels = [(value, panel) for value, panel in panels if panel[x].nunique() > 1] or panels
    columns = min(len(panels), 4) or 1
    lines = -(-len(panels) // columns) or 1
    missing = ", ".join(f"{called}: {status}" for called, status, _ in gaps(rows))
    small_print = [*filter(None, [missing and f"Not measured: {missing}"]), *feet_of(rows, environments)]
    fig, part = sheet(2.7 * lines + 0.22 * -(-len(looks) // 3), title(rows), small_print)
    grid = part.subplots(lines, columns, squeeze=False)
    for ax in grid.flat[len(panels) :]:
        ax.axis("off")
    for k, (ax, (value, panel)) in enumerate(zip(grid.flat, panels, strict=False)):
        ticks = sorted(panel[x].unique())
        for name, look in looks.items():
            own = panel[panel.label == name].sort_values(x)
            at, error = own[x].map(ticks.index), half_widths(own, column)
            ax.errorbar(at, own[column], yerr=error, elinewidth=1, capsize=2, label=name, **look)
        if column == "speedup":
            ax.axhline(1, color=INK, linewidth=1)
        ax.set_xlim(-0.3, len(ticks) - 0.7)
        ax.set_ylim(0)
        ax.set_title(f"batch {value}" if by_batch else f"{value} px", fontsize=10.5)
        lowest, leftmost = k + columns >= len(panels), k % columns == 0
        dress(ax, AXIS[x] if lowest else "", unit if leftmost else "")
        ax.set_xticks(range(len(ticks)), list(map(str, ticks)))
        ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    legend(part, grid.flat[0])
    return fig


def draw_horizontal(title: str, small_print: list[str], rows: pd.DataFrame, column: str) -> Figure:
    """Horizontal bars of a column in images/s with its intervals, the first at the foot; `name` stands at the
    left of each and `text` at its end."""
    fig, part = sheet(0.4 + 0.48 * len(rows), title, small_print)
    ax, values = part.subplots(), rows[column].fillna(0)
    colours, error = [style(row)["color"] for row in rows.itertuples()], half_widths(rows, column)
    bars = ax.barh(range(len(rows)), values, 0.7, xerr=error, color=colours, ecolor=INK, capsize=2)
    ax.bar_label(bars, rows.text, padding=5, fontsize=8.5)
    dress(ax, "images/s", "")
    ax.grid(visible=False, axis="y")
    ax.set_yticks(range(len(rows)), rows.name, fontsize=8.5)
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.set_xlim(0, ((values + error[1]).max() or 1) * 1.75)
    return fig


def draw_methods(rows: pd.DataFrame, environments: dict[str, dict]) -> Figure | None:
    """Every method at one image and batch size, the slowest at the foot; under its name what a variant adds
    and its environment, at its end images/s and speedup with its interval."""
    rows = analysis.all_methods(in_order(rows))
    if len(rows) < 2:
        return None
    names, texts, several = [], [], rows.sweep.nunique() > 1
    for row in rows.itertuples():
        about = ["the baseline" if row.backend == BASELINE else row.adds, row.sweep * several]
        about = textwrap.fill("; ".join(filter(None, about)), 60)
        names.append(f"{label(row)}\n{about}".strip())
        text = ", ".join(filter(None, [f"{figure(row.fps)} images/s", times(row)]))
        texts.append("wrong results" if row.status == "mismatch" else text)
    where = f"{rows.image_size.iloc[0]} px, batch {rows.batch_size.iloc[0]}: every method"
    note = f"{where}; x: speedup over PyTorch FP32 in the same environment, with its 95 % interval"
    small_print = [note, *feet_of(rows, environments)]
    return draw_horizontal(leader(rows), small_print, rows.assign(name=names, text=texts), "fps")


def draw_roofline(rows: pd.DataFrame, environments: dict[str, dict]) -> Figure | None:
    """Rate of operations against operations per byte, under the highest limits measured on the machine; a
    mark grows with its batch.  None where no limits were measured."""
    limits = {sweep: facts["ceilings"] for sweep, facts in environments.items() if facts.get("ceilings")}
    rows = in_order(rows[rows.sweep.isin(limits)])
    rows = rows[rows.pct_measured_peak.notna()]
    if rows.empty:
        return None
    best, counts = rows.loc[rows.pct_measured_peak.idxmax()], rows["limit"].value_counts()
    share = f"{figure(best.pct_measured_peak)} % of the rate of PyTorch's matrix product"
    title = f"{best.label} reaches {share} at {best.image_size} px, batch {best.batch_size}"
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.sort_index().items())
    note = f"Larger marks: larger batches.  Rows by bottleneck: {kinds}"
    height = 4.4 + 0.2 * -(-rows.label.nunique() // 3)
    fig, part = sheet(height, title, [note, *feet_of(rows, environments)])
    ax, known = part.subplots(), [limits[sweep] for sweep in rows.sweep.unique()]
    roofs = {name: max(one["tflops"].get(name, 0) for one in known) for name in rows.precision.unique()}
    bandwidth = max(one["gb_per_s"] for one in known) / 1000  # TB/s
    left = rows.flops_per_byte.min() / 3
    right = max(rows.flops_per_byte.max(), max(roofs.values()) / bandwidth) * 1.5
    for name, peak in roofs.items():
        line = [left * bandwidth, peak, peak]
        ax.plot([left, peak / bandwidth, right], line, color=GREY, linewidth=1.2, zorder=1)
        text = f"PyTorch's {name} matrix product: {figure(peak)} TFLOP/s"
        ax.annotate(text, (right, peak * 1.05), ha="right", va="bottom", fontsize=9)
    ax.text(0.02, 0.94, f"slope: copy at {figure(bandwidth * 1000)} GB/s", transform=ax.transAxes, fontsize=9)
    for name, look in looks_of(rows, "tflops").items():
        own = rows[rows.label == name]
        points = (3.5 + 1.2 * np.log2(own.batch_size)) ** 2
        ax.scatter(own.flops_per_byte, own.tflops, points, look["color"], look["marker"])
        ax.scatter([], [], 40, look["color"], look["marker"], label=name)
    ax.set(xscale="log", yscale="log", xlim=(left, right))
    ax.set_ylim(rows.tflops.min() / 2, max(rows.tflops.max(), *roofs.values()) * 2)
    dress(ax, "operations per byte (FLOP/B), every layer's input, output and weights moved once", "TFLOP/s")
    legend(part, ax)
    return fig


def at_usual_size(table: pd.DataFrame, environments: dict) -> tuple[pd.DataFrame, str, list[str]]:
    """The rows at 224 px, or the smallest size, with their label; the size and threads that they were served
    with; a foot for each sweep, with the day of serving."""
    table = with_labels(table[table.image_size == analysis.usual_size(table)].reset_index(drop=True))
    days = table.groupby("sweep").date.max()
    known = {sweep: facts | {"date": days[sweep]} for sweep, facts in environments.items() if sweep in days}
    known = {sweep: facts | {"short": short(facts)} for sweep, facts in known.items()}
    where = f"{table.image_size.iloc[0]} px, {table.cores.iloc[-1]} threads"
    return table, where, feet_of(table, known)


def draw_end_to_end(table: pd.DataFrame, environments: dict[str, dict]) -> Figure:
    """For each method and decoder a bar from files to labels; beside it the speed of its halves alone."""
    table, where, feet = at_usual_size(table, environments)
    ok, names, texts = table[table.status == "ok"], [], []
    title = "Nothing from files to labels was measured"
    if len(ok):
        best = ok.loc[ok.images_per_s.idxmax()]
        title = f"From files to labels: {best.label} reaches {figure(best.images_per_s)} images/s"
    for row in table.itertuples():
        decoding, inference = figure(row.decode_images_per_s), figure(row.infer_images_per_s)
        text = f"{figure(row.images_per_s)} images/s, {row.overlap:.0%} of what its parts allow"
        text += f"\nalone: decoding {decoding}, inference {inference}"
        texts.append(text if row.status == "ok" else textwrap.fill(f"{row.status}: {row.reason}", 70))
        decoder = ", ".join(filter(None, [row.decoder, row.images]))
        names.append(f"{row.label}, batch {row.batch_size}\n{decoder}; bottleneck: {row.limit}")
    note = f"{where}.  The percentages are of what decoding and inference allow together."
    bars = without_figures(table).assign(name=names, text=texts)
    return draw_horizontal(title, [note, *feet], bars, "images_per_s")


def draw_load(load: pd.DataFrame, environments: dict[str, dict]) -> Figure:
    """The 99th percentile of the latency against the rate offered, with the limit."""
    load, where, feet = at_usual_size(load, environments)
    limit = load.max_latency_ms.iloc[0]
    title = f"No rate tried keeps 99 % of the answers within {figure(limit)} ms"
    kept = load[load.valid & (load.p99_ms <= load.max_latency_ms)]
    if len(kept):
        best = kept.loc[kept["rate"].idxmax()]
        rate = f"up to {figure(best['rate'])} images/s"
        title = f"{best.label} answers 99 % within {figure(limit)} ms at {rate}"
    note = f"{where}, single images arriving at random; ×: the load generator calls the run invalid"
    fig, part = sheet(4.4, title, [note, *feet])
    ax = part.subplots()
    for name, look in looks_of(load, "p99_ms").items():
        own = load[load.label == name].sort_values("rate")
        ax.plot(own["rate"], own.p99_ms, label=name, **look)
    wrong = load[~load.valid]
    ax.plot(wrong["rate"], wrong.p99_ms, "x", color=INK, markersize=9, zorder=5)
    ax.axhline(limit, color=GREY, linewidth=1.2, label=f"limit: {figure(limit)} ms")
    ax.set_yscale("log")
    ax.set_xlim(0, load["rate"].max() * 1.05)
    dress(ax, "images/s offered", "p99 latency (ms)")
    legend(part, ax)
    return fig


def draw_all(rows: pd.DataFrame, environments: dict[str, dict], results: Path) -> list[Path]:
    """Write every chart and return the paths; a chart of what was not measured is removed."""
    figures = {name: draw(chart, rows, environments) for name, chart in CHARTS.items()}
    figures["methods.png"] = draw_methods(rows, environments)
    figures["roofline.png"] = draw_roofline(rows, environments)
    for name, draw_serving in (("end_to_end", draw_end_to_end), ("load", draw_load)):
        table = read_serving(results / f"{name}.csv")
        served = table is not None and len(table) > 0
        figures[f"{name}.png"] = draw_serving(table, environments) if served else None
    for name, fig in figures.items():
        if fig is None:
            (results / name).unlink(missing_ok=True)
        else:
            chart_style.write_png(fig, results / name)
    return [results / name for name, fig in figures.items() if fig]
