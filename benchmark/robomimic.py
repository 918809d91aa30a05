"""RoboMimic's table of README: policies trained on demonstrations of our own scripted experts, 50 unseen starts each.

    python benchmark/robomimic.py                        lift, can, square, transport; half an hour each on two cores
    python benchmark/robomimic.py --tasks lift-image     one task
    python benchmark/robomimic.py --experts 100          the experts alone, undisturbed, 100 starts from seed 100,000 on
    python benchmark/robomimic.py --print                the tables of what there is

Every row is one `dbp_train.py --env <task> --demos scripted` command; its final score is over starts that no choice has seen
(seeds 100,000 on). The expert's own success is that of the attempts in which its demonstrations were recorded. Lines go to
benchmark/results/robomimic.jsonl; a line that is there is not run again, a run that was cut is resumed.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import record
import tyro

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results" / "robomimic.jsonl"
EXPERTS = ROOT / "benchmark" / "results" / "robomimic_experts.jsonl"
sys.path.insert(0, str(ROOT))
import demos
import scripted
from robomimic_tasks import Robosuite


@dataclasses.dataclass(frozen=True)
class Config:
    tasks: tuple[str, ...] = ("lift", "can", "square", "transport")
    seeds: tuple[int, ...] = (0,)  # training seeds
    experts: int = 0  # measure the experts over so many starts, train nothing
    print: bool = False  # print the tables of what there is, run nothing


def table(rows: list[dict]) -> str:
    lines = [
        "| task | demonstrations | expert's success | seed | DBP, 50 episodes | 95 % interval | time per call | wall time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["task"], row["train_seed"])):
        low, high = record.interval(row)
        lines.append(
            f"| {row['task']} | {row['demos']} | {row['demos']} of {row['attempts']} | {row['train_seed']} | "
            f"{row['score']:.2f} | {low:.2f} to {high:.2f} | {row['latency_ms_p50']:.1f} ms | "
            f"{row['wall_s'] / 60:.0f} min |"
        )
    return "\n".join(lines)


def measure(task: str, episodes: int) -> dict:
    """The expert's own success, nobody pushing its hand."""
    env, outcomes = Robosuite(task, False, "state"), []
    for seed in range(100_000, 100_000 + episodes):
        rows, success = scripted.episode(env, seed, shake=0.0)
        outcomes.append((success, len(rows)))
    env.close()
    return {
        "episodes": episodes,
        "success_rate": float(np.mean([s for s, _ in outcomes])),
        "steps": float(np.mean([n for _, n in outcomes])),
    }


def main() -> None:
    cfg = tyro.cli(Config, description=__doc__.split("\n")[0])
    done = {(row["task"], row["train_seed"]) for row in record.read(RESULTS)}
    if cfg.experts and not cfg.print:
        for task in cfg.tasks:
            record.append(EXPERTS, {"task": task}, measure(task, cfg.experts))
            print(record.read(EXPERTS)[-1], flush=True)
        return
    for task, seed in [] if cfg.print else [(t, s) for s in cfg.seeds for t in cfg.tasks if (t, s) not in done]:
        flags = ["--env", task, "--demos", "scripted", "--seed", str(seed)]
        line = record.run("dbp_train.py", ROOT / "runs" / "benchmark" / f"{task}-{seed}", flags)
        with np.load(demos.embedded(task), allow_pickle=False) as file:
            extra = {"demos": len(file["episode_ends"]), "attempts": int(file["attempts"])}
        record.append(RESULTS, {"task": task, "train_seed": seed}, {**line, **extra})
    print(table(record.read(RESULTS)) + "\n")
    for row in record.read(EXPERTS):
        share, steps = f"{row['success_rate']:.2f} of {row['episodes']} episodes", f"{row['steps']:.0f} steps"
        print(f"expert of {row['task']}, undisturbed: {share}, {steps}")


if __name__ == "__main__":
    main()
