"""What the sentences say, against hand-worked tables; and that the committed README is what the committed
CSV renders to."""

import json
import math
import sys

import pandas as pd
import pytest
from conftest import ROOT, run_script

import compare
from utils.report import analysis, readme, tables, words
from utils.report.rows import COLUMNS
from utils.utils import UserError, run_main


def table(*rows) -> pd.DataFrame:
    """Rows of (backend, size, batch, fps) or with a status in place of fps, intervals 1 % wide."""
    made, base = (
        [],
        {
            (size, batch): fps
            for backend, size, batch, fps in rows
            if backend == "pytorch" and not isinstance(fps, str)
        },
    )
    for backend, size, batch, fps in rows:
        row = (
            dict.fromkeys(COLUMNS, None)
            | {"adds": ""}
            | {"sweep": "main", "backend": backend, "precision": "FP32", "device": "cpu"}
        )
        row |= {"image_size": size, "batch_size": batch, "status": "ok", "reason": "", "notes": ""}
        if isinstance(fps, str):
            row |= {"status": fps, "reason": "why"}
        else:
            row |= {
                "fps": fps,
                "fps_low": fps * 0.995,
                "fps_high": fps * 1.005,
                "mean_ms": batch / fps * 1000,
                "std_ms": 0.1,
                "p95_ms": 1.0,
            }
            row |= {"agreement": 1.0, "accuracy": 0.9}
            if backend != "pytorch" and (size, batch) in base:
                speedup = fps / base[size, batch]
                row |= {"speedup": speedup, "speedup_low": speedup * 0.99, "speedup_high": speedup * 1.01}
        made.append(row)
    return pd.DataFrame(made).astype(
        {"fps": float, "fps_low": float, "fps_high": float, "mean_ms": float, "speedup": float}
    )


def test_the_fastest_wins_unless_the_intervals_overlap():
    clear = table(("pytorch", 64, 1, 100.0), ("onnx", 64, 1, 150.0))
    assert [row.backend for row in analysis.fastest(clear)] == ["onnx"]
    level = table(("pytorch", 64, 1, 100.0), ("onnx", 64, 1, 100.5))
    assert len(analysis.fastest(level)) == 2
    assert "no difference that this sweep can show" in words.answers_of(level)[0]


def test_the_speedup_decides_where_drift_makes_the_throughputs_overlap():
    rows = table(("pytorch", 64, 1, 100.0), ("onnx", 64, 1, 150.0)).assign(fps_low=60.0, fps_high=200.0)
    assert [row.backend for row in analysis.fastest(rows)] == ["onnx"]


def test_the_throughputs_decide_where_a_noisy_baseline_makes_the_speedups_overlap():
    rows = table(("pytorch", 64, 1, 100.0), ("onnx", 64, 1, 150.0), ("tensorrt", 64, 1, 160.0)).assign(
        speedup_low=1.1, speedup_high=2.2
    )
    assert [row.backend for row in analysis.fastest(rows)] == ["tensorrt"]


def test_a_row_that_is_not_ok_is_never_best_and_says_why():
    rows = table(("pytorch", 64, 1, 100.0), ("onnx", 64, 1, 900.0), ("tensorrt", 64, 1, "unavailable"))
    rows.loc[1, ["status", "reason"]] = ["mismatch", "wrong class"]
    assert [row.backend for row in analysis.fastest(rows)] == ["pytorch"]
    text = words.text_table(rows)
    assert "TensorRT FP32: unavailable: why" in text and "ONNX Runtime FP32: mismatch: wrong class" in text
    assert "900" not in text


@pytest.mark.parametrize(
    "fps, expected",
    [
        ({1: 100.0, 2: 104.0, 4: 105.0}, 1),
        ({1: 100.0, 2: 190.0, 4: 195.0}, 2),
        ({1: 100.0, 2: 190.0, 4: 300.0}, None),  # still growing
        ({1: 100.0, 8: 800.0, 16: 820.0}, 8),
        ({1: 100.0, 8: 110.0}, 1),  # three doublings of 3 % each
        ({1: 100.0, 2: 102.0, 4: 150.0}, None),  # a plateau that ends
        ({4: 100.0}, None),
    ],
)
def test_saturation(fps, expected):
    assert (
        analysis.saturation(table(*(("onnx", 64, batch, value) for batch, value in fps.items()))) == expected
    )


