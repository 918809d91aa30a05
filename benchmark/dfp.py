"""The off-policy table and curves of README: every row is a `dfp_finetune.py` command, run here.

    python benchmark/dfp.py --only cube-single-task2     one group, 2 seeds, about 40 minutes each on one core
    python benchmark/dfp.py --print                      the tables of what there is, and the picture

The offline success is that of the policy at the end of the offline phase, then come the best evaluation's policy and the last
one, all over 50 starts that no choice has seen (seeds 100,000 on); the return is minus the steps until success. The cubes have
200 episodes of play (200,000 steps) of OGBench's own oracle, recorded here, Push-T the embedded demonstrations. The rivals and
the numbers K are compared `early`: from 4,000 offline updates, before the critics' choice alone solves the task, over 12,000
online steps. Groups of one task that differ online alone share their offline phase. Lines go to benchmark/results/dfp.jsonl
with the evaluations of the training, (step, seconds, success, train success); a line that is there is not run again, a run that
was cut is resumed.
"""

from __future__ import annotations

import csv
import dataclasses
import shutil
import sys
from pathlib import Path

import numpy as np
import record
import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import evaluate

RESULTS = ROOT / "benchmark" / "results" / "dfp.jsonl"
RUNS = ROOT / "runs" / "benchmark"
RIVALS = ("best-of-n", "random-k", "gradient")
PUBLISHED_K = {1: (99.7, 85.8), 2: (100.0, 91.9), 4: (99.7, 95.6), 8: (99.8, 92.5)}  # cube-double, average of 12 tasks; N = 16
COMPARED = "cube-single-task2, early"  # with its rivals and other numbers K; its own is 4
OF_RIVALS = {rival: f"{COMPARED}, {rival}" for rival in RIVALS}
OF_K = {k: COMPARED if k == 4 else f"{COMPARED}, K = {k}" for k in PUBLISHED_K}
FULL, EARLY = (20_000, 20_000, 10_000), (4_000, 12_000, 4_000)  # updates offline, steps online, between evaluations
GROUPS = {  # name: (task, numbers above, flags of dfp_finetune.py)
    **{f"cube-single-task{k}": (f"cube-single-task{k}", FULL, []) for k in range(1, 6)},
    COMPARED: ("cube-single-task2", EARLY, []),
    **{group: ("cube-single-task2", EARLY, ["--method", rival]) for rival, group in OF_RIVALS.items()},
    **{group: ("cube-single-task2", EARLY, ["--positives", str(k)]) for k, group in OF_K.items() if k != 4},
    "pusht": ("pusht", FULL, []),
}


@dataclasses.dataclass(frozen=True)
class Config:
    only: tuple[str, ...] = ()  # groups to run; empty: all
    seeds: tuple[int, ...] = (0, 1)  # training seeds
    print: bool = False  # print the tables and draw the picture of what there is, run nothing


