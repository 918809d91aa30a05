"""The off-policy table and curves of README: every row is a `dfp_finetune.py` command, run here.

    python benchmark/dfp.py --only cube-single-task2     one group, 2 seeds, about 40 minutes each on one core
    python benchmark/dfp.py --only adroit-pen --adroit PATH --seeds 0 1 2     with PATH/adroit_pen_expert.npz; 30 minutes each
    python benchmark/dfp.py --print                      the tables of what there is, and the picture

The offline success is that of the policy at the end of the offline phase, then come the best evaluation's policy and the last
one, and what the last one does alone, with the one chunk of one latent of std 1, without the critics' choice, all over 100 starts
that no choice has seen (seeds 100,000 on); the return is the environment's: of a cube minus the steps
until success, of Push-T 1 for success and a tenth of the coverage gained, of the pen 1 for success. The cubes have 200 episodes
of play (200,000 steps) of OGBench's own oracle, recorded here, Push-T the embedded demonstrations, Adroit's pen ten successes of
a published expert. The rivals and the numbers K are compared on task 1, two of the rivals on the pen, too.
Groups of one task that differ online alone share their offline phase. Lines go to benchmark/results/dfp.jsonl with the
evaluations of the training, (step, seconds, success, train success, return); a line that is there is not run again, a run that
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
COMPARED = "cube-single-task1"  # with its rivals and other numbers K; its own is 4
OF_RIVALS = {rival: f"{COMPARED}, {rival}" for rival in RIVALS}
OF_K = {k: COMPARED if k == 4 else f"{COMPARED}, K = {k}" for k in PUBLISHED_K}
OF_PEN = {"adroit-pen": "DFP", **{f"adroit-pen, {rival}": rival for rival in ("best-of-n", "random-k")}}
OFFLINE, ONLINE = 20_000, 20_000  # updates, then environment steps
STEPS = ["--offline-steps", str(OFFLINE), "--online-steps", str(ONLINE), "--eval-every", "10000", "--report-episodes", "100"]
PEN = ["--offline-steps", "5000", "--online-steps", "120000", "--start-after", "10000", "--eval-episodes", "50"]
PEN += ["--num-envs", "16", "--updates-per-step", "0.1", "--clone", "successes", "--latent-scale", "0.5", "--explore", "0.2"]
SMOOTH = ["--backbone", "tanh", "--state-scale", "std", "--cond-width", "512", "--horizon", "3"]  # as the pen's stage 1
SMOOTH += ["--online-steps", "160000", "--eval-every", "20000", "--eval-episodes", "100", "--report-episodes", "200"]
OF_SMOOTH = {"adroit-pen, smooth": "dfp", "adroit-pen, smooth, best-of-n": "best-of-n"}
GROUPS = {  # name: (task, flags of dfp_finetune.py)
    COMPARED: (COMPARED, []),
    **{group: (COMPARED, ["--method", rival]) for rival, group in OF_RIVALS.items()},
    **{group: (COMPARED, ["--positives", str(k)]) for k, group in OF_K.items() if k != 4},
    **{f"cube-single-task{k}": (f"cube-single-task{k}", []) for k in range(2, 6)},
    "pusht": ("pusht", []),
    **{group: ("adroit-pen", [*PEN, "--method", method.lower()]) for group, method in OF_PEN.items()},
    **{group: ("adroit-pen", [*PEN, *SMOOTH, "--method", method]) for group, method in OF_SMOOTH.items()},
}
BY_EXPERT = {*OF_PEN, *OF_SMOOTH}  # their demonstrations come from a published expert, --adroit


@dataclasses.dataclass(frozen=True)
class Config:
    only: tuple[str, ...] = ()  # groups to run; empty: all
    seeds: tuple[int, ...] = (0, 1)  # training seeds
    adroit: str = ""  # folder of the published experts' npz files
    print: bool = False  # print the tables and draw the picture of what there is, run nothing


def curve(out: Path) -> list[list[float]]:
    """(step, seconds, success, success of training episodes since the last one, return) of every evaluation."""
    with open(out / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    points, training = [], []
    for row in rows:
        training += [float(row["episode_success"])] if row["episode_success"] else []
        if row["success_rate"]:
            practice = round(float(np.mean(training)), 3) if training else None
            seconds, success, mean_return = (round(float(row[name]), 4) for name in ("seconds", "success_rate", "mean_return"))
            points.append([int(row["step"]), seconds, success, practice, mean_return])
            training = []
    return points


def table(rows: list[dict]) -> str:
    lines = [
        "| run | seed | offline | kept: the best evaluation's, offline ones included | 95 % interval | the last one | "
        "return, offline -> last | the last one alone, return | wall time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for group in GROUPS:
        if not any(row["group"] == group for row in rows):
            lines.append(f"| {group} | - | not run | - | - | - | - | - | - |")
        mine = sorted((row for row in rows if row["group"] == group), key=lambda row: row["train_seed"])
        for row in mine:
            again = sum(other["train_seed"] == row["train_seed"] for other in mine) > 1
            name = f"{group} ({row['date']})" if again else group
            share, episodes = row["success_rate"], row["episodes"]
            alone = f"{row['alone_success']:.2f}, {row['alone_return']:.3g}" if "alone_success" in row else "-"
            low, high = evaluate.share95(share, episodes)
            lines.append(
                f"| {name} | {row['train_seed']} | {row['offline_success']:.2f} | {share:.2f} | "
                f"{low:.2f} to {high:.2f} | {row['last_success']:.2f} | "
                f"{row['offline_return']:.3g} -> {row['last_return']:.3g} | {alone} | "
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
    """Evaluations (30 starts) over steps, the mean of the seeds: tasks, rivals, K. They begin with the offline phase's policy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {  # title: (number of a point, {group: label})
        "from data to practice": (2, {task: task for task in GROUPS if ", " not in task}),
        f"{COMPARED}: rivals": (4, {COMPARED: "DFP", **{group: rival for rival, group in OF_RIVALS.items()}}),
        f"{COMPARED}: K of 16": (4, {group: f"K = {k}" for k, group in OF_K.items()}),
        "adroit-pen: rivals": (2, OF_PEN),
    }
    run = {row["group"] for row in rows}
    panels = {title: (value, groups) for title, (value, groups) in panels.items() if run & set(groups)}
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.4), layout="constrained", squeeze=False)
    for ax, (title, (value, groups)) in zip(axes[0], panels.items(), strict=True):
        for number, (group, label) in enumerate(groups.items()):
            mine = [(row["offline_steps"], row["curve"]) for row in rows if row["group"] == group]
            curves = [[point for point in curve if point[0] >= offline] for offline, curve in mine]
            if not curves:
                continue
            x = (np.array([point[0] for point in curves[0]]) - mine[0][0]) / 1e3
            y = np.array([[point[value] for point in curve] for curve in curves])
            ax.plot(x, y.mean(0), "o-", ms=3, color=f"C{number}", label=f"{label} ({len(curves)})")
            ax.fill_between(x, y.min(0), y.max(0), color=f"C{number}", alpha=0.12)
        ax.set(title=title, xlabel="thousand steps online", ylabel="return" if value == 4 else "success")
        if value == 2:
            ax.set_ylim(-0.02, 1.05)
        ax.grid(alpha=0.3)
        ax.legend(loc="lower right", fontsize=8)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    cfg = tyro.cli(Config, description=__doc__.split("\n")[0])
    for group in cfg.only:
        record.check_known(group, GROUPS)
        if group in BY_EXPERT and not cfg.adroit and not cfg.print:
            sys.exit(f"--only {group!r} needs --adroit, the folder of the published experts' npz files")
    done = {(row["group"], row["train_seed"]) for row in record.read(RESULTS)}
    groups = cfg.only or [group for group in GROUPS if group not in BY_EXPERT or cfg.adroit]
    jobs = [(g, s) for g in groups for s in cfg.seeds if (g, s) not in done]
    for group, seed in [] if cfg.print else jobs:
        task, flags = GROUPS[group]
        out = RUNS / f"dfp-{group.replace(', ', '-').replace(' = ', '')}-{seed}"
        common = ["--env", task, "--seed", str(seed), *STEPS]
        if group in BY_EXPERT:
            flags = [*flags, "--demos", f"{cfg.adroit}/adroit_pen_expert.npz"]
        elif "gradient" not in flags and not out.exists():  # the others differ online alone: one offline phase serves them all
            offline = RUNS / f"dfp-{task}-offline{OFFLINE}-{seed}"
            record.run("dfp_finetune.py", offline, [*common, "--online-steps", "0"])
            shutil.copytree(offline, out, ignore=shutil.ignore_patterns("result.json", "rollout.gif"))
        line = record.run("dfp_finetune.py", out, [*common, *flags])
        record.append(RESULTS, {"group": group, "train_seed": seed}, {**line, "curve": curve(out)})
    rows = record.read(RESULTS)
    print(table(rows) + "\n\n" + table_of_k(rows))
    if rows:
        draw(rows, ROOT / "benchmark" / "pictures" / "dfp.png")


if __name__ == "__main__":
    main()
