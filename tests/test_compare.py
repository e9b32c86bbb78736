"""compare.py on one table, on two and on damaged ones; and that the committed README is what the committed
CSV renders to."""

import json
import math
import sys

import pandas as pd
import pytest
from conftest import ROOT

import compare
from utils import plot_utils
from utils.report import analysis, readme, tables
from utils.report.rows import COLUMNS
from utils.utils import UserError, run_main


def table(*rows, **changes) -> pd.DataFrame:
    """Rows of (backend, size, batch, fps) or with a status in place of fps, intervals 1 % wide."""
    base = {row[1:3]: row[3] for row in rows if row[0] == "pytorch" and not isinstance(row[3], str)}
    made = []
    for backend, size, batch, fps in rows:
        row = dict.fromkeys(COLUMNS) | {"adds": "", "sweep": "main", "backend": backend, "precision": "FP32"}
        row |= {"device": "cpu", "image_size": size, "batch_size": batch, "status": "ok", "reason": ""}
        row["notes"] = []
        if isinstance(fps, str):
            row |= {"status": fps, "reason": "why"}
        else:
            row |= {"fps": fps, "fps_low": fps * 0.995, "fps_high": fps * 1.005, "std_ms": 0.1, "p95_ms": 1.0}
            row |= {"mean_ms": batch / fps * 1000, "agreement": 1.0, "accuracy": 0.9, "build_s": 1.0}
            if (size, batch) in base:
                speedup, width = fps / base[size, batch], 0.0 if backend == "pytorch" else 0.01
                ends = speedup * (1 - width), speedup * (1 + width)
                row |= {"speedup": speedup, "speedup_low": ends[0], "speedup_high": ends[1]}
        made.append(row)
    figures = ["fps", "fps_low", "fps_high", "mean_ms", "speedup", "speedup_low", "speedup_high", "accuracy"]
    return pd.DataFrame(made).astype(dict.fromkeys(figures, float)).assign(**changes)


def write(folder, rows, **environment):
    """A results folder with these rows, as the scripts leave it."""
    folder.mkdir()
    rows = rows.assign(notes=rows.notes.map("; ".join))
    rows.to_csv(folder / "benchmark_results.csv", index=False)
    facts = {"packages": {}} | environment
    (folder / "environment.json").write_text(json.dumps({"main": facts}), encoding="utf-8")
    return folder


def say(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of compare.py's main() in this process."""
    code = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
        try:
            run_main(compare.main)
        except SystemExit as stopped:
            code = stopped.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys, *arguments) -> str:
    """The one sentence with which compare.py refuses; its exit code is 2."""
    code, _, said = say(capsys, *arguments)
    assert code == 2 and "Traceback" not in said
    return said.splitlines()[-1]


def test_the_best_within_limits_is_the_fastest_whose_figures_are_known():
    rows = table(("pytorch", 64, 1, 100.0), ("onnx", 64, 1, 150.0), ("onnx", 64, 4, 300.0)).assign(
        device="cuda", gpu_memory_mb=[500.0, 600.0, None], host_memory_mb=[300.0, 200.0, 100.0]
    )
    rows["p95_ms"] = [11.0, 7.0, 14.0]

    def best(**limits) -> list[float]:
        return analysis.best_within(rows, dict.fromkeys(compare.LIMITS) | limits).fps.tolist()

    assert best() == [300, 150, 100] and best(p95_ms=10) == [150]
    assert best(memory_mb=1000) == [150, 100]  # unknown memory does not fit
    assert best(p95_ms=5) == best(accuracy=0.95) == []
    rows["device"] = "cpu"
    assert best(memory_mb=150) == [300] and best(memory_mb=50) == []


