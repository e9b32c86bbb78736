"""Charts: the rows of results/benchmark_results.csv -> results/*.png.  A pure reader: it measures nothing, changes no row.

One colour per backend and one marker, line style and hatch per variant, the same in every chart.  What was not measured
stays visible: as a gap, as a mark at the foot of the panel and in the note under it.  `python benchmark.py` draws them.
"""

import dataclasses
import functools
import io
from collections.abc import Callable
from pathlib import Path

import numpy
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from utils.records import level
from utils.utils import write_atomic

WIDTH, DPI = 10.0, 150  # inches, dots per inch; shown about 850 pixels wide in the README
LEFT, EDGE, LINE, TITLE = (
    0.95,
    0.12,
    0.19,
    0.25,
)  # inches: the y axis, the margin, a line of 10 pt text, one of 13 pt
ABOVE, BELOW, LABEL = 0.3, 0.5, 2.1  # inches: a panel's own title, its x axis, the widest label of a line
INK, GREY = "#222222", "#666666"
BLUE, SKY, ORANGE, PURPLE, GREEN = (
    "#0072B2",
    "#56B4E9",
    "#E69F00",
    "#CC79A7",
    "#009E73",
)  # Okabe and Ito's palette

BASELINE = "pytorch"
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
HATCH = {
    "s": "//",
    "^": "\\\\",
    "D": "..",
    "P": "xx",
    "v": "--",
    "X": "oo",
}  # what a bar has instead of the marker
NAMES = {
    "pytorch": "PyTorch",
    "torch-compile": "torch.compile",
    "onnx": "ONNX Runtime",
    "torch-tensorrt": "Torch-TensorRT",
    "tensorrt": "TensorRT",
}
WORDS = {"graph": "CUDA graph", "static": "static shape", "nhwc": "NHWC"}
PRECISIONS = {"fp32", "tf32", "fp16", "bf16", "int8", "fp8"}
STATUS = {"out_of_memory": "out of memory", "mismatch": "wrong results", "ok": "no reading"}
MARK = {"out_of_memory": "OOM", "mismatch": "wrong", "ok": "no baseline"}


def family(backend: str) -> str:
    """The backend that a variant belongs to: "onnx" of "onnx-nhwc-graph"."""
    return next((name for name in NAMES if backend == name or backend.startswith(f"{name}-")), backend)


def label(backend: str, precision: str) -> str:
    """What people call it: "ONNX Runtime FP16, NHWC, CUDA graph".  A precision in the backend's name comes first."""
    base = family(backend)
    words = list(filter(None, backend[len(base) :].split("-")))
    precision = next((word for word in words if word in PRECISIONS), precision)
    extras = [WORDS.get(word, word) for word in words if word not in PRECISIONS]
    return ", ".join([f"{NAMES.get(base, base)} {precision.upper()}".strip(), *extras])


def style(backend: str, precision: str) -> dict:
    """How a line looks; open markers are FP32; an unknown variant takes its backend's colour."""
    colour = BACKEND_STYLE.get(family(backend), (GREY,))[0]
    colour, marker, dashes = BACKEND_STYLE.get(backend, (colour, "X", (0, (1, 1))))
    face = "white" if label(backend, precision).split(",")[0].endswith("FP32") else colour
    width = 1.8 if backend in NAMES else 1.2
    return dict(
        color=colour, marker=marker, linestyle=dashes, linewidth=width, markersize=5.5, markerfacecolor=face
    )


def number(value: float) -> str:
    """Three significant digits, thousands apart: 15 800; 34.2."""
    if value < 99.95:
        return f"{value:.3g}"
    return f"{round(value, 3 - len(str(int(value)))):,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


# The rows -------------------------------------------------------------------------------------------------------------


