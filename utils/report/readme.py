"""README.md's generated parts, each between `<!-- begin PART FOLDER -->` and `<!-- end -->`, and the READMEs
of results folders, which are generated as a whole."""

import math
import re
from pathlib import Path

import pandas as pd

from utils.measure.schema import BASELINE
from utils.report import analysis, words
from utils.report.names import in_words, label
from utils.report.tables import read_serving, read_table
from utils.report.words import figure, foot, lines_of, markdown, times
from utils.utils import UserError

PART = re.compile(
    r"^<!-- begin (headline|summary|answers) (\S+) -->\n(?:(?!<!-- (?:begin|end)).*\n)*<!-- end -->$",
    re.MULTILINE,
)
CHARTS = ["methods", "fps_vs_image_size", "fps_vs_batch_size", "speedup_vs_image_size"]
CHARTS += ["memory_vs_batch_size", "roofline", "end_to_end", "load", "training"]
SERVING = {
    "end_to_end.csv": ("From files to labels", words.END_TO_END),
    "load.csv": ("Latency under load", words.LOAD),
}
FACTS = {"ceilings": "measured limits", "sweep": "time"}  # of environment.json: what people call them
Table = tuple[pd.DataFrame, dict]  # rows, and sweep -> environment: what tables.read_table() gives


def headline(rows: pd.DataFrame, environments: dict) -> str:
    """The method with the highest throughput and its speedup over PyTorch FP32; the same for FP16."""
    ok = analysis.measured(rows)
    ok = ok[(ok.backend != BASELINE) & ok.speedup.notna()]
    if ok.empty:
        return "Nothing to compare with PyTorch FP32 has been measured here yet."
    best = ok.loc[ok.fps.idxmax()]
    lines = [f"**Best: {in_words(best)}, {times(best)} PyTorch FP32**: {deed(best)}."]
    if not best.speedup_low > 1:  # nor NaN
        why = "one round has no interval" if pd.isna(best.speedup_low) else "the intervals overlap"
        lines = [f"No verdict ({why}); the most images/s: {in_words(best)}, {deed(best)}."]
    half = ok[(ok.precision == "FP16") & (ok.image_size == best.image_size)]
    if best.precision != "FP16" and len(half):
        row = half.loc[half.fps.idxmax()]
        called = ", ".join(filter(None, [in_words(row).replace(" FP16", ""), times(row)]))
        lines.append(f"Best FP16: {called}: {deed(row)}.")
    return "<br>\n".join(lines) + f"\n\n<sub>{foot(environments.get(best.sweep, {}))}</sub>"


def deed(row) -> str:
    """What a row did, where, and how right it was."""
    where = f"{figure(row.fps)} images/s at {row.image_size} px, batch {row.batch_size}"
    right = f"the same class as PyTorch FP32 on {row.agreement:.1%} of the test images"
    return f"{where}, accuracy {row.accuracy:.1%}, {right}"


def summary_columns(rows: pd.DataFrame) -> list[tuple[int, int]]:
    """(image size, batch size) of the summary's columns: 224 px at batch 1, 16 and 256, 512 px at batch 16,
    or what comes nearest to these among what was measured."""
    small, large = analysis.usual_size(rows), 512 if (rows.image_size == 512).any() else rows.image_size.max()
    columns = set()
    for size, wanted in ((small, 1), (small, 16), (small, 256), (large, 16)):
        batches = rows[rows.image_size == size].batch_size
        columns.add((int(size), min(batches, key=lambda batch: abs(math.log(batch / wanted)))))
    return sorted(columns)


def summary(rows: pd.DataFrame, environments: dict) -> str:
    """A row for each method across the environments of a machine, the fastest first; each cell images/s and
    the speedup with its own interval, or the status; the environments as footnotes."""
    ok = analysis.measured(rows)
    if ok.empty:
        return "Nothing has been measured here yet."
    columns, sweeps = summary_columns(ok), list(ok.sweep.unique())
    marks = {sweep: f"<sup>{k}</sup> " if len(sweeps) > 1 else "" for k, sweep in enumerate(sweeps, 1)}
    lines = [["Method", *(f"{size} px, batch {batch}" for size, batch in columns), "Accuracy"]]
    shown = pd.concat([analysis.at(rows, *column) for column in columns])
    order = analysis.measured(shown).groupby(["backend", "sweep"]).fps.max()
    for backend, sweep in order.sort_values(ascending=False, kind="stable").index:
        own, cells = shown[(shown.backend == backend) & (shown.sweep == sweep)], dict.fromkeys(columns, "")
        for row in own.itertuples():
            figures = "<br>".join(filter(None, [figure(row.fps), times(row)]))
            told = figures if row.status == "ok" else row.status.replace("_", " ")
            cells[row.image_size, row.batch_size] = told
        ends = dict.fromkeys(f"{share * 100:.0f}" for share in (own.accuracy.min(), own.accuracy.max()))
        called = f"{label(own.iloc[0])} {marks[sweep]}".rstrip()
        lines.append([called, *cells.values(), f"{'-'.join(ends)} %"])
    notes = ["images/s; below, the speedup over PyTorch FP32 in the same environment with its 95 % interval"]
    for sweep, mark in marks.items():
        notes.append((f"{mark}{sweep}: " if mark else "") + foot(environments.get(sweep, {})))
    notes += [": ".join(gap) for gap in words.gaps(rows[~rows.backend.isin(ok.backend)])]
    return f"{markdown(lines)}\n\n<sub>{'<br>'.join(filter(None, notes))}</sub>"


