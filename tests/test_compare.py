"""What the sentences say, against hand-worked tables; and that the committed README is what the committed CSV renders to."""

import pandas as pd
import pytest
from conftest import ROOT

import compare
from utils import report
from utils.utils import COLUMNS


def table(*rows) -> pd.DataFrame:
    """Rows of (backend, size, batch, fps) or with a status in place of fps, intervals 1 % wide."""
    made = []
    for backend, size, batch, fps in rows:
        row = dict.fromkeys(COLUMNS, None) | {"run": "main", "backend": backend, "precision": "FP32", "device": "cpu"}
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
            row |= {"speedup": fps / 100, "speedup_low": fps / 101, "speedup_high": fps / 99} if backend != "pytorch" else {}
        made.append(row)
    return pd.DataFrame(made).astype({"fps": float, "fps_low": float, "fps_high": float, "mean_ms": float, "speedup": float})


def test_the_fastest_wins_unless_the_intervals_overlap():
    clear = table(("pytorch", 64, 1, 100.0), ("onnx", 64, 1, 150.0))
    assert [row.backend for row in compare.fastest(clear)] == ["onnx"]
    level = table(("pytorch", 64, 1, 100.0), ("onnx", 64, 1, 100.5))
    assert len(compare.fastest(level)) == 2
    assert "no difference that this run can show" in compare.answers(level)[0]


def test_a_row_that_is_not_ok_is_never_best_and_says_why():
    rows = table(("pytorch", 64, 1, 100.0), ("onnx", 64, 1, 900.0), ("tensorrt", 64, 1, "unavailable"))
    rows.loc[1, ["status", "reason"]] = ["mismatch", "wrong class"]
    assert [row.backend for row in compare.fastest(rows)] == ["pytorch"]
    text = compare.table(rows)
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
    assert compare.saturation(table(*(("onnx", 64, batch, value) for batch, value in fps.items()))) == expected


def test_the_answers_cover_every_question_for_each_run():
    rows = table(
        *((b, size, n, f * n**0.5 / size) for b, f in (("pytorch", 6400.0), ("onnx", 12800.0)) for size in (64, 128) for n in (1, 4))
    )
    text = "\n".join(compare.answers(rows))
    for part in ("Which is fastest", "Throughput", "Speedup", "Image size", "Batch size", "Optimal here"):
        assert part in text
    assert "ONNX Runtime FP32 in 4 of 4" in text
    assert "64 px: ONNX Runtime FP32, batch 4" in text
    both = pd.concat([rows, rows.assign(run="other")], ignore_index=True)
    assert "Run other: **Optimal here" in "\n".join(compare.answers(both))


def test_nothing_measured_is_said_and_not_a_crash():
    rows = table(("pytorch", 64, 1, "failed"), ("onnx", 64, 1, "unavailable"))
    assert "nothing was measured" in compare.answers(rows)[0]
    assert "failed" in report.table(rows, {}) and "Nothing to compare" in report.headline(rows, {})


def test_figures_have_three_digits_and_thousands_apart():
    assert [compare.figure(value) for value in (0.51234, 34.06, 999.6, 15834.2, 123456.0, float("nan"))] == [
        "0.512",
        "34.1",
        "1000",
        "15,800",
        "123,000",
        "",
    ]


def test_the_readme_is_what_the_committed_results_render_to():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(report.MARKED.findall(text)) >= 4
    assert report.render(text, ROOT) == text, "stale: python compare.py --write-readme"
