"""Rows and judgements -> words: numbers, tables and the five answers."""

from collections import Counter
from collections.abc import Callable, Iterable

import pandas as pd

from utils.measure.schema import BASELINE
from utils.report import analysis
from utils.report.names import family, in_words, label
from utils.report.rows import WARNINGS, percent_width

SAMPLE = "trained on the drawn sample images"


def figure(value: float) -> str:
    """The one way to print a number: three digits, thousands apart: "0.512", "1,000"; NaN is ""."""
    if pd.isna(value):
        return ""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:.3g}"


def percent(value: float) -> str:
    return "" if pd.isna(value) else f"{value:.1%}"


def interval(low: float, high: float, form: Callable = figure) -> str:
    """ "12-14"; nothing where there is none."""
    return "" if pd.isna(low) or low == high else f"{form(low)}-{form(high)}"


def times(row) -> str:
    """A speedup over PyTorch FP32 with its 95 % interval: "7.90x (7.88-7.92)"; nothing where it has none."""

    def digits(value: float) -> str:  # three, also where the last is 0, as the ends are compared
        return f"{value:#.3g}".rstrip(".")

    limits = interval(row.speedup_low, row.speedup_high, digits)
    return f"{digits(row.speedup)}x ({limits})" if limits and row.backend != BASELINE else ""


def foot(known: dict) -> str:
    """The hardware and versions behind a figure in one line, and whether the network saw the sample only."""
    return known.get("short", "") + (f" · {SAMPLE}" if known.get("sample_data") else "")


# ---- tables: a list of columns, or of (header, the column or what else it shows of a row)