def test_the_answers_cover_every_question_for_each_sweep():
    rows = table(
        *(
            (b, size, n, f * n**0.5 / size)
            for b, f in (("pytorch", 6400.0), ("onnx", 12800.0))
            for size in (64, 128)
            for n in (1, 4)
        )
    )
    text = "\n".join(words.answers_of(rows))
    for part in ("Which is fastest?", "Image size:", "Batch size:", "Saturation:", "Optimal here:"):
        assert f"**{part}**" in text
    assert text.count("\n") == 4  # five answers, a sentence each
    assert "ONNX Runtime FP32 in 4 of 4 combinations of image and batch size" in text
    assert "from 64 to 128 px, 4 times the pixels, throughput at batch 4 falls 2 times" in text
    assert "from batch 1 to 4 at 64 px throughput grows 2 times" in text
    assert "64 px ONNX Runtime FP32, batch 4" in text
    both = pd.concat([rows, rows.assign(sweep="other")], ignore_index=True)
    text = "\n".join(words.answers_of(both))
    assert text.count("\n") == 4 and text.count("(main)") == text.count("(other)") == 4


def test_nothing_measured_is_said_and_not_a_crash():
    rows = table(("pytorch", 64, 1, "failed"), ("onnx", 64, 1, "unavailable"))
    assert "Nothing was measured" in words.answers_of(rows)[0]
    assert "failed" in words.text_table(rows) and "Nothing to compare" in readme.headline(rows, {})
    assert "Nothing has been measured" in readme.summary(rows, {})


def test_best_within_limits_names_the_cost_the_runner_up_or_why_none_fits():
    rows = table(("pytorch", 64, 1, 100.0), ("onnx", 64, 1, 150.0), ("onnx", 64, 4, 300.0)).assign(
        build_s=1.0, device="cuda", gpu_memory_mb=[500.0, 600.0, None], host_memory_mb=[300.0, 200.0, 100.0]
    )
    rows["p95_ms"] = [11.0, 7.0, 14.0]

    def best(max_latency_ms=None, max_memory_mb=None, min_accuracy=None):
        limits = (max_latency_ms, max_memory_mb, min_accuracy)
        return compare.best_lines(rows, dict(zip(compare.LIMITS, limits, strict=True)))

    lines, fits = best()
    assert fits and "ONNX Runtime FP32, 64 px, batch 4" in lines[0] and lines[1].startswith("Runner-up")
    assert "an unknown number of MB of GPU memory" in lines[0]
    assert "batch 1: 150 images/s, p95 7 ms, 600 MB" in best(max_latency_ms=10)[0][0]
    assert "batch 1" in best(max_memory_mb=1000)[0][0]  # unknown memory does not fit
    lines, fits = best(max_latency_ms=5, min_accuracy=0.95)
    text = "\n".join(lines)
    assert not fits and "No row fits" in text and "3 of 3 rows: takes longer than 5 ms" in text
    assert "p95_ms 7" in text and "3 of 3 rows: has less than 0.95 top-1 accuracy" in text
    rows["device"] = "cpu"
    assert "batch 1: 150 images/s, p95 7 ms, 200 MB of memory, " in best(max_latency_ms=10)[0][0]
    assert "batch 4" in best(max_memory_mb=150)[0][0] and not best(max_memory_mb=50)[1]


def write(folder, rows, **environment):
    folder.mkdir()
    rows.to_csv(folder / "benchmark_results.csv", index=False)
    (folder / "environment.json").write_text(json.dumps({"main": environment}), encoding="utf-8")
    return folder


