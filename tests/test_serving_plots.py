"""The charts of every method, from files to labels, and of latency under load."""

import pandas
from test_plots import ENVIRONMENT, coarse, spoil, table, texts, two_environments  # noqa: F401  (a fixture)

from utils import plot_utils
from utils.plot_utils import draw_all
from utils.report import analysis, readme


def drawn(fig) -> str:
    """Everything that is written on a figure."""
    return " | ".join(texts(fig))


def bars(ax) -> list[float]:
    return [bar.get_width() for bar in ax.patches]


def test_every_method_stands_at_its_throughput_with_its_environment_and_its_speedup():
    rows = two_environments()
    rows.loc[rows["backend"] == "tensorrt-graph", "adds"] = "replayed as one CUDA graph"
    fig = plot_utils.draw_methods(rows, ENVIRONMENT)
    assert bars(fig.axes[0]) == [200, 400, 1000, 1600, 1600]  # at 224 px and batch 16
    called = [" ".join(text.get_text().split()) for text in fig.axes[0].get_yticklabels()]
    assert called[:2] == ["PyTorch FP32 the baseline; b", "PyTorch FP32 the baseline; a"]
    assert called[4] == "TensorRT FP16, CUDA graph replayed as one CUDA graph; b"
    said = drawn(fig)
    assert "1,000 images/s, 2.50x (2.45-2.55)" in said and "1,600 images/s, 8.00x (7.84-8.16)" in said
    assert "are indistinguishable: up to 1,600 images/s" in said and "400 images/s |" in said


def test_a_mismatch_is_at_the_foot_without_a_figure():
    fig = plot_utils.draw_methods(spoil(table(), "mismatch", backend="tensorrt"), ENVIRONMENT)
    called = [text.get_text().split("\n")[0] for text in fig.axes[0].get_yticklabels()]
    assert called == ["TensorRT FP16", "PyTorch FP32", "ONNX Runtime FP16"] and "wrong results" in drawn(fig)
    assert "1,600" not in drawn(fig)


def test_every_method_is_shown_at_the_largest_batch_that_most_share():
    rows = table(batches=(1, 16, 256))
    rows = rows[(rows["batch_size"] < 256) | (rows["backend"] == "tensorrt")]
    assert set(analysis.all_methods(rows).batch_size) == {16}
    assert set(analysis.all_methods(table(sizes=(256, 64))).image_size) == {64}
    assert plot_utils.draw_methods(table({"pytorch": ("fp32", 100.0)}), {}) is None
    assert plot_utils.draw_methods(spoil(table(), "failed"), {}) is None


def served(**changes) -> pandas.DataFrame:
    """Two rows of end_to_end.csv."""
    rows = []
    for decoder, decode in (("pillow", 2000.0), ("dali", 20000.0)):
        row = dict(sweep="a", backend="tensorrt", precision="FP16", image_size=224, batch_size=256)
        row |= dict(images="test set")
        row |= dict(decoder=decoder, images_per_s=decode * 0.9, decode_images_per_s=decode)
        row |= dict(images_per_s_low=decode * 0.88, images_per_s_high=decode * 0.92, overlap=0.9)
        row |= dict(infer_images_per_s=90000.0, limit="decode")
        row |= dict(agreement=1.0, max_abs_diff=0.01, status="ok", reason="", cores=16, date="2026-11-26")
        rows.append(row)
    return pandas.DataFrame(rows).assign(**changes)


def test_from_files_to_labels_shows_the_pipeline_and_its_halves():
    fig = plot_utils.draw_end_to_end(served(), ENVIRONMENT)
    said = drawn(fig)
    assert (
        "From files to labels: TensorRT FP16 reaches 18,000 images/s" in said and "bottleneck: decode" in said
    )
    assert "1,800 images/s, 90% of what its parts allow alone: decoding 2,000, inference 90,000" in said
    assert "224 px, 16 threads" in said and "2026-11-26" in said
    assert "2026-11-23" not in said  # the sweep's day
    assert bars(fig.axes[0]) == [1800, 18000]
    wrong = served(status=["ok", "mismatch"], reason=["", "another class on 9 of 100"])
    said = drawn(plot_utils.draw_end_to_end(wrong, ENVIRONMENT))
    assert "18,000" not in said and "mismatch: another class on 9 of 100" in said


def loaded() -> pandas.DataFrame:
    """load.csv: three rates of two backends, the last beyond the limit or invalid."""
    rows = []
    for backend, rates in (("pytorch", (100, 200, 400)), ("tensorrt", (1000, 2000, 4000))):
        for rate, p99, valid in zip(rates, (3.0, 9.0, 40.0), (True, backend == "pytorch", True), strict=True):
            row = dict(sweep="a", backend=backend, precision="FP16", image_size=224)
            row |= dict(rate=rate, achieved=rate, p50_ms=1.0, p90_ms=2.0, p99_ms=p99, valid=valid)
            rows.append(row | dict(max_latency_ms=15.0, cores=16, date="2026-11-26"))
    return pandas.DataFrame(rows)


def test_latency_under_load_is_drawn_against_the_rate_with_its_limit():
    fig = plot_utils.draw_load(loaded(), ENVIRONMENT)
    assert "TensorRT FP16 answers 99 % within 15 ms at up to 1,000 images/s" in drawn(fig)
    (ax,) = fig.axes
    assert ax.get_yscale() == "log" and "limit: 15 ms" in drawn(fig)
    crosses = [line for line in ax.lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in crosses] == [[2000]]
    slow = loaded().assign(p99_ms=99.0)
    assert "No rate tried keeps 99 % of the answers within 15 ms" in drawn(plot_utils.draw_load(slow, {}))


def test_serving_is_drawn_and_told_only_where_it_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(plot_utils, "CHARTS", {})
    names = {"end_to_end.png", "load.png"}
    assert not names & {path.name for path in draw_all(table(), ENVIRONMENT, tmp_path)}
    served().to_csv(tmp_path / "end_to_end.csv", index=False)
    loaded().to_csv(tmp_path / "load.csv", index=False)
    assert names <= {path.name for path in draw_all(table(), ENVIRONMENT, tmp_path)}
    text = readme.folder_readme(tmp_path, table(), ENVIRONMENT)
    assert (
        "| TensorRT FP16 | 224 | 256 | dali | test set | 18,000 | 17,600-18,400 | 20,000 | 90,000 |" in text
    )
    assert "| TensorRT FP16 | 224 | 1,000 | 1,000 | 1 | 2 | 3 | yes |" in text
    assert "![end to end](end_to_end.png)" in text and "![load](load.png)" in text
    served().drop(columns="decoder").to_csv(tmp_path / "end_to_end.csv", index=False)
    assert "end_to_end.png" not in {path.name for path in draw_all(table(), ENVIRONMENT, tmp_path)}
    (tmp_path / "load.csv").write_bytes(b"")
    text = readme.folder_readme(tmp_path, table(), ENVIRONMENT)
    for name in ("end_to_end.csv", "load.csv"):
        assert f"{name} is damaged or of an earlier version; python end_to_end.py makes it anew" in text
