"""What the sentences and tables say, against hand-worked rows."""

import pandas as pd
import pytest
from test_compare import one_round, table

from utils.report import analysis, readme, words


def test_the_fastest_wins_unless_the_intervals_overlap():
    clear = table(("pytorch", 64, 1, 100.0), ("onnx", 64, 1, 150.0))
    assert [row.backend for row in analysis.fastest(clear)] == ["onnx"]
    close = table(("pytorch", 64, 1, 100.0), ("onnx", 64, 1, 100.5))
    assert len(analysis.fastest(close)) == 2
    assert "In none of 1 combinations" in words.answers_of(close)[0]


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


def test_the_answers_cover_every_question_in_one_sentence_each():
    pairs = [(backend, fps) for backend, fps in (("pytorch", 6400.0), ("onnx", 12800.0))]
    grid = [(size, batch) for size in (64, 128) for batch in (1, 4)]
    rows = table(*((name, size, n, fps * n**0.5 / size) for name, fps in pairs for size, n in grid))
    assert words.answers_of(rows) == [
        "**Which is fastest?** In 4 of 4 combinations of image and batch size ONNX Runtime FP32 is the "
        "fastest.",
        "**Image size:** From 64 to 128 px there are 4 times the pixels, and throughput at batch 4 falls by "
        "a factor of 2.",
        "**Batch size:** From batch 1 to 4 at 64 px, throughput grows by a factor of 2.",
        "**Saturation:** At 64 px, doubling the batch gains less than 5 % at no batch up to 4 with "
        "PyTorch FP32, ONNX Runtime FP32.",
        "**Optimal here:** For throughput, ONNX Runtime FP32 at batch 4 gives 400 images/s at 64 px (10 ms a "
        "batch), 200 images/s at 128 px (20 ms a batch).",
    ]


def test_the_answers_are_of_the_machine_across_its_environments():
    one = table(("pytorch", 224, 1, 100.0), ("onnx", 224, 1, 150.0), ("onnx", 224, 16, 400.0))
    other = table(("pytorch", 224, 1, 90.0), ("tensorrt", 224, 1, 300.0), ("tensorrt", 224, 16, 390.0))
    both = pd.concat([one, other.assign(sweep="tensorrt-8.6")], ignore_index=True)
    said = words.answers_of(both)
    assert "In 1 of 2 combinations of image and batch size TensorRT FP32 is the fastest" in said[0]
    assert "fastest of those measured there, in 1 ONNX" in said[0]  # PyTorch FP32 lacks a batch size
    assert len(said) == 4 and "main" not in "".join(said)
    lines = readme.summary(both, {"tensorrt-8.6": {"short": "GPU, tensorrt 8.6"}}).splitlines()
    assert lines[2].startswith("| ONNX Runtime FP32 <sup>1</sup> | 150<br>1.50x (1.48-1.52) | 400 |")
    assert lines[3].startswith("| TensorRT FP32 <sup>2</sup> | 300<br>3.33x (3.30-3.37) | 390 |")
    assert "<sup>2</sup> tensorrt-8.6: GPU, tensorrt 8.6" in lines[-1]
    assert "| Environment |" in words.markdown(words.lines_of(words.TABLE, both))


def test_nothing_measured_is_said_and_not_a_crash():
    rows = table(("pytorch", 64, 1, "failed"), ("onnx", 64, 1, "unavailable"))
    assert "Nothing was measured" in words.answers_of(rows)[0]
    assert "failed" in words.text_table(rows) and "Nothing to compare" in readme.headline(rows, {})
    assert "Nothing has been measured" in readme.summary(rows, {})


def test_the_device_table_shows_only_what_is_known():
    rows = table(("pytorch", 64, 1, 100.0), ("onnx", 64, 1, 200.0))
    rows = rows.assign(
        tflops=0.5, pct_measured_peak=25.0, flops_per_byte=60.0, limit="compute", busy_ms=float("nan")
    )
    known = {"main": {"short": "a CPU", "ceilings": {"tflops": {"FP32": 2.0}, "gb_per_s": 20.0}}}
    text = words.markdown(words.lines_of(words.DEVICE, rows))
    assert "| Method | Size | Batch | tflops | pct measured peak | flops per byte | bottleneck |" in text
    assert "| ONNX Runtime FP32 | 64 | 1 | 0.5 | 25 | 60 | compute |" in text
    assert "| measured limits | tflops FP32 2.0, gb_per_s 20.0 |" in readme.environment_table(known)


