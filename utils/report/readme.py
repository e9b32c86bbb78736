"""README.md's generated parts, and the READMEs of results folders, which are generated as a whole.

A part stands in README.md between `<!-- begin PART FOLDER -->` and `<!-- end -->`; the part `machines` takes
two folders.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from utils.measure import roofline
from utils.measure.schema import BASELINE
from utils.report import analysis, words
from utils.report.tables import read_serving, read_table
from utils.report.words import figure, foot, label, markdown, name
from utils.utils import UserError, write_atomic

BEGIN = re.compile(r"<!-- begin (\w+) (\S+)(?: (\S+))? -->")
END = "<!-- end -->"
METHODS, BATCH = ["onnx", "torch-tensorrt", "tensorrt"], 16  # set against each other in the headline
CHARTS = {  # files that plot_utils draws, and what they show
    "fps_vs_image_size.png": "Throughput against image size",
    "fps_vs_batch_size.png": "Throughput against batch size",
    "speedup_vs_image_size.png": "Speedup over PyTorch FP32",
    "memory_vs_batch_size.png": "GPU memory against batch size",
    "ladder.png": "The ladder: from the slowest to the fastest method",
    "roofline.png": "Rate of operations under the measured ceilings",
    "end_to_end.png": "From files to labels",
    "load.png": "Latency under load",
    "training.png": "Training",
}
SERVING = {
    "end_to_end.csv": ("From files to labels", words.END_TO_END),
    "load.csv": ("Latency under load", words.LOAD),
}


def headline(rows: pd.DataFrame, environments: dict) -> str:
    """The highest throughput and its speedup over PyTorch FP32; the same in FP16, and of the methods."""
    ok = analysis.measured(rows)
    ok = ok[(ok.backend != BASELINE) & ok.speedup.notna()]
    if ok.empty:
        return "Nothing to compare with PyTorch FP32 has been measured here yet."
    best = ok.loc[ok.fps.idxmax()]
    claim = f"**{name(best)} serves ResNet-18 {figure(best.speedup)} times as fast as PyTorch FP32**"
    if not analysis.beats_baseline(best):
        why = "one round supports none" if pd.isna(best.speedup_low) else "the intervals overlap"
        claim = f"No verdict ({why}); the most images/s: {name(best)}, {times_of(best)} PyTorch FP32's"
    lines = [f"{claim}{sureness(best)}:\n{deed(best)}."]
    half = ok[(ok.precision == "FP16") & (ok.image_size == best.image_size)]
    if best.precision != "FP16" and len(half):
        row = half.loc[half.fps.idxmax()]
        lines.append(f"In FP16 {name(row)} {times_of(row)}{sureness(row)}: {deed(row)}.")
    plain = ok[ok.backend.isin(METHODS) & (ok.image_size == best.image_size) & (ok.batch_size == BATCH)]
    if len(plain):
        plain = plain.loc[plain.groupby("backend").fps.idxmax()].sort_values("fps")
        texts = [f"{name(row)} {times_of(row)}" for row in plain.itertuples()]
        lines.append(f"At {best.image_size} px, batch {BATCH}, over PyTorch FP32: {', '.join(texts)}.")
    return "<br>\n".join(lines) + f"\n\n<sub>{foot(environments.get(best.sweep, {}))}</sub>"


def times_of(row) -> str:
    return f"{figure(row.speedup)}×"


def sureness(row) -> str:
    limits = words.between(row.speedup_low, row.speedup_high)
    return f" ({limits} at 95 % confidence)" if limits else ""


def deed(row) -> str:
    """What a row did, where, and how right it was."""
    where = f"{figure(row.fps)} images/s at {row.image_size} px, batch {row.batch_size}"
    right = f"the same class as PyTorch FP32 on {row.agreement:.1%} of the test images"
    return f"{where}, accuracy {row.accuracy:.1%}, {right}"


def summary(rows: pd.DataFrame, environments: dict) -> str:
    """Method x image size, each at its best batch: images/s ± half the 95 % interval, speedup, accuracy.

    Of each method the plain one and its fastest variant, so that it fits a screen.
    """
    best = analysis.best_batch(rows)
    if best.empty:
        return "Nothing has been measured here yet."
    families = best.backend.map(words.family)
    keys = best.sweep + "/" + best.backend
    fastest = best.fps == best.groupby(["sweep", families]).fps.transform("max")
    best = best[(best.backend == families) | keys.isin(keys[fastest])]
    columns, several = sorted(best.image_size.unique()), rows.sweep.nunique() > 1
    lines = [["Method, at its best batch", *(f"{size} px" for size in columns), "Accuracy"]]
    for (sweep, _), group in best.groupby(["sweep", "backend"], sort=False):
        cells = {row.image_size: summary_cell(row) for row in group.itertuples()}
        who = name(group.iloc[0]) + (f" ({sweep})" if several else "")
        least, most = (f"{share * 100:.0f}" for share in (group.accuracy.min(), group.accuracy.max()))
        accuracy = least if least == most else f"{least}–{most}"
        lines.append([who, *(cells.get(size, "") for size in columns), f"{accuracy} %"])
    notes = ["images/s ± half the 95 % interval, speedup over PyTorch FP32 of the same sweep, b = batch size"]
    notes += dict.fromkeys(foot(known) for known in environments.values())
    missing = rows[(rows.status != "ok") & (rows.backend.map(words.family) == rows.backend)]
    notes += words.reasons(missing.assign(notes="", adds=""))
    return f"{markdown(lines)}\n\n<sub>{'<br>'.join(notes)}</sub>"


def summary_cell(row) -> str:
    """ "51,700 ± 2 %, 6.67×, b16"; a single round has no interval that holds."""
    half = (row.fps_high - row.fps_low) / 2 / row.fps * 100
    half = "" if pd.isna(half) else f" ± {half:.1g} %" if half < 1 else f" ± {half:.0f} %"
    times = "" if pd.isna(row.speedup) or row.backend == BASELINE else f", {figure(row.speedup)}×"
    return f"{figure(row.fps)}{half}{times}, b{row.batch_size}"


def answers(rows: pd.DataFrame, environments: dict) -> str:
    return "\n".join(f"- {sentence}" for sentence in words.answers_of(rows))


def machine_ratios(a: Path, b: Path) -> tuple[pd.DataFrame, list[str]]:
    """The second folder's figures over the first's (findings.ratios()), in the sweeps that both have, and
    the names of the two machines."""
    (before, old), (after, new) = read_table(a), read_table(b)
    if shared := set(before.sweep) & set(after.sweep):
        before, after = (rows[rows.sweep.isin(shared)] for rows in (before, after))
    first = [next(iter(known.values()), {}) for known in (old, new)]
    return analysis.ratios(before, after), [known.get("gpu") or known.get("cpu", "?") for known in first]


def machines(a: Path, b: Path) -> str:
    """Two machines in a sentence: throughput of the second over the first's."""
    both, (first, second) = machine_ratios(a, b)
    if both.empty:
        return f"{a.name} and {b.name} have no measured configuration in common."
    ratio, most = both.fps_ratio, both.loc[both.fps_ratio.idxmax()]
    where = f"{label(most.backend, most.precision_after)}, {most.image_size} px, batch {most.batch_size}"
    middle = f"**{second}: {figure(ratio.median())} times the images/s of {first}** in the median"
    return f"{middle} of {len(both)} configurations ({words.span(ratio)} times; most: {where})."


