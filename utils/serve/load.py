"""Latency under load: single images arrive at random, one worker serves what waits as a batch.

MLPerf's own load generator (mlcommons-loadgen) asks and judges: its Server scenario calls a rate VALID where
99 % of the images were answered within the limit, over enough images to know.  An image's latency begins when
it should have arrived and ends with its logits on the host: waiting, gathering into a batch, copying uint8
pixels, normalising, inference, copying back.  Reading and decoding are outside: the pixels lie in memory.
"""

import json
import os
import queue
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import torch

from utils.measure import timing
from utils.serve.pipeline import Network

QUERIES = 600  # images of a rate at least: 459 without a late one show 99 % (confidence 99 %)
HOPELESS_QUERIES = 100  # where one image alone takes longer than the limit
MIN_SECONDS = 2.0  # of a rate
SEARCH = 6, 60.0  # rates that are tried, seconds after which none is begun
FIRST_SHARE = 0.4  # of the throughput in full batches: the first rate


def generate(images: int, waiting: queue.SimpleQueue, **settings) -> dict:
    """Run the generator; its results by name.  Leaves no files.

    The samples' numbers and their images' indices, two lists, arrive in `waiting`.
    """
    import mlperf_loadgen

    asked = mlperf_loadgen.TestSettings()
    asked.scenario = mlperf_loadgen.TestScenario.Server
    asked.mode = mlperf_loadgen.TestMode.PerformanceOnly
    for name, value in settings.items():
        setattr(asked, name, value)
    # "Fast": lists of numbers, where the usual one makes an object of each of 200,000 samples.
    system = mlperf_loadgen.ConstructFastSUT(lambda *samples: waiting.put(samples), lambda: None)
    library = mlperf_loadgen.ConstructQSL(images, images, lambda _: None, lambda _: None)
    log, before = mlperf_loadgen.LogSettings(), Path.cwd()
    log.enable_trace = False
    log.log_output.outdir, log.log_output.copy_summary_to_stdout = ".", False
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # its C++ can't open a path with Cyrillic letters on Windows
        try:
            mlperf_loadgen.StartTestWithLogSettings(system, library, asked, log, "audit.config")
        finally:
            os.chdir(before)
        lines = Path(folder, "mlperf_log_detail.txt").read_text(encoding="utf-8").splitlines()
    mlperf_loadgen.DestroyQSL(library)
    mlperf_loadgen.DestroyFastSUT(system)
    entries = [json.loads(line.partition(" ")[2]) for line in lines if line.startswith(":::MLLOG")]
    return {entry["key"]: entry["value"] for entry in entries}


def server(network: Network, pixels, rate: float, max_latency_ms: float, queries: int) -> dict:
    """Offer single images at `rate` images/s and serve them; the generator's results.

    The generator has a thread of its own; this one stays the worker, since CUDA streams belong to threads.
    """
    import mlperf_loadgen

    waiting, told, largest, arrived = queue.SimpleQueue(), Future(), network.batch_sizes[-1], []
    settings = {"server_target_qps": rate, "server_target_latency_ns": int(max_latency_ms * 1e6)}
    settings |= {"server_target_latency_percentile": 0.99, "min_query_count": queries}
    settings["min_duration_ms"] = int(MIN_SECONDS * 1000)

    def offer() -> None:
        try:
            told.set_result(generate(len(pixels), waiting, **settings))
        except Exception as error:
            told.set_exception(error)
        waiting.put(None)

    threading.Thread(target=offer, daemon=True).start()  # if the worker fails, nobody waits for it
    batch = torch.empty(largest, *pixels.shape[1:], dtype=torch.uint8, pin_memory=network.device == "cuda")
    while True:
        while len(arrived) < largest and not (arrived and waiting.empty()):
            if (samples := waiting.get()) is None:  # all are answered, or the generator failed
                return told.result()
            arrived += zip(*samples, strict=True)
        taken, arrived = arrived[:largest], arrived[largest:]
        numbers, indices = zip(*taken, strict=True)
        torch.index_select(pixels, 0, torch.tensor(indices), out=batch[: len(taken)])
        network.finish(network.enqueue(batch[: len(taken)]))
        ready = [mlperf_loadgen.QuerySampleResponse(number, 0, 0) for number in numbers]
        mlperf_loadgen.QuerySamplesComplete(ready)


def batch_s(network: Network, pixels: torch.Tensor) -> float:
    """Seconds from pixels to logits on the host, one batch after another."""
    timed = timing.warm_up(lambda: network.finish(network.enqueue(pixels)), lambda: None, 10, MIN_SECONDS, 30)
    return timing.trimmed_mean(timed[len(timed) // 2 :]) / 1000


def measure(where: dict, network: Network, pixels: torch.Tensor, max_latency_ms: float) -> list[dict]:
    """Rates: upwards while VALID, then halving what lies between VALID and INVALID.

    The rows of load.csv; `where` has the first columns.  Where a batch of one takes longer than the limit,
    one rate shows it.
    """
    sys.setswitchinterval(0.0005)  # s; generator and worker share Python: neither shall keep the other
    hopeless = batch_s(network, pixels[:1]) * 1000 > max_latency_ms
    (tries, seconds), queries = ((1, 0), HOPELESS_QUERIES) if hopeless else (SEARCH, QUERIES)
    largest = network.batch_sizes[-1]
    low, high = 0.0, largest / batch_s(network, pixels[torch.arange(largest) % len(pixels)])
    rate, start, rows = FIRST_SHARE * high, time.perf_counter(), []
    for _ in range(tries):
        told = server(network, pixels, rate, max_latency_ms, queries)
        achieved, valid = told["result_completed_samples_per_sec"], told["result_validity"] == "VALID"
        row = {**where, "rate": rate, "achieved": achieved}  # images/s
        row |= {f"p{k}_ms": told[f"result_{k}.00_percentile_latency_ns"] / 1e6 for k in (50, 90, 99)}
        rows.append(row | {"valid": valid, "max_latency_ms": max_latency_ms})
        low, high = (rate, high) if valid else (low, rate)
        rate = (low + high) / 2
        if time.perf_counter() - start > seconds:
            break
    return rows
