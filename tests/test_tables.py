"""README.md and benchmark/README.md hold what the raw results give, and name every file of raw results."""

import ast
import importlib
import re
import sys

import pytest
import tyro
from conftest import ROOT

sys.path.append(str(ROOT / "benchmark"))

from benchmark import paper, table

MARKS = [(path, name, text) for path in table.DOCUMENTS for name, text in table.MARKED.findall(path.read_text())]


@pytest.mark.parametrize(("path", "name", "text"), MARKS, ids=[f"{path.parent.name}-{name}" for path, name, _ in MARKS])
def test_a_marked_table_is_what_the_raw_results_give(path, name, text):
    assert text.strip() == table.text_of(name).strip(), f"python benchmark/table.py --write brings {path.name} up to date"


def test_the_marks_are_whole():
    for path in table.DOCUMENTS:
        document = path.read_text()
        assert document.count("<!-- table:") == document.count("<!-- end -->") == len(table.MARKED.findall(document))
    names = [name for _, name, _ in MARKS]
    assert len(names) == len(set(names))
    assert {"pusht", "dbpo", "provenance", "paper"} <= set(names)


def test_every_file_of_raw_results_is_named_where_the_numbers_come_from():
    document = (ROOT / "benchmark" / "README.md").read_text()
    files = [path.name for path in (ROOT / "benchmark" / "results").iterdir()]
    assert [name for name in files if f"results/{name}" not in document] == []
    for script in re.findall(r"`python (benchmark/\w+\.py)", document):
        assert (ROOT / script).is_file(), script


def commands() -> list[tuple[str, str]]:
    """(script, flags) of the commands of benchmark/ that both documents and the docstrings there name."""
    texts = [path.read_text() for path in table.DOCUMENTS]
    texts += [ast.get_docstring(ast.parse(path.read_text())) for path in (ROOT / "benchmark").glob("*.py")]
    found = re.findall(r"python benchmark/(\w+)\.py((?: +(?:--)?[\w./,-]+)*)", "\n".join(texts))
    return sorted({(script, re.split(r" {2,}", flags)[0].strip()) for script, flags in found})


@pytest.mark.parametrize(("script", "flags"), commands(), ids=[" ".join(command) for command in commands()])
def test_every_command_is_accepted(script, flags):
    if script == "ppo_flow":
        config = importlib.import_module("dbpo_finetune").Config
    elif "class Config" not in (ROOT / "benchmark" / f"{script}.py").read_text():
        assert flags == ""
        return
    else:
        config = importlib.import_module(f"benchmark.{script}").Config
    tyro.cli(config, args=flags.split())  # SystemExit fails the test


def test_a_number_that_changes_is_noticed():
    readme = table.DOCUMENTS[0].read_text()
    changed = readme.replace("| embedded-fast | 0 | 0.938 |", "| embedded-fast | 0 | 0.939 |")
    assert changed != readme
    assert table.rewritten(changed) == table.rewritten(readme)
    assert table.rewritten("no marks") == "no marks"
    with pytest.raises(KeyError):
        table.rewritten("<!-- table: unheard-of -->\nx\n<!-- end -->")


def test_verdicts_on_the_papers_cells():
    def verdict(paper_figure, ours, **more):
        return paper.verdict(paper.Cell("I", "x", paper_figure, ours, "not run", **more))

    assert verdict(0.87, None) == "not run"
    assert [verdict(0.87, ours) for ours in (0.80, 0.86, 0.88, 0.90)] == ["below", "met", "met", "above"]
    assert [verdict(87.0, ours) for ours in (80.0, 86.0, 90.0)] == ["below", "met", "above"]
    assert verdict(0.5, 0.9, differs="other data") == "not the same: other data"


# --- tables whose results are still to come: from results made up here ---------------------------------------------------


def run_of(method: str, seconds: float, seed: int, score: float) -> dict:
    curve = [[10.0, 100, score - 0.1], [seconds, 1000, score]]
    return {"method": method, "seconds": seconds, "train_seed": seed, "score": score, "steps": 1000, "curve": curve} | {
        "nfe": 1,
        "lr": 1e-3,
        "backbone": "mlp",
        "success_rate": 0.5,
        "latency_ms_p50": 0.7,
    }