def test_two_tables_are_compared_with_intervals_and_environments(tmp_path):
    a = write(
        tmp_path / "a",
        table(("pytorch", 64, 1, 100.0), ("onnx", 64, 1, 150.0)),
        gpu=None,
        packages={"torch": "2.2"},
    )
    b = write(
        tmp_path / "b",
        table(("pytorch", 64, 1, 100.2), ("onnx", 64, 1, 120.0)),
        gpu=None,
        packages={"torch": "2.14"},
    )
    both = analysis.ratios(tables.read_table(a)[0], tables.read_table(b)[0]).set_index("backend")
    assert both.fps_ratio["onnx"] == pytest.approx(0.8)
    own = math.log(1.005 / 0.995) / 2
    half = math.hypot(own, own, math.log(1.05))  # the half-widths add as squares, and 5 % of drift on a CPU
    assert both.fps_ratio_high["onnx"] == pytest.approx(0.8 * math.exp(half))
    done = run_script("compare.py", a, b, "--fail-if-slower", "5%", ok=False)
    assert done.returncode == 1 and "torch: 2.2 -> 2.14" in done.stdout
    assert (
        "agrees within the 95 % intervals in 1 of 2" in done.stdout
        and "1 of 2 configurations are slower" in done.stdout
    )
    assert (b / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert run_script("compare.py", a, b / "benchmark_results.csv", "--fail-if-slower", "25%").returncode == 0
    assert "slower" not in run_script("compare.py", a, a).stdout.replace("beyond", "")


def test_an_interval_that_reaches_the_bound_does_not_fail(tmp_path):
    """6 % slower on average, but the interval reaches 4 %: not beyond doubt."""
    a = write(tmp_path / "a", table(("onnx", 64, 1, 100.0)), packages={})
    rows = table(("onnx", 64, 1, 94.0)).assign(fps_low=90.0, fps_high=98.0)
    b = write(tmp_path / "b", rows, packages={})
    assert run_script("compare.py", a, b, "--fail-if-slower", "0.05").returncode == 0


def test_tables_with_several_sweeps_are_matched_by_name_or_by_choice(tmp_path):
    rows = table(("onnx", 64, 1, 100.0))
    several = pd.concat([rows, rows.assign(sweep="other", fps=50.0, fps_low=49.0, fps_high=51.0)])
    a, b = write(tmp_path / "a", rows, packages={}), write(tmp_path / "b", several, packages={})
    done = run_script("compare.py", a, b, ok=False)
    assert done.returncode == 2 and "--sweeps" in done.stderr
    assert "0.500" in run_script("compare.py", a, b, "--sweeps", "main", "other").stdout


def test_the_device_table_shows_only_what_is_known():
    rows = table(("pytorch", 64, 1, 100.0), ("onnx", 64, 1, 200.0))
    rows = rows.assign(
        tflops=0.5, pct_measured_peak=25.0, flops_per_byte=60.0, limit="compute", busy_ms=float("nan")
    )
    known = {"main": {"short": "a CPU", "ceilings": {"tflops": {"FP32": 2.0}, "gb_per_s": 20.0}}}
    text = words.markdown(words.lines_of(words.DEVICE, rows))
    assert "| Method | Size | Batch | TFLOP/s | % of measured peak | FLOP/byte | Limit |" in text
    assert "| ONNX Runtime FP32 | 64 | 1 | 0.5 | 25 | 60 | compute |" in text
    assert "matrix product FP32 2 TFLOP/s; copy 20 GB/s" in readme.ceilings_text(known["main"])


def test_the_summary_has_a_line_a_method_and_a_column_a_size():
    rows = table(
        ("pytorch", 64, 1, 100.0), ("onnx", 64, 1, 150.0), ("onnx", 64, 4, 300.0), ("onnx", 128, 4, 80.0)
    )
    lines = readme.summary(rows.assign(rounds=3), {}).splitlines()
    assert lines[0] == "| Method, at its best batch | 64 px | 128 px | Accuracy |"
    assert lines[2] == "| PyTorch FP32 | 100 ± 0.5 %, b1 |  | 90 % |"
    assert lines[3] == "| ONNX Runtime FP32 | 300 ± 0.5 %, b4 | 80 ± 0.5 %, b4 | 90 % |"
    assert "150 ± 0.5 %, 1.5×, b1" in readme.summary(rows.iloc[:2].assign(rounds=3), {})
    assert "±" not in readme.summary(one_round(rows), {}).splitlines()[3]


def test_figures_have_three_digits_and_thousands_apart():
    assert [words.figure(value) for value in (0.51234, 34.06, 999.6, 15834.2, 123456.0, float("nan"))] == [
        "0.512",
        "34.1",
        "1,000",
        "15,800",
        "123,000",
        "",
    ]


def test_the_winning_figure_is_bold_whichever_columns_are_empty():
    rows = table(("pytorch", 64, 1, 100.0), ("onnx", 64, 1, 150.0)).assign(std_ms=float("nan"))
    assert "| **150** | 149–151 |" in readme.results_table(rows)


def test_saturation_is_told_with_the_sizes_at_which_it_holds():
    rows = table(
        *(("onnx", 64, batch, fps) for batch, fps in ((1, 100.0), (2, 200.0))),
        *(("onnx", 128, batch, fps) for batch, fps in ((1, 50.0), (2, 51.0))),
    )
    text = "\n".join(words.answers_of(rows))
    assert "ONNX Runtime FP32 from batch 1 at 128 px, in 1 of 2 cases not up to batch 2" in text


def test_the_readme_is_what_the_committed_results_render_to():
    path = ROOT / "README.md"
    assert [kind for *_, kind, _ in readme.marked(path)].count("summary") == 2
    assert readme.render(path) == path.read_text(encoding="utf-8"), "stale: python compare.py --write-readme"


@pytest.mark.parametrize("folder", readme.folders_of(ROOT / "README.md"), ids=lambda folder: folder.name)
def test_a_results_folders_readme_is_what_its_table_renders_to(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert readme.folder_readme(folder) == text, "stale: python compare.py --write-readme"


# ---- gates and tables that must not pass silently


def one_round(rows: pd.DataFrame) -> pd.DataFrame:
    """The same rows as a sweep of a single round leaves them: without intervals."""
    ends = ["fps_low", "fps_high", "speedup_low", "speedup_high"]
    return rows.assign(rounds=1, **dict.fromkeys(ends, math.nan))


def refused(capsys, *arguments) -> str:
    """The one sentence with which compare.py's main() refuses, in this process; its exit code is 2."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
        run_main(compare.main)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in said
    return said.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["a", "--fail-if-slower", "5%"], "need two results folders"),
        (["a", "--sweeps", "main"], "need two results folders"),
        (["a", "a", "--fail-if-slower", "nan"], "nan is no share"),
        (["a", "a", "--fail-if-slower=-5%"], "-5% is no share"),
        (["a", "a", "--fail-if-slower", "500%"], "500% is no share"),
        (["a", "a", "--fail-if-slower", "five"], "invalid share value: 'five'"),
        (["a", "a", "--sweeps", "x"], "a has no sweep x; name one of: main"),
        (["a", "a", "--sweeps", "main", "main", "main"], "one name, or two"),
        (["a", "a", "--best"], "take one results folder"),
        (["a", "a", "--write-readme"], "take one results folder"),
        (["a", "a", "a"], "one results folder or two"),
        (["a", "--max-latency-ms", "5"], "need --best"),
        (["a", "--min-accuracy", "0.9"], "need --best"),
        (["a", "--best", "--max-latency-ms", "nan"], "nan is no limit"),
        (["a", "--best", "--max-memory-mb=-1"], "-1 is no limit"),
        (["a", "--best", "--write-readme"], "are two commands"),
        (["nowhere"], "is missing; make it anew: python benchmark.py"),
    ],
)
def test_an_argument_without_effect_is_refused(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", table(("onnx", 64, 1, 100.0)), packages={})
    assert said in refused(capsys, *arguments)


def csv(**changes) -> bytes:
    return table(("onnx", 64, 1, 100.0)).assign(**changes).to_csv(index=False).encode()


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "No columns to parse from file"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "benchmark_results.csv is no table"),
        (csv()[:-40] + b'"', "benchmark_results.csv is no table"),  # cut short
        (csv().replace(b"main", "Mündung".encode("latin-1")), "can't decode byte"),
        (b"run,backend\nmain,pytorch\n", "no column sweep"),
        (csv().replace(b"speedup_low", b"speedup"), "no column speedup_low"),
        (csv(fps="fast"), "could not convert string to float: 'fast'"),
        (csv(batch_size=math.nan), "benchmark_results.csv is no table"),
        (csv(status="fine"), "unknown status 'fine'"),
        (csv(fps=math.nan), "a row that is ok has no images/s"),
        (csv(fps=-1), "a row that is ok has no images/s"),
        (csv(fps=math.inf), "a row that is ok has no images/s"),
    ],
)
def test_a_damaged_or_foreign_table_is_named_in_one_sentence(tmp_path, capsys, content, said):
    path = tmp_path / "benchmark_results.csv"
    path.write_bytes(content)
    for arguments in ([tmp_path], [tmp_path, tmp_path], [tmp_path, "--best"], [path]):
        sentence = refused(capsys, *arguments)
        assert said in sentence and str(path) in sentence
    assert path.read_bytes() == content and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    "content",
    [b"", b"[1, 2]", b'{"main": 3}', b"\xff", b'{"main": {"packages": [2]}}']
    + [b'{"main": {"ceilings": {"a": 1}}}', b'{"main": {"date": true}}', b'{"main": {"short": [1]}}'],
)
def test_a_damaged_environment_is_named_in_one_sentence(tmp_path, capsys, content):
    folder = write(tmp_path / "a", table(("onnx", 64, 1, 100.0)), packages={})
    (folder / "environment.json").write_bytes(content)
    assert "environment.json does not say" in refused(capsys, folder)


def test_a_table_of_an_earlier_version_is_read(tmp_path):
    rows = table(("onnx", 64, 1, 100.0)).drop(columns=tables.NEW_COLUMNS)
    read, environments = tables.read_table(write(tmp_path / "a", rows, packages={}))
    assert list(read) == COLUMNS and read.adds[0] == "" and math.isnan(read.load_s[0])
    (tmp_path / "a" / "environment.json").unlink()
    assert tables.read_table(tmp_path / "a" / "benchmark_results.csv")[1] == {}


def test_the_gate_passes_only_where_something_was_judged(tmp_path):
    rows = table(("pytorch", 64, 1, 100.0), ("onnx", 64, 1, 150.0))
    slow = table(("pytorch", 64, 1, 100.0), ("onnx", 64, 1, 50.0))
    a, alone = (
        write(tmp_path / "a", rows, packages={}),
        write(tmp_path / "alone", one_round(slow), packages={}),
    )
    gate = ["--fail-if-slower", "5%"]
    assert run_script("compare.py", a, a, *gate).returncode == 0
    done = run_script("compare.py", a, alone, *gate, ok=False)
    assert done.returncode == 1 and done.stdout.count("can't judge: one round") == 2
    assert "0 of 0 configurations are slower" in done.stdout
    assert "2 more can't be judged: measured in one round; use --rounds 3" in done.stdout
    assert "faster" not in done.stdout.replace("slower", "")
    half = rows.assign(fps_low=[99.0, math.nan])
    done = run_script("compare.py", a, write(tmp_path / "half", half, packages={}), *gate)
    assert "1 more can't be judged" in done.stdout and done.stdout.count("can't judge: one round") == 1
    broken = table(("pytorch", 64, 1, 100.0), ("onnx", 64, 1, "failed"))
    done = run_script("compare.py", a, write(tmp_path / "broken", broken, packages={}), *gate, ok=False)
    assert (
        done.returncode == 1 and "no longer ok: ONNX Runtime FP32, 64 px, batch 1: failed: why" in done.stdout
    )
    done = run_script("compare.py", a, write(tmp_path / "fewer", rows[:1], packages={}), *gate, ok=False)
    assert done.returncode == 1 and "no longer there: ONNX Runtime FP32, 64 px, batch 1" in done.stdout


def test_the_best_that_does_not_fit_is_exit_code_1(tmp_path):
    a = write(tmp_path / "a", table(("onnx", 64, 1, 100.0)).assign(build_s=1.0), packages={})
    assert run_script("compare.py", a, "--best").returncode == 0
    done = run_script("compare.py", a, "--best", "--max-latency-ms", 0.5, ok=False)
    assert done.returncode == 1 and "No row fits" in done.stdout


def test_the_headline_names_the_fastest_right_row_fp16_and_the_methods():
    rows = table(
        ("pytorch", 224, 16, 100.0),
        *(("onnx", 224, 16, 280.0), ("tensorrt", 224, 16, 600.0), ("torch-tensorrt", 224, 16, 550.0)),
        *(("pytorch", 224, 64, 110.0), ("tensorrt-int8", 224, 64, 1320.0), ("tensorrt", 224, 64, 770.0)),
    )
    rows["precision"] = ["FP32", "FP16", "FP16", "FP16", "FP32", "INT8", "FP16"]
    lines = readme.headline(rows, {}).splitlines()
    assert lines[0].startswith(
        "**TensorRT INT8 serves ResNet-18 12 times as fast as PyTorch FP32** (11.9–12.1"
    )
    assert lines[1].startswith("1,320 images/s at 224 px, batch 64, accuracy 90.0%, the same class")
    assert lines[2].startswith("In FP16 TensorRT FP16 7× (6.93–7.07 at 95 % confidence): 770 images/s")
    methods = "ONNX Runtime FP16 2.8×, Torch-TensorRT FP16 5.5×, TensorRT FP16 6×"
    assert lines[3] == f"At 224 px, batch 16, over PyTorch FP32: {methods}."
    rows.loc[rows.backend == "tensorrt-int8", "status"] = "mismatch"
    assert readme.headline(rows, {}).startswith("**TensorRT FP16 serves ResNet-18 7 times")
    level = table(("pytorch", 224, 1, 100.0), ("onnx", 224, 1, 100.5))
    assert readme.headline(level, {}).startswith("No verdict (the intervals overlap)")


def test_one_round_supports_no_verdict():
    rows = one_round(table(("pytorch", 64, 1, 100.0), ("onnx", 64, 1, 900.0), ("onnx", 64, 4, 950.0)))
    assert words.answers_of(rows) == [
        "Each row was measured in a single round, which supports no verdict: use --rounds 3."
    ]
    assert "**" not in readme.results_table(rows) and "–" not in readme.results_table(rows)
    said = readme.headline(rows, {})
    assert "times as fast" not in said and "**" not in said and "one round supports none" in said
    lines, _ = compare.best_lines(rows.assign(build_s=1.0), dict.fromkeys(compare.LIMITS))
    assert lines[0].startswith("Most images/s: ") and "one round" in lines[-1]
    assert "astest" not in " ".join(lines)
    mixed = pd.concat([rows.iloc[:1], table(("onnx", 64, 1, 900.0))])
    assert "**" not in readme.results_table(mixed)  # its rival may be anywhere
    assert "**900**" in readme.results_table(table(("pytorch", 64, 1, 100.0), ("onnx", 64, 1, 900.0)))


@pytest.mark.parametrize("content", [None, "Größe".encode("latin-1")])
def test_a_readme_that_is_missing_or_in_another_encoding_is_one_sentence(
    tmp_path, monkeypatch, capsys, content
):
    write(tmp_path / "results", table(("onnx", 64, 1, 100.0)), packages={})
    monkeypatch.chdir(tmp_path)
    if content:
        (tmp_path / "README.md").write_bytes(content)
    assert "README.md can't be read" in refused(capsys, "--write-readme")
    assert not content or (tmp_path / "README.md").read_bytes() == content
    assert [path.name for path in (tmp_path / "results").glob("*.png")] == []


def test_a_readme_without_generated_parts_is_one_sentence(tmp_path, monkeypatch, capsys):
    write(tmp_path / "results", table(("onnx", 64, 1, 100.0)), packages={})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("# Mine\n", encoding="utf-8")
    assert "README.md has no generated parts; put <!-- begin" in refused(capsys, "--write-readme")


def test_two_machines_are_a_sentence_and_a_chart(tmp_path, monkeypatch):
    slow = table(("pytorch", 224, 1, 100.0), ("onnx", 224, 1, 150.0), ("onnx", 512, 1, 50.0))
    fast = table(("pytorch", 224, 1, 110.0), ("onnx", 224, 1, 180.0), ("onnx", 512, 1, 75.0))
    fast = pd.concat([fast, fast.assign(sweep="only here")])
    for name, rows in (("h100", slow), ("h200", fast)):
        folder = write(tmp_path / name, rows)
        known = {"gpu": name.upper(), "packages": {}}
        (folder / "environment.json").write_text(json.dumps({"main": known}), encoding="utf-8")
    path = tmp_path / "README.md"
    path.write_text("# Mine\n<!-- begin machines h100 h200 -->\n<!-- end -->\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    compare.write_readmes(path)
    said = "**H200: 1.2 times the images/s of H100** in the median of 3 configurations (1.1 to 1.5 times; "
    assert said + "most: ONNX Runtime FP32, 512 px, batch 1)." in path.read_text(encoding="utf-8")
    assert (tmp_path / "h200" / "machines.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "h100" / "README.md").is_file()


def test_the_summary_keeps_of_each_method_the_plain_one_and_its_fastest_variant():
    rows = table(
        ("pytorch", 64, 1, 100.0),
        *(("tensorrt", 64, 1, 400.0), ("tensorrt-graph", 64, 1, 450.0), ("tensorrt-int8", 64, 1, 700.0)),
    )
    lines = readme.summary(rows, {}).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:5]] == [
        "| PyTorch FP32",
        "| TensorRT FP32",
        "| TensorRT INT8",
    ]
    assert lines[5] == ""


def test_doubts_are_told_with_the_width_reached():
    notes = "noisy: speedup ±5 %, target 3 %, close other programs, or raise --budget; CPU-bound: x; 23 MB"
    rows = table(("pytorch", 64, 1, 100.0), ("onnx", 64, 1, 150.0)).assign(notes=["", notes])
    assert words.text_table(rows).splitlines()[2].endswith("noisy ±5 %, CPU-bound")
    assert {line.split(":")[0] for line in words.reasons(rows)} == {"noisy", "CPU-bound"}


def test_what_a_variant_adds_is_said_once():
    rows = table(("pytorch", 64, 1, 100.0), ("onnx-nhwc", 64, 1, 150.0), ("onnx-nhwc", 64, 4, 350.0))
    rows = rows.assign(adds=["", "channels last", "channels last"], load_s=[0.1, 0.2, 0.2])
    assert words.reasons(rows) == ["ONNX Runtime FP32, NHWC: channels last"]
    assert "Load s" in words.text_table(rows) and "First call ms" not in words.text_table(rows)
    assert "channels last" not in readme.summary(rows, {})


@pytest.mark.parametrize(
    "text, said",
    [
        ("<!-- begin answers results -->\n\n# Mine\n", "line 1: the generated part has no"),
        ("a\n<!-- begin answers x -->\n<!-- begin summary x -->\n<!-- end -->\n", "line 2: the generated"),
        ("<!-- begin poem results -->\n<!-- end -->\n", "line 1: poem is none of"),
        ("mine\n<!-- end -->\n", "line 2: <!-- end --> marks no generated part"),
        ("<!-- begin answers -->\n<!-- end -->\n", "line 1: <!-- begin answers --> marks no"),
        ("<!-- begin machines a -->\n<!-- end -->\n", "line 1: machines takes two folders"),
        ("<!-- begin summary a b -->\n<!-- end -->\n", "line 1: summary takes one folder"),
    ],
)
def test_a_readme_with_a_broken_marker_is_left_alone(tmp_path, text, said):
    path = tmp_path / "README.md"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        readme.write_readme(path)
    assert path.read_text(encoding="utf-8") == text