def prepare(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Add `label` and `speedup`, blank the figures of every row that is not ok, put backends in the charts' order."""
    rows = rows.reset_index(drop=True)
    rows["precision"] = rows["precision"].fillna("").astype(str)
    rows["label"] = [label(*names) for names in zip(rows["backend"], rows["precision"], strict=True)]
    for column in ["mean_ms", "fps", "fps_low", "fps_high", "speedup_low", "speedup_high", "gpu_memory_mb"]:
        rows[column] = pandas.to_numeric(rows[column]).astype(float).where(rows["status"] == "ok")
    keys = ["run", "device", "image_size", "batch_size"]
    baseline = (
        rows[rows["backend"] == BASELINE].groupby(keys)["mean_ms"].first().rename("baseline_ms").reset_index()
    )
    rows = rows.merge(baseline, on=keys, how="left")
    rows["speedup"] = rows["baseline_ms"].astype(float) / rows["mean_ms"]
    order = {backend: index for index, backend in enumerate(BACKEND_STYLE)}
    return rows.sort_values("backend", key=lambda names: names.map(order).fillna(len(order)), kind="stable")


def blocks(rows: pandas.DataFrame) -> list[tuple[str, pandas.DataFrame]]:
    """The rows of each run and device, in the order of the CSV, with the name that tells them from the others."""
    runs = rows.sort_index().drop_duplicates(["run", "device"])
    twice = runs["run"].duplicated(keep=False)
    found = []
    for run, device, both in zip(runs["run"], runs["device"], twice, strict=True):
        found.append(
            (f"{run} on {device}" if both else run, rows[(rows["run"] == run) & (rows["device"] == device)])
        )
    return found


def series(block: pandas.DataFrame, column: str) -> dict[str, dict]:
    """Label -> style of each backend that has at least one value."""
    found = block[block[column].notna()].drop_duplicates("label")
    return {row.label: style(row.backend, row.precision) for row in found.itertuples()}


# The findings: what the titles say ------------------------------------------------------------------------------------


def leaders(block: pandas.DataFrame, column: str) -> pandas.DataFrame:
    """Where the highest value is: its row, then those of the same size and batch that this run can't tell from it."""
    found = block[block[column].notna()]
    shared = found.groupby(["image_size", "batch_size"])[column].transform("size") > 1
    best = (found[shared] if shared.any() else found).nlargest(1, column)
    same = found.merge(best[["image_size", "batch_size"]]).sort_values(column, ascending=False, kind="stable")
    return same[[level(row, best.iloc[0]) for _, row in same.iterrows()]] if len(best) else same


def fastest(block: pandas.DataFrame, column: str) -> str:
    """The fastest (or the largest speedup) and where; no winner while the intervals of the best overlap."""
    lead = leaders(block, column)
    if lead.empty:
        return (
            "PyTorch FP32 was not measured: no speedups"
            if block["fps"].notna().any()
            else "Nothing was measured"
        )
    best, last = lead.iloc[0], lead.iloc[-1]
    where = f"at {best['image_size']} px, batch {best['batch_size']}"
    unit = "x the speed of PyTorch FP32" if column == "speedup" else " images/s"
    alone = block.loc[block["fps"].notna(), "label"].nunique() == 1
    if alone:
        return f"Only {best['label']} was measured: {number(best['fps'])} images/s {where}"
    if column == "speedup" and BASELINE in set(lead["backend"]):
        return f"Nothing is clearly faster than PyTorch FP32 {where}"
    if len(lead) == 1:
        verb = "reaches" if column == "speedup" else "is fastest:"
        unsure = " (no interval)" if pandas.isna(best["fps_low"]) else ""
        return f"{best['label']} {verb} {number(best[column])}{unit} {where}{unsure}"
    names = f"{best['label']} and {last['label'] if len(lead) == 2 else f'{len(lead) - 1} others'}"
    return f"{names} are level: {number(best[column])} to {number(last[column])}{unit} {where} (95 % intervals overlap)"


def span(values: pandas.Series, unit: str) -> str:
    """ "1.2x (PyTorch FP32) to 11.8x (TensorRT FP16)": the least and the greatest."""
    values = values.sort_values(kind="stable")
    return " to ".join(
        f"{number(values.iloc[i])}{unit} ({values.index[i]})" for i in ([0, -1] if len(values) > 1 else [0])
    )


def batching(block: pandas.DataFrame, column: str) -> str:
    """What the largest batch gains over the smallest, at the smallest image size that has both."""
    found = block[block[column].notna()].drop_duplicates(["image_size", "batch_size", "label"])
    small, large = found["batch_size"].min(), found["batch_size"].max()
    ends = (
        found.set_index(["image_size", "label", "batch_size"])[column].unstack().dropna(subset=[small, large])
        if len(found)
        else found
    )
    if ends.empty or small == large:
        return fastest(block, column)
    size = ends.index.get_level_values("image_size").min()
    gain = (ends[large] / ends[small]).loc[size]
    return f"Batch {large} serves {span(gain, 'x')} the images/s of batch {small} at {size} px"


def memory(block: pandas.DataFrame, column: str) -> str:
    """The least and the most memory at the largest configuration that most backends could hold."""
    found = block[block[column].notna()]
    if found.empty:
        return "GPU memory was not read"
    count = found.groupby(["image_size", "batch_size"])[column].transform("size")
    found = found.assign(count=count).sort_values(["count", "batch_size", "image_size"], kind="stable")
    size, batch = found["image_size"].iloc[-1], found["batch_size"].iloc[-1]
    same = found[(found["image_size"] == size) & (found["batch_size"] == batch)]
    return f"GPU memory at {size} px, batch {batch}: {span(same.set_index('label')[column], ' MB')}"


def place(pairs: set, grid: set) -> str:
    """Which part of the grid: nothing for all, ": 512 px, batch 8, 16" for a rectangle, else how many."""
    sizes, batches = ({pair[i] for pair in pairs} for i in (0, 1))
    if pairs == grid:
        return ""
    if len(pairs) < len(sizes) * len(batches):
        return f": {len(pairs)} of {len(grid)} configurations"
    px = f"{', '.join(map(str, sorted(sizes)))} px" if sizes != {size for size, _ in grid} else ""
    batch = f"batch {', '.join(map(str, sorted(batches)))}" if batches != {batch for _, batch in grid} else ""
    return ": " + ", ".join(filter(None, [px, batch]))


def not_measured(block: pandas.DataFrame, column: str) -> str:
    """ "Not measured: TensorRT FP16 (unavailable), PyTorch FP32 (out of memory: 512 px, batch 16)", or nothing."""
    grid = set(zip(block["image_size"], block["batch_size"], strict=True))
    gaps = []
    for name, own in block.groupby("label", sort=False):
        reasons = dict.fromkeys(sorted(grid), "not run")
        for row in own.itertuples():
            blank = pandas.isna(getattr(row, column))
            reasons[row.image_size, row.batch_size] = STATUS.get(row.status, row.status) if blank else None
        parts = {
            reason: {pair for pair in grid if reasons[pair] == reason}
            for reason in reasons.values()
            if reason
        }
        if parts:
            gaps.append(
                f"{name} ({'; '.join(reason + place(pairs, grid) for reason, pairs in parts.items())})"
            )
    return f"Not measured: {', '.join(gaps)}" if gaps else ""


# The drawing ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Chart:
    """One kind of chart: the column that it draws and how it splits into panels."""

    column: str
    unit: str
    x: str
    panel: str  # a panel for each value of this column
    finding: Callable[[pandas.DataFrame, str], str]
    shared: bool = True  # one scale for all panels, or one for each value of `panel`
    bars: bool = False


AXIS = {"image_size": "image size (px)", "batch_size": "batch size (images)"}
CHARTS = {
    "fps_vs_image_size.png": Chart("fps", "images/s", "image_size", "batch_size", fastest, shared=False),
    "fps_vs_batch_size.png": Chart("fps", "images/s", "batch_size", "image_size", batching),
    "speedup_vs_image_size.png": Chart(
        "speedup", "speedup over\nPyTorch FP32", "image_size", "batch_size", fastest, bars=True
    ),
    "memory_vs_batch_size.png": Chart("gpu_memory_mb", "GPU memory (MB)", "batch_size", "image_size", memory),
}


@functools.cache
def text_width(text: str, size: float = 10, weight: str = "normal") -> float:
    """Inches."""
    return (
        text_to_path.get_text_width_height_descent(text, FontProperties(size=size, weight=weight), False)[0]
        / 72
    )


def wrap(text: str, width: float, size: float = 10, weight: str = "normal") -> list[str]:
    """Lines no wider than so many inches."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if text_width(longer, size, weight) <= width else [*lines, word]
    return list(filter(None, lines))


def spread(wanted: list[float], heights: list[float], top: float) -> list[float]:
    """Centres near the wanted ones and in their order that leave each label its height between 0 and top."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed, edge = list(wanted), 0.0
    for i in order:  # upwards, off the one below
        placed[i] = max(placed[i], edge + heights[i] / 2)
        edge = placed[i] + heights[i] / 2
    edge = top
    for i in reversed(order):  # back down, off the ceiling and the one above
        placed[i] = min(placed[i], edge - heights[i] / 2)
        edge = placed[i] - heights[i] / 2
    return placed


def draw_lines(ax: Axes, chart: Chart, panel: pandas.DataFrame, looks: dict, ticks: list[int]) -> None:
    """A line per backend with its 95 % intervals; a cross at the foot where one was tried and has no value."""
    crosses = dict.fromkeys(ticks, 0)
    for name, look in looks.items():
        own = panel[panel["label"] == name].drop_duplicates(chart.x).set_index(chart.x).reindex(ticks)
        value = own[chart.column].to_numpy()
        error = (
            numpy.clip([value - own["fps_low"], own["fps_high"] - value], 0, None)
            if chart.column == "fps"
            else None
        )
        ax.errorbar(range(len(ticks)), value, yerr=error, elinewidth=1, capsize=2, label=name, **look)
        for i in numpy.flatnonzero(numpy.isnan(value) & own["status"].notna()):
            foot = 0.05 + 0.08 * crosses[ticks[i]]
            crosses[ticks[i]] += 1
            ax.plot(
                i,
                foot,
                "x",
                color=look["color"],
                markeredgewidth=1.8,
                transform=ax.get_xaxis_transform(),
                zorder=5,
            )
    ax.set_xlim(-0.3, len(ticks) - 0.7)


def draw_bars(ax: Axes, chart: Chart, panel: pandas.DataFrame, looks: dict, ticks: list[int]) -> None:
    """Groups of bars with their values, a line at 1x, and the reason where a bar is missing."""
    step = 0.84 / len(looks)
    slot = step * ax.get_position().width * WIDTH / len(ticks)  # inches
    halo = [withStroke(linewidth=2.5, foreground="white")]
    ax.axhline(1, color=INK, linewidth=1, zorder=2)
    for k, (name, look) in enumerate(looks.items()):
        own = panel[panel["label"] == name].drop_duplicates(chart.x).set_index(chart.x).reindex(ticks)
        at = [i - 0.42 + step * (k + 0.5) for i in range(len(ticks))]
        ax.bar(at, own[chart.column], step * 0.92, **bar_look(look))
        error = numpy.clip(
            [own["speedup"] - own["speedup_low"], own["speedup_high"] - own["speedup"]], 0, None
        )
        ax.errorbar(at, own[chart.column], yerr=error, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
        tops = own["speedup_high"].fillna(own["speedup"])
        for x, value, top, status in zip(at, own[chart.column], tops, own["status"], strict=True):
            text = f"{value:.1f}" if value == value else MARK.get(status, status)
            if slot > 0.13 and isinstance(text, str):  # no text where nothing was tried
                turn = 0 if slot > text_width(text) + 0.05 else 90
                where = dict(
                    xytext=(0, 2), textcoords="offset points", ha="center", va="bottom", rotation=turn
                )
                ax.annotate(
                    text,
                    (x, top if value == value else 0),
                    fontsize=10,
                    color=INK,
                    path_effects=halo,
                    **where,
                )
    ax.set_xlim(-0.5, len(ticks) - 0.5)


def bar_look(look: dict) -> dict:
    """The bar that goes with a line: its colour, and a hatch for its marker."""
    return dict(facecolor=look["color"], hatch=HATCH.get(look["marker"]), edgecolor="white", linewidth=0)


def label_height(name: str) -> float:
    return 0.17 * len(wrap(name, LABEL)) + 0.05


def draw_labels(
    fig: Figure, ax: Axes, chart: Chart, panel: pandas.DataFrame, looks: dict, ticks: list[int]
) -> None:
    """Name the lines to the right of the last panel, each at the height of its end or as near as there is room."""
    box, (width, height) = ax.get_position(), fig.get_size_inches()
    room = box.height * height  # inches, as is everything on the column of labels
    column = fig.add_axes(
        [box.x1, box.y0, 1 - box.x1, box.height], xlim=(0, (1 - box.x1) * width), ylim=(0, room)
    )
    column.axis("off")
    last = panel[panel[chart.x] == ticks[-1]].set_index("label")[chart.column].to_dict()
    ends = [last.get(name, float("nan")) / ax.get_ylim()[1] * room for name in looks]
    places = spread([end if end == end else 0 for end in ends], [*map(label_height, looks)], room)
    margin = 0.3 / (len(ticks) - 0.4) * box.width * width  # from the last point to the edge of its panel
    for (name, look), end, y in zip(looks.items(), ends, places, strict=True):
        column.plot([-margin, 0.3], [end, y], color=look["color"], linewidth=0.7, alpha=0.7, clip_on=False)
        column.plot([0.3, 0.5, 0.7], [y, y, y], markevery=[1], **look)
        column.text(
            0.78, y, "\n".join(wrap(name, LABEL)), fontsize=10, color=INK, va="center", linespacing=1.05
        )


@dataclasses.dataclass
class Strip:
    """One row of panels of one block, with what stands above and below it; lengths in inches."""

    block: pandas.DataFrame
    looks: dict
    values: list[int]  # of Chart.panel, one panel each
    columns: int
    title: list[str]
    legend: int  # columns of the legend, 0 for none
    note: list[str]
    last: bool
    plot: float

    def foot(self) -> float:
        return LINE * len(self.note) + (0.18 if self.last else 0.05)

    def height(self) -> float:
        legend = 0.21 * -(-len(self.looks) // self.legend) if self.legend else 0
        axis = BELOW if self.last else BELOW - 0.2
        return (
            TITLE * len(self.title)
            + legend
            + (ABOVE + self.plot + axis if self.values else 0.1)
            + self.foot()
        )


def strips(chart: Chart, name: str, block: pandas.DataFrame) -> list[Strip]:
    """A block's panels, as many beside each other as stay legible."""
    looks = series(block[block["backend"] != BASELINE] if chart.bars else block, chart.column)
    values = sorted(block[chart.panel].unique()) if looks else []
    if chart.x == "image_size" and not chart.bars and len(values) > 3:
        values = values[-1:]
    ticks = max(1, block[chart.x].nunique())
    most = min(3, 48 // (ticks * (len(looks) + 1))) if chart.bars else min(4, 16 // ticks)
    columns = max(1, min(most, len(values)))
    title = wrap(name + chart.finding(block, chart.column), WIDTH - 2 * EDGE, 13, "bold")
    note = not_measured(block, "fps" if chart.bars else chart.column)
    if not chart.bars and block.loc[block["label"].isin(list(looks)), chart.column].isna().any():
        note = note.replace("Not measured", "Not measured (×)")
    legend = max(1, int((WIDTH - LEFT) / (max(map(text_width, looks)) + 0.65))) if chart.bars and looks else 0
    plot = 1.7 if chart.bars else max(2.2, sum(map(label_height, looks)))
    rows = [values[i : i + columns] for i in range(0, len(values), columns)] or [[]]
    found = [Strip(block, looks, row, columns, [], 0, [], False, plot) for row in rows]
    found[0].title, found[0].legend, found[-1].note, found[-1].last = (
        title,
        legend,
        wrap(note, WIDTH - 2 * EDGE),
        True,
    )
    return found


def draw_strip(fig: Figure, chart: Chart, strip: Strip, top: float, limits: dict, right: float) -> None:
    """Title, legend, panels and note, downwards from `top` inches."""
    height = fig.get_size_inches()[1]
    bottom = top - strip.height() + strip.foot()
    inches = dict(transform=fig.dpi_scale_trans, color=INK, va="top", linespacing=1.15)
    fig.text(EDGE, top, "\n".join(strip.title), fontsize=13, fontweight="bold", **inches)
    fig.text(EDGE, bottom - 0.03, "\n".join(strip.note), fontsize=10, **inches)
    ticks = sorted(strip.block[chart.x].unique())
    gap = 0.15 if chart.shared else 0.7
    width = (WIDTH - LEFT - right - gap * (strip.columns - 1)) / strip.columns
    for i, value in enumerate(strip.values):
        y = bottom + (BELOW if strip.last else BELOW - 0.2)
        box = [(LEFT + i * (width + gap)) / WIDTH, y / height, width / WIDTH, strip.plot / height]
        ax = fig.add_axes(box, ylim=(0, limits[value]))
        panel = strip.block[strip.block[chart.panel] == value]
        (draw_bars if chart.bars else draw_lines)(ax, chart, panel, strip.looks, ticks)
        dress(ax, f"{value} px" if chart.panel == "image_size" else f"batch {value}", ticks)
        ax.tick_params(labelleft=i == 0 or not chart.shared)
        ax.set_xlabel(AXIS[chart.x] if strip.last else "", color=INK)
        ax.set_ylabel(chart.unit if i == 0 else "", color=INK)
        if i == 0 and strip.legend:
            handles = [Patch(**bar_look(look), label=name) for name, look in strip.looks.items()]
            above = dict(
                loc="lower left",
                bbox_to_anchor=(0, 1 + 0.25 / strip.plot),
                borderaxespad=0,
                borderpad=0,
                labelspacing=0.25,
            )
            ax.legend(handles=handles, ncols=strip.legend, frameon=False, fontsize=10, **above)
    if strip.values and not chart.bars:
        draw_labels(fig, ax, chart, panel, strip.looks, ticks)


def dress(ax: Axes, title: str, ticks: list[int]) -> None:
    """What every panel has: its title, evenly spaced ticks, thousands apart, a light grid."""
    ax.set_title(title, fontsize=10.5, color=INK, pad=4)
    ax.set_xticks(range(len(ticks)), [str(tick) for tick in ticks])
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter(
        FuncFormatter(lambda y, _: f"{y:,.6g}".replace(",", "\N{NARROW NO-BREAK SPACE}"))
    )
    ax.tick_params(labelsize=10, color=GREY, labelcolor=INK)
    ax.grid(axis="y", color="#dddddd", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def footer(runs: list[str], environment: dict[str, dict]) -> list[str]:
    """A line of hardware and versions for each run, marked where the network saw sample data only."""
    lines = []
    for run in runs:
        known = environment.get(run, {})
        name = f"{run}: " if len(runs) > 1 else ""
        facts = [known.get("short"), "sample\N{NO-BREAK SPACE}data" if known.get("sample_data") else None]
        lines += (
            wrap(name + " ·\N{NO-BREAK SPACE}".join(filter(None, facts)), WIDTH - 2 * EDGE)
            if any(facts)
            else []
        )
    return lines


def scales(chart: Chart, rows: pandas.DataFrame) -> dict[int, float]:
    """The top of the y axis for each panel."""
    columns = [name for name in (chart.column, f"{chart.column}_high") if name in rows]
    highest = rows[columns].max(axis=1).groupby(rows[chart.panel]).max()
    if chart.shared:
        highest[:] = highest.max()
    highest = highest.fillna(1)
    return (highest * (1.35 if chart.bars else 1.06)).to_dict()  # values are written above the bars


def draw(chart: Chart, rows: pandas.DataFrame, environment: dict[str, dict]) -> Figure:
    """The whole chart.  Args: rows as in the CSV; environment by run (see draw_all)."""
    rows = prepare(rows)
    parts = blocks(rows) or [("", rows)]
    sheet = [
        strip
        for name, block in parts
        for strip in strips(chart, f"{name}: " if len(parts) > 1 else "", block)
    ]
    feet = footer([*dict.fromkeys(rows.sort_index()["run"])], environment)
    top = sum(strip.height() for strip in sheet) + LINE * len(feet) + 2 * EDGE
    fig = Figure(figsize=(WIDTH, top), dpi=DPI, facecolor="white")
    fig.text(
        EDGE,
        EDGE,
        "\n".join(feet),
        fontsize=10,
        color=GREY,
        va="bottom",
        linespacing=1.15,
        transform=fig.dpi_scale_trans,
    )
    limits = scales(chart, rows)
    names = [line for strip in sheet for look in strip.looks for line in wrap(look, LABEL)]
    right = EDGE if chart.bars else 0.9 + max(map(text_width, names), default=0)
    top -= EDGE
    for strip in sheet:
        own = scales(chart, strip.block) if chart.bars else limits  # speedups of two runs have two baselines
        draw_strip(fig, chart, strip, top, own, right)
        top -= strip.height()
    return fig


def roofline_finding(block: pandas.DataFrame) -> str:
    """Which row comes nearest to a measured matrix product, and what limits how many rows."""
    best = block.loc[block["pct_measured_peak"].idxmax()]
    counts = block["limit"].value_counts()
    limits = ", ".join(
        f"{counts[name]} {name}-bound"
        for name in ("launch", "latency", "memory", "compute")
        if name in counts
    )
    where = f"at {best['image_size']} px, batch {best['batch_size']}"
    return f"{best['label']} comes nearest to the measured ceiling, {number(best['pct_measured_peak'])} % of it {where}; rows: {limits}"


def draw_roofline(rows: pandas.DataFrame, environment: dict[str, dict]) -> Figure | None:
    """Rate of operations against operations per byte, one panel a run, under that machine's measured ceilings; None without any."""
    rows = prepare(rows)
    rows = rows[(rows["status"] == "ok") & rows["pct_measured_peak"].notna()]
    parts = [
        (name, block)
        for name, block in blocks(rows)
        if environment.get(block["run"].iloc[0], {}).get("ceilings")
    ]
    if not parts:
        return None
    titles = [
        wrap((f"{name}: " if len(parts) > 1 else "") + roofline_finding(block), WIDTH - 2 * EDGE, 13, "bold")
        for name, block in parts
    ]
    feet = footer([*dict.fromkeys(block["run"].iloc[0] for _, block in parts)], environment)
    plot, axis = 3.6, 0.65  # inches
    height = sum(TITLE * len(title) + 0.15 + plot + axis for title in titles) + LINE * len(feet) + 2 * EDGE
    fig = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    fig.text(
        EDGE,
        EDGE,
        "\n".join(feet),
        fontsize=10,
        color=GREY,
        va="bottom",
        linespacing=1.15,
        transform=fig.dpi_scale_trans,
    )
    top = height - EDGE
    for title, (_, block) in zip(titles, parts, strict=True):
        fig.text(
            EDGE,
            top,
            "\n".join(title),
            fontsize=13,
            fontweight="bold",
            color=INK,
            va="top",
            transform=fig.dpi_scale_trans,
        )
        top -= TITLE * len(title) + 0.15 + plot
        ax = fig.add_axes(
            [LEFT / WIDTH, top / height, (WIDTH - LEFT - LABEL - 0.8) / WIDTH, plot / height],
            xscale="log",
            yscale="log",
        )
        draw_roof(ax, block, environment[block["run"].iloc[0]]["ceilings"])
        top -= axis
    return fig


def draw_roof(ax: Axes, block: pandas.DataFrame, ceilings: dict) -> None:
    """The roofs of one machine and the rows under them; a mark grows with its batch."""
    used = {name: ceilings["tflops"][name] for name in dict.fromkeys(block["precision"])}
    bandwidth = ceilings["gb_per_s"] / 1000
    left, right = (
        block["flops_per_byte"].min() / 3,
        max(block["flops_per_byte"].max(), max(used.values()) / bandwidth) * 1.5,
    )
    halo = [withStroke(linewidth=2.5, foreground="white")]
    for name, peak in used.items():
        ridge = peak / bandwidth
        ax.plot([left, ridge, right], [left * bandwidth, peak, peak], color=GREY, linewidth=1.2, zorder=1)
        x, side = (right, "right") if ridge**2 > left * right else (max(left, ridge), "left")
        where = dict(
            xytext=(-3 if side == "right" else 3, 3),
            textcoords="offset points",
            ha=side,
            va="bottom",
            fontsize=9,
        )
        ax.annotate(
            f"{name} matrix product: {number(peak)} TFLOP/s", (x, peak), color=INK, path_effects=halo, **where
        )
    ax.text(
        0.02,
        0.96,
        f"slope: copy at {number(ceilings['gb_per_s'])} GB/s",
        transform=ax.transAxes,
        fontsize=9,
        color=INK,
        va="top",
    )
    for name, look in series(block, "tflops").items():
        own = block[block["label"] == name]
        for row in own.itertuples():
            size = 3.5 + 1.2 * numpy.log2(row.batch_size)
            ax.plot(
                row.flops_per_byte,
                row.tflops,
                **{**look, "linestyle": "none", "markersize": size},
                alpha=0.85,
            )
        ax.plot([], [], **{**look, "linestyle": "none"}, label="\n".join(wrap(name, LABEL)))
    ax.set_xlim(left, right)
    ax.set_ylim(block["tflops"].min() / 2, max(used.values()) * 2)
    ax.set_xlabel(
        "operations per byte (FLOP/B), every layer's input, output and weights moved once", color=INK
    )
    ax.set_ylabel("TFLOP/s", color=INK)
    for side in (ax.xaxis, ax.yaxis):
        side.set_major_locator(LogLocator(subs=[1, 2, 5]))
        side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        side.set_minor_formatter("")
    ax.legend(
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        fontsize=10,
        title="larger marks: larger batches",
        title_fontsize=9,
    )
    ax.tick_params(labelsize=10, color=GREY, labelcolor=INK)
    ax.grid(color="#dddddd", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def draw_all(rows: pandas.DataFrame, environment: dict[str, dict], results: Path) -> list[Path]:
    """Write every chart to `results` and return their paths.

    Args: `environment` holds for each run a dict with "short", one line of hardware and versions for the footer, and
    "sample_data", whether the images are the drawn samples; and, for the roofline, "ceilings" (utils.ceilings.measure()).  A chart
    of what was not read is removed.
    """
    paths = []
    for name, chart in CHARTS.items():
        path = results / name
        if (
            chart.column == "gpu_memory_mb"
            and not ((rows["status"] == "ok") & rows["gpu_memory_mb"].notna()).any()
        ):
            path.unlink(missing_ok=True)
            continue
        write_png(draw(chart, rows, environment), path)
        paths.append(path)
    figure, path = draw_roofline(rows, environment), results / "roofline.png"
    if figure is None:
        path.unlink(missing_ok=True)
        return paths
    write_png(figure, path)
    return [*paths, path]


def write_png(figure: Figure, path: Path) -> None:
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    write_atomic(path, png.getvalue())


def draw_comparison(both: pandas.DataFrame, title: str, path: Path) -> None:
    """Throughput of a second table over a first's, a bar of its 95 % interval for each configuration: see compare.ratios()."""
    fig = Figure(figsize=(WIDTH, 1.3 + 0.24 * len(both)), dpi=DPI, layout="constrained")
    ax = fig.add_subplot()
    names = [
        f"{label(row.backend, row.precision_after)}, {row.image_size} px, batch {row.batch_size}"
        for row in both.itertuples()
    ]
    for y, row in enumerate(both.itertuples()):
        look = style(row.backend, row.precision_after)
        ax.plot([row.fps_ratio_low, row.fps_ratio_high], [y, y], color=look["color"], linewidth=2)
        ax.plot(
            row.fps_ratio,
            y,
            marker=look["marker"],
            color=look["color"],
            markerfacecolor=look["markerfacecolor"],
        )
    ax.axvline(1, color=INK, linewidth=1)
    ax.set_yticks(range(len(both)), names)
    ax.invert_yaxis()
    ax.set_xlabel("throughput, second / first (right of 1: the second is faster)", color=INK)
    level = ((both["fps_ratio_low"] <= 1) & (both["fps_ratio_high"] >= 1)).sum()
    fig.suptitle(
        f"{title}: no difference in {level} of {len(both)} configurations",
        fontsize=12,
        fontweight="bold",
        color=INK,
    )
    ax.grid(axis="x", color="#dddddd", linewidth=0.7)
    ax.spines[["top", "right"]].set_visible(False)
    write_png(fig, path)
