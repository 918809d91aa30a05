"""The point-cloud table of README: Meta-World from 10 episodes of its scripted experts, Adroit from 10 of published experts.

    python benchmark/pointcloud.py                                     the eight tasks, two per group, that two cores can do
    python benchmark/pointcloud.py --tasks all --seeds 0 1 2           all 50 of Meta-World, unattended; wants a GPU
    python benchmark/pointcloud.py --tasks all --steps 2000 --episodes 50 --jobs 15     seven minutes of an H200 and 16 cores
    python benchmark/pointcloud.py --tasks adroit --adroit PATH        PATH/adroit_<task>_expert.npz for door and pen
    python benchmark/pointcloud.py --tasks basketball hammer --protocol papers          the papers' way of counting
    python benchmark/pointcloud.py --print                             the table of what there is

Every row is one `dbp_train.py --env <task>-points` command; its final score is over --episodes starts that no choice has seen
(seeds 100,000 on). Lines go to benchmark/results/pointcloud.jsonl; a line that is there is not run again, a run that was cut is
resumed. The paper follows MP1 with 34 of the tasks and does not list them; the groups here are DP3's.
--protocol papers counts as DP3 and MP1 do, the mean of the five best of ten evaluations of 20 episodes; these rows have a table
of their own, which sets the kept policy's score over unseen starts beside it.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Literal

import numpy as np
import record
import tyro

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results" / "pointcloud.jsonl"
RUNS = ROOT / "runs" / "benchmark"
sys.path.insert(0, str(ROOT))
from manipulation import METAWORLD

PUBLISHED = {"easy": 91.7, "medium": 90.3, "hard": 75.2, "very hard": 86.7}  # DBP in its paper, averages in %
IN_PAPER = {"easy": 21, "medium": 4, "hard": 4, "very hard": 5}  # how many tasks of each group these are averages of
ADROIT = ["adroit-door", "adroit-pen"]
EIGHT = ["button-press", "reach-wall", "basketball", "hammer", "assembly", "push", "disassemble", "stick-pull"]


@dataclasses.dataclass(frozen=True)
class Config:
    tasks: tuple[str, ...] = ("eight",)  # names of Meta-World's tasks, adroit-door, adroit-pen, or eight, all, adroit
    seeds: tuple[int, ...] = (0,)  # training seeds
    episodes: int = 100  # of the final evaluation; the papers have 20
    adroit: str = ""  # folder of the published experts' npz files
    device: str = "auto"
    steps: int = 0  # gradient steps of each training; 0: the task's own number
    protocol: Literal["ours", "papers"] = "ours"  # papers: their way of counting, into a table of its own
    jobs: int = 1  # trainings at once, as on a machine with a GPU and many cores
    print: bool = False  # print the table of what there is, run nothing


def is_ours(row: dict) -> bool:
    return row.get("protocol", "ours") == "ours"


def table(rows: list[dict]) -> str:
    scores: dict[str, list[float]] = {}
    for row in filter(is_ours, rows):
        scores.setdefault(row["task"], []).append(100 * row["score"])
    lines = ["| group | task: success % (seeds) | average | published |", "|---|---|---|---|"]
    averages: dict[str, list[float]] = {}
    for group, names in {**METAWORLD, "Adroit": ADROIT}.items():
        names = [name if group == "Adroit" else f"metaworld-{name}" for name in names]
        done = {name: scores[name] for name in names if name in scores}
        averages[group] = [np.mean(s) for s in done.values()]
        cells = ", ".join(f"{name.removeprefix('metaworld-')} {np.mean(s):.0f} ({len(s)})" for name, s in done.items())
        missing = len(names) - len(done)
        average = f"{np.mean(averages[group]):.1f}" if done else "not run"
        published = {**PUBLISHED, "Adroit": "door 70, pen 80"}[group]
        lines.append(f"| {group} | {cells or '-'}{f'; {missing} not run' if missing else ''} | {average} | {published} |")
    each = [averages[group] for group in PUBLISHED]
    if all(each):
        weights = list(IN_PAPER.values())
        ours, theirs = (np.average(x, weights=weights) for x in ([np.mean(x) for x in each], list(PUBLISHED.values())))
        lines.append(f"| Meta-World, each task alike | {sum(map(len, each))} | {np.mean(np.concatenate(each)):.1f} | - |")
        lines.append(f"| Meta-World, weighted as the paper | {' : '.join(map(str, weights))} | {ours:.1f} | {theirs:.1f} |")
    return "\n".join(lines)


def table_of_papers(rows: list[dict]) -> str:
    """The papers' way of counting beside ours, of the same trainings."""
    rows = sorted((row for row in rows if not is_ours(row)), key=lambda row: (row["task"], row["train_seed"]))
    lines = ["| task | seeds | mean of the 5 best of 10 evaluations, % | kept policy, unseen starts, % |", "|---|---|---|---|"]
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        seeds = ", ".join(str(row["train_seed"]) for row in mine)
        cells = []
        for key in ("score_top5", "score"):
            each = [100 * row[key] for row in mine]
            cells.append(f"{np.mean(each):.1f}" + (f" ({', '.join(f'{x:.0f}' for x in each)})" if len(each) > 1 else ""))
        lines.append(f"| {task.removeprefix('metaworld-')} | {seeds} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run(task: str, seed: int, cfg: Config) -> dict:
    demos = f"{cfg.adroit}/{task.replace('-', '_')}_expert.npz" if task.startswith("adroit") else "embedded"
    flags = ["--demos", demos, "--seed", str(seed), "--report-episodes", str(cfg.episodes), "--device", cfg.device]
    flags += ["--steps", str(cfg.steps), "--eval-every", str(cfg.steps // 2)] if cfg.steps else []
    flags += ["--protocol", cfg.protocol]
    suffix = "" if cfg.protocol == "ours" else f"-{cfg.protocol}"
    return record.run("dbp_train.py", RUNS / f"{task}-points-{seed}{suffix}", ["--env", f"{task}-points", *flags])


def main() -> None:
    cfg = tyro.cli(Config, description=__doc__.split("\n")[0])
    every = [name for group in METAWORLD.values() for name in group]
    words = {"eight": EIGHT, "all": every, "adroit": ADROIT, **{name: [name] for name in every + ADROIT}}
    for word in cfg.tasks:
        record.check_known(word, words, "--tasks")
    names = [name for word in cfg.tasks for name in words[word]]
    tasks = [name if name in ADROIT else f"metaworld-{name}" for name in names]
    if set(tasks) & set(ADROIT) and not cfg.adroit and not cfg.print:
        sys.exit(f"--tasks {' '.join(cfg.tasks)} needs --adroit, the folder of the published experts' npz files")
    own = ({"steps": cfg.steps} if cfg.steps else {}) | ({} if cfg.protocol == "ours" else {"protocol": cfg.protocol})
    done = {(row["task"], row["train_seed"]) for row in record.read(RESULTS) if is_ours(row) == is_ours(own)}
    jobs = [] if cfg.print else [(task, seed) for seed in cfg.seeds for task in tasks if (task, seed) not in done]
    with ThreadPoolExecutor(cfg.jobs) as pool:
        lines = {pool.submit(run, *job, cfg): job for job in jobs}
        for finished in as_completed(lines):
            task, seed = lines[finished]
            try:
                record.append(RESULTS, {"task": task, "train_seed": seed, **own}, finished.result())
            except subprocess.CalledProcessError as error:  # its message stands above; the others go on
                print(f"{task}, seed {seed}: not run, status {error.returncode}", flush=True)
    rows = record.read(RESULTS)
    print(table(rows), table_of_papers(rows), sep="\n\n")


if __name__ == "__main__":
    main()
