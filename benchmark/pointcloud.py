"""The point-cloud table of README: Meta-World from 10 episodes of its scripted experts, Adroit from 10 of published experts.

    python benchmark/pointcloud.py                                     the eight tasks, two per group, that two cores can do
    python benchmark/pointcloud.py --tasks 34 --jobs 15                the paper's 34; eight minutes of an H200 and 16 cores
    python benchmark/pointcloud.py --tasks all --seeds 0 1 2           all 50 of Meta-World, unattended; wants a GPU
    python benchmark/pointcloud.py --tasks adroit --adroit PATH        PATH/adroit_<task>_expert.npz for door and pen
    python benchmark/pointcloud.py --tasks basketball hammer --protocol papers          the papers' way of counting
    python benchmark/pointcloud.py --print                             the table of what there is

Every row is one `dbp_train.py --env <task>-points` command; its final score is over --episodes starts that no choice has seen
(seeds 100,000 on). Lines go to benchmark/results/pointcloud.jsonl; a line that is there is not run again, a run that was cut is
resumed. The groups are DP3's. The paper follows MP1 with 34 of the tasks, 21, 4, 4 and 5 of the groups, and neither lists them.
FlowPolicy, on which MP1 builds, has configurations for just so many of each (github.com/zql-kk/FlowPolicy, commit ff3b3fe).
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
THE_34 = {
    group: names.split()
    for group, names in {
        "easy": """
            button-press button-press-wall dial-turn door-close door-open door-unlock drawer-close faucet-close faucet-open
            handle-press handle-pull lever-pull peg-unplug-side plate-slide plate-slide-back plate-slide-back-side
            plate-slide-side reach reach-wall window-close window-open""",
        "medium": "coffee-pull hammer peg-insert-side soccer",
        "hard": "assembly hand-insert pick-place push",
        "very hard": "disassemble pick-place-wall shelf-place stick-pull stick-push",
    }.items()
}
ADROIT = ["adroit-door", "adroit-pen"]
EIGHT = ["button-press", "reach-wall", "basketball", "hammer", "assembly", "push", "disassemble", "stick-pull"]


@dataclasses.dataclass(frozen=True)
class Config:
    tasks: tuple[str, ...] = ("eight",)  # names of Meta-World's tasks, adroit-door, adroit-pen, or eight, 34, all, adroit
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
    """Every task's mean over its seeds; averages over each group's tasks, over those of the paper's 34, and over all."""
    scores: dict[str, list[float]] = {}
    for row in filter(is_ours, rows):
        scores.setdefault(row["task"].removeprefix("metaworld-"), []).append(100 * row["score"])

    def average(names: list[str]) -> str:
        done = [np.mean(scores[name]) for name in names if name in scores]
        missing = f" ({len(names) - len(done)} not run)" if len(done) < len(names) else ""
        return f"{np.mean(done):.1f}{missing}" if done else "not run"

    lines = [
        "| group | task: success % (seeds), *: of the 34 | average | of the 34 | published, of the 34 |",
        "|---|---|---|---|---|",
    ]
    for group, names in METAWORLD.items():
        marked = {name: name + "*" * (name in THE_34[group]) for name in names if name in scores}
        cells = ", ".join(f"{mark} {np.mean(scores[name]):.0f} ({len(scores[name])})" for name, mark in marked.items())
        lines.append(f"| {group} | {cells or '-'} | {average(names)} | {average(THE_34[group])} | {PUBLISHED[group]} |")
    published = np.average(list(PUBLISHED.values()), weights=[len(THE_34[group]) for group in PUBLISHED])
    of_50, of_34 = (average([name for names in groups.values() for name in names]) for groups in (METAWORLD, THE_34))
    lines.append(f"| all of Meta-World | each task alike | {of_50} | {of_34} | {published:.1f} |")
    cells = ", ".join(f"{name} {average([name])}" for name in ADROIT)
    lines.append(f"| Adroit | {cells} | - | - | door 70, pen 80 |")
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
    every, of_34 = ([name for names in groups.values() for name in names] for groups in (METAWORLD, THE_34))
    words = {"eight": EIGHT, "34": of_34, "all": every, "adroit": ADROIT, **{name: [name] for name in every + ADROIT}}
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
