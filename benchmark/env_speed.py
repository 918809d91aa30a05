"""Environment steps per second: our Locomotion beside gymnasium's SyncVectorEnv and AsyncVectorEnv, the same actions.

    python benchmark/env_speed.py                 two minutes; writes benchmark/results/env_speed.json

All three in one run, in turn, medians over rounds; ours in chunks of 4 as the training steps it, gymnasium's step by step. Ended
episodes start again within the timed region in all three.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import record
import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import locomotion
import vector

RESULTS = ROOT / "benchmark" / "results" / "env_speed.json"
CHUNK = 4


def ours(body: str, num_envs: int):
    env = locomotion.Locomotion(num_envs, 1, body)
    episodes = vector.Episodes(env, 0, 1)

    def run(actions: np.ndarray) -> None:
        for chunk in np.split(actions, len(actions) // CHUNK):  # (steps, N, Da)
            episodes.step(chunk.swapaxes(0, 1))

    return run, env.close


def gymnasium_vector(body: str, num_envs: int, vector: type):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = vector([lambda: gymnasium.make(locomotion.BODIES[body].gym_id)] * num_envs)
    env.reset(seed=0)

    def run(actions: np.ndarray) -> None:
        for action in actions:
            env.step(action)

    return run, env.close


def compare(body: str, num_envs: int, steps: int = 80, rounds: int = 9) -> dict:
    rivals = {
        "ours": ours(body, num_envs),
        "SyncVectorEnv": gymnasium_vector(body, num_envs, gymnasium.vector.SyncVectorEnv),
        "AsyncVectorEnv": gymnasium_vector(body, num_envs, gymnasium.vector.AsyncVectorEnv),
    }
    rng, times = np.random.default_rng(0), {name: [] for name in rivals}
    for round_ in range(rounds + 1):
        actions = rng.uniform(-1, 1, (steps, num_envs, locomotion.OBS_DIMS[body][1]))
        for name, (run, _) in rivals.items():
            start = time.perf_counter()
            run(actions)
            if round_ > 0:
                times[name].append(time.perf_counter() - start)
    for _, close in rivals.values():
        close()
    speeds = {name: round(steps * num_envs / statistics.median(seconds)) for name, seconds in times.items()}
    ratios = [min(s, a) / o for o, s, a in zip(*times.values(), strict=True)]
    return {"body": body, "num_envs": num_envs, **speeds, "ratio_to_the_better": round(statistics.median(ratios), 2)}


def table(result: dict) -> str:
    names = {"hopper": "Hopper", "walker2d": "Walker2d", "halfcheetah": "HalfCheetah", "ant": "Ant"}
    lines = ["| body | ours | SyncVectorEnv | AsyncVectorEnv | against the better |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        speeds = " | ".join(f"{row[name]:,}" for name in ("ours", "SyncVectorEnv", "AsyncVectorEnv"))
        lines.append(f"| {names[row['body']]} | {speeds} | {row['ratio_to_the_better']:.1f} times |")
    return "\n".join(lines)


def main() -> None:
    rows = [compare(body, 40) for body in locomotion.BODIES]
    result = {**record.stamp(), "gymnasium": gymnasium.__version__, "rows": rows}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__.split("\n")[0])  # --help shall not begin to measure
