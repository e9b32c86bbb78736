"""Rows and findings -> words: names, numbers, tables and the five answers."""

import re
from collections.abc import Callable

import pandas as pd

from utils.report import analysis
from utils.report.rows import VERDICTS

NAMES = {
    "pytorch": "PyTorch",
    "torch-compile": "torch.compile",
    "onnx": "ONNX Runtime",
    "openvino": "OpenVINO",
    "torch-tensorrt": "Torch-TensorRT",
    "tensorrt": "TensorRT",
}
WORDS = {"graph": "CUDA graph", "static": "static shape", "nhwc": "NHWC"}
PRECISIONS = {"fp32", "tf32", "fp16", "bf16", "int8", "fp8"}

# ---- words


def family(backend: str) -> str:
    """The backend that a variant belongs to: "onnx" of "onnx-nhwc-graph"."""
    return next((name for name in NAMES if f"{backend}-".startswith(f"{name}-")), backend)


def label(backend: str, precision: str) -> str:
    """What people call it: "ONNX Runtime FP16, NHWC, CUDA graph"; a precision in the name comes first."""
    base = family(backend)
    words = backend[len(base) :].replace("channels-last", "channels last").split("-")[1:]
    precision = next((word for word in words if word in PRECISIONS), precision)
    extras = [WORDS.get(word, word) for word in words if word not in PRECISIONS]
    return ", ".join([f"{NAMES.get(base, base)} {precision.upper()}".strip(), *extras])


def name(row) -> str:
    return label(row.backend, row.precision)


def figure(value: float) -> str:
    """The one way to print a number: three digits, thousands apart: "0.512", "1,000"; NaN is ""."""
    if pd.isna(value):
        return ""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:.3g}"


def percent(value: float) -> str:
    return "" if pd.isna(value) else f"{value:.1%}"


def span(values) -> str:
    low, high = figure(min(values)), figure(max(values))
    return low if low == high else f"{low} to {high}"


def between(low: float, high: float, text: Callable = figure) -> str:
    """ "12–14": an interval; nothing where there is none."""
    return "" if pd.isna(low) or low == high else f"{text(low)}–{text(high)}"


def foot(known: dict) -> str:
    """The hardware and versions behind a figure in one line, and whether the network saw sample data only."""
    return known.get("short", "") + (" · sample data (drawn heroes)" if known.get("sample_data") else "")


# ---- tables: a list of (header, the column or what else it shows of a row)