def answers(rows: pd.DataFrame, environments: dict) -> str:
    return "\n".join(f"- {sentence}" for sentence in words.answers_of(rows))


PARTS = {"headline": headline, "summary": summary, "answers": answers}


def read_folders(path: Path, measuring: Path | None = None) -> dict[Path, Table]:
    """What lies in the results folders that README.md shows parts of, and in results/published/, but for the
    one that is about to be measured.  Raises UserError at a marker that belongs to no part, and at a folder
    that is missing or damaged."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8; save it so, then: python compare.py --write-readme") from None
    if stray := re.search(r"^<!-- (begin|end).*", PART.sub("", text), re.MULTILINE):
        says = f"{stray[0]} marks no generated part, such as <!-- begin summary results --> to <!-- end -->"
        raise UserError(f"{path}: {says}; mend it, then: python compare.py --write-readme")
    published = (path.parent / "results" / "published").glob("*/benchmark_results.csv")
    shown = {path.parent / part[2] for part in PART.finditer(text)}
    folders = sorted(shown | {table.parent for table in published})
    known = measuring and measuring.resolve()
    return {folder: read_table(folder) for folder in folders if folder.resolve() != known}


def render(path: Path, tables: dict[Path, Table]) -> str:
    """README.md's text with every generated part made anew from the folder it names."""

    def anew(part: re.Match) -> str:
        made = PARTS[part[1]](*tables[path.parent / part[2]])
        return f"<!-- begin {part[1]} {part[2]} -->\n{made}\n<!-- end -->"

    return PART.sub(anew, path.read_text(encoding="utf-8"))


def folder_readme(folder: Path, rows: pd.DataFrame, environments: dict) -> str:
    """All that is generated about a results folder: the summary, answers, charts, tables and environments."""
    made = "Made by `python benchmark.py`; renewed by `python compare.py --write-readme`."
    known = next(iter(environments.values()), {})
    machine = known.get("gpu") or known.get("cpu") or "an unknown machine"
    parts = [f"# Results: {machine}", made, headline(rows, environments)]
    parts += [summary(rows, environments), answers(rows, environments)]
    drawn = [chart for chart in CHARTS if (folder / f"{chart}.png").is_file()]
    parts += [f"![{chart.replace('_', ' ')}]({chart}.png)" for chart in drawn]
    parts += ["## Every row", *by_size(words.without_figures(rows), words.TABLE)]
    parts += [f"<sub>{line}</sub>" for line in words.reasons(rows)]
    if len(ok := analysis.measured(rows)):
        parts += ["## What the device was doing", *by_size(ok, words.DEVICE)]
    for file, (title, columns) in SERVING.items():
        if (folder / file).is_file():
            found = read_serving(folder / file)
            old = f"{file} is damaged or of an earlier version; python end_to_end.py makes it anew."
            parts += [f"## {title}", old if found is None else markdown(lines_of(columns, found))]
    return "\n\n".join([*parts, "## Environment", environment_table(environments)]) + "\n"


def by_size(rows: pd.DataFrame, columns: list) -> list[str]:
    """A folded table for each image size, the first one open."""
    parts = []
    for size, group in rows.groupby("image_size"):
        opened, table = "" if parts else " open", markdown(lines_of(columns, group))
        parts.append(f"<details{opened}><summary>{size} px</summary>\n\n{table}\n\n</details>")
    return parts


def environment_table(environments: dict) -> str:
    """A column for each environment: every fact of environment.json that is known of one."""
    names = dict.fromkeys(fact for known in environments.values() for fact in known if fact != "short")
    lines = [[fact, *(text_of(known.get(fact)) for known in environments.values())] for fact in names]
    shown = [[FACTS.get(fact, fact), *texts] for fact, *texts in lines if any(texts)]
    return markdown([["", *environments], *shown])


def text_of(fact) -> str:
    if isinstance(fact, dict):
        return ", ".join(f"{name} {text_of(part)}" for name, part in fact.items() if name != "settings_key")
    return "" if fact is None else str(fact)