def test_the_summary_has_a_line_a_method_and_the_columns_that_matter():
    batches = [("tensorrt", 224, batch, 1000.0 * batch) for batch in (1, 8, 16, 256, 1024)]
    rows = table(
        ("pytorch", 224, 1, 100.0), *batches, ("tensorrt", 512, 8, 80.0), ("tensorrt", 512, 16, 90.0)
    )
    assert readme.summary_columns(rows) == [(224, 1), (224, 16), (224, 256), (512, 16)]
    rows = table(
        ("pytorch", 64, 1, 100.0), ("onnx", 64, 1, 150.0), ("onnx", 64, 8, 300.0), ("onnx", 96, 8, 80.0)
    )
    lines = readme.summary(rows, {}).splitlines()
    assert lines[0] == "| Method | 64 px, batch 1 | 64 px, batch 8 | 96 px, batch 8 | Accuracy |"
    assert lines[2] == "| ONNX Runtime FP32 | 150<br>1.50x (1.48-1.52) | 300 | 80 | 90 % |"
    assert lines[3] == "| PyTorch FP32 | 100 |  |  | 90 % |"
    rows.loc[1, "status"] = "mismatch"
    assert "| ONNX Runtime FP32 | mismatch | 300 | 80 |" in readme.summary(rows, {})


def test_a_speedup_without_an_interval_is_printed_nowhere():
    rows = one_round(table(("pytorch", 64, 1, 100.0), ("onnx", 64, 1, 731.0)))
    assert "7.31" not in "".join(
        [words.text_table(rows), readme.summary(rows, {}), readme.headline(rows, {})]
    )
    assert (
        words.times(table(("pytorch", 64, 1, 100.0), ("onnx", 64, 1, 790.0)).iloc[1]) == "7.90x (7.82-7.98)"
    )


def test_figures_have_three_digits_and_thousands_apart():
    assert [words.figure(value) for value in (0.51234, 34.06, 999.6, 15834.2, 123456.0, float("nan"))] == [
        "0.512",
        "34.1",
        "1,000",
        "15,800",
        "123,000",
        "",
    ]


def test_saturation_is_told_of_the_plain_methods_and_the_fastest():
    curves = {"pytorch": (100.0, 101.0), "onnx": (100.0, 150.0), "onnx-nhwc": (90.0, 91.0)}
    curves["tensorrt-int8"] = (500.0, 900.0)
    rows = table(*((name, 64, n, fps[n - 1]) for name, fps in curves.items() for n in (1, 2)))
    said = (
        "At 64 px, doubling the batch gains less than 5 % from batch 1 on with PyTorch FP32; at no batch up"
    )
    assert words.answers_of(rows)[2] == f"**Saturation:** {said} to 2 with ONNX Runtime FP32, TensorRT INT8."


def test_the_headline_names_the_fastest_right_row_and_the_best_in_fp16():
    rows = table(
        *(("pytorch", 224, 16, 100.0), ("tensorrt", 224, 16, 600.0), ("pytorch", 224, 64, 110.0)),
        *(("tensorrt-int8-static-graph", 224, 64, 1320.0), ("tensorrt-static-graph", 224, 64, 770.0)),
    )
    rows["precision"] = ["FP32", "FP16", "FP32", "INT8", "FP16"]
    lines = readme.headline(rows, {}).splitlines()
    best = (
        "**Best: TensorRT INT8 with static shapes and a CUDA graph, 12.0x (11.9-12.1) PyTorch FP32**: 1,320 "
    )
    assert lines[0].startswith(best + "images/s at 224 px, batch 64, accuracy 90.0%, the same class")
    half = "Best FP16: TensorRT with static shapes and a CUDA graph, 7.00x (6.93-7.07): 770 images/s"
    assert lines[1].startswith(half)
    rows.loc[rows.precision == "INT8", "status"] = "mismatch"
    assert readme.headline(rows, {}).startswith(
        "**Best: TensorRT FP16 with static shapes and a CUDA graph, 7.00x"
    )
    close = table(("pytorch", 224, 1, 100.0), ("onnx", 224, 1, 100.5))
    assert readme.headline(close, {}).startswith("No verdict (the intervals overlap)")


def test_one_round_supports_no_verdict():
    rows = one_round(table(("pytorch", 64, 1, 100.0), ("onnx", 64, 1, 900.0), ("onnx", 64, 4, 950.0)))
    assert words.answers_of(rows) == [
        "Each row was measured in a single round, which supports no verdict: use --rounds 3."
    ]
    said = readme.headline(rows, {})
    assert "**" not in said and said.startswith("No verdict (one round has no interval)")


def test_warnings_are_told_with_the_width_reached():
    noisy = "noisy: speedup ±1 %, target 0.5 %, close other programs, or raise --budget"
    rows = table(("pytorch", 64, 1, 100.0), ("onnx", 64, 1, 150.0))
    rows["notes"] = [[], [noisy, "CPU-bound: x", "23 MB"]]
    assert words.text_table(rows).splitlines()[2].endswith("noisy ±1 %, CPU-bound")
    assert {line.split(":")[0] for line in words.reasons(rows)} == {"noisy", "CPU-bound"}


def test_what_a_variant_adds_is_said_once():
    rows = table(("pytorch", 64, 1, 100.0), ("onnx-nhwc", 64, 1, 150.0), ("onnx-nhwc", 64, 4, 350.0))
    rows = rows.assign(adds=["", "channels last", "channels last"], load_s=[0.1, 0.2, 0.2])
    assert words.reasons(rows) == ["ONNX Runtime FP32, NHWC: channels last"]
    assert "Load s" in words.text_table(rows) and "First call ms" not in words.text_table(rows)
    assert "channels last" not in readme.summary(rows, {})
