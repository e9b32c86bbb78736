"""Latency under load, by MLPerf's own generator."""

import importlib.util

import pytest
import torch

import backends
from utils.backend import inference
from utils.report import tables
from utils.serve import load
from utils.serve.pipeline import Network

MISSING = importlib.util.find_spec("mlperf_loadgen") is None
pytestmark = pytest.mark.skipif(MISSING, reason="mlcommons-loadgen is not installed")


@pytest.fixture
def network(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "MIN_SECONDS", 0.3)
    monkeypatch.setattr(load, "QUERIES", 30)
    monkeypatch.setattr(load, "SEARCH", (2, 5.0))
    checkpoint = project / "weights" / "best_resnet18_64.pth"
    backend = backends.make("onnx")
    with inference("cpu"):
        backend.load(checkpoint, 64, [1, 4], "cpu")
        yield Network(backend, [1, 4], 64, "cpu")
    assert list(tmp_path.iterdir()) == []  # the generator's logs are gone


WHERE = {"sweep": "main", "backend": "onnx", "precision": "FP32", "image_size": 64, "batch_size_max": 4}


def pictures(count: int = 6) -> torch.Tensor:
    return torch.randint(0, 255, (count, 64, 64, 3), dtype=torch.uint8)


def test_rates_with_their_percentiles(network, monkeypatch):
    monkeypatch.setattr(load, "batch_s", lambda network, pixels: len(pixels) / 200)
    rows = load.measure(WHERE, network, pictures(), max_latency_ms=60_000)  # nothing can be late
    assert len(rows) in (1, 2)
    assert rows[0]["rate"] == pytest.approx(load.FIRST_SHARE * 200)
    assert all(0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"] for row in rows)
    assert {*tables.SERVING["load.csv"].split()} <= {*rows[0], "cores", "date"}


def test_where_one_image_takes_longer_than_the_limit_one_rate_shows_it(network, monkeypatch):
    monkeypatch.setattr(load, "HOPELESS_QUERIES", 5)
    rows = load.measure(WHERE, network, pictures(), max_latency_ms=0.001)
    assert len(rows) == 1 and not rows[0]["valid"]


def test_every_image_is_answered_once_and_batches_stay_within_the_largest(network):
    sizes, enqueue = [], network.enqueue

    def watched(pixels):
        sizes.append(len(pixels))
        return enqueue(pixels)

    network.enqueue = watched
    told = load.server(network, pictures(), rate=300.0, max_latency_ms=1000.0, queries=90)
    assert told["result_query_count"] == sum(sizes) >= 90 and max(sizes) <= 4


def test_a_generator_that_fails_ends_the_worker_too(network, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no generator")

    monkeypatch.setattr(load, "generate", fail)
    with pytest.raises(RuntimeError, match="no generator"):
        load.server(network, pictures(), rate=300.0, max_latency_ms=1000.0, queries=90)


def test_the_generator_is_given_no_path_that_c_plus_plus_can_not_open(network, monkeypatch, tmp_path_factory):
    import mlperf_loadgen

    asked, settings = [], mlperf_loadgen.LogSettings
    monkeypatch.setattr(mlperf_loadgen, "LogSettings", lambda: asked.append(settings()) or asked[-1])
    monkeypatch.setattr(load.tempfile, "tempdir", str(tmp_path_factory.mktemp("Журнал")))
    told = load.server(network, pictures(), rate=300.0, max_latency_ms=1000.0, queries=30)
    assert told["result_query_count"] >= 30 and asked[0].log_output.outdir.isascii()