def without_figures(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with figures only where they are ok; agreement and accuracy stay, they tell why not."""
    kept = ["image_size", "batch_size", "agreement", "accuracy"]
    figures = rows.select_dtypes("number").columns.difference(kept)
    return rows.assign(**{column: rows[column].where(rows.status == "ok") for column in figures})


def verdicts(row) -> dict[str, str]:
    """The verdicts in a row's notes, each with the width that it reached where it tells that: "±5 %"."""
    parts = [part.partition(": ") for part in row.notes.split("; ")]
    widths = {name: re.search(r"±\S+ %", said) for name, _, said in parts if name in VERDICTS}
    return {name: width[0] if width else "" for name, width in widths.items()}


def doubts(row) -> str:
    """ "noisy ±5 %, CPU-bound" """
    return ", ".join(f"{name} {width}".strip() for name, width in verdicts(row).items())


HEAD = [
    ("Method", name),
    ("Size", lambda row: str(row.image_size)),
    ("Batch", lambda row: str(row.batch_size)),
]
TABLE = [
    *HEAD,
    ("Mean ms", lambda row: figure(row.mean_ms) if row.status == "ok" else row.status.replace("_", " ")),
    ("Std ms", "std_ms"),
    ("p95 ms", "p95_ms"),
    ("Images/s", "fps"),
    ("95 %", lambda row: between(row.fps_low, row.fps_high)),
    ("Speedup", "speedup"),
    ("95 % of it", lambda row: between(row.speedup_low, row.speedup_high)),
    ("Load s", "load_s"),
    ("First call ms", "first_call_ms"),
    ("Memory MB", lambda row: figure(row.gpu_memory_mb if row.device == "cuda" else row.host_memory_mb)),
    ("Agreement", lambda row: percent(row.agreement)),
    ("Accuracy", lambda row: percent(row.accuracy)),
    ("Notes", lambda row: doubts(row) if row.status == "ok" else ""),
]
DEVICE = [
    *HEAD,
    ("Pipelined images/s", "sustained_fps"),
    ("GPU busy %", lambda row: figure(row.busy_ms / row.mean_ms * 100)),
    ("Util. %", "gpu_util_pct"),
    ("W", "power_w"),
    ("mJ/image", "mj_per_image"),
    ("SM MHz", "sm_clock_mhz"),
    ("°C", "temperature_c"),
    ("TFLOP/s", "tflops"),
    ("% of peak", "pct_peak"),
    ("% of measured peak", "pct_measured_peak"),
    ("FLOP/byte", "flops_per_byte"),
    ("Limit", "limit"),
]
END_TO_END = [
    *HEAD,
    ("Decoder", "decoder"),
    ("Images/s", lambda row: figure(row.images_per_s) if row.status == "ok" else row.status),
    ("95 %", lambda row: between(row.images_per_s_low, row.images_per_s_high)),
    ("Decoding alone", "decode_images_per_s"),
    ("Inference alone", "infer_images_per_s"),
    ("Overlap", "overlap"),
    ("One after the other", "serial_images_per_s"),
    ("Limit", "limit"),
    ("Agreement", lambda row: percent(row.agreement)),
    ("Reason", "reason"),
]
LOAD = [
    *HEAD[:2],
    ("Scenario", "scenario"),
    ("Offered images/s", "rate"),
    ("Achieved", "achieved"),
    ("p50 ms", "p50_ms"),
    ("p90 ms", "p90_ms"),
    ("p99 ms", "p99_ms"),
    ("Valid", lambda row: "yes" if row.valid else "no"),
    ("By our clock", "fps"),
]


def lines_of(table: list[tuple[str, str | Callable]], rows: pd.DataFrame) -> list[list[str]]:
    """Header and rows as cells, without columns that are empty throughout."""
    columns = []
    for header, show in table:
        cells = [show(row) if callable(show) else cell(row[show]) for _, row in rows.iterrows()]
        if any(cells) or header in dict(HEAD):
            columns.append([header, *cells])
    return [list(line) for line in zip(*columns, strict=True)]


def cell(value) -> str:
    return value if isinstance(value, str) else figure(value)


def results_lines(rows: pd.DataFrame) -> list[list[str]]:
    """TABLE's lines; batch sizes without figures for one and the same reason share a line."""
    shown = without_figures(rows.reset_index(drop=True)).astype({"batch_size": str})
    missing = ~shown.status.isin(["ok", "mismatch"])
    keys = ["sweep", "backend", "image_size", "status", "reason"]
    for _, group in shown[missing].groupby(keys):
        shown.loc[group.index[0], "batch_size"] = ", ".join(group.batch_size)
        shown = shown.drop(group.index[1:])
    return lines_of(TABLE, shown)


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
    return "\n".join([aligned(results_lines(rows)), *reasons(rows)])


def reasons(rows: pd.DataFrame) -> list[str]:
    """A line for each reason why rows have no figures or can't win, and for each verdict on the others."""
    lines, keys = [], ["backend", "precision", "status", "reason"]
    for (backend, precision, status, reason), group in rows[rows.status != "ok"].groupby(keys, sort=False):
        places = sorted(set(zip(group.image_size, group.batch_size, strict=True)))
        where = ", ".join(f"{size} px batch {batch}" for size, batch in places)
        scope = "" if len(places) == sum(rows.backend == backend) else f" ({where})"
        lines.append(f"{label(backend, precision)}{scope}: {status.replace('_', ' ')}: {reason}")
    variants = rows[rows.adds != ""].drop_duplicates("backend")
    lines += [f"{name(row)}: {row.adds}" for row in variants.itertuples()]
    named = {verdict for row in rows.itertuples() for verdict in verdicts(row)}
    return lines + [f"{verdict}: {remedy}" for verdict, remedy in VERDICTS.items() if verdict in named]


# ---- answers


def answers_of(rows: pd.DataFrame) -> list[str]:
    """The five answers, a sentence each; where there are several sweeps, each speaks but in the last."""
    ok = analysis.measured(rows)
    if ok.empty:
        return ["Nothing was measured; the reasons are in the table."]
    if ok.fps_low.isna().all():
        return ["Each row was measured in a single round, which supports no verdict: use --rounds 3."]
    sentences, sweeps = [], ok.sweep.unique()
    for question, answer in QUESTIONS.items():
        if len(sweeps) == 1 or answer is optimum:
            texts = [answer(ok)]
        else:
            texts = [f"{text} ({sweep})" for sweep in sweeps if (text := answer(ok[ok.sweep == sweep]))]
        if any(texts):
            sentences.append(f"**{question}** {'; '.join(texts)}.")
    return sentences


def which(ok: pd.DataFrame) -> str:
    winners, ties, total = analysis.wins(ok)
    if not total:
        return f"Only {name(ok.iloc[0])} was measured, so there is nothing to compare it with"
    texts = [f"{name(row)} in {count}" for row, count in winners]
    texts += [f"no difference that this sweep can show in {ties}"] if ties else []
    return f"{', '.join(texts)} of {total} combinations of image and batch size"


def sizes(ok: pd.DataFrame) -> str:
    cost, small, large = analysis.size_cost(ok), ok.image_size.min(), ok.image_size.max()
    pixels = f"from {small} to {large} px, {figure((large / small) ** 2)} times the pixels"
    fall = f"throughput at batch {ok.batch_size.max()} falls"
    return f"{pixels}, {fall} {span(cost.values())} times" if cost else ""


def batches(ok: pd.DataFrame) -> str:
    gains = analysis.batch_gain(ok)
    ends = f"from batch {ok.batch_size.min()} to {ok.batch_size.max()} at {ok.image_size.min()} px"
    return f"{ends} throughput grows {span(gains.values())} times" if gains else ""


def saturation(ok: pd.DataFrame) -> str:
    texts, missing, total = [], 0, 0
    for _, own in ok[ok.backend.map(family) == ok.backend].groupby("backend", sort=False):
        found = analysis.saturations(own)
        reached = {size: batch for size, batch in found.items() if batch}
        missing, total = missing + len(found) - len(reached), total + len(found)
        if reached:
            at = "" if len(reached) == len(found) else f" at {', '.join(map(str, reached))} px"
            texts.append(f"{name(own.iloc[0])} from batch {span(reached.values())}{at}")
    texts += [f"in {missing} of {total} cases not up to batch {ok.batch_size.max()}"] if missing else []
    return f"doubling the batch gives under 5 % more: {', '.join(texts)}" if texts else ""


def optimum(ok: pd.DataFrame) -> str:
    texts = []
    for best in analysis.optimal(ok[ok.fps_low.notna()]):
        cost = f"{figure(best.fps)} images/s, {figure(best.mean_ms)} ms a batch"
        texts.append(f"{best.image_size} px {name(best)}, batch {best.batch_size} ({cost})")
    return f"for throughput {', '.join(texts)}"


QUESTIONS = {
    "Which is fastest?": which,
    "Image size:": sizes,
    "Batch size:": batches,
    "Saturation:": saturation,
    "Optimal here:": optimum,
}
