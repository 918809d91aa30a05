"""The paper's studies on Push-T (its Appendix B) with our preset `fast`: hypotheses, temperatures, chunk against step-wise mode.

    python benchmark/studies.py --human PATH/pusht_cchi_v7_replay.zarr             33 runs, three hours on two cores; resumable
    python benchmark/studies.py --human PATH --only hypotheses --seeds 0           one study, one seed
    python benchmark/studies.py --trial 100 --seeds 0                              does every setting run? no row is written
    python benchmark/studies.py --print                                            the table of what there is

Every row is one `dbp_train.py` command; its score is over 50 starts that no choice has seen (seeds 100,000 on). Lines go to
benchmark/results/studies.jsonl; a line that is there is not run again, a run that was cut is resumed. The setting G = 4, {0.2},
chunk mode stands in all three studies and runs once.

The paper trains Table VIII's U-Net for 100 epochs (200 for the modes) on 90 demonstrations and evaluates other starts: compare
differences within a study, not levels. The digits of its Figure 7 and the members of its wide and dense sets are lost in our
copy: wide and dense are ours, three values over two decades and six values between 0.02 and 0.2.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import record
import tyro

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results" / "studies.jsonl"
EPISODES = 50  # of a final evaluation; the paper's
BASE = "G = 4, {0.2}, chunk"  # Table VII
SETTINGS: dict[str, list[str]] = {  # name: flags of dbp_train.py beside preset fast
    "G = 1": ["--hypotheses", "1"],
    "G = 2": ["--hypotheses", "2"],
    BASE: [],
    "G = 8": ["--hypotheses", "8"],
    "G = 16": ["--hypotheses", "16"],
    "{0.02}": ["--temperatures", "0.02"],
    "{0.05}": ["--temperatures", "0.05"],
    "default {0.02, 0.05, 0.2}": ["--temperatures", "0.02", "0.05", "0.2"],
    "wide {0.02, 0.2, 2}": ["--temperatures", "0.02", "0.2", "2"],
    "dense {0.02, 0.03, 0.05, 0.08, 0.13, 0.2}": ["--temperatures", "0.02", "0.03", "0.05", "0.08", "0.13", "0.2"],
    "step-wise": ["--stepwise"],
}
LOST = "illegible in our copy"
STUDIES: dict[str, dict[str, str]] = {  # study: {setting: the paper's mean (std)}
    "hypotheses": {"G = 1": LOST, "G = 2": LOST, BASE: LOST, "G = 8": LOST, "G = 16": LOST},
    "temperatures": {
        "{0.02}": "0.758 (0.031)",
        "{0.05}": "0.864 (0.038)",
        BASE: "0.873 (0.012)",
        "default {0.02, 0.05, 0.2}": "0.858 (0.057)",
        "wide {0.02, 0.2, 2}": "0.849 (0.007)",
        "dense {0.02, 0.03, 0.05, 0.08, 0.13, 0.2}": "0.817 (0.030)",
    },
    "modes": {BASE: "0.890 (0.015)", "step-wise": "0.845 (0.021)"},
}


@dataclasses.dataclass(frozen=True)
class Config:
    human: str = "embedded"  # path of the published human demonstrations
    only: str = ""  # run one study only: hypotheses, temperatures or modes; empty: all
    seeds: tuple[int, ...] = (0, 1, 2)  # training seeds
    trial: int = 0  # so many steps instead of the preset's, to see that all settings run; no row is written
    print: bool = False  # print the table of what there is, run nothing


def table(rows: list[dict]) -> str:
    lines = ["| study | setting | score, 50 episodes | std | seeds | training | paper: mean (std) |", "|---" * 7 + "|"]
    for study, settings in STUDIES.items():
        for setting, published in settings.items():
            mine = [row for row in rows if row["setting"] == setting]
            ours = "not run | - | 0 | -"
            if mine:
                scores = np.array([row["score"] for row in mine])
                spread = f"{scores.std(ddof=1):.3f}" if len(mine) > 1 else "-"
                minutes = np.mean([row["wall_s"] for row in mine]) / 60
                ours = f"{scores.mean():.3f} | {spread} | {len(mine)} | {minutes:.1f} min"
            lines.append(f"| {study} | {setting} | {ours} | {published} |")
    return "\n".join(lines)


def main() -> None:
    cfg = tyro.cli(Config, description=__doc__.split("\n")[0])
    record.check_known(cfg.only, STUDIES)
    rows = record.read(RESULTS)
    done = {(row["setting"], row["train_seed"]) for row in rows}
    wanted = [setting for setting in SETTINGS if any(setting in STUDIES[s] for s in ([cfg.only] if cfg.only else STUDIES))]
    for seed, setting in [] if cfg.print else [(seed, setting) for seed in cfg.seeds for setting in wanted]:
        if (setting, seed) in done:
            continue
        flags = ["--demos", cfg.human, "--seed", str(seed), "--report-episodes", str(EPISODES), *SETTINGS[setting]]
        if cfg.trial:
            flags += ["--steps", str(cfg.trial), "--eval-every", str(cfg.trial), "--eval-episodes", "2"]
        name = f"{'trial' if cfg.trial else 'study'}-{list(SETTINGS).index(setting)}-{seed}"
        line = record.run("dbp_train.py", ROOT / "runs" / "benchmark" / name, flags)
        if not cfg.trial:
            record.append(RESULTS, {"setting": setting, "train_seed": seed, "demos": Path(cfg.human).name}, line)
    print(table(record.read(RESULTS)))


if __name__ == "__main__":
    main()
