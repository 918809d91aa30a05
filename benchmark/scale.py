"""More processes, and more memory: torchrun with 1 and 2 processes in turn; time and memory of a training step over B, G and S.

    python benchmark/scale.py                            six minutes; one thread per process; leave the machine alone meanwhile
    python benchmark/scale.py --processes 1 2 4 8        where there are so many cores or GPUs
    python benchmark/scale.py --steps 300 --rounds 1     does it run? two minutes
    python benchmark/scale.py --print                    the tables of what there is

Speed: `torchrun --nproc-per-node N dbp_train.py` with the preset fast, once with the preset's minibatch, of which every process
takes its share (the gradient is that of one process, tests/test_cli.py), and once with as much for every process as one has
alone. Samples per second are those between the rows of metrics.csv, without start and evaluations. Memory: what a step allocates,
at its peak; weights, average and optimiser are there before. r_T and r_M are the paper's Eq. (58): time and memory of a step over
those at G = 1, the same B. Writes benchmark/results/scale.json.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import latency
import numpy as np
import record
import torch
import tyro

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results" / "scale.json"
RUN = ROOT / "runs" / "benchmark" / "scale"
BATCHES, HYPOTHESES = (32, 128, 512), (1, 2, 4, 8, 16)  # the paper's G; its B go to what 24 GB hold
HORIZONS = (16, 64, 256)  # S = 2 Tp
LOGGED = 100  # steps between rows of metrics.csv, see dbp_train.LOG_EVERY


@dataclasses.dataclass(frozen=True)
class Config:
    processes: tuple[int, ...] = (1, 2)  # numbers of processes
    steps: int = 600  # of each training
    rounds: int = 2  # trainings of each number of processes, in turn
    device: str = "cpu"  # or cuda
    print: bool = False  # print the tables of what there is, measure nothing


def samples_per_second(processes: int, B: int, cfg: Config) -> float:
    """Of `dbp_train.py` in so many processes that share minibatches of B."""
    shutil.rmtree(RUN, ignore_errors=True)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "dbp_train.py"]
    flags = {"steps": cfg.steps, "eval-every": cfg.steps, "save-every": cfg.steps, "device": cfg.device, "out": RUN}
    flags |= {"batch-size": B, "eval-episodes": 1, "report-episodes": 1, "precision": "float32"}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    command = [*launch, *words]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    with open(RUN / "metrics.csv", newline="") as file:
        seconds = {int(row["step"]): float(row["seconds"]) for row in csv.DictReader(file)}
    last = cfg.steps - LOGGED  # the last row holds an evaluation
    return B * (last - LOGGED) / (seconds[last] - seconds[LOGGED])


def cell(B: int, G: int, horizon: int, device: str) -> dict:
    """Milliseconds of a training step, and the megabytes that are alive at its peak beside weights, average and optimiser."""
    train = dataclasses.replace(latency.settings("fast"), batch_size=B, hypotheses=G, horizon=horizon)
    step = latency.make_step(train, device, latency.our_loss)
    for _ in range(3):
        step()
    times = [latency.seconds_of(step) for _ in range(10)]
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        peak = torch.cuda.max_memory_allocated() - held
    else:
        with tempfile.NamedTemporaryFile(suffix=".json") as file:  # the allocator's own record of the step
            activities = [torch.profiler.ProfilerActivity.CPU]
            with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
                step()
            profile.export_chrome_trace(file.name)
            events = json.loads(Path(file.name).read_text())["traceEvents"]
        live: dict[int, int] = {}  # address: bytes, of what this step allocated
        peak = 0
        for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
            address, size = event["args"]["Addr"], event["args"]["Bytes"]
            live.pop(address, None) if size < 0 else live.update({address: size})
            peak = max(peak, sum(live.values()))
    return {"B": B, "G": G, "S": 2 * horizon, "ms": round(1e3 * float(np.median(times)), 2), "MB": round(peak / 1e6, 2)}


def cells(device: str) -> list[dict]:
    torch.set_num_threads(1)
    wanted = [(B, G, HORIZONS[0]) for B in BATCHES for G in HYPOTHESES]
    wanted += [(BATCHES[1], 4, horizon) for horizon in HORIZONS[1:]]
    return [cell(*sizes, device) for sizes in wanted]


def table(result: dict) -> str:
    lines = ["| processes, one thread each | minibatch | samples per second | against one |", "|---|---|---|---|"]
    base = result["speeds"][0]["samples_per_second"]
    for row in result["speeds"]:
        speed = row["samples_per_second"]
        lines.append(f"| {row['processes']} | {row['B']} | {speed:,.0f} | {speed / base:.2f} times |")
    rows = {(row["B"], row["G"], row["S"]): row for row in result["cells"]}
    S = 2 * HORIZONS[0]
    heads = " | ".join(f"G = {G}" for G in HYPOTHESES)
    lines += ["", f"| a training step, S = {S}: ms, r_T; MB, r_M | {heads} |", "|---" * (1 + len(HYPOTHESES)) + "|"]
    for B in BATCHES:
        base = rows[B, 1, S]
        texts = [
            f"{row['ms']:.1f}, {row['ms'] / base['ms']:.2f}; {row['MB']:.1f}, {row['MB'] / base['MB']:.2f}"
            for row in (rows[B, G, S] for G in HYPOTHESES)
        ]
        lines.append(f"| B = {B} | {' | '.join(texts)} |")
    B = BATCHES[1]
    lines += ["", f"| a training step, B = {B}, G = 4 | ms | MB |", "|---|---|---|"]
    lines += [f"| S = {2 * h} | {rows[B, 4, 2 * h]['ms']:.1f} | {rows[B, 4, 2 * h]['MB']:.1f} |" for h in HORIZONS]
    return "\n".join(lines)


def main() -> None:
    cfg = tyro.cli(Config, description=__doc__.split("\n")[0])
    if cfg.steps < 3 * LOGGED and not cfg.print:
        sys.exit(f"error: --steps is {cfg.steps}; it must be at least {3 * LOGGED}")
    if not cfg.print:
        B = latency.settings("fast").batch_size
        pairs = dict.fromkeys(((1, B), *((n, B * k) for n in cfg.processes for k in (1, n))))  # each once, one process first
        speeds: dict[tuple[int, int], list[float]] = {pair: [] for pair in pairs}
        for _ in range(cfg.rounds):
            for (number, size), measured in speeds.items():
                measured.append(samples_per_second(number, size, cfg))
        result = {**record.stamp(), "torch": torch.__version__, "device": cfg.device}
        result["speeds"] = [
            {"processes": n, "B": b, "samples_per_second": round(float(np.median(measured)), 1)}
            for (n, b), measured in speeds.items()
        ]
        RESULTS.write_text(json.dumps({**result, "cells": cells(cfg.device)}, indent=1) + "\n")
    elif not RESULTS.is_file():
        sys.exit(f"error: there is no {RESULTS.relative_to(ROOT)} yet; run without --print")
    print(table(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