def test_two_tables_are_compared_with_intervals_and_environments(tmp_path, capsys):
    old, new = ({"gpu": None, "packages": {"torch": version}} for version in ("2.2", "2.14"))
    a = write(tmp_path / "a", table(("pytorch", 64, 1, 100.0), ("onnx", 64, 1, 150.0)), **old)
    b = write(tmp_path / "b", table(("pytorch", 64, 1, 100.2), ("onnx", 64, 1, 120.0)), **new)
    both = analysis.ratios(tables.read_table(a)[0], tables.read_table(b)[0]).set_index("backend")
    assert both.fps_ratio["onnx"] == pytest.approx(0.8)
    own = math.log(1.005 / 0.995) / 2
    half = math.hypot(own, own, math.log(1.05))  # the half-widths add as squares, and 5 % of drift on a CPU
    assert both.fps_ratio_high["onnx"] == pytest.approx(0.8 * math.exp(half))
    code, said, _ = say(capsys, a, b, "--fail-if-slower", "5%")
    assert code == 1 and "torch: 2.2 -> 2.14" in said and "Ratio, 95 % CI" in said
    assert "agrees within the 95 % intervals in 1 of 2" in said and "1 of 2 configurations are slower" in said
    assert say(capsys, a, b, "--fail-if-slower", "25%")[0] == 0
    assert "slower" not in say(capsys, a, a)[1]


def test_an_interval_that_reaches_the_bound_does_not_fail(tmp_path, capsys):
    """6 % slower on average, but the interval reaches 4 %: not beyond doubt."""
    a = write(tmp_path / "a", table(("onnx", 64, 1, 100.0)))
    b = write(tmp_path / "b", table(("onnx", 64, 1, 94.0), fps_low=90.0, fps_high=98.0))
    assert say(capsys, a, b, "--fail-if-slower", "0.05")[0] == 0


def test_tables_with_several_sweeps_are_matched_by_name_or_by_choice(tmp_path, capsys):
    rows = table(("onnx", 64, 1, 100.0))
    several = pd.concat([rows, rows.assign(sweep="other", fps=50.0, fps_low=49.0, fps_high=51.0)])
    a, b = write(tmp_path / "a", rows), write(tmp_path / "b", several)
    assert "--sweeps" in refused(capsys, a, b)
    assert "0.500" in say(capsys, a, b, "--sweeps", "main", "other")[1]


def test_the_readme_is_what_the_committed_results_render_to():
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    found = readme.read_folders(path)
    shown = ["results", "results/published/h200"]
    assert [folder.relative_to(ROOT).as_posix() for folder in found] == shown
    assert readme.render(path, found) == text, "stale: python compare.py --write-readme"
    for folder, known in found.items():
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert readme.folder_readme(folder, *known) == text, "stale: python compare.py --write-readme"


# ---- gates and tables that must not pass silently


def one_round(rows: pd.DataFrame) -> pd.DataFrame:
    """The same rows as a sweep of a single round leaves them: without intervals."""
    ends = ["fps_low", "fps_high", "speedup_low", "speedup_high"]
    return rows.assign(rounds=1, **dict.fromkeys(ends, math.nan))


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["a", "--fail-if-slower", "5%"], "need two results folders"),
        (["a", "--sweeps", "main", "main"], "need two results folders"),
        (["a", "a", "--fail-if-slower", "nan"], "is needed, not 'nan'"),
        (["a", "a", "--fail-if-slower=-5%"], "is needed, not '-5'"),
        (["a", "a", "--fail-if-slower", "500%"], "is needed, not '500'"),
        (["a", "a", "--fail-if-slower", "five"], "is needed, not 'five'"),
        (["a", "a", "--sweeps", "main", "x"], "have no measured configuration in common; see their sweeps"),
        (["a", "a", "--sweeps", "main"], "expected 2 arguments"),
        (["a", "a", "--best"], "name one results folder"),
        (["a", "a", "--write-readme"], "name one results folder"),
        (["a", "a", "a"], "or two to compare"),
        (["a", "--max-latency-ms", "5"], "need --best"),
        (["a", "--min-accuracy", "0.9"], "need --best"),
        (["a", "--best", "--max-latency-ms", "nan"], "is needed, not 'nan'"),
        (["a", "--best", "--max-memory-mb=-1"], "is needed, not '-1'"),
        (["a", "--best", "--write-readme"], "--best or --write-readme or neither"),
        (["nowhere"], "is missing; make it anew: python benchmark.py"),
    ],
)
def test_an_argument_without_effect_is_refused(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", table(("onnx", 64, 1, 100.0)))
    assert said in refused(capsys, *arguments)


def csv(**changes) -> bytes:
    return table(("onnx", 64, 1, 100.0), **{"notes": ""} | changes).to_csv(index=False).encode()


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "No columns to parse from file"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "benchmark_results.csv is no table"),
        (csv()[:-40], "it is cut inside its last row"),
        (csv()[:-40] + b'"\n', "benchmark_results.csv is no table"),
        (csv().replace(b"main", "Mündung".encode("latin-1")), "can't decode byte"),
        (b"run,backend\nmain,pytorch\n", "no column sweep"),
        (csv().replace(b"speedup_low", b"speedup"), "no column speedup_low"),
        (csv(fps="fast"), "could not convert string to float: 'fast'"),
        (csv(batch_size=math.nan), "benchmark_results.csv is no table"),
        (csv(status="fine"), "an unknown status"),
        (csv(fps=math.nan), "a row that is ok without images/s"),
        (csv(fps=-1), "a row that is ok without images/s"),
        (csv(fps=math.inf), "a row that is ok without images/s"),
    ],
)
def test_a_damaged_or_foreign_table_is_named_in_one_sentence(tmp_path, capsys, content, said):
    path = tmp_path / "benchmark_results.csv"
    path.write_bytes(content)
    sentence = refused(capsys, tmp_path)
    assert said in sentence and str(path) in sentence
    assert path.read_bytes() == content and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b'{"main": 3}', b"\xff"])