def with_labels(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with `label`, what their method is called, with its sweep where several have the method."""
    several = rows.groupby("backend").sweep.transform("nunique") > 1
    pairs = zip(rows.itertuples(), several, strict=True)
    named = [label(row) + f" ({row.sweep})" * more for row, more in pairs]
    return rows.assign(label=pd.Series(named, rows.index, dtype=object))


def without_figures(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with figures only where they are ok; agreement and accuracy stay, they tell why not."""
    kept = ["image_size", "batch_size", "agreement", "accuracy"]
    figures = rows.select_dtypes("number").columns.difference(kept)
    return rows.assign(**{column: rows[column].where(rows.status == "ok") for column in figures})


def warnings(row) -> dict[str, str]:
    """The names of a row's warnings (see WARNINGS), and what a table says of each: "noisy ±5 %"."""
    names = [name for name in (note.partition(": ")[0] for note in row.notes) if name in WARNINGS]
    return {name: f"{name} {percent_width(row)}" if name == "noisy" else name for name in names}


def whole_command(row) -> str:
    """How long `python predict.py` took in all, known of a user's photos."""
    if row.images != "photos" or pd.isna(row.whole_s):
        return ""
    return f"{figure(row.files)} files in {row.whole_s:.1f} s, of which {row.start_s:.1f} s to start"


HEAD = [
    ("Method", label),
    ("Environment", "environment"),
    ("Size", lambda row: str(row.image_size)),
    ("Batch", lambda row: str(row.batch_size)),
]
TABLE = [
    *HEAD,
    ("Mean ms", lambda row: figure(row.mean_ms) if row.status == "ok" else row.status.replace("_", " ")),
    ("Std ms", "std_ms"),
    ("p95 ms", "p95_ms"),
    ("Images/s", "fps"),
    ("Images/s, 95 % CI", lambda row: interval(row.fps_low, row.fps_high)),
    ("Speedup", lambda row: times(row).partition("x")[0]),
    ("Speedup, 95 % CI", lambda row: times(row).partition("(")[2].rstrip(")")),
    ("Load s", "load_s"),
    ("First call ms", "first_call_ms"),
    ("Memory MB", lambda row: figure(row.gpu_memory_mb if row.device == "cuda" else row.host_memory_mb)),
    ("Agreement", lambda row: percent(row.agreement)),
    ("Accuracy", lambda row: percent(row.accuracy)),
    ("Warnings", lambda row: ", ".join(warnings(row).values()) if row.status == "ok" else ""),
]
DEVICE = [*HEAD, ("GPU busy %", lambda row: figure(row.busy_ms / row.mean_ms * 100)), "sustained_fps"]
DEVICE += ["gpu_util_pct", "power_w", "mj_per_image", "sm_clock_mhz", "temperature_c", "tflops", "pct_peak"]
DEVICE += ["pct_measured_peak", "flops_per_byte", ("bottleneck", "limit")]
END_TO_END = [
    *HEAD,
    ("Decoder", "decoder"),
    ("Images", "images"),
    ("Images/s", lambda row: figure(row.images_per_s) if row.status == "ok" else row.status),
    ("Images/s, 95 % CI", lambda row: interval(row.images_per_s_low, row.images_per_s_high)),
    ("Decoding alone", "decode_images_per_s"),
    ("Inference alone", "infer_images_per_s"),
    ("Share of the possible", "overlap"),
    ("Bottleneck", "limit"),
    ("Agreement", lambda row: percent(row.agreement)),
    ("python predict.py", whole_command),
    ("Reason", "reason"),
]
RATIOS = [
    *HEAD,
    ("Ratio", lambda row: f"{row.fps_ratio:.3f}"),
    ("Ratio, 95 % CI", lambda row: interval(row.fps_ratio_low, row.fps_ratio_high, "{:.3f}".format)),
    ("Verdict", "verdict"),
]
LOAD = [*HEAD[:3], ("offered images/s", "rate"), "achieved", "p50_ms", "p90_ms", "p99_ms"]
LOAD += [("valid", lambda row: "yes" if row.valid else "no")]


def lines_of(table: Iterable[str | tuple], rows: pd.DataFrame) -> list[list[str]]:
    """Header and rows as cells, without columns that are empty throughout; with the environment of each row
    where there are several."""
    if "sweep" in rows and rows.sweep.nunique() > 1:
        rows = rows.assign(environment=rows.sweep)
    columns = []
    for entry in table:
        header, show = (entry.replace("_", " "), entry) if isinstance(entry, str) else entry
        values: list = [show(row) if callable(show) else row.get(show, "") for _, row in rows.iterrows()]
        cells = [value if isinstance(value, str) else figure(value) for value in values]
        if any(cells) or header in ("Method", "Size", "Batch"):
            columns.append([header, *cells])
    return [list(line) for line in zip(*columns, strict=True)]


def aligned(lines: list[list[str]]) -> str:
    """Columns of text, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = []
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        texts.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(texts)


def markdown(lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def text_table(rows: pd.DataFrame) -> str:
    """The rows as aligned text, the reasons of those without figures below."""
    return "\n".join([aligned(lines_of(TABLE, without_figures(rows))), *reasons(rows)])


def gaps(rows: pd.DataFrame) -> list[tuple[str, str, str]]:
    """(method and, where it isn't all of its rows, where; status; reason) of the rows that are not ok."""
    found, keys = [], ["backend", "precision", "status", "reason"]
    for (backend, _, status, reason), group in rows[rows.status != "ok"].groupby(keys, sort=False):
        own, places = rows[rows.backend == backend], []
        for size, part in group.groupby("image_size"):
            batches = ", ".join(map(str, sorted(set(part.batch_size))))
            places.append(f"{size} px" + f" batch {batches}" * (len(part) < sum(own.image_size == size)))
        scope = f" ({', '.join(places)})" if len(group) < len(own) else ""
        found.append((label(group.iloc[0]) + scope, status.replace("_", " "), reason))
    return found


def reasons(rows: pd.DataFrame) -> list[str]:
    """A line for each reason why rows have no figures or can't win, each variant and each warning."""
    variants = rows[rows.adds != ""].drop_duplicates("backend").itertuples()
    named = {warning for row in rows.itertuples() for warning in warnings(row)}
    lines = [": ".join(gap) for gap in gaps(rows)] + [f"{label(row)}: {row.adds}" for row in variants]
    return lines + [f"{warning}: {remedy}" for warning, remedy in WARNINGS.items() if warning in named]


# ---- answers: one sentence each for a machine, across the environments that it was measured in


def which(ok: pd.DataFrame) -> str:
    groups = [group for _, group in ok.groupby(["image_size", "batch_size"]) if group.backend.nunique() > 1]
    if not groups:
        return f"Only {in_words(ok.iloc[0])} was measured, so there is nothing to compare it with"
    leaders = [analysis.fastest(group) for group in groups]
    wins = Counter(in_words(best[0]) for best in leaders if len(best) == 1)
    ties, grid = len(groups) - wins.total(), f"of {len(groups)} combinations of image and batch size"
    if not wins:
        return f"In none {grid} is one method clearly faster than all others"
    (first, count), *others = wins.most_common()
    there = " of those measured there" * (len({frozenset(group.backend) for group in groups}) > 1)
    texts = [f"In {count} {grid} {first} is the fastest{there}", *(f"in {n} {other}" for other, n in others)]
    return ", ".join(texts) + (f"; {ties} {'is' if ties == 1 else 'are'} too close to call" if ties else "")


def range_of(factors: pd.Series) -> str:
    low, high = figure(factors.min()), figure(factors.max())
    return low if low == high else f"{low} to {high}, depending on the method"


def sizes(ok: pd.DataFrame) -> str:
    """At the largest batch at which a method was measured at the smallest and the largest image size."""
    fps = ok.pivot_table("fps", ["batch_size", "sweep", "backend"], "image_size")
    cost, (small, large) = (fps.iloc[:, 0] / fps.iloc[:, -1]).dropna(), fps.columns[[0, -1]]
    if small == large or cost.empty:
        return ""
    batch = cost.index.get_level_values("batch_size").max()
    pixels = f"From {small} to {large} px there are {figure((large / small) ** 2)} times the pixels"
    return f"{pixels}, and throughput at batch {batch} falls by a factor of {range_of(cost.loc[batch])}"


def batches(ok: pd.DataFrame) -> str:
    """Up to the largest batch that most methods share, at the usual image size."""
    own = ok[ok.image_size == analysis.usual_size(ok)]
    fps, last = own.pivot_table("fps", ["sweep", "backend"], "batch_size"), analysis.shared_batch(own)
    gains, first = (fps[last] / fps.iloc[:, 0]).dropna(), fps.columns[0]
    if first == last or gains.empty:
        return ""
    ends = f"From batch {first} to {last} at {own.image_size.iloc[0]} px"
    return f"{ends}, throughput grows by a factor of {range_of(gains)}"


def saturation(ok: pd.DataFrame) -> str:
    """Of every plain method and the fastest of all, at the usual image size."""
    own, found = ok[ok.image_size == analysis.usual_size(ok)], {}
    told = (own.backend.map(family) == own.backend) | (own.backend == own.loc[own.fps.idxmax()].backend)
    for _, group in own[told].groupby("backend", sort=False):
        longest = max((rows for _, rows in group.groupby("sweep")), key=len)  # where several have the method
        if len(longest) > 1:
            batch, last = analysis.saturation(longest), longest.batch_size.max()
            reached = f"from batch {batch} on" if batch else f"at no batch up to {last}"
            found.setdefault(reached, []).append(in_words(longest.iloc[0]))
    texts = [f"{reached} with {', '.join(names)}" for reached, names in found.items()]
    gain = f"At {own.image_size.iloc[0]} px, doubling the batch gains less than 5 %"
    return f"{gain} {'; '.join(texts)}" if texts else ""


def optimum(ok: pd.DataFrame) -> str:
    """For each image size the fastest, of several the one that answers soonest; told together by method."""
    chosen = {}
    for size, group in ok[ok.fps_low.notna()].groupby("image_size"):
        best = min(analysis.fastest(group), key=lambda row: row.mean_ms)
        cost = f"{figure(best.fps)} images/s at {size} px ({figure(best.mean_ms)} ms a batch)"
        chosen.setdefault(f"{in_words(best)} at batch {best.batch_size}", []).append(cost)
    texts = [f"{method} gives {', '.join(costs)}" for method, costs in chosen.items()]
    return f"For throughput, {'; '.join(texts)}"


QUESTIONS = {"Which is fastest?": which, "Image size:": sizes, "Batch size:": batches}
QUESTIONS |= {"Saturation:": saturation, "Optimal here:": optimum}


def answers_of(rows: pd.DataFrame) -> list[str]:
    ok = analysis.measured(rows)
    if ok.empty:
        return ["Nothing was measured; the reasons are in the table."]
    if ok.fps_low.isna().all():
        return ["Each row was measured in a single round, which supports no verdict: use --rounds 3."]
    found = {question: answer(ok) for question, answer in QUESTIONS.items()}
    return [f"**{question}** {sentence}." for question, sentence in found.items() if sentence]
