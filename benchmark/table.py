"""README's tables from the raw results.

    python benchmark/table.py               print all that have results
    python benchmark/table.py --only dbpo   print one
    python benchmark/table.py --write       put them into README.md and benchmark/README.md, between their marks,
                                            `<!-- table: NAME -->` and `<!-- end -->`

tests/test_tables.py compares README.md with what this prints. Every script of benchmark/ has its own table; here they meet.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import record
import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmark import (  # not `import blockpush`: two of them have the name of a file at the top level
    baselines,
    blockpush,
    dbpo,
    dfp,
    dfp_speed,
    drift_cost,
    env_speed,
    latency,
    latent_scale,
    paper,
    pointcloud,
    ppo_rivals,
    pusht,
    robomimic,
    robot,
    scale,
    studies,
)

DOCUMENTS = (ROOT / "README.md", ROOT / "benchmark" / "README.md")
RESULTS = ROOT / "benchmark" / "results"
MARKED = re.compile(r"<!-- table: ([\w-]+) -->\n(.*?)<!-- end -->", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Table:
    file: str  # of raw results, in benchmark/results
    command: str  # that made them
    group: tuple[str, ...]  # keys that name a row's number; seeds of the same names are averaged
    text: Callable[[], str]  # the table in Markdown
    keep: Callable[[dict], bool] = lambda row: True  # rows of the file that are this table's
    only: Callable[[dict], str] = lambda row: ""  # flags that make the command run this row alone; its seeds are `--seeds`


def of_rows(script, command: str, *group: str, **more) -> Table:
    return Table(script.RESULTS.name, command, group, lambda: script.table(record.read(script.RESULTS)), **more)


def only_group(row: dict) -> str:
    return f' --only "{row["group"]}"' if " " in row["group"] else f" --only {row['group']}"


def only_dfp(row: dict) -> str:
    return only_group(row) + (" --adroit PATH" if row["env"].startswith("adroit") else "")


def only_points(row: dict) -> str:
    suite, name = row["task"].split("-", 1)
    own = f" --steps {row['steps']} --episodes {row['episodes']}" if "steps" in row else ""
    own += "" if pointcloud.is_ours(row) else f" --protocol {row['protocol']}"
    return f" --tasks {name}{own}" if suite == "metaworld" else f" --tasks {row['task']} --adroit PATH{own}"


def of_json(script, command: str, table: Callable[[dict], str]) -> Table:
    return Table(script.RESULTS.name, command, (), lambda: table(json.loads(script.RESULTS.read_text())))


COST, GROWTH = "benchmark/drift_cost.py", drift_cost.growth_table
TABLES: dict[str, Table] = {
    "pusht": of_rows(pusht, "benchmark/pusht.py --human PATH", "group", only=only_group),
    "baselines": of_rows(
        baselines,
        "benchmark/baselines.py --demos PATH --clock cpu",
        *("method", "seconds", "lr", "backbone"),
        only=lambda row: f" --only {row['objective']} --seconds {row['seconds']:.0f}",
    ),
    "studies": of_rows(studies, "benchmark/studies.py --human PATH", "setting"),
    "latency": of_json(latency, "benchmark/latency.py --released PATH", latency.table),
    "scale": of_json(scale, "benchmark/scale.py", scale.table),
    "drift-share": of_json(drift_cost, COST, drift_cost.share_table),
    "drift-growth-G": of_json(drift_cost, COST, lambda result: GROWTH(result, "G", 64, 32)),
    "drift-growth-S": of_json(drift_cost, COST, lambda result: GROWTH(result, "S", 16, 16)),
    "dbpo": of_rows(dbpo, "benchmark/dbpo.py --hopper PATH --human PATH", "group", only=only_group),
    "ppo-rivals": Table(
        ppo_rivals.RESULTS.name,
        "benchmark/ppo_rivals.py --hopper PATH",
        ("rival", "env"),
        lambda: ppo_rivals.table(record.read(ppo_rivals.RESULTS), record.read(dbpo.RESULTS)),
    ),
    "dfp": of_rows(dfp, "benchmark/dfp.py", "group", only=only_dfp),
    "dfp-k": Table(
        dfp.RESULTS.name,
        "benchmark/dfp.py",
        ("group",),
        lambda: dfp.table_of_k(record.read(dfp.RESULTS)),
        lambda row: row["group"] in dfp.OF_K.values(),
        only_group,
    ),
    "dfp-speed": of_json(dfp_speed, "benchmark/dfp_speed.py", dfp_speed.table),
    "env-speed": of_json(env_speed, "benchmark/env_speed.py", env_speed.table),
    "pointcloud": of_rows(pointcloud, "benchmark/pointcloud.py", "task", only=only_points, keep=pointcloud.is_ours),
    "pointcloud-papers": Table(
        pointcloud.RESULTS.name,
        "benchmark/pointcloud.py",
        ("task",),
        lambda: pointcloud.table_of_papers(record.read(pointcloud.RESULTS)),
        lambda row: not pointcloud.is_ours(row),
        only_points,
    ),
    "robomimic": of_rows(robomimic, "benchmark/robomimic.py", "task", only=lambda row: f" --tasks {row['task']}"),
    "blockpush": of_rows(blockpush, "benchmark/blockpush.py", "who"),
    "robot-times": Table(
        robot.RESULTS.name,
        "benchmark/robot.py",
        ("policy",),
        lambda: robot.times_table(record.read(robot.RESULTS)),
        lambda row: row["what"] == "times",
    ),
    "robot-tasks": Table(
        robot.RESULTS.name,
        "benchmark/robot.py --experts 50 --train lift can transport",
        ("what", "task"),
        lambda: robot.tasks_table(record.read(robot.RESULTS)),
        lambda row: row["what"] != "times",
    ),
    "latent-scale": of_json(latent_scale, "benchmark/latent_scale.py --ckpt PATH", latent_scale.table),
}


@dataclasses.dataclass(frozen=True)
class Config:
    only: str = ""  # one table; empty: all
    write: bool = False  # put the tables into README.md and benchmark/README.md instead of printing them


def text_of(name: str) -> str:
    """The table of that name. Raises KeyError where there is none of that name."""
    if name == "paper":
        return paper.table()
    if name == "provenance":
        return provenance()
    table = TABLES[name]
    return table.text() if (RESULTS / table.file).is_file() else f"Not run yet: `python {table.command}`."


def provenance() -> str:
    """Where the numbers of README's tables come from: one line per number, or per table where a run gives it as a whole."""
    lines = ["| table | number | command | commit | hardware | seeds | date | raw results |", "|---" * 8 + "|"]
    for name, table in TABLES.items():
        path = RESULTS / table.file
        lists = path.suffix == ".jsonl"
        rows = [row for row in record.read(path) if table.keep(row)] if lists else []
        if not path.is_file() or (lists and not rows):
            lines.append(f"| {name} | not run yet | `python {table.command}` | | | | | |")
        elif not rows:
            found = json.loads(path.read_text())
            rows = found if isinstance(found, list) else [found]
            lines.append(provenance_line(name, "all", table, rows))
        else:
            for key in dict.fromkeys(tuple(str(row[field]) for field in table.group) for row in rows):
                mine = [row for row in rows if tuple(str(row[field]) for field in table.group) == key]
                lines.append(provenance_line(name, ", ".join(key) or "all", table, mine))
    return "\n".join(lines)


