"""Does torch.compile pay on this machine? One training step of preset `fast`, compiled and not, in turn.

python benchmark/compile_step.py        about two minutes; needs a C++ compiler; writes benchmark/results/compile_step.json
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import record
import torch
import tyro

import envs
from dbp_train import Config
from drift import dbp_loss
from policy import Policy, PolicyConfig


def main(rounds: int = 100) -> None:
    cfg, task = Config(), envs.get_task("pusht")
    shapes = {name: getattr(cfg, name) for name in ("cond_width", "cond_depth", "width", "depth")}
    policy = Policy(PolicyConfig(env="pusht", obs_shapes=task.obs_shapes, action_dim=2, **shapes))
    networks = {"eager": policy, "compiled": torch.compile(policy)}
    times: dict[str, list[float]] = {name: [] for name in networks}
    first = {}
    for round_ in range(rounds):
        for name, network in networks.items():
            start = time.perf_counter()
            generated = network({"state": torch.randn(cfg.batch_size, 2, 20)}, torch.randn(cfg.batch_size, cfg.hypotheses, 16, 2))
            loss, _ = dbp_loss(generated.flatten(2), torch.randn(cfg.batch_size, 1, 32), temperatures=cfg.temperatures)
            policy.zero_grad(set_to_none=True)
            loss.mean().backward()
            seconds = time.perf_counter() - start
            first.setdefault(name, round(seconds, 1))
            if round_ >= 10:
                times[name].append(seconds)
    ratio = statistics.median(e / c for e, c in zip(times["eager"], times["compiled"], strict=True))
    result = {**record.stamp(), "threads": torch.get_num_threads(), "first_call_s": first}
    result |= {f"{name}_ms": round(statistics.median(t) * 1e3, 2) for name, t in times.items()}
    result |= {"eager_over_compiled": round(ratio, 3)}
    print(json.dumps(result))
    (ROOT / "benchmark" / "results" / "compile_step.json").write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__.split("\n")[0])  # --help shall not begin to measure
