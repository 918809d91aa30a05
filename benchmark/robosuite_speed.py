"""Lift's environment steps per second: one worker process per environment, several environments per worker, and none.

    python benchmark/robosuite_speed.py      two minutes; writes benchmark/results/robosuite_speed.json; needs robosuite

Eight environments, chunks of 8 random actions, the three in turn in one run, medians over rounds; and our controller loop
(robomimic_tasks.PandaArm) against robosuite's own step on one environment, actions in turn.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import record
import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import vector
from robomimic_tasks import Robosuite

NUM, CHUNK = 8, 8
MAKE = partial(Robosuite, "lift", False, "state")


def serve(pipe, number: int) -> None:
    """A worker with several environments, one after the other."""
    env = vector.GymVector(MAKE, number, 2)
    env.reset(list(range(number)))
    pipe.send("ready")
    while (chunks := pipe.recv()) is not None:
        pipe.send(env.step(chunks))


class Shared:
    """Environments in as many workers as there are processors."""

    def __init__(self, workers: int):
        self.pipes = []
        for _ in range(workers):
            mine, theirs = multiprocessing.Pipe()
            multiprocessing.Process(target=serve, args=(theirs, NUM // workers), daemon=True).start()
            self.pipes.append(mine)
        for pipe in self.pipes:
            pipe.recv()

    def step(self, chunks: np.ndarray) -> None:
        for pipe, share in zip(self.pipes, np.split(chunks, len(self.pipes)), strict=True):
            pipe.send(share)
        for pipe in self.pipes:
            pipe.recv()


def vectors(rounds: int = 9) -> dict[str, float]:
    rng = np.random.default_rng(0)
    every = {
        "one process": vector.GymVector(MAKE, NUM, 2),
        "a process per environment": vector.GymVector(MAKE, NUM, 2, processes=True),
        f"{os.cpu_count()} processes, {NUM // os.cpu_count()} environments each": Shared(os.cpu_count()),
    }
    for env in every.values():
        if isinstance(env, vector.GymVector):
            env.reset(list(range(NUM)))
    times: dict[str, list[float]] = {name: [] for name in every}
    for round_ in range(rounds + 1):
        chunks = rng.uniform(-0.3, 0.3, (NUM, CHUNK, 7)).astype(np.float32)
        for name, env in every.items():
            start = time.perf_counter()
            env.step(chunks)
            if round_:
                times[name].append(time.perf_counter() - start)
    return {name: round(NUM * CHUNK / float(np.median(t)), 1) for name, t in times.items()}


def loop(rounds: int = 100) -> dict[str, float]:
    """Milliseconds of one environment step, its observation included."""
    env, rng = MAKE(), np.random.default_rng(0)
    env.reset(seed=0)
    ours, theirs = [], []
    for _ in range(rounds):
        action = rng.uniform(-0.3, 0.3, 7)
        for step, times in ((env.step, ours), (env.sim_env.step, theirs)):
            start = time.perf_counter()
            step(action)
            times.append((time.perf_counter() - start) * 1e3)
    return {"ours_ms": round(float(np.median(ours)), 2), "robosuite_ms": round(float(np.median(theirs)), 2)}


def main() -> None:
    result = {**record.stamp(), "step": loop(), "steps_per_second": vectors()}
    (ROOT / "benchmark" / "results" / "robosuite_speed.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__.split("\n")[0])  # --help shall not begin to measure