def test_a_damaged_environment_is_named_in_one_sentence(tmp_path, capsys, content):
    folder = write(tmp_path / "a", table(("onnx", 64, 1, 100.0)))
    (folder / "environment.json").write_bytes(content)
    assert "environment.json does not say" in refused(capsys, folder)


@pytest.mark.parametrize("sweep", ["NA", "null", "2.10"])
def test_a_sweep_keeps_its_name_whatever_pandas_would_take_it_for(tmp_path, sweep):
    rows = table(("onnx", 64, 1, 100.0), sweep=sweep)
    assert tables.read_table(write(tmp_path / "a", rows))[0].sweep.tolist() == [sweep]


def test_the_gate_passes_only_where_something_was_judged(tmp_path, capsys):
    rows = table(("pytorch", 64, 1, 100.0), ("onnx", 64, 1, 150.0))
    slow = one_round(table(("pytorch", 64, 1, 100.0), ("onnx", 64, 1, 50.0)))
    a, single = write(tmp_path / "a", rows), write(tmp_path / "single", slow)

    def gated(folder) -> tuple[int, str]:
        return say(capsys, a, folder, "--fail-if-slower", "5%")[:2]

    assert gated(a)[0] == 0
    code, said = gated(single)
    assert code == 1 and said.count("can't judge: one round") == 2
    assert "0 of 0 configurations are slower" in said and "faster" not in said
    assert "2 more can't be judged: measured in one round; use --rounds 3" in said
    half = rows.assign(fps_low=[99.0, math.nan])
    code, said = gated(write(tmp_path / "half", half))
    assert code == 0 and "1 more can't be judged" in said and said.count("can't judge: one round") == 1
    broken = table(("pytorch", 64, 1, 100.0), ("onnx", 64, 1, "failed"))
    code, said = gated(write(tmp_path / "broken", broken))
    assert code == 1 and "1 configurations of the first table are not ok in the second" in said
    code, said = gated(write(tmp_path / "fewer", rows[:1]))
    assert code == 1 and "1 configurations of the first table are not ok in the second" in said


def test_the_best_that_does_not_fit_is_exit_code_1(tmp_path, capsys):
    rows = table(("pytorch", 64, 1, 100.0), ("onnx", 64, 1, 150.0), ("onnx", 64, 4, 151.0))
    a, once = write(tmp_path / "a", rows), write(tmp_path / "once", one_round(rows))
    code, said, _ = say(capsys, a, "--best")
    lines = said.splitlines()
    assert code == 0 and lines[1].split()[:5] == ["ONNX", "Runtime", "FP32", "64", "4"] and len(lines) == 4
    assert lines[2].split()[4] == "1" and "indistinguishable" in lines[3]
    said = say(capsys, once, "--best")[1]
    assert "one round, which supports no verdict" in said and "astest" not in said
    code, said, _ = say(capsys, a, "--best", "--max-latency-ms", 0.5)
    assert code == 1 and f"None of the measured rows fits; see: python compare.py {a}" in said


