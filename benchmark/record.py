"""Runs of the tables and their raw results: one JSON line per finished run, stamped with what it was run with and on."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import evaluate


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def interval(row: dict) -> tuple[float, float]:
    """95 % interval of a row's score: as it stands there, or Wilson's where that is the share of successes."""
    if row["score"] == row["success_rate"]:  # older rows have the normal one
        return evaluate.share95(row["score"], row["episodes"])
    return tuple(row["score_ci95"])


def run(script: str, out: Path, flags: list[str]) -> dict:
    """The result line of one training; a finished one is not run again, a cut one is resumed."""
    if not (out / "result.json").is_file():
        resume = ["--resume"] if (out / "state.pt").is_file() else []
        command = [sys.executable, script, "--out", str(out), *flags, *resume]
        print(" ".join(command), flush=True)
        subprocess.run(command, cwd=ROOT, check=True)
    return json.loads((out / "result.json").read_text().splitlines()[-1])


def check_known(name: str, known: Iterable[str], flag: str = "--only") -> None:
    """Leave with a line where somebody asks for what is not there; an empty name asks for all."""
    if name and name not in known:
        sys.exit(f"error: {flag} {name} is not known; there are {', '.join(known)}")


def append(path: Path, key: dict, line: dict) -> None:
    """key: what the run is called in its table; line: what it gave."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps({**key, **stamp(), **line}) + "\n")


def stamp() -> dict:
    """When, with what and on what."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit, "machine": machine()}


def device_name(device: str) -> str:
    """cpu, or what the GPU is called."""
    return torch.cuda.get_device_name() if device != "cpu" else "cpu"


def machine() -> str:
    """Processors, their model and generation, and how many of them share a core: an "AMD EPYC" alone may be any of ten years."""
    info = Path("/proc/cpuinfo")
    fields = [line.split(":", 1) for line in info.read_text().splitlines() if ":" in line] if info.is_file() else []
    values = {name.strip(): value.strip() for name, value in fields}
    if "model name" not in values:
        return platform.processor()
    count = sum(name.strip() == "processor" for name, _ in fields)
    family = f" (family {values['cpu family']})" if "cpu family" in values else ""
    siblings = Path("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list")
    threads = "hyperthreads" if siblings.is_file() and siblings.read_text().strip() != "0" else "cores"
    gpu = f", {device_name('cuda')}" if torch.cuda.is_available() else ""
    return f"{count} {threads}, {values['model name']}{family}{gpu}"
