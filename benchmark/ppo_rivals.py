"""Fine-tuning rivals beside DBPO, on its code path: PPO on a Gaussian policy without latent, and on a one-step flow.

    python benchmark/ppo_rivals.py --hopper PATH/hopper_medium_regenerated.hdf5 --tasks hopper-medium-v2     45 minutes
    python benchmark/ppo_rivals.py --trial 12000 --seeds 0          does it run? two minutes, no row is written
    python benchmark/ppo_rivals.py --print                          the table of what there is, DBPO's rows (dbpo.py) among them

Stage 1 of each rival is its own objective (rivals/bc.py, rivals/flow.py) on the network, data and seconds of DBP's stage 1.
Stage 2 is dbpo_finetune.py with its settings for the task:

    gaussian    N(mu(o), sigma(o)): a checkpoint that acts with z = 0, so the actor has no latent
    flow        N(z + v(z, 0, o), sigma(o)): ppo_flow.py

Seeds {0, 1, 2}; final scores over 100 starts that no choice has seen (seeds 100,000 on). Lines go to
benchmark/results/ppo_rivals.jsonl; a line that is there is not run again, a run that was cut is resumed.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import baselines
import dbpo
import numpy as np
import record
import torch
import tyro

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results" / "ppo_rivals.jsonl"
RUNS = ROOT / "runs" / "benchmark"
sys.path.insert(0, str(ROOT))
from ppo_flow import OneStepFlow
from rivals.network import Rival

from policy import Policy

RIVALS = {  # name: (objective of stage 1, script of stage 2, std of the latents)
    "gaussian": ("bc", "dbpo_finetune.py", "0"),
    "flow": ("flow", "benchmark/ppo_flow.py", "1"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    tasks: tuple[str, ...] = ("hopper-medium-v2", "walker2d-medium-v2", "halfcheetah-medium-v2")
    rivals: tuple[str, ...] = tuple(RIVALS)  # gaussian, flow
    hopper: str = "embedded"  # path of hopper_medium_regenerated.hdf5, the data of DBPO's row
    seeds: tuple[int, ...] = (0, 1, 2)  # training seeds
    stage1_seconds: float = 60.0  # of training; about what DBP's 3,000 steps take
    trial: int = 0  # so many environment steps instead of the task's, to see that it runs; no row is written
    print: bool = False  # print the table of what there is, run nothing


def as_policy(rival: Rival, name: str) -> Policy:
    """The rival as a policy that dbpo_finetune.py or ppo_flow.py loads."""
    if name == "flow":
        return OneStepFlow.of(rival)
    policy = Policy(dataclasses.replace(rival.config, latent_scale=0.0))  # acts with z = 0, the one input that it was trained on
    policy.load_state_dict(rival.state_dict(), strict=True)
    return policy


def stage1(rival: str, task: str, demos: str, seed: int, cfg: Config) -> Path:
    """The pretrained checkpoint, trained where there is none."""
    path = RUNS / f"{'trial-' if cfg.trial else ''}{rival}-{task}-stage1-{seed}.pt"
    if not path.is_file():
        torch.manual_seed(seed)
        policy, seconds = baselines.make_policy(RIVALS[rival][0], "mlp", task), 5.0 if cfg.trial else cfg.stage1_seconds
        steps = baselines.training(policy, baselines.Config(demos=demos, seconds=seconds, device="cpu"))
        trained = next(average for _, spent, average, _ in steps if spent >= seconds)
        as_policy(trained, rival).save(path)
    return path


def table(rows: list[dict], ours: list[dict]) -> str:
    """rows: ppo_rivals.jsonl; ours: dbpo.jsonl."""
    lines = [
        "| task | method | seeds | stage 1, 20 selection starts | final, 100 episodes | std | mean of all evaluations |",
        "|---" * 7 + "|",
    ]
    mine = {task: group for group, (task, *_) in dbpo.GROUPS.items() if not group.endswith("no-anchor")}
    for task in dict.fromkeys(row["env"] for row in rows):
        sets = {"DBPO": [row for row in ours if row["group"] == mine.get(task)]}
        sets |= {f"PPO, {name}": [row for row in rows if (row["rival"], row["env"]) == (name, task)] for name in RIVALS}
        for name, runs in sets.items():
            if not runs:
                lines.append(f"| {task} | {name} | 0 | not run | | | |")
                continue
            final = np.array([row["score"] for row in runs])
            spread = f"{final.std(ddof=1):,.3g}" if len(final) > 1 else "-"
            before, on_the_way = np.mean([row["curve"][0][2] for row in runs]), np.mean([p[2] for r in runs for p in r["curve"]])
            lines.append(
                f"| {task} | {name} | {len(runs)} | {before:,.4g} | {final.mean():,.4g} | {spread} | {on_the_way:,.4g} |"
            )
    return "\n".join(lines)


def main() -> None:
    cfg = tyro.cli(Config, description=__doc__.split("\n")[0])
    torch.set_num_threads(1)
    done = {(row["rival"], row["env"], row["train_seed"]) for row in record.read(RESULTS)}
    jobs = [(rival, task, seed) for seed in cfg.seeds for task in cfg.tasks for rival in cfg.rivals]
    for rival, task, seed in [] if cfg.print else [job for job in jobs if job not in done]:
        demos = cfg.hopper if task.startswith("hopper") else "embedded"
        ckpt = stage1(rival, task, demos, seed, cfg)
        out = RUNS / f"{'trial-' if cfg.trial else ''}ppo-{rival}-{task}-{seed}"
        _, script, scale = RIVALS[rival]
        flags = ["--env", task, "--ckpt", str(ckpt), "--seed", str(seed), "--latent-scale", scale]
        if cfg.trial:
            flags += ["--env-steps", str(cfg.trial), "--eval-episodes", "2", "--report-episodes", "2"]
        line = record.run(script, out, flags)
        if not cfg.trial:
            key = {"rival": rival, "train_seed": seed, "demos": Path(demos).name}
            record.append(RESULTS, key, {**line, "curve": dbpo.curve(out)})
    print(table(record.read(RESULTS), record.read(dbpo.RESULTS)))


if __name__ == "__main__":
    main()