def provenance_line(name: str, number: str, table: Table, rows: list[dict]) -> str:
    def all_of(*fields: str) -> str:
        seen = dict.fromkeys(str(row[field]) for row in rows for field in fields if field in row)
        return ", ".join(seen)

    commit = all_of("commit") or "not recorded"
    seeds, date, machine = all_of("train_seed", "seed") or "-", all_of("date"), all_of("machine") or "not recorded"
    command = table.command + table.only(rows[0])
    return f"| {name} | {number} | `python {command}` | {commit} | {machine} | {seeds} | {date} | `results/{table.file}` |"


def rewritten(document: str) -> str:
    """The text with every marked table as the raw results give it now. Raises KeyError for a mark that names none."""
    return MARKED.sub(lambda found: f"<!-- table: {found[1]} -->\n{text_of(found[1])}\n<!-- end -->", document)


def main() -> None:
    cfg = tyro.cli(Config, description=__doc__.split("\n")[0])
    names = [*TABLES, "paper", "provenance"]
    if cfg.only and cfg.only not in names:
        sys.exit(f"error: --only {cfg.only} is not known; there are {', '.join(names)}")
    if cfg.write:
        for document in DOCUMENTS:
            document.write_text(rewritten(document.read_text()))
        return
    for name in [cfg.only] if cfg.only else names:
        print(f"\n{name}\n\n{text_of(name)}")


if __name__ == "__main__":
    main()