def test_two_machines_are_a_sentence_and_every_published_folder_is_renewed(tmp_path, monkeypatch, capsys):
    published = tmp_path / "results" / "published"
    published.mkdir(parents=True)
    slow = table(("pytorch", 224, 1, 100.0), ("onnx", 224, 1, 150.0), ("onnx", 512, 1, 50.0))
    fast = table(("pytorch", 224, 1, 110.0), ("onnx", 224, 1, 180.0), ("onnx", 512, 1, 75.0))
    for name, rows in (("h100", slow), ("h200", fast)):
        write(published / name, rows.assign(device="cuda"), gpu=name.upper())
    path = tmp_path / "README.md"
    path.write_text("<!-- begin answers results/published/h200 -->\n<!-- end -->\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plot_utils, "CHARTS", {})
    compare.write_readmes(path)
    assert "- **Which is fastest?** In 1 of 1 combinations" in path.read_text(encoding="utf-8")
    assert (published / "h100" / "README.md").read_text("utf-8").startswith("# Results: H100\n")
    said = say(capsys, published / "h100", published / "h200")[1]
    assert f"Median over 3 configurations: 1.2x {published / 'h100'} (range 1.1-1.5)." in said
    assert "gpu: H100 -> H200" in said


@pytest.mark.parametrize(
    "text, said",
    [
        ("<!-- begin answers results -->\n\n# Mine\n", "<!-- begin answers results --> marks no"),
        (
            "a\n<!-- begin answers x -->\n<!-- begin summary x -->\n<!-- end -->\n",
            "<!-- begin answers x --> marks no",
        ),
        ("<!-- begin poem results -->\n<!-- end -->\n", "<!-- begin poem results --> marks no"),
        ("mine\n<!-- end -->\n", "<!-- end --> marks no generated part"),
        ("<!-- begin answers -->\n<!-- end -->\n", "<!-- begin answers --> marks no"),
        ("<!-- begin machines a -->\n<!-- end -->\n", "<!-- begin machines a --> marks no"),
        ("<!-- begin summary a b -->\n<!-- end -->\n", "<!-- begin summary a b --> marks no"),
    ],
)
def test_a_readme_with_a_broken_marker_is_left_alone(tmp_path, text, said):
    path = tmp_path / "README.md"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        readme.read_folders(path)  # as benchmark.py does before it measures
    assert path.read_text(encoding="utf-8") == text


def test_a_readme_in_another_encoding_is_named(tmp_path):
    (tmp_path / "README.md").write_bytes("Мой".encode("cp1251"))
    with pytest.raises(UserError, match="README.md is not UTF-8; save it so"):
        readme.read_folders(tmp_path / "README.md")


# ---- before anything is measured, and by which device


def test_damaged_published_results_are_found_before_measuring_with_what_brings_them_back(tmp_path):
    path, published = tmp_path / "README.md", tmp_path / "results" / "published"
    published.mkdir(parents=True)
    write(tmp_path / "results" / "published" / "gpu", table(("onnx", 64, 1, 100.0)))
    parts = [
        "<!-- begin summary results -->",
        "<!-- end -->",
        "<!-- begin headline results/published/gpu -->",
    ]
    path.write_text("\n".join([*parts, "<!-- end -->", ""]), encoding="utf-8")
    assert list(readme.read_folders(path, measuring=tmp_path / "results")) == [published / "gpu"]
    content = (published / "gpu" / "benchmark_results.csv").read_bytes()
    for damage in (content[:-3], None):
        (published / "gpu" / "benchmark_results.csv").unlink()
        if damage:
            (published / "gpu" / "benchmark_results.csv").write_bytes(damage)
        with pytest.raises(UserError, match="restore it: git checkout results/published$"):
            readme.read_folders(path, measuring=tmp_path / "results")
