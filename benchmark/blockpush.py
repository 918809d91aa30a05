"""The BlockPush table of README: a policy from the oracle's demonstrations, and whether it kept all of the oracle's ways.

    python benchmark/blockpush.py                     seed 0: training and evaluation, ten minutes on one core
    python benchmark/blockpush.py --seeds 0 1 2       three seeds
    python benchmark/blockpush.py --print             the table of what there is

Each seed is one `dbp_train.py --env blockpush` command and 50 episodes on the starts of its final score (seeds 100,000 on), the
same for the oracle. `ways` counts which block went first into which target. Lines go to benchmark/results/blockpush.jsonl; a
line that is there is not run again, a run that was cut is resumed.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import record
import tyro

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results" / "blockpush.jsonl"
sys.path.insert(0, str(ROOT))
import blockpush
import envs
import evaluate
from policy import Policy

WAYS = {f"block {b + 1}, target {t + 1}": (b, t) for b in range(2) for t in range(2)}


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: tuple[int, ...] = (0,)  # training seeds
    episodes: int = 50  # of the evaluation of each seed, and of the oracle
    print: bool = False  # print the table of what there is, run nothing


def line_of(score: np.ndarray, firsts: list) -> dict:
    """score (episodes,); firsts: (block, target) or None of each -> numbers of a result line."""
    ways = {name: sum(first == way for first in firsts) for name, way in WAYS.items()}
    return {"episodes": len(score), **evaluate.stage_shares(score, 2), "ways": ways}


def try_oracle(seeds: list[int]) -> dict:
    env, score, firsts = blockpush.BlockPush(), [], []
    for seed in seeds:
        obs, _ = env.reset(seed=seed)
        oracle, success, late = blockpush.Oracle(seed), False, False
        while not (success or late):
            obs, _, success, late, info = env.step(oracle(obs))
        score.append(info["score"])
        firsts.append(env.first)
    return line_of(np.array(score), firsts)


def try_policy(ckpt: Path, seeds: list[int]) -> dict:
    task, made = envs.get_task("blockpush"), []

    def make(num_envs: int, obs_steps: int):  # keeps the environments, which know more than their score
        made.append(task.make(num_envs, obs_steps))
        return made[-1]

    score = evaluate.rollout(Policy.load(ckpt), dataclasses.replace(task, make=make), seeds)["score"]
    return line_of(score, [first for env in made for first in env.vector.get_attr("first")])


def table(rows: list[dict]) -> str:
    lines = [f"| who | episodes | p1 | p2 | {' | '.join(f'{name} first' for name in WAYS)} |", "|---" * (4 + len(WAYS)) + "|"]
    for row in sorted(rows, key=lambda row: row["who"]):
        done = max(1, sum(row["ways"].values()))
        shares = " | ".join(f"{row['ways'][name] / done:.2f}" for name in WAYS)
        lines.append(f"| {row['who']} | {row['episodes']} | {row['p1']:.2f} | {row['p2']:.2f} | {shares} |")
    return "\n".join(lines)


def main() -> None:
    cfg = tyro.cli(Config, description=__doc__.split("\n")[0])
    done = {row["who"] for row in record.read(RESULTS)}
    starts = list(range(evaluate.REPORT_SEED, evaluate.REPORT_SEED + cfg.episodes))
    if not cfg.print and "oracle" not in done:
        record.append(RESULTS, {"who": "oracle"}, try_oracle(starts))
    for seed in [] if cfg.print else [seed for seed in cfg.seeds if f"policy, seed {seed}" not in done]:
        out = ROOT / "runs" / "benchmark" / f"blockpush-{seed}"
        trained = record.run("dbp_train.py", out, ["--env", "blockpush", "--seed", str(seed)])
        kept = {name: trained[name] for name in ("latency_ms_p50", "nfe", "parameters", "wall_s")}
        record.append(RESULTS, {"who": f"policy, seed {seed}"}, {**try_policy(out / "dbp.pt", starts), **kept})
    print(table(record.read(RESULTS)))


if __name__ == "__main__":
    main()
