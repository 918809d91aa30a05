"""The fine-tuning table and curves of README: every row is a `dbp_train.py` and a `dbpo_finetune.py` command, run here.

    python benchmark/dbpo.py --hopper PATH/hopper_medium_regenerated.hdf5 --only hopper     one group, 3 seeds, half an hour
    python benchmark/dbpo.py --only lift --seeds 0                           RoboMimic's, from a weak start, half an hour
    python benchmark/dbpo.py --print                                                        the table of what there is

Seeds {0, 1, 2}; final scores over 100 starts that no choice has seen (seeds 100,000 on). Lines go to benchmark/results/dbpo.jsonl
with the evaluations of the training, (environment steps, seconds, score); a line that is there is not run again, a run that was
cut is resumed. Stage 1 of each task and seed is trained once and shared by its groups, where they run in one checkout.
Picture: benchmark/pictures/dbpo.png.
"""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import record
import tyro

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results" / "dbpo.jsonl"
RUNS = ROOT / "runs" / "benchmark"
FREE = ["--anchor", "0"]
LONGER = ["--env-steps", "800000"]  # Can still rises at the 500,000 of the default


def weak(steps: int) -> list[str]:
    """A deliberately weak start, with about half of the successes: a training that has hardly begun."""
    return ["--steps", str(steps), "--eval-every", str(steps), "--warmup", "50"]


GROUPS = {  # name: (task, demonstrations, flags of dbp_train.py, of dbpo_finetune.py); HOPPER and HUMAN stand for the paths given
    "hopper": ("hopper-medium-v2", "HOPPER", [], []),
    "hopper-no-anchor": ("hopper-medium-v2", "HOPPER", [], FREE),
    "walker2d": ("walker2d-medium-v2", "embedded", [], []),
    "walker2d-no-anchor": ("walker2d-medium-v2", "embedded", [], FREE),
    "halfcheetah": ("halfcheetah-medium-v2", "embedded", [], []),
    "halfcheetah-no-anchor": ("halfcheetah-medium-v2", "embedded", [], FREE),
    "ant": ("ant-medium-v2", "embedded", [], []),
    "ant-no-anchor": ("ant-medium-v2", "embedded", [], FREE),
    "pusht": ("pusht", "HUMAN", [], []),
    "lift": ("lift", "scripted:20", weak(40), []),
    "lift-no-anchor": ("lift", "scripted:20", weak(40), FREE),
    "can": ("can", "scripted:20", weak(150), LONGER),
    "can-no-anchor": ("can", "scripted:20", weak(150), LONGER + FREE),
}


@dataclasses.dataclass(frozen=True)
class Config:
    hopper: str = ""  # path of hopper_medium_regenerated.hdf5
    human: str = ""  # path of the published human Push-T demonstrations
    only: str = ""  # run one group only; empty: all
    seeds: tuple[int, ...] = (0, 1, 2)  # training seeds
    print: bool = False  # print the table and draw the picture of what there is, run nothing


def curve(out: Path) -> list[list[float]]:
    with open(out / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["score"]]
    return [[int(row["step"]), round(float(row["seconds"]), 1), round(float(row["score"]), 4)] for row in rows]


def table(rows: list[dict]) -> str:
    lines = [
        "| run | seed | stage 1 | after 1 million steps | final, 100 episodes | 95 % interval | success | steps | wall time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for group in GROUPS:
        mine = sorted((row for row in rows if row["group"] == group), key=lambda row: row["train_seed"])
        for row in mine:
            steps = row["curve"][-1][0]
            before = [score for step, _, score in row["curve"] if step <= 1_000_000]
            million = f"{before[-1]:,.4g}" if steps >= 1_000_000 else "-"
            low, high = record.interval(row)
            lines.append(
                f"| {group} | {row['train_seed']} | {row['stage1']:,.4g} | {million} | {row['score']:,.4g} | {low:,.4g} to "
                f"{high:,.4g} | {row['success_rate']:.2f} | {steps / 1e6:.1f} M | {row['wall_s'] / 60:.1f} min |"
            )
        if len(mine) > 1:
            final, stage1 = (np.array([row[name] for row in mine]) for name in ("score", "stage1"))
            worst = min(score for row in mine for _, _, score in row["curve"])
            mean = np.mean([score for row in mine for _, _, score in row["curve"]])
            success, wall = (np.mean([row[name] for row in mine]) for name in ("success_rate", "wall_s"))
            lines.append(
                f"| **{group}** | {len(mine)} seeds | {stage1.mean():,.4g} | evaluations: mean {mean:,.4g}, worst {worst:,.4g} | "
                f"**{final.mean():,.4g}** | std {final.std(ddof=1):,.3g} | {success:.2f} | | {wall / 60:.1f} min |"
            )
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """Evaluations over environment steps, one panel per task, with and without the anchor; one thin line per seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(GROUPS[row["group"]][0] for row in rows))
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.5 * len(tasks), 3.4), layout="constrained", squeeze=False)
    for ax, task in zip(axes[0], tasks, strict=True):
        for row in (row for row in rows if GROUPS[row["group"]][0] == task):
            free = row["group"].endswith("no-anchor")
            steps, _, scores = zip(*row["curve"], strict=True)
            name = "without the anchor" if free else "DBPO"
            label = name if row["train_seed"] == 0 else None
            ax.plot(np.array(steps) / 1e6, scores, color="tab:orange" if free else "tab:blue", lw=1, label=label)
        ax.set(title=task, xlabel="million environment steps", ylim=(0.8, 1) if task == "pusht" else (0, None))
        ax.grid(alpha=0.3)
        ax.legend(loc="lower right")
    axes[0, 0].set_ylabel("score")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    cfg = tyro.cli(Config, description=__doc__.split("\n")[0])
    record.check_known(cfg.only, GROUPS)
    done = {(row["group"], row["train_seed"]) for row in record.read(RESULTS)}
    jobs = [(g, s) for g in GROUPS for s in cfg.seeds if (g, s) not in done and cfg.only in ("", g)]
    for group, seed in [] if cfg.print else jobs:
        task, source, training, flags = GROUPS[group]
        demos = {"HOPPER": cfg.hopper, "HUMAN": cfg.human}.get(source, source)
        stage1 = RUNS / f"{task}-stage1-{seed}"
        before = record.run("dbp_train.py", stage1, ["--env", task, "--demos", demos, "--seed", str(seed), *training])
        out = RUNS / f"dbpo-{group}-{seed}"
        line = record.run("dbpo_finetune.py", out, ["--env", task, "--ckpt", str(stage1 / "dbp.pt"), "--seed", str(seed), *flags])
        extra = {"stage1": before["score"], "stage1_success": before["success_rate"], "curve": curve(out)}
        record.append(RESULTS, {"group": group, "train_seed": seed}, {**line, **extra})
    rows = record.read(RESULTS)
    print(table(rows))
    if rows:
        draw(rows, ROOT / "benchmark" / "pictures" / "dbpo.png")


if __name__ == "__main__":
    main()
