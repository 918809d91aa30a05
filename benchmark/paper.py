"""The cells of the paper's Tables I to VIII, our figure beside each, or why there is none.

    python benchmark/paper.py       a second; reads benchmark/results/

Ours are means over the training seeds that have run; the network is our preset's, the starts are other ones. `met` is a mean
within 0.02, or 2 points, of the paper's; where data or task differ, the difference stands in place of a verdict.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import record

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmark import pointcloud  # not the one at the top level

RESULTS = Path(__file__).parent / "results"
NO_DATA = "not run: demonstrations not within reach"
NO_TIME = "not run: trainings of hours on two cores"


def mean(file: str, field: str = "score", scale: float = 1.0, **key: str) -> float | None:
    """Mean of a field over the rows of a results file that hold the key; None where there are none."""
    values = [row[field] for row in record.read(RESULTS / file) if key.items() <= row.items()]
    return scale * float(np.mean(values)) if values else None


def average(of: dict[str, float]) -> float | None:
    """Over tasks that have run; None where there are none."""
    return float(np.mean(list(of.values()))) if of else None


def points(*tasks: str) -> float | None:
    """Success in percent, averaged over tasks, of point-cloud policies; only those that have run count."""
    rows = [row for row in record.read(RESULTS / "pointcloud.jsonl") if pointcloud.is_ours(row)]
    found = {task: [100 * row["score"] for row in rows if row["task"] == task] for task in tasks}
    return average({task: np.mean(scores) for task, scores in found.items() if scores})


def meta_world(*groups: str) -> float | None:
    return points(*(f"metaworld-{name}" for group in groups for name in pointcloud.THE_34[group]))


def study(setting: str) -> float | None:
    return mean("studies.jsonl", setting=setting)


class Cell(NamedTuple):
    table: str
    name: str
    paper: float | None  # the paper's figure
    ours: float | None = None
    missing: str = ""  # why ours is missing, where it is
    differs: str = ""  # what keeps the two from being compared


def cells() -> list[Cell]:
    suite = sorted({row["task"] for row in record.read(RESULTS / "robomimic.jsonl")})
    low, seen = (
        {task: mean("robomimic.jsonl", task=task) for task in suite if task.endswith("-image") == pictures}
        for pictures in (False, True)
    )
    push = [mean("blockpush.jsonl", field, who="policy, seed 0") for field in ("p1", "p2")]
    scripted, scripted_seen = (f"{', '.join(tasks)}; demonstrations of scripted experts, not humans" for tasks in (low, seen))
    rivals, studies, adroit = (
        f"not run yet: `{name}`" for name in ("baselines.py", "studies.py", "pointcloud.py --tasks adroit --adroit PATH")
    )
    which = "the tasks as far as known, another simulator, unseen starts"
    small = "small network, 206 demonstrations instead of 90; compare within the study"
    minutes = "our small network, 27 minutes of training on one processor"
    twin = "a simulated twin that is told where the object is; scripted experts"
    return [
        Cell("I", "Push-T, image", 0.89, mean("pusht.jsonl", group="human-pictures"), NO_TIME),
        Cell("I", "Push-T, low-dim", 0.87, mean("pusht.jsonl", group="human-best")),
        Cell(
            "I",
            "... Diffusion Policy, 100 steps",
            0.85,
            mean("baselines.jsonl", method="ddpm-100", seconds=1600.0),
            rivals,
            minutes,
        ),
        Cell("I", "BlockPush, mean of P1, P2", 0.43, None if None in push else sum(push) / 2, differs="our own table, no arm"),
        Cell("I", "RoboMimic, low-dim", 0.92, average(low), differs=scripted),
        Cell("I", "RoboMimic, image", 0.87, average(seen), NO_TIME, scripted_seen),
        Cell("I", "Kitchen, mean of P1 to P4", 1.00, missing=NO_DATA),
        Cell("I", "average of the six", 0.83, missing="not run: not all of the six have"),
        Cell("I", "... Diffusion Policy on the other five", None, missing=NO_TIME),
        Cell("II", "Adroit hammer", 100.0, missing=NO_DATA),
        Cell("II", "Adroit door", 70.0, points("adroit-door"), adroit),
        Cell("II", "Adroit pen", 80.0, points("adroit-pen"), adroit),
        Cell("II", "Meta-World easy", 91.7, meta_world("easy"), differs=which),
        Cell("II", "Meta-World medium", 90.3, meta_world("medium"), differs=which),
        Cell("II", "Meta-World hard", 75.2, meta_world("hard"), differs=which),
        Cell("II", "Meta-World very hard", 86.7, meta_world("very hard"), differs=which),
        Cell("II", "average of the 37", 88.4, missing="not run: not all of the 37 have"),
        Cell("II", "the other eight methods", None, missing="not run: the paper quotes them, too"),
        Cell("III", "UR5 lift, can, transport, %", 75.0, mean("robot.jsonl", scale=100, what="training"), "not run yet", twin),
        Cell("IV", "{0.02}", 0.758, study("{0.02}"), studies, small),
        Cell("IV", "{0.05}", 0.864, study("{0.05}"), studies, small),
        Cell("IV", "{0.2}", 0.873, study("G = 4, {0.2}, chunk"), studies, small),
        Cell("IV", "default {0.02, 0.05, 0.2}", 0.858, study("default {0.02, 0.05, 0.2}"), studies, small),
        Cell("IV", "wide", 0.849, study("wide {0.02, 0.2, 2}"), studies, f"members lost, ours {{0.02, 0.2, 2}}; {small}"),
        Cell(
            "IV",
            "dense",
            0.817,
            study("dense {0.02, 0.03, 0.05, 0.08, 0.13, 0.2}"),
            studies,
            f"members lost, ours 0.02 to 0.2; {small}",
        ),
        Cell("V", "chunk mode", 0.890, study("G = 4, {0.2}, chunk"), studies, small),
        Cell("V", "step-wise mode", 0.845, study("step-wise"), studies, small),
        Cell("VI", "100 epochs against 4,500", None, missing="as seconds to a score of 0.90, 11 times sooner: `baselines.py`"),
        Cell("VII", "hyper-parameters", None, missing="settings, no figures: `dbp_train.py --preset paper`"),
        Cell("VIII", "network", None, missing="settings, no figures: `policy.py`, `ConditionalUNet1D`"),
    ]


def verdict(cell: Cell) -> str:
    if cell.ours is None or cell.paper is None:
        return cell.missing
    if cell.differs:
        return f"not the same: {cell.differs}"
    near = 2.0 if cell.paper > 1 else 0.02
    return "above" if cell.ours > cell.paper + near else "met" if cell.ours >= cell.paper - near else "below"


def table() -> str:
    lines = ["| table | cell | paper | ours | |", "|---|---|---|---|---|"]
    for cell in cells():
        digits = 1 if (cell.paper or 0) > 1 else 3
        paper, ours = ("-" if value is None else f"{value:.{digits}f}" for value in (cell.paper, cell.ours))
        lines.append(f"| {cell.table} | {cell.name} | {paper} | {ours} | {verdict(cell)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
