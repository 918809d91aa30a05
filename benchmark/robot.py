"""README's numbers of the robot: times in the twin, the experts' success, and policies trained on their demonstrations.

    python benchmark/robot.py                              60 s each: state policy at 500 Hz, policy with three cameras
    python benchmark/robot.py --seconds 10 --device cpu    shorter
    python benchmark/robot.py --experts 50                 the experts alone, undisturbed, starts from seed 100,000 on
    python benchmark/robot.py --train lift can transport   dbp_train.py on 100 demonstrations, 50 unseen starts, some minutes each
    python benchmark/robot.py --print                      the tables of what there is

Times are taken with a policy of the default size whose weights are random and whose hands move by centimetres about home: what a
network computes does not change how long it takes, and the episode does not end. Lines go to benchmark/results/robot.jsonl; a
training that is there is not run again, one that was cut is resumed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import record
import torch
import tyro

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results" / "robot.jsonl"
sys.path.insert(0, str(ROOT))
import demos
import ur5_tasks
import ur5_twin
from policy import Policy, PolicyConfig
from ur5_motion import ARMS

WANTED = {"lift": 0.90, "can": 0.80, "transport": 0.55}  # success of the paper's real arms


@dataclasses.dataclass(frozen=True)
class Config:
    train: tuple[str, ...] = ()  # train on these tasks
    seeds: tuple[int, ...] = (0,)  # training seeds
    experts: int = 0  # measure the experts over so many starts
    seconds: float = 60.0  # length of each timing
    device: str = "auto"  # of the network in the timings
    print: bool = False  # print the tables of what there is, run nothing


def waving_policy(path: Path, cameras: tuple[str, ...] = (), env: str = "ur5-transport-image", **changes) -> Path:
    """A checkpoint of random weights that sees hands and cameras only and moves both hands by centimetres about home."""
    shapes = {f"{arm}_{name}": (n,) for arm in ARMS for name, n in (("pos", 3), ("rot", 6), ("grip", 1))}
    shapes |= {f"{camera}_image": (84, 84, 3) for camera in cameras}
    torch.manual_seed(0)
    settings = {"env": env, "obs_shapes": shapes, "action_dim": 20, "obs_steps": 1, "horizon": 8, "action_steps": 4, **changes}
    policy = Policy(PolicyConfig(**settings))
    if policy.config.action_dim == 20:
        center = np.concatenate([[*place, *ur5_twin.DOWN[:, 0], *ur5_twin.DOWN[:, 1], 0.0] for place in ur5_twin.REST])
        policy.normalize_action.center.copy_(torch.from_numpy(center))
        policy.normalize_action.half_range.copy_(torch.tensor([0.06, 0.06, 0.05, *[0.02] * 6, 0.2] * 2))
    policy.save(path)
    return path


def times(cfg: Config, cameras: tuple[str, ...], exported: bool) -> dict:
    """The report of robot_ur5.py over cfg.seconds."""
    out = ROOT / "runs" / "benchmark" / ("robot-cameras" if cameras else "robot-state")
    ckpt, graph = waving_policy(out / "waving.pt", cameras), str(out / "waving.onnx")
    command = [sys.executable, "robot_ur5.py", "--sim", "--no-window", "--ckpt", str(ckpt), "--out", str(out)]
    if exported:
        subprocess.run([sys.executable, "evaluate.py", "--ckpt", str(ckpt), "--export", graph], cwd=ROOT, check=True)
        command += ["--graph", graph]
    command += ["--seconds", str(cfg.seconds), "--device", cfg.device]
    command += [] if cameras else ["--policy-hz", "500"]  # an answer to every state of the arms
    command += ["--stale-policy", "2", "--stale-camera", "2", "--watchdog-hz", "2"]  # what is late shall be seen, and not end it
    print(" ".join(command), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)
    device = torch.cuda.get_device_name() if cfg.device != "cpu" and torch.cuda.is_available() else "cpu"
    return {
        **json.loads((out / "report.json").read_text()),
        "device": device,
        "load": Path("/proc/loadavg").read_text().split()[0],
    }


def expert(task: str, episodes: int) -> dict:
    env = ur5_tasks.Table(task)
    outcomes = [ur5_tasks.episode(env, seed, shake=0.0) for seed in range(100_000, 100_000 + episodes)]
    env.close()
    return {
        "episodes": episodes,
        "success_rate": float(np.mean([success for _, success in outcomes])),
        "steps": float(np.mean([len(rows) for rows, _ in outcomes])),
    }


def times_table(rows: list[dict]) -> str:
    """The newest timing of each policy, and the missed periods of the earlier ones."""
    lines = [
        "| | servo | periods missed | decisions per second | after capture, p50 / p99 | end to end, p50 / p99 | load |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = [row for row in rows if row["what"] == "times"]
    for policy in dict.fromkeys(row["policy"] for row in rows):
        *before, row = [row for row in rows if row["policy"] == policy]
        missed = ", ".join(f"{100 * old['missed_share']:.2f}" for old in before)
        earlier = f" (before: {missed})" if before else ""
        after, whole = (row["latency_ms"][name] for name in ("after capture", "end to end"))
        lines.append(
            f"| {policy} | {row['servo_hz']:.1f} Hz | {100 * row['missed_share']:.2f} %{earlier} | "
            f"{row['policy_hz']:.1f} | {after[0]:.2f} / {after[2]:.2f} ms | {whole[0]:.2f} / {whole[2]:.2f} ms | {row['load']} |"
        )
    return "\n".join(lines)


def tasks_table(rows: list[dict]) -> str:
    lines = [
        "| task | demonstrations | expert | seed | DBP, unseen starts | 95 % interval | training | wanted (the paper's arms) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    experts = {row["task"]: row for row in rows if row["what"] == "expert"}
    for row in sorted((row for row in rows if row["what"] == "training"), key=lambda row: (row["task"], row["train_seed"])):
        (low, high), one = record.interval(row), experts[row["task"]]
        lines.append(
            f"| ur5-{row['task']} | {row['demos']} | {one['success_rate']:.2f} of {one['episodes']} | {row['train_seed']} | "
            f"{row['score']:.2f} of {row['episodes']} | {low:.2f} to {high:.2f} | {row['wall_s'] / 60:.0f} min | "
            f"{WANTED[row['task']]:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    cfg = tyro.cli(Config, description=__doc__.split("\n")[0])
    done = {(row["task"], row["train_seed"]) for row in record.read(RESULTS) if row["what"] == "training"}
    if cfg.experts and not cfg.print:
        for task in ur5_tasks.SCENES:
            record.append(RESULTS, {"what": "expert", "task": task}, expert(task, cfg.experts))
    for task, seed in [] if cfg.print else [(t, s) for s in cfg.seeds for t in cfg.train if (t, s) not in done]:
        flags = ["--env", f"ur5-{task}", "--demos", "scripted:100", "--seed", str(seed)]
        line = record.run("dbp_train.py", ROOT / "runs" / "benchmark" / f"ur5-{task}-{seed}", flags)
        with np.load(demos.embedded(f"ur5-{task}", "100"), allow_pickle=False) as file:
            extra = {"demos": len(file["episode_ends"]), "attempts": int(file["attempts"])}
        record.append(RESULTS, {"what": "training", "task": task, "train_seed": seed}, {**line, **extra})
    if not (cfg.print or cfg.experts or cfg.train):
        for policy, cameras in (("state", ()), ("three cameras, 84 x 84", ur5_twin.CAMERAS)):
            for exported in (False, True) if importlib.util.find_spec("onnxruntime") else (False,):
                name = policy + ", exported" * exported
                record.append(RESULTS, {"what": "times", "policy": name}, times(cfg, cameras, exported))
    print(times_table(record.read(RESULTS)) + "\n\n" + tasks_table(record.read(RESULTS)))


if __name__ == "__main__":
    main()
