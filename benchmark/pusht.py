"""The Push-T table of README: every row is one `dbp_train.py` command, run here, its result line kept.

    python benchmark/pusht.py --human PATH/pusht_cchi_v7_replay.zarr        six hours on two cores, most for pictures; resumable
    python benchmark/pusht.py --human PATH --only human-pictures            one group, 95 minutes for each of its seeds

Seeds {0, 1, 2}; the final score is over 100 starts that no choice has seen (seeds 100,000 on). Lines go to
benchmark/results/pusht.jsonl; a line that is there is not run again. `--print` prints the table and runs nothing.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import record
import tyro

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results" / "pusht.jsonl"
GROUPS = {  # name: flags of dbp_train.py; HUMAN stands for --human
    "embedded-fast": ["--preset", "fast"],
    "human-fast": ["--preset", "fast", "--demos", "HUMAN"],
    "human-best": ["--preset", "best", "--demos", "HUMAN"],
    "human-pictures": ["--env", "pusht-image", "--demos", "HUMAN"],
}


@dataclasses.dataclass(frozen=True)
class Config:
    human: str = ""  # path of the published human demonstrations
    only: str = ""  # run one group only; empty: all
    seeds: tuple[int, ...] = (0, 1, 2)  # training seeds
    print: bool = False  # print the table of what there is, run nothing


def table(rows: list[dict]) -> str:
    lines = [
        "| demonstrations, preset | seed | score, 100 episodes | 95 % interval | success | wall time |",
        "|---|---|---|---|---|---|",
    ]
    for group in GROUPS:
        mine = sorted((row for row in rows if row["group"] == group), key=lambda row: row["train_seed"])
        for row in mine:
            low, high = record.interval(row)
            lines.append(
                f"| {group} | {row['train_seed']} | {row['score']:.3f} | {low:.3f} to {high:.3f} | {row['success_rate']:.2f} | "
                f"{row['wall_s'] / 60:.1f} min |"
            )
        if len(mine) > 1:
            scores = np.array([row["score"] for row in mine])
            wall = np.mean([row["wall_s"] for row in mine]) / 60
            success = np.mean([row["success_rate"] for row in mine])
            spread = f"std {scores.std(ddof=1):.3f}"
            lines.append(
                f"| **{group}** | {len(mine)} seeds | **{scores.mean():.3f}** | {spread} | {success:.2f} | {wall:.1f} min |"
            )
    return "\n".join(lines)


def main() -> None:
    cfg = tyro.cli(Config, description=__doc__.split("\n")[0])
    record.check_known(cfg.only, GROUPS)
    done = {(row["group"], row["train_seed"]) for row in record.read(RESULTS)}
    jobs = [(g, s) for g in GROUPS for s in cfg.seeds if (g, s) not in done and cfg.only in ("", g)]
    for group, seed in [] if cfg.print else jobs:
        flags = [cfg.human if flag == "HUMAN" else flag for flag in GROUPS[group]]
        out = ROOT / "runs" / "benchmark" / f"{group}-{seed}"
        resume = ["--resume"] if (out / "state.pt").is_file() else []
        command = [sys.executable, "dbp_train.py", "--seed", str(seed), "--out", str(out), *flags, *resume]
        print(" ".join(command), flush=True)
        subprocess.run(command, cwd=ROOT, check=True)
        line = json.loads((out / "result.json").read_text().splitlines()[-1])
        record.append(RESULTS, {"group": group, "train_seed": seed}, line)
    print(table(record.read(RESULTS)))


if __name__ == "__main__":
    main()
