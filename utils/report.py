"""Results folder -> the README's generated parts: headline, table, answers, environment.  A pure reader of the CSV.

A part stands in the README between `<!-- begin PART FOLDER -->` and `<!-- end -->`; what lies between is replaced.
"""

import re
from pathlib import Path

import pandas as pd

import compare
from utils.plot_utils import draw_all
from utils.utils import UserError, write_atomic

MARKED = re.compile(r"(<!-- begin (\w+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def headline(rows: pd.DataFrame, environments: dict) -> str:
    """The largest speedup over PyTorch FP32 that a run shows, with its hardware."""
    ok = compare.measured(rows)
    ok = ok[(ok.backend != "pytorch") & ok.speedup.notna()]
    if ok.empty:
        return "Nothing to compare with PyTorch FP32 has been measured here yet."
    best = ok.loc[ok.speedup.idxmax()]
    environment = environments.get(best.run, {})
    return (
        f"**{compare.name(best)} serves ResNet-18 {best.speedup:.1f} times as fast as PyTorch FP32** "
        f"({best.speedup_low:.1f}–{best.speedup_high:.1f} at 95 % confidence): {compare.figure(best.fps)} images/s "
        f"at {best.image_size} px, batch {best.batch_size}, with the same class on {best.agreement:.1%} of the test images.  \n"
        f"<sub>{foot(environment)}</sub>"
    )


def foot(environment: dict) -> str:
    """The hardware and versions behind a figure in one line, and whether the network saw sample data only."""
    return environment.get("short", "") + (" · sample data (drawn heroes)" if environment.get("sample_data") else "")


def table(rows: pd.DataFrame, environments: dict) -> str:
    """A table for each run and image size, folded but for the first size of each run."""
    parts = []
    for run in rows.run.unique():
        if rows.run.nunique() > 1:
            parts.append(f"**Run {run}**")
        part = rows[rows.run == run]
        for size, group in part.groupby("image_size"):
            lines = ["| " + " | ".join(compare.TABLE) + " |", "|---|" + "---:|" * (len(compare.TABLE) - 1)]
            best = compare.fastest(group) if (group.status == "ok").any() else []
            bold = {(row.backend, row.batch_size) for row in best}
            for _, row in group.iterrows():
                cells = compare.cells(row)
                if (row.backend, row.batch_size) in bold:
                    cells[0], cells[6] = f"**{cells[0]}**", f"**{cells[6]}**"
                lines.append("| " + " | ".join(cells) + " |")
            opened = " open" if size == part.image_size.min() else ""
            parts.append(f"<details{opened}><summary>{size} px</summary>\n\n" + "\n".join(lines) + "\n\n</details>")
        parts += [f"<sub>{line}</sub>" for line in compare.reasons(part)]
        parts.append(f"<sub>{foot(environments.get(run, {}))}</sub>")
    return "\n\n".join(parts)


def answers(rows: pd.DataFrame, environments: dict) -> str:
    return "\n".join(f"- {sentence}" for sentence in compare.answers(rows))


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
    commit = known.get("commit") and f"{known['commit']}{'' if known.get('clean') else ' with uncommitted changes'}"
    data = f"{known.get('data')}{' (drawn sample heroes)' if known.get('sample_data') else ''}"
    facts = {
        "GPU": gpu or "none",
        "CPU": f"{known.get('cpu')}, {known.get('cores')} cores, {known.get('threads')} threads used",
        "System": f"{known.get('os')}, Python {known.get('python')}",
        "CUDA": cuda,
        "Packages": packages,
        "Data": data,
        "Command": f"`{known.get('command')}`",
        "Commit": commit,
        "Date": known.get("date"),
    }
    return {name: text for name, text in facts.items() if text}


PARTS = {"headline": headline, "table": table, "answers": answers, "environment": environment}


def render(text: str, root: Path) -> str:
    """The README's text with every generated part made anew from the folder it names, relative to `root`."""

    def part(match: re.Match) -> str:
        begin, kind, folder, end = match.groups()
        if kind not in PARTS:
            raise UserError(f"README.md asks for the generated part {kind!r} ({folder}); there are {', '.join(PARTS)}")
        return f"{begin}{PARTS[kind](*compare.read(root / folder)).strip()}\n{end}"

    return MARKED.sub(part, text)


def write_readme(path: Path) -> None:
    """Renew the generated parts of the README, and the charts of the folders it names."""
    text = path.read_text(encoding="utf-8")
    write_atomic(path, render(text, path.parent))
    for folder in sorted({match[2] for match in MARKED.findall(text) if match}):
        rows, environments = compare.read(path.parent / folder)
        draw_all(rows, environments, path.parent / folder)
