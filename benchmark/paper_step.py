"""Seconds of one training step of the `paper` preset on this machine: python benchmark/paper_step.py, about one minute."""

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
from dbp_train import PRESETS, Config
from drift import dbp_loss
from policy import EMA, Policy, PolicyConfig


def main(steps: int = 5) -> None:
    cfg, task = Config(**PRESETS["paper"]), envs.get_task("pusht")
    policy = Policy(PolicyConfig(env="pusht", obs_shapes=task.obs_shapes, action_dim=2, backbone="unet")).train()
    ema, weights = EMA(policy), list(policy.parameters())
    optimizer = torch.optim.AdamW(weights, lr=cfg.lr, betas=cfg.betas, fused=True)
    times = []
    for step in range(steps):
        start = time.perf_counter()
        generated = policy({"state": torch.randn(cfg.batch_size, 2, 20)}, torch.randn(cfg.batch_size, cfg.hypotheses, 16, 2))
        loss, _ = dbp_loss(generated.flatten(2), torch.randn(cfg.batch_size, 1, 32), temperatures=cfg.temperatures)
        optimizer.zero_grad(set_to_none=True)
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, cfg.grad_clip)
        optimizer.step()
        ema.update(step)
        times.append(time.perf_counter() - start)
    result = {
        **record.stamp(),
        "parameters": sum(p.numel() for p in weights),
        "threads": torch.get_num_threads(),
    }
    result |= {"step_s": round(statistics.median(times[1:]), 2)}
    print(json.dumps(result))
    (ROOT / "benchmark" / "results" / "paper_step.json").write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__.split("\n")[0])  # --help shall not begin to measure