PARTS = {"headline": headline, "summary": summary, "answers": answers, "machines": machines}


def marked(path: Path) -> list[tuple[int, int, str, list[Path]]]:
    """README.md's parts: lines of their markers, kind, folders.  Raises UserError at a broken marker."""
    found, begun = [], None

    def broken(line: int, why: str) -> UserError:
        return UserError(f"{path}, line {line + 1}: {why}; mend it, then: python compare.py --write-readme")

    for k, line in enumerate(map(str.strip, lines_in(path))):
        match = BEGIN.fullmatch(line)
        if begun and line == END:
            found.append((begun[0], k, *begun[1:]))
            begun = None
        elif begun and match:
            break
        elif match and match[1] not in PARTS:
            raise broken(k, f"{match[1]} is none of {', '.join(PARTS)}")
        elif match and (match[3] is None) == (match[1] == "machines"):
            raise broken(k, f"{match[1]} takes {'two folders' if match[3] is None else 'one folder'}")
        elif match:
            begun = k, match[1], [path.parent / folder for folder in match.groups()[1:] if folder]
        elif line.startswith(("<!-- begin", "<!-- end")):
            raise broken(k, f"{line} marks no generated part")
    if begun:
        raise broken(begun[0], f"the generated part has no {END}")
    return found


def lines_in(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        mend = "run compare.py in the repository's root, where README.md is, in UTF-8"
        raise UserError(f"{path} can't be read ({error}); {mend}") from None


def folders_of(path: Path) -> list[Path]:
    """The results folders that README.md shows parts of."""
    return sorted({folder for *_, folders in marked(path) for folder in folders})


def render(path: Path) -> str:
    """README.md's text with every generated part made anew from the folder it names."""
    lines = lines_in(path)
    for start, end, kind, folders in reversed(marked(path)):
        made = machines(*folders) if kind == "machines" else PARTS[kind](*read_table(folders[0]))
        lines[start + 1 : end] = made.strip().splitlines()
    return "\n".join(lines) + "\n"


def write_readme(path: Path) -> None:
    """Renew the generated parts of README.md and nothing else in it; a UserError leaves it as it was."""
    write_atomic(path, render(path))


# ---- a results folder's own README.md


def folder_readme(folder: Path) -> str:
    """Everything that is generated about a results folder: answers, tables, charts, environment."""
    rows, environments = read_table(folder)
    parts = ["# Results", "Made by `python benchmark.py`; renewed by `python compare.py --write-readme`."]
    parts += [headline(rows, environments), answers(rows, environments)]
    parts += [f"![{text}]({file})" for file, text in CHARTS.items() if (folder / file).is_file()]
    for sweep, part in rows.groupby("sweep", sort=False):
        parts += sweep_parts(sweep, part, environments.get(sweep, {}))
    for file, (title, table) in SERVING.items():
        if (folder / file).is_file():
            parts += [f"## {title}", *serving_parts(read_serving(folder / file), table)]
    return "\n\n".join(parts) + "\n"


def serving_parts(found: pd.DataFrame | None, table: list) -> list[str]:
    if found is None:
        return ["Measured by an earlier version; python end_to_end.py makes it anew."]
    parts = []
    for sweep, part in found.groupby("sweep", sort=False):
        parts += [f"Sweep {sweep}:", markdown(words.lines_of(table, part))]
    return parts


def sweep_parts(sweep: str, rows: pd.DataFrame, known: dict) -> list[str]:
    parts = [f"## Sweep {sweep}", f"<sub>{foot(known)}</sub>", *by_size(rows, results_table)]
    parts += [f"<sub>{line}</sub>" for line in words.reasons(rows)]
    if len(ok := analysis.measured(rows)):
        parts.append("### What the device was doing")
        parts += by_size(ok, lambda group: markdown(words.lines_of(words.DEVICE, group)))
        parts += [f"<sub>{text}</sub>"] if (text := ceilings_text(known)) else []
    return [*parts, "### Environment", environment_table(known)]


def write_folder_readme(folder: Path) -> None:
    write_atomic(folder / "README.md", folder_readme(folder))


def by_size(rows: pd.DataFrame, table: Callable) -> list[str]:
    """A folded table for each image size, the first one open."""
    parts = []
    for size, group in rows.groupby("image_size"):
        opened = "" if parts else " open"
        parts.append(f"<details{opened}><summary>{size} px</summary>\n\n{table(group)}\n\n</details>")
    return parts


def results_table(rows: pd.DataFrame) -> str:
    """TABLE in Markdown; the fastest row is bold where it is so beyond doubt at its batch size."""
    lines, ok = words.results_lines(rows), analysis.measured(rows)
    if len(ok):
        at = ok.loc[ok.fps.idxmax()].batch_size
        best = analysis.decided(rows[rows.batch_size == at])
        fps = lines[0].index("Images/s")
        for line in lines[1:] if best is not None else []:
            if (line[0], line[2]) == (name(best), str(at)):
                line[0], line[fps] = f"**{line[0]}**", f"**{line[fps]}**"
    return markdown(lines)


def ceilings_text(known: dict) -> str:
    """The measured ceilings of a sweep's machine and its theoretical peaks; "" where nothing was measured."""
    found = known.get("ceilings")
    if not found:
        return ""
    texts = []
    for precision, tflops in found["tflops"].items():
        peak = roofline.peak_tflops(known, precision)
        texts.append(f"{precision} {figure(tflops)}{f' of {figure(peak)}' if peak else ''} TFLOP/s")
    context = known.get("context_mb")
    share = f"; the CUDA context alone takes {figure(context)} MB of each row's GPU memory" if context else ""
    products = f"measured ceilings: matrix product {', '.join(texts)}"
    return f"{products}; copy {figure(found['gb_per_s'])} GB/s{share}"


def environment_table(known: dict) -> str:
    """The environment in people's words, without what is not known."""
    gpu = "none"
    if known.get("gpu"):
        power = f"power limit {known.get('power_limit_w')} W"
        gpu = f"{known['gpu']}, {known.get('gpu_memory_mb')} MB, {power}, driver {known.get('driver')}"
    packages = [f"{package} {version}" for package, version in known.get("packages", {}).items()]
    changed = "" if known.get("clean") else " with uncommitted changes"
    facts = {
        "GPU": gpu,
        "CPU": f"{known.get('cpu')}, {known.get('cores')} cores, {known.get('threads')} threads used",
        "System": f"{known.get('os')}, Python {known.get('python')}",
        "CUDA": known.get("cuda") and f"{known['cuda']}, cuDNN {known.get('cudnn')}",
        "Packages": ", ".join(packages),
        "Data": f"{known.get('data')}{' (drawn sample heroes)' if known.get('sample_data') else ''}",
        "Time": account(known.get("sweep")),
        "Command": f"`{known.get('command')}`",
        "Commit": known.get("commit") and f"{known['commit']}{changed}",
        "Date": known.get("date"),
    }
    return markdown([["", ""], *([fact, text] for fact, text in facts.items() if text)])


def account(sweep: dict | None) -> str | None:
    """Where the sweep's time went, as a sentence."""
    if not sweep or not sweep.get("total_s") or "timed_s" not in sweep:  # or an earlier version's
        return None
    timed = f"{sweep['timed_s']:.0f} s of them timed runs"
    return f"{sweep['processes']} processes in {sweep['total_s']:.0f} s, {timed}"
