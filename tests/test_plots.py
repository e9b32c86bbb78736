"""The charts: what they say, what they show as missing, and that no state of the results stops them."""

import itertools
from types import SimpleNamespace

import numpy
import pandas
import pytest
from matplotlib.colors import to_hex
from matplotlib.legend import Legend
from matplotlib.text import Text

from utils import plot_utils
from utils.plot_utils import CHARTS, draw, draw_all
from utils.report import chart_style, names, tables
from utils.report.rows import COLUMNS
from utils.report.words import figure

BACKENDS = {"pytorch": ("fp32", 100.0), "onnx": ("fp16", 250.0), "tensorrt": ("fp16", 400.0)}
ENVIRONMENT = {
    "a": {"short": "GPU one, torch 2.11", "gpu": "GPU one", "date": "2026-11-23", "sample_data": True},
    "b": {"short": "GPU one, torch 2.2", "sample_data": False},
}
FPS, BATCH, SPEEDUP, MEMORY = CHARTS


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Few pixels are drawn faster; the lay-out is in inches."""
    monkeypatch.setattr(chart_style, "DPI", 50)


def table(backends=BACKENDS, sizes=(224, 512), batches=(1, 16), sweep="a", interval=0.02, memory=900.0):
    """Rows whose throughput is the given one at 224 px and batch 1, times 4 at batch 16, shrinking with the
    area."""
    rows = []
    for backend, (precision, base) in backends.items():
        for size in sizes:
            for batch in batches:
                fps = base * (4 if batch == 16 else 1) * (224 / size) ** 2
                row = dict(sweep=sweep, backend=backend, precision=precision, device="cuda", status="ok")
                row |= dict(image_size=size, batch_size=batch, mean_ms=1000 * batch / fps, fps=fps)
                if interval:
                    row |= dict(fps_low=fps * (1 - interval), fps_high=fps * (1 + interval))
                rows.append({**row, "gpu_memory_mb": memory})
    rows = pandas.DataFrame(rows).reindex(columns=COLUMNS)
    rows = rows.astype({"gpu_memory_mb": float}).assign(adds="", reason="")
    return with_speedups(rows.assign(notes=[[] for _ in range(len(rows))]))


def with_speedups(rows):
    """The rows with their speedup over PyTorch FP32, where that is ok."""
    keys = ["image_size", "batch_size"]
    base = rows[(rows["backend"] == "pytorch") & (rows["status"] == "ok")].set_index(keys)["mean_ms"]
    at = [base.get(key, float("nan")) for key in zip(*(rows[key] for key in keys), strict=True)]
    speedup = numpy.array(at, dtype=float) / rows["mean_ms"].astype(float)
    width = rows["fps_high"] / rows["fps"]
    return rows.assign(speedup=speedup, speedup_low=speedup / width, speedup_high=speedup * width)


def spoil(rows, status, **where):
    """The same rows with this status, and no figures, where all the columns have these values."""
    rows = rows.copy()
    chosen = pandas.Series(True, rows.index)
    for column, value in where.items():
        chosen &= rows[column] == value
    rows.loc[chosen, "status"] = status
    if status != "mismatch":  # a mismatch keeps its figures, and no chart may use them
        rows.loc[chosen, ["mean_ms", "fps", "fps_low", "fps_high", "gpu_memory_mb"]] = float("nan")
    return with_speedups(rows)


def texts(fig):
    """Every text on the figure, broken lines joined, no-break spaces as spaces."""
    return [" ".join(text.get_text().split()) for text in fig.findobj(Text) if text.get_text().strip()]


def say(rows, name=FPS):
    return " | ".join(texts(draw(CHARTS[name], rows, ENVIRONMENT)))


def data_lines(fig):
    """Label -> the lines with that label, over all panels."""
    found = {}
    for ax in fig.axes:
        for container in filter(lambda item: hasattr(item, "lines"), ax.containers):
            found.setdefault(container.get_label(), []).append(container.lines[0])
    return found


@pytest.mark.parametrize(
    "backend, precision, expected",
    [
        ("pytorch", "fp32", "PyTorch FP32"),
        ("pytorch-tf32", "fp32", "PyTorch TF32"),
        ("pytorch-channels-last", "fp32", "PyTorch FP32, channels last"),
        ("pytorch-fp16-graph", "fp16", "PyTorch FP16, CUDA graph"),
        ("torch-compile", "fp16", "torch.compile FP16"),
        ("onnx", "FP16", "ONNX Runtime FP16"),
        ("onnx-nhwc", "fp16", "ONNX Runtime FP16, NHWC"),
        ("torch-tensorrt-graph", "fp16", "Torch-TensorRT FP16, CUDA graph"),
        ("tensorrt-static-graph", "fp16", "TensorRT FP16, static shapes, CUDA graph"),
        ("tensorrt-int8", "int8", "TensorRT INT8"),
        ("openvino-int8", "int8", "OpenVINO INT8"),
        ("glow", "", "glow"),
    ],
)
def test_label(backend, precision, expected):
    assert names.label(SimpleNamespace(backend=backend, precision=precision)) == expected


def test_a_sentence_names_a_method_in_words():
    called = {
        ("tensorrt-int8-static-graph", "INT8"): "TensorRT INT8 with static shapes and a CUDA graph",
        ("pytorch-channels-last", "FP32"): "PyTorch FP32 with the channels-last layout",
        ("onnx", "FP16"): "ONNX Runtime FP16",
    }
    for (backend, precision), expected in called.items():
        assert names.in_words(SimpleNamespace(backend=backend, precision=precision)) == expected


@pytest.mark.parametrize(
    "value, expected",
    [
        (15832, "15,800"),
        (999.6, "1,000"),
        (312.4, "312"),
        (34.21, "34.2"),
        (1.02, "1.02"),
        (1e6, "1,000,000"),
    ],
)
def test_a_number_has_three_digits_and_thousands_apart(value, expected):
    assert figure(value) == expected


def test_findings_of_a_case_worked_by_hand():
    rows = table()  # TensorRT: 400 images/s at batch 1, 1600 at batch 16; PyTorch: 100 and 400
    assert "TensorRT FP16 is fastest: 1,600 images/s at 224 px, batch 16" in say(rows)
    assert "at 224 px, batch 16, 4.00x (3.92-4.08) PyTorch FP32" in say(rows, SPEEDUP)
    assert "From batch 1 to 16 at 224 px, throughput grows by a factor of 4" in say(rows, BATCH)
    assert "PyTorch FP32 takes most GPU memory: 900 MB at 224 px, batch 1" in say(rows, MEMORY)


def test_no_winner_while_the_intervals_overlap():
    rows = table({**BACKENDS, "onnx": ("fp16", 390.0)})  # 390 + 2 % reaches 400 - 2 %
    said = (
        "TensorRT FP16 and ONNX Runtime FP16 are indistinguishable: up to 1,600 images/s at 224 px, batch 16"
    )
    for name in (FPS, SPEEDUP):
        assert said in say(rows, name) and "fastest" not in say(rows, name)
    assert "is fastest" in say(table({**BACKENDS, "onnx": ("fp16", 380.0)}))  # 380 + 2 % does not
    three = table({**BACKENDS, "onnx": ("fp16", 390.0), "torch-tensorrt": ("fp16", 395.0)})
    assert "TensorRT FP16 and Torch-TensorRT FP16 and ONNX Runtime FP16 are indistinguishable" in say(three)
    for name in (FPS, SPEEDUP):
        single = say(table(interval=None), name)
        assert "One round supports no verdict: TensorRT FP16" in single and "fastest" not in single
        assert "4.00" not in single


def test_a_row_that_is_not_ok_is_never_drawn_and_never_wins():
    rows = spoil(table(), "mismatch", backend="tensorrt")
    for name in CHARTS:
        said = say(rows, name)
        assert "Not measured: TensorRT FP16: mismatch" in said
        fig = draw(CHARTS[name], rows, {})
        legend = [text.get_text() for part in fig.findobj(Legend) for text in part.get_texts()]
        assert "TensorRT FP16" not in [*data_lines(fig), *legend] and "TensorRT FP16" not in texts(fig)
    assert "ONNX Runtime FP16 is fastest: 1,000 images/s" in say(rows)


def test_what_is_missing_is_said_and_leaves_a_gap():
    rows = spoil(table(), "out_of_memory", backend="onnx", image_size=512, batch_size=16)
    rows = spoil(rows, "unavailable", backend="tensorrt")
    note = "ONNX Runtime FP16 (512 px batch 16): out of memory, TensorRT FP16: unavailable"
    assert f"Not measured: {note}" in say(rows) and f"Not measured: {note}" in say(rows, SPEEDUP)
    fig = draw(CHARTS[FPS], rows, {})
    assert pandas.isna(
        data_lines(fig)["ONNX Runtime FP16"][1].get_ydata()[1]
    )  # the panel of batch 16, at 512 px


def test_a_missing_baseline_is_said():
    nothing = spoil(table(), "failed", backend="pytorch")
    assert "Not measured: PyTorch FP32: failed" in say(nothing, SPEEDUP)
    assert not [ax for ax in draw(CHARTS[SPEEDUP], nothing, {}).axes if ax.axison]


def test_a_line_leaves_a_gap_where_it_was_tried_and_none_where_it_was_not():
    rows = table({"pytorch": ("fp32", 100.0), "tensorrt": ("fp16", 400.0)}, batches=(1, 8, 16))
    tried = spoil(rows, "failed", backend="tensorrt", batch_size=8)
    (line, *_) = data_lines(draw(CHARTS[BATCH], tried, {}))["TensorRT FP16"]
    assert list(line.get_xdata()) == [0, 1, 2] and numpy.isnan(line.get_ydata()[1])
    left_out = rows[~((rows.backend == "tensorrt") & (rows.batch_size == 8))]
    (line, *_) = data_lines(draw(CHARTS[BATCH], left_out, {}))["TensorRT FP16"]
    assert list(line.get_xdata()) == [0, 2] and list(line.get_ydata()) == [400, 1600]


def two_environments():
    """One machine, measured in two environments, in each against its own PyTorch FP32."""
    slower = {"pytorch": ("fp32", 50.0), "tensorrt-graph": ("fp16", 400.0)}
    return pandas.concat([table(), table(slower, sweep="b")], ignore_index=True)


def test_one_panel_set_holds_every_method_of_a_machine_across_its_environments():
    fig = draw(CHARTS[FPS], two_environments(), ENVIRONMENT)
    assert len([ax for ax in fig.axes if ax.axison]) == 2  # one for each batch size, not for each environment
    assert set(data_lines(fig)) == {
        *("PyTorch FP32 (a)", "PyTorch FP32 (b)", "ONNX Runtime FP16"),
        *("TensorRT FP16", "TensorRT FP16, CUDA graph"),
    }
    said = " | ".join(texts(fig))
    assert "a: GPU one, torch 2.11" in said and "b: GPU one, torch 2.2" in said
    assert said.count("Trained on the drawn sample images (a)") == 1


def test_a_panel_with_a_single_point_is_not_drawn_where_others_have_more():
    rows = table(batches=(1, 16, 256))
    rows = rows[(rows["batch_size"] < 256) | (rows["image_size"] == 224)]
    for name in (FPS, SPEEDUP):
        panels = [ax for ax in draw(CHARTS[name], rows, {}).axes if ax.axison]
        assert [ax.get_title() for ax in panels] == ["batch 1", "batch 16"]
    assert len([ax for ax in draw(CHARTS[FPS], rows[rows.image_size == 224], {}).axes if ax.axison]) == 3


def test_every_chart_has_the_same_colours_units_and_a_zero():
    for name, chart in CHARTS.items():
        fig = draw(chart, table(), ENVIRONMENT)
        panels = [ax for ax in fig.axes if ax.axison]
        assert panels and all(ax.get_ylim()[0] == 0 for ax in panels)
        assert panels[0].get_ylabel() == chart[1] and panels[-1].get_xlabel() in plot_utils.AXIS.values()
        assert any("GPU one, torch 2.11 Trained on the drawn sample" in text for text in texts(fig))
        colours = {text: to_hex(lines[0].get_color()) for text, lines in data_lines(fig).items()}
        assert colours["ONNX Runtime FP16"] == names.ORANGE.lower(), name
        assert colours["TensorRT FP16"] == names.GREEN.lower(), name


def test_no_panel_cuts_a_value_off():
    rows = table(sizes=(224, 512), batches=(1, 16)).assign(gpu_memory_mb=range(100, 1300, 100))
    for name, chart in CHARTS.items():
        for ax in draw(chart, rows, {}).axes:
            bars = [bar.get_height() for bar in ax.patches]
            lines = [y for line in ax.lines if line.get_label().startswith("_") for y in line.get_ydata()]
            assert max([*bars, *filter(numpy.isfinite, lines)], default=0) <= ax.get_ylim()[1], name


def test_nothing_is_squeezed_or_printed_over_something_else():
    for rows in (spoil(table(), "unavailable"), table(batches=(1, 2, 4, 8, 16, 32, 64, 256))):
        fig = draw(CHARTS[FPS], rows, ENVIRONMENT)
        fig.draw_without_rendering()
        assert all(ax.get_window_extent().height > 1.2 * fig.dpi for ax in fig.axes if ax.axison)
        said = [text for text in fig.findobj(Text) if text.get_text() and text.get_fontsize() in (9, 13)]
        boxes = [box for text in said if (box := text.get_window_extent()).width > 1]  # 1: not drawn
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_styles_differ_and_variants_keep_their_backends_colour():
    variants = ["", "-graph", "-static", "-static-graph", "-int8", "-int8-graph", "-int8-static-graph"]

    def style(backend: str) -> dict:
        return chart_style.style(SimpleNamespace(backend=backend, precision="FP16"))

    looks = [style(f"tensorrt{variant}") for variant in variants]
    assert len(set(map(str, looks))) == len(looks)
    for backend in ("tensorrt-int8-graph", "tensorrt-static", "tensorrt-of-tomorrow"):
        assert style(backend)["color"] == names.GREEN
    assert style("torch-tensorrt-graph")["marker"] == "D"
    assert style("onnx-new")["color"] == names.ORANGE


@pytest.mark.parametrize(
    "rows",
    [
        table().iloc[:0],
        spoil(table(), "failed", sweep="a"),
        table(sizes=(224,), batches=(16,)),
        table({"pytorch": ("fp32", 34.0)}, interval=None, memory=None),
        table(sizes=(224,), batches=(1, 2, 4, 8, 16, 32, 64, 256)),
    ],
    ids=["empty", "all failed", "one configuration", "baseline only", "many batches"],
)
def test_edge_cases_are_drawn(rows, tmp_path):
    paths = draw_all(rows, {}, tmp_path)
    assert {FPS, BATCH, SPEEDUP} <= {path.name for path in paths}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    if not (rows["status"] == "ok").any():
        assert "Nothing was measured" in say(rows)


def test_every_panel_and_text_stays_on_the_sheet():
    variants = ["", "-graph", "-static", "-static-graph", "-int8", "-int8-graph"]
    made = [f"{backend}{variant}" for backend in ("pytorch", "tensorrt") for variant in variants]
    backends = {name: ("fp16" if "-" in name else "fp32", 100.0 + 20 * i) for i, name in enumerate(made)}
    rows = table(backends, sizes=(224, 256, 384, 512), batches=(1, 8, 16))
    for name in (FPS, SPEEDUP):
        fig = draw(CHARTS[name], rows, ENVIRONMENT)
        fig.draw_without_rendering()
        drawn, sheet = fig.get_tightbbox(), fig.bbox_inches.padded(0.02)
        assert sheet.contains(drawn.x0, drawn.y0) and sheet.contains(drawn.x1, drawn.y1), name


def test_the_same_rows_give_the_same_bytes_and_a_stale_chart_goes(tmp_path, monkeypatch):
    rows = table()
    before = rows.copy()
    first = {path.name: path.read_bytes() for path in draw_all(rows, ENVIRONMENT, tmp_path)}
    assert set(first) == {*CHARTS, "methods.png"}
    pandas.testing.assert_frame_equal(rows, before)
    rows.assign(notes="").to_csv(tmp_path / "benchmark_results.csv", index=False)
    read = tables.read_table(tmp_path)[0]  # as benchmark.py hands them over
    again = {path.name: path.read_bytes() for path in draw_all(read, ENVIRONMENT, tmp_path)}
    assert again == first
    monkeypatch.setattr(plot_utils, "CHARTS", {MEMORY: CHARTS[MEMORY]})
    assert MEMORY not in [path.name for path in draw_all(table(memory=None), {}, tmp_path)]
    assert not (tmp_path / MEMORY).exists()