def test_the_table_of_baselines(tmp_path):
    rows = [run_of("dbp", 160, 0, 0.95), run_of("dbp", 160, 1, 0.93), run_of("ddpm-100", 160, 0, 0.7)]
    rows += [run_of("ddpm-100", 1600, 0, 0.91), run_of("ddpm-100", 160, 0, 0.8) | {"lr": 3e-4}]
    lines = table.baselines.table(rows).splitlines()
    assert "| dbp | 1 | 160 | 2 | 0.940 | 0.014 | 0.50 | 160, 160 | 6 | 0.70 ms | 0.87 |" in lines
    assert any(line.startswith("| ddpm-100 | 1 | 160 | 1 | 0.700 | - | 0.50 | not reached |") for line in lines)
    assert any(line.startswith("| ddpm-100 | 1 | 1600 | 1 | 0.910 | - | 0.50 | 1600 |") for line in lines)
    assert any(line.startswith("| ddpm-100, rate 0.0003 | 1 | 160 | 1 | 0.800 |") for line in lines)  # not mixed with the others
    table.baselines.draw(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_the_table_of_studies_has_the_papers_figures_beside_ours():
    base = {"setting": "G = 4, {0.2}, chunk", "wall_s": 240.0}
    text = table.studies.table([base | {"score": 0.9}, base | {"score": 0.92}])
    assert "| temperatures | G = 4, {0.2}, chunk | 0.910 | 0.014 | 2 | 4.0 min | 0.873 (0.012) |" in text
    assert "| modes | step-wise | not run | - | 0 | - | 0.845 (0.021) |" in text
    assert set(table.studies.SETTINGS) == {setting for study in table.studies.STUDIES.values() for setting in study}


def test_the_table_of_speed():
    times = {"calls": 100, "p50_ms": 0.2504, "p95_ms": 0.3, "p99_ms": 0.4}
    acting = {"fast": {"parameters": 1_346_720, "paths": {"eager": times}, "diffusion_over_dbp": 101.3}}
    speeds = {"samples_per_second": {"eager": 9000.0, "released loss in our step": 8000.0}}
    training = {"fast": speeds | {"loss_ms": {"ours": 1.5, "released": 1.7}, "ours_over_released": 1.6}}
    text = table.latency.table({"acting": acting, "training": training, "released": "losses.py:drift_loss"})
    assert "| fast, 1.3 M: eager | 0.25 | 0.3 | 0.4 | 100 |" in text
    assert "101 times" in text and "| fast: released loss in our step | 8,000 | 1.70 ms |" in text and "1.60 times" in text


def test_the_table_of_scale():
    cells = [{"B": B, "G": G, "S": 32, "ms": 10.0 * G, "MB": 2.0 * G} for B in (32, 128, 512) for G in (1, 2, 4, 8, 16)]
    cells += [{"B": 128, "G": 4, "S": S, "ms": 50.0, "MB": 9.0} for S in (128, 512)]
    speeds = [{"processes": n, "B": 256, "samples_per_second": speed} for n, speed in ((1, 1000.0), (2, 1800.0))]
    text = table.scale.table({"speeds": speeds, "cells": cells})
    assert "| 2 | 256 | 1,800 | 1.80 times |" in text
    assert "| B = 32 | 10.0, 1.00; 2.0, 1.00 | 20.0, 2.00; 4.0, 2.00 |" in text  # r_T and r_M, Eq. (58)


def test_the_table_of_fine_tuning_rivals_holds_dbpo():
    def run(score, **key):
        return {"score": score, "curve": [[0, 1.0, 2000.0], [10, 2.0, score]], "env": "hopper-medium-v2", **key}

    text = table.ppo_rivals.table([run(3000.0, rival="gaussian")], [run(3300.0, group="hopper")])
    assert "| hopper-medium-v2 | DBPO | 1 | 2,000 | 3,300 | - | 2,650 |" in text
    assert "| hopper-medium-v2 | PPO, gaussian | 1 | 2,000 | 3,000 | - | 2,500 |" in text
    assert "| hopper-medium-v2 | PPO, flow | 0 | not run |" in text