def curve(out: Path) -> list[list[float]]:
    """(step, seconds, success, success of training episodes since the last one) of every evaluation."""
    with open(out / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    points, training = [], []
    for row in rows:
        training += [float(row["episode_success"])] if row["episode_success"] else []
        if row["success_rate"]:
            practice = round(float(np.mean(training)), 3) if training else None
            points.append([int(row["step"]), round(float(row["seconds"]), 1), round(float(row["success_rate"]), 4), practice])
            training = []
    return points


def table(rows: list[dict]) -> str:
    lines = [
        "| run | seed | offline | after online steps: best evaluation's | 95 % interval | the last one | "
        "return, offline -> last | wall time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for group in GROUPS:
        if not any(row["group"] == group for row in rows):
            lines.append(f"| {group} | - | not run | - | - | - | - | - |")
        mine = sorted((row for row in rows if row["group"] == group), key=lambda row: row["train_seed"])
        for row in mine:
            share, episodes = row["success_rate"], row["episodes"]
            low, high = evaluate.interval95(1.0 * (np.arange(episodes) < round(share * episodes)))
            lines.append(
                f"| {group} | {row['train_seed']} | {row['offline_success']:.2f} | {share:.2f} | "
                f"{max(low, 0):.2f} to {min(high, 1):.2f} | {row['last_success']:.2f} | "
                f"{row['offline_return']:.3g} -> {row['last_return']:.3g} | "
                f"{row['wall_s'] / 60:.0f} min |"
            )
    return "\n".join(lines)


def table_of_k(rows: list[dict]) -> str:
    lines = [
        f"| K of N = 16 | {COMPARED}: best evaluation's, mean (seeds) | the last one | return of the last one | "
        "published: cube-double / average |",
        "|---|---|---|---|---|",
    ]
    for k, (double, average) in PUBLISHED_K.items():
        mine = [(row["success_rate"], row["last_success"], row["last_return"]) for row in rows if row["group"] == OF_K[k]]
        ours = "not run | - | -"
        if mine:
            best, last, back = np.mean(mine, axis=0)
            ours = f"{best:.2f} ({len(mine)}) | {last:.2f} | {back:.0f}"
        lines.append(f"| {k} | {ours} | {double} / {average} |")
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """Evaluations over steps, the mean of the seeds: tasks, rivals, K. They begin with the policy of the offline phase."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "from data to practice": {group: group for group, (_, steps, _) in GROUPS.items() if steps == FULL},
        f"{COMPARED}: rivals": {COMPARED: "DFP", **{group: rival for rival, group in OF_RIVALS.items()}},
        f"{COMPARED}: K of 16": {group: f"K = {k}" for k, group in OF_K.items()},
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.4), layout="constrained")
    for ax, (title, groups) in zip(axes, panels.items(), strict=True):
        for number, (group, label) in enumerate(groups.items()):
            curves = [row["curve"] for row in rows if row["group"] == group]
            if not curves:
                continue
            offline = GROUPS[group][1][0]
            points = np.array([[(step, score) for step, _, score, _ in curve if step >= offline] for curve in curves])
            x, y = points[0, :, 0] - offline, points[:, :, 1]
            ax.plot(x / 1e3, y.mean(0), "o-", ms=3, color=f"C{number}", label=f"{label} ({len(curves)})")
            ax.fill_between(x / 1e3, y.min(0), y.max(0), color=f"C{number}", alpha=0.12)
        ax.set(title=title, xlabel="thousand steps online", ylim=(-0.02, 1.05))
        ax.grid(alpha=0.3)
        if ax.lines:
            ax.legend(loc="lower right", fontsize=8)
    axes[0].set_ylabel("success of 30 starts, mean (seeds)")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    cfg = tyro.cli(Config, description=__doc__.split("\n")[0])
    for group in cfg.only:
        record.check_known(group, GROUPS)
    done = {(row["group"], row["train_seed"]) for row in record.read(RESULTS)}
    jobs = [(g, s) for g in cfg.only or GROUPS for s in cfg.seeds if (g, s) not in done]
    for group, seed in [] if cfg.print else jobs:
        task, (offline_steps, online_steps, eval_every), flags = GROUPS[group]
        out = RUNS / f"dfp-{group.replace(', ', '-').replace(' = ', '')}-{seed}"
        common = ["--env", task, "--seed", str(seed), "--offline-steps", str(offline_steps), "--eval-every", str(eval_every)]
        if "gradient" not in flags and not out.exists():  # the others differ online alone: one offline phase serves them all
            offline = RUNS / f"dfp-{task}-offline{offline_steps}-{seed}"
            record.run("dfp_finetune.py", offline, [*common, "--online-steps", "0"])
            shutil.copytree(offline, out, ignore=shutil.ignore_patterns("result.json", "rollout.gif"))
        line = record.run("dfp_finetune.py", out, [*common, "--online-steps", str(online_steps), *flags])
        record.append(RESULTS, {"group": group, "train_seed": seed}, {**line, "curve": curve(out)})
    rows = record.read(RESULTS)
    print(table(rows) + "\n\n" + table_of_k(rows))
    if rows:
        draw(rows, ROOT / "benchmark" / "pictures" / "dfp.png")


if __name__ == "__main__":
    main()
