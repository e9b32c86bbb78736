"""Results folder -> words: the table, the answers, and the README's generated parts.  A pure reader of the CSV.

A part stands in the README between `<!-- begin PART FOLDER -->` and `<!-- end -->`; what lies between is replaced.
"""

import re
from pathlib import Path

import pandas as pd

import compare
from utils import ceilings
from utils.plot_utils import draw_all, label
from utils.records import VERDICTS
from utils.utils import UserError, write_atomic

MARKED = re.compile(r"(<!-- begin (\w+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
TABLE = [
    "Method",
    "Size",
    "Batch",
    "Mean ms",
    "Std ms",
    "p95 ms",
    "Images/s",
    "95 %",
    "Speedup",
    "95 %",
    "Memory MB",
    "Agreement",
    "Accuracy",
    "Notes",
]


def figure(value: float) -> str:
    """Three significant digits with thousands separated: "0.512", "34.1", "15,800"."""
    if pd.isna(value):
        return ""
    if abs(value) >= 1000:
        digits = len(str(int(abs(value)))) - 3
        return f"{round(value, -digits):,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def span(values: pd.Series) -> str:
    low, high = figure(values.min()), figure(values.max())
    return low if low == high else f"{low} to {high}"


def answers_of(rows: pd.DataFrame) -> list[str]:
    """Sentences that answer the five questions and name the optimum, one list item each; for each run on its own."""
    sentences = []
    for run in rows.run.unique():
        part = rows[rows.run == run]
        head = f"Run {run}: " if rows.run.nunique() > 1 else ""
        ok = compare.measured(part)
        if ok.empty:
            sentences.append(f"{head}nothing was measured; the reasons are in the table.")
            continue
        sentences += [
            head + sentence
            for sentence in (_which(ok), _ranges(ok), _speedups(ok), _sizes(ok), _batches(ok), _optimum(ok))
            if sentence
        ]
    return sentences


def _which(ok: pd.DataFrame) -> str:
    wins, ties, total = {}, 0, 0
    for _, group in ok.groupby(["image_size", "batch_size"]):
        if group.backend.nunique() < 2:
            continue
        total += 1
        best = compare.fastest(group)
        wins[compare.name(best[0])] = wins.get(compare.name(best[0]), 0) + (len(best) == 1)
        ties += len(best) > 1
    if not total:
        return f"**Which is fastest?** Only {compare.name(ok.iloc[0])} was measured, so there is nothing to compare it with."
    texts = [
        f"{who} in {count} of {total}"
        for who, count in sorted(wins.items(), key=lambda item: -item[1])
        if count
    ]
    if ties:
        texts.append(f"in {ties} of {total} no difference that this run can show between the first two")
    return (
        f"**Which is fastest?** Of the {total} combinations of image size and batch size: {'; '.join(texts)}."
    )


def _by_backend(ok: pd.DataFrame):
    return [(compare.name(group.iloc[0]), group) for _, group in ok.groupby("backend", sort=False)]


def _ranges(ok: pd.DataFrame) -> str:
    return (
        "**Throughput.** "
        + "; ".join(f"{who} {span(group.fps)} images/s" for who, group in _by_backend(ok))
        + "."
    )


def _speedups(ok: pd.DataFrame) -> str:
    texts = []
    for who, group in _by_backend(ok[(ok.backend != "pytorch") & ok.speedup.notna()]):
        best = group.loc[group.speedup.idxmax()]
        unclear = int(((group.speedup_low <= 1) & (group.speedup_high >= 1)).sum())
        text = f"{who} {group.speedup.min():.2f} to {best.speedup:.2f} times (most at {best.image_size} px, batch {best.batch_size})"
        texts.append(
            text
            + (f", no difference that this run can show in {unclear} of {len(group)} rows" if unclear else "")
        )
    return f"**Speedup** over PyTorch FP32. {'; '.join(texts)}." if texts else ""


def _sizes(ok: pd.DataFrame) -> str:
    small, large = ok.image_size.min(), ok.image_size.max()
    if small == large:
        return ""
    batch = ok.batch_size.max()
    texts = []
    for who, group in _by_backend(ok[ok.batch_size == batch]):
        ends = group.set_index("image_size").fps
        if small in ends and large in ends:
            texts.append(
                f"{who} falls from {figure(ends[small])} to {figure(ends[large])} images/s ({ends[small] / ends[large]:.1f} times)"
            )
    pixels = (large / small) ** 2
    return (
        f"**Image size.** From {small} to {large} px an image has {pixels:.1f} times the pixels; at batch {batch} {'; '.join(texts)}."
        if texts
        else ""
    )


def _batches(ok: pd.DataFrame) -> str:
    if ok.batch_size.nunique() < 2:
        return ""
    texts = []
    for who, group in _by_backend(ok):
        found = {
            size: compare.saturation(rows)
            for size, rows in group.groupby("image_size")
            if rows.batch_size.nunique() > 1
        }
        reached = [f"{size} px at batch {batch}" for size, batch in found.items() if batch]
        missing = [f"{size}" for size, batch in found.items() if not batch]
        parts = reached + (
            [f"not reached up to batch {group.batch_size.max()} at {', '.join(missing)} px"]
            if missing
            else []
        )
        texts.append(f"{who}: {', '.join(parts)}")
    return "**Batch size.** Doubling the batch gives under 5 % more from here on: " + "; ".join(texts) + "."


def _optimum(ok: pd.DataFrame) -> str:
    texts = []
    for size, group in ok.groupby("image_size"):
        tied = compare.fastest(group)
        best = min(tied, key=lambda row: row.mean_ms)  # of equals the one that answers soonest
        text = f"{size} px: {compare.name(best)}, batch {best.batch_size}, {figure(best.fps)} images/s at {figure(best.mean_ms)} ms a batch"
        if best is not tied[0]:
            text += f" (no difference that this run can show from batch {tied[0].batch_size}, {figure(tied[0].fps)}, which answers later)"
        texts.append(text)
    return "**Optimal here,** for throughput: " + "; ".join(texts) + "."


def cells(row: pd.Series) -> list[str]:
    """One row of the table as people read it; a row that is not ok says why instead of figures."""
    head = [compare.name(row), str(row.image_size), str(row.batch_size)]
    shares = ["" if pd.isna(value) else f"{value:.1%}" for value in (row.agreement, row.accuracy)]
    if row.status != "ok":
        return [*head, row.status.replace("_", " "), *[""] * 7, *shares, ""]
    times = [figure(value) for value in (row.mean_ms, row.std_ms, row.p95_ms, row.fps)]
    fps = f"{figure(row.fps_low)}–{figure(row.fps_high)}"
    speed = (
        ["", ""]
        if pd.isna(row.speedup)
        else [f"{row.speedup:.2f}", f"{row.speedup_low:.2f}–{row.speedup_high:.2f}"]
    )
    if row.backend == "pytorch":
        speed = ["1", ""]
    memory = row.gpu_memory_mb if row.device == "cuda" else row.host_memory_mb
    return [*head, *times, fps, *speed, figure(memory), *shares, ", ".join(verdicts(row.notes))]


def verdicts(notes: str) -> list[str]:
    """The names of the verdicts in a row's notes."""
    return [part.split(": ")[0] for part in notes.split("; ") if part.split(": ")[0] in VERDICTS]


def lines_of(rows: pd.DataFrame) -> list[list[str]]:
    """The rows as cells; batch sizes without figures for one and the same reason share a line."""
    lines = []
    for (*_, status, _), group in rows.groupby(
        ["run", "backend", "image_size", "status", "reason"], sort=False
    ):
        found = [cells(row) for _, row in group.iterrows()]
        if status not in ("ok", "mismatch"):
            found = [[*found[0][:2], ", ".join(line[2] for line in found), *found[0][3:]]]
        lines += found
    return lines


def text_table(rows: pd.DataFrame) -> str:
    """The rows as aligned text, the reasons of those without figures below."""
    return "\n".join([aligned([TABLE, *lines_of(rows)]), *reasons(rows)])


def reasons(rows: pd.DataFrame) -> list[str]:
    """One line for each distinct reason why rows have no figures or can't win, and for each verdict on those that have."""
    grouped = rows[rows.status != "ok"].groupby(["backend", "precision", "status", "reason"], sort=False)
    lines = []
    for (backend, precision, status, reason), group in grouped:
        where = sorted(
            {f"{row.image_size} px batch {row.batch_size}" for _, row in group.iterrows()},
            key=lambda text: [int(t) for t in text.split() if t.isdigit()],
        )
        scope = "" if len(where) == len(rows[rows.backend == backend]) else f" ({', '.join(where)})"
        lines.append(f"{label(backend, precision)}{scope}: {status.replace('_', ' ')}: {reason}")
    return lines + [
        f"{name}: {VERDICTS[name]}"
        for name in VERDICTS
        if any(name in verdicts(notes) for notes in rows.notes)
    ]


def end_to_end_lines(table: pd.DataFrame) -> list[list[str]]:
    """Header and rows of the table of end_to_end.py: milliseconds of each step for one image, and its share of the whole."""
    steps = [column for column in table if column.endswith("_ms")]
    head = [
        "Method",
        "Size",
        "Batch",
        "Images/s",
        "Inference alone",
        *(f"{step[:-3].replace('_', ' ')} ms" for step in steps),
        "Bottleneck",
    ]
    lines = [head]
    for _, row in table.iterrows():
        fps = [figure(row.images_per_s), figure(row.infer_alone_images_per_s)]
        parts = [f"{figure(row[step])} ({row[step] / row[steps].sum():.0%})" for step in steps]
        lines.append(
            [
                compare.name(row),
                str(row.image_size),
                str(row.batch_size),
                *fps,
                *parts,
                row.bottleneck.split(" (")[0],
            ]
        )
    return lines


def end_to_end(table: pd.DataFrame) -> str:
    """The table of end_to_end.py for the README, one for each run."""
    several = table.run.nunique() > 1
    parts = []
    for run, part in table.groupby("run", sort=False):
        parts += [f"**Run {run}**"] * several + [markdown(end_to_end_lines(part))]
    return "\n\n".join(parts)


def end_to_end_text(table: pd.DataFrame) -> str:
    return aligned(end_to_end_lines(table))


def aligned(lines: list[list[str]]) -> str:
    """Columns of text, the first to the left and the others to the right."""
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    rows = [zip(line, widths, strict=True) for line in lines]
    return "\n".join(
        "  ".join(cell.rjust(width) if k else cell.ljust(width) for k, (cell, width) in enumerate(row))
        for row in rows
    )


def markdown(lines: list[list[str]]) -> str:
    return "\n".join(
        [
            "| " + " | ".join(lines[0]) + " |",
            "|---|" + "---:|" * (len(lines[0]) - 1),
            *("| " + " | ".join(line) + " |" for line in lines[1:]),
        ]
    )


DEVICE = [
    "Method",
    "Size",
    "Batch",
    "Pipelined images/s",
    "GPU busy %",
    "Util. %",
    "W",
    "mJ/image",
    "SM MHz",
    "°C",
    "TFLOP/s",
    "% of peak",
    "% of measured peak",
    "FLOP/byte",
    "Limit",
]


def device(rows: pd.DataFrame, environments: dict) -> str:
    """What the device was doing in each row, a table for each run and image size, and the ceilings it is held against."""
    parts = []
    for run in rows.run.unique():
        if rows.run.nunique() > 1:
            parts.append(f"**Run {run}**")
        part = compare.measured(rows[rows.run == run])
        shown = [
            k
            for k, column in enumerate(DEVICE)
            if k < 3 or any(device_cells(row)[k] for _, row in part.iterrows())
        ]
        for size, group in part.groupby("image_size"):
            lines = [DEVICE, *(device_cells(row) for _, row in group.iterrows())]
            opened = " open" if size == part.image_size.min() else ""
            table = markdown([[line[k] for k in shown] for line in lines])
            parts.append(f"<details{opened}><summary>{size} px</summary>\n\n{table}\n\n</details>")
        parts.append(
            f"<sub>{' · '.join(filter(None, [ceilings_text(environments.get(run, {})), foot(environments.get(run, {}))]))}</sub>"
        )
    return "\n\n".join(parts)


def device_cells(row: pd.Series) -> list[str]:
    """One row of the table DEVICE; what is not known is empty."""
    busy = row.busy_ms / row.mean_ms * 100
    loop = [
        row.sustained_fps,
        busy,
        row.gpu_util_pct,
        row.power_w,
        row.mj_per_image,
        row.sm_clock_mhz,
        row.temperature_c,
    ]
    work = [row.tflops, row.pct_peak, row.pct_measured_peak, row.flops_per_byte]
    return [compare.name(row), str(row.image_size), str(row.batch_size), *map(figure, loop + work), row.limit]


def ceilings_text(known: dict) -> str:
    """The measured ceilings of a run's machine and the theoretical peaks in one line; "" where nothing was measured."""
    found = known.get("ceilings")
    if not found:
        return ""
    texts = []
    for precision, tflops in found["tflops"].items():
        peak = ceilings.peak_tflops(known, precision)
        texts.append(f"{precision} {figure(tflops)}{f' of {figure(peak)}' if peak else ''} TFLOP/s")
    context = known.get("context_mb")
    share = f"; the CUDA context alone takes {context:.0f} MB of each row's GPU memory" if context else ""
    return (
        f"measured ceilings: matrix product {', '.join(texts)}; copy {figure(found['gb_per_s'])} GB/s{share}"
    )


def headline(rows: pd.DataFrame, environments: dict) -> str:
    """The highest throughput that a run shows and its speedup over PyTorch FP32 there, with its hardware."""
    ok = compare.measured(rows)
    ok = ok[(ok.backend != "pytorch") & ok.speedup.notna()]
    if ok.empty:
        return "Nothing to compare with PyTorch FP32 has been measured here yet."
    best = ok.loc[ok.fps.idxmax()]
    environment = environments.get(best.run, {})
    confidence = (
        "at 95 % confidence"
        if best.rounds > 1
        else "from run to run; one round, so without what differs between processes"
    )
    return (
        f"**{compare.name(best)} serves ResNet-18 {best.speedup:.2f} times as fast as PyTorch FP32** "
        f"({best.speedup_low:.2f}–{best.speedup_high:.2f} {confidence}): {figure(best.fps)} images/s "
        f"at {best.image_size} px, batch {best.batch_size}, with the same class on {best.agreement:.1%} of the test images.  \n"
        f"<sub>{foot(environment)}</sub>"
    )


def foot(environment: dict) -> str:
    """The hardware and versions behind a figure in one line, and whether the network saw sample data only."""
    return environment.get("short", "") + (
        " · sample data (drawn heroes)" if environment.get("sample_data") else ""
    )


def table(rows: pd.DataFrame, environments: dict) -> str:
    """A table for each run and image size, folded but for the first size of each run."""
    parts = []
    for run in rows.run.unique():
        if rows.run.nunique() > 1:
            parts.append(f"**Run {run}**")
        part = rows[rows.run == run]
        for size, group in part.groupby("image_size"):
            lines = lines_of(group)
            if (group.status == "ok").any():
                best = compare.fastest(group)[0]
                if (
                    len(compare.fastest(group[group.batch_size == best.batch_size])) == 1
                ):  # no other method is level with it
                    line = next(
                        line
                        for line in lines
                        if line[0] == compare.name(best) and line[2] == str(best.batch_size)
                    )
                    line[0], line[6] = f"**{line[0]}**", f"**{line[6]}**"
            opened = " open" if size == part.image_size.min() else ""
            parts.append(
                f"<details{opened}><summary>{size} px</summary>\n\n"
                + markdown([TABLE, *lines])
                + "\n\n</details>"
            )
        parts += [f"<sub>{line}</sub>" for line in reasons(part)]
        parts.append(f"<sub>{foot(environments.get(run, {}))}</sub>")
    return "\n\n".join(parts)


def answers(rows: pd.DataFrame, environments: dict) -> str:
    return "\n".join(f"- {sentence}" for sentence in answers_of(rows))


def environment(rows: pd.DataFrame, environments: dict) -> str:
    """What the figures depend on, in full, for each run."""
    lines = []
    for run in rows.run.unique():
        known = environments.get(run, {})
        lines += [f"| Run {run} | |", "|---|---|"]
        for name, text in described(known).items():
            lines.append(f"| {name} | {text} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def described(known: dict) -> dict[str, str]:
    """The environment in people's words, without what is not known."""
    packages = ", ".join(f"{name} {version}" for name, version in known.get("packages", {}).items())
    gpu = (
        known.get("gpu")
        and f"{known['gpu']}, {known.get('gpu_memory_mb')} MB, power limit {known.get('power_limit_w')} W, driver {known.get('driver')}"
    )
    cuda = known.get("cuda") and f"{known['cuda']}, cuDNN {known.get('cudnn')}"
    commit = (
        known.get("commit")
        and f"{known['commit']}{'' if known.get('clean') else ' with uncommitted changes'}"
    )
    data = f"{known.get('data')}{' (drawn sample heroes)' if known.get('sample_data') else ''}"
    facts = {
        "GPU": gpu or "none",
        "CPU": f"{known.get('cpu')}, {known.get('cores')} cores, {known.get('threads')} threads used",
        "System": f"{known.get('os')}, Python {known.get('python')}",
        "CUDA": cuda,
        "Ceilings": ceilings_text(known),
        "Packages": packages,
        "Data": data,
        "Sweep": account(known.get("sweep")),
        "Command": f"`{known.get('command')}`",
        "Commit": commit,
        "Date": known.get("date"),
    }
    return {name: text for name, text in facts.items() if text}


def account(sweep: dict | None) -> str | None:
    """Where the sweep's time went, as a sentence."""
    if sweep is None:
        return None
    each = sweep["other_s"] / sweep["processes"]
    parts = f"{sweep['time_s']:.0f} s warm-up and timed runs, {sweep['check_s']:.0f} s checks against PyTorch"
    return f"{sweep['processes']} processes in {sweep['total_s']:.0f} s: {parts}, {each:.1f} s a process to start, load or build, and write"


PARTS = {
    "headline": headline,
    "table": table,
    "answers": answers,
    "device": device,
    "environment": environment,
}


def render(text: str, root: Path) -> str:
    """The README's text with every generated part made anew from the folder it names, relative to `root`."""

    def part(match: re.Match) -> str:
        begin, kind, folder, end = match.groups()
        if kind == "end_to_end":
            return f"{begin}{end_to_end(pd.read_csv(root / folder / 'end_to_end.csv'))}\n{end}"
        if kind not in PARTS:
            raise UserError(
                f"README.md asks for the generated part {kind!r} ({folder}); there are end_to_end, {', '.join(PARTS)}"
            )
        return f"{begin}{PARTS[kind](*compare.read(root / folder)).strip()}\n{end}"

    return MARKED.sub(part, text)


def write_readme(path: Path) -> None:
    """Renew the generated parts of the README, and the charts of the folders it names."""
    text = path.read_text(encoding="utf-8")
    write_atomic(path, render(text, path.parent))
    for folder in sorted({match[2] for match in MARKED.findall(text) if match}):
        rows, environments = compare.read(path.parent / folder)
        draw_all(rows, environments, path.parent / folder)
