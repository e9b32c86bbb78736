"""Charts of serving: from files to labels (end_to_end.csv), and latency under load (load.csv)."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from utils.report.chart_style import (
    GREY,
    INK,
    bar_look,
    dress,
    heading,
    lie_down,
    log_ticks,
    note,
    sheet,
    style,
)
from utils.report.chart_titles import end_to_end_finding, feet_of, load_finding
from utils.report.tables import short
from utils.report.words import figure, label

PARTS = {  # of a pipeline: column, what it is, and how its bar differs from the pipeline's
    "images_per_s": ("files to labels", {}),
    "decode_images_per_s": ("decoding alone", dict(facecolor="#bbbbbb", hatch=None)),
    "infer_images_per_s": ("inference alone", dict(facecolor="#888888", hatch=None)),
}


def panels(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """For each sweep a title and its rows at 224 px, or the smallest size, with their label."""
    size = 224 if (table["image_size"] == 224).any() else table["image_size"].min()
    table = table[table["image_size"] == size]
    labels = [label(row.backend, row.precision) for row in table.itertuples()]
    groups = list(table.assign(label=labels).groupby("sweep", sort=False))
    return [(f"{sweep}, {size} px: " if len(groups) > 1 else f"{size} px: ", part) for sweep, part in groups]


def feet(parts: list[tuple[str, pd.DataFrame]], environments: dict[str, dict]) -> list[str]:
    """A line for each sweep, with this measurement's day, not the sweep's, and beside a GPU the threads."""
    known = {}
    for _, part in parts:
        last, facts = part.loc[part["date"].idxmax()], environments.get(part["sweep"].iloc[0], {})
        day = f"{last.cores} threads, {last.date}" if facts.get("gpu") else last.date
        own = facts | {"date": day}
        known[last.sweep] = facts | {"short": short(own)} if facts else {}
    return feet_of(list(known), known)


def draw_end_to_end(table: pd.DataFrame, environments: dict[str, dict]) -> Figure:
    """For each backend and decoder the whole pipeline and its halves alone, a panel for each sweep."""
    parts = panels(table)
    fig, subfigures = sheet([1.6 + 0.55 * len(part) for _, part in parts], feet(parts, environments))
    for under, (title, part) in zip(subfigures, parts, strict=True):
        heading(under, title + end_to_end_finding(part))
        draw_pipelines(under.subplots(), part)
    return fig


def draw_pipelines(ax, part: pd.DataFrame) -> None:
    """Three bars a row; a bar that would dwarf the pipelines is cut off, its value written in it."""
    most = 1.3 * part[["images_per_s", "decode_images_per_s"]].max().max()
    for y, row in enumerate(part.itertuples()):
        for k, (column, (what, other)) in enumerate(PARTS.items()):
            value, at = getattr(row, column), y + 0.27 * (1 - k)
            text = f"{what} {figure(value)}"
            if column == "images_per_s":
                text += f", {row.overlap:.0%} of what its parts allow"
                value, text = (value, text) if row.status == "ok" else (0, f"{row.status}: {row.reason}")
            cut = value > most
            ax.barh(at, min(value, most), 0.25, **bar_look(style(row.backend, row.precision)) | other)
            side = dict(xytext=(-4, 0), ha="right", color="white") if cut else dict(xytext=(4, 0), color=INK)
            where = dict(textcoords="offset points", va="center", fontsize=8)
            ax.annotate(f"{text} →" if cut else text, (min(value, most), at), **where, **side)
    names = [
        f"{row.label}, batch {row.batch_size}\n{row.decoder}; limit: {row.limit}" for row in part.itertuples()
    ]
    lie_down(ax, names, "images/s", most * 1.25)


def draw_load(load: pd.DataFrame, environments: dict[str, dict]) -> Figure:
    """The 99th percentile of the latency against the rate offered, with the limit."""
    load = load[load["rate"].notna() & load["p99_ms"].notna()]
    load = load.assign(valid=load["valid"].astype(str) == "True")
    parts = panels(load)
    fig, subfigures = sheet([4.4] * len(parts), feet(parts, environments))
    for under, (title, part) in zip(subfigures, parts, strict=True):
        heading(under, title + load_finding(part))
        note(under, "single images arriving at random; ×: the load generator calls the run invalid")
        draw_latencies(under.subplots(), part)
        under.legend(frameon=False, fontsize=10, loc="outside right center")
    return fig


def draw_latencies(ax, part: pd.DataFrame) -> None:
    for name, own in part.sort_values("rate").groupby("label", sort=False):
        look = style(own["backend"].iloc[0], own["precision"].iloc[0])
        ax.plot(own["rate"], own["p99_ms"], label=name, **look)
        wrong = own[~own["valid"]]
        ax.plot(wrong["rate"], wrong["p99_ms"], "x", color=INK, markersize=9, zorder=5)
    limit = part["max_latency_ms"].iloc[0]
    ax.axhline(limit, color=GREY, linewidth=1.2, label=f"limit: {figure(limit)} ms")
    ax.set_yscale("log")
    ax.set_xlim(0, part["rate"].max() * 1.05)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.6g}"))
    log_ticks(ax.yaxis)
    dress(ax, "images/s offered", "p99 latency (ms)")


CHARTS = {"end_to_end.png": draw_end_to_end, "load.png": draw_load}
