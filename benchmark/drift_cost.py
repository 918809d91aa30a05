"""What the drift costs: its share of a training step, step-wise mode against a loop, growth with G and S.

    python benchmark/drift_cost.py            about two minutes; writes benchmark/results/drift_cost.json

Every ratio is taken inside one run, the two sides in turn, medians over many rounds. The training step is dbp_train.py's: same
network, batch and optimiser. The drift is `dbp_loss` forward and its own part of the backward pass, down to the chunks.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch

import envs
from dbp_train import Config
from drift import dbp_loss, dbp_loss_stepwise
from policy import EMA, Policy, PolicyConfig


def milliseconds(*functions: Callable[[], object], rounds: int = 60) -> list[float]:
    """Median time of each function, the functions called in turn."""
    times: list[list[float]] = [[] for _ in functions]
    for round_ in range(rounds + 5):
        for function, record in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if round_ >= 5:
                record.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(record) for record in times]


def share_of_step() -> dict[str, float]:
    cfg, task = Config(), envs.get_task("pusht")
    fields = ("obs_steps", "horizon", "action_steps", "backbone", "cond_width", "cond_depth", "width", "depth")
    settings = {name: getattr(cfg, name) for name in fields}
    policy = Policy(PolicyConfig(env="pusht", obs_shapes=task.obs_shapes, action_dim=task.action_dim, **settings))
    ema = EMA(policy)
    weights = list(policy.parameters())
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    B, G, S = cfg.batch_size, cfg.hypotheses, cfg.horizon * task.action_dim
    obs, expert = {"state": torch.randn(B, cfg.obs_steps, 20)}, torch.randn(B, 1, S)
    chunks = torch.randn(B, G, S, requires_grad=True)

    def step() -> None:
        generated = policy(obs, torch.randn(B, G, cfg.horizon, task.action_dim)).flatten(2)
        loss, _ = dbp_loss(generated, expert, temperatures=cfg.temperatures)
        optimizer.zero_grad(set_to_none=True)
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, cfg.grad_clip)
        optimizer.step()
        ema.update(1000)

    def drift() -> None:
        chunks.grad = None
        loss, _ = dbp_loss(chunks, expert, temperatures=cfg.temperatures)
        loss.mean().backward()

    whole, part = milliseconds(step, drift)
    return {"step_ms": whole, "drift_ms": part, "share": part / whole}


def stepwise_against_loop(B: int = 128, G: int = 4, Tp: int = 16, Da: int = 2) -> dict[str, float]:
    generated, expert = torch.randn(B, G, Tp, Da, requires_grad=True), torch.randn(B, 1, Tp, Da)

    def batched() -> None:
        dbp_loss_stepwise(generated, expert)[0].mean().backward()

    def loop() -> None:
        losses = [dbp_loss(generated[:, :, t], expert[:, :, t])[0] for t in range(Tp)]
        torch.stack(losses).mean(0).mean().backward()

    fast, slow = milliseconds(batched, loop)
    return {"batched_ms": fast, "loop_ms": slow, "ratio": slow / fast}


def growth(B: int = 64) -> list[dict[str, float]]:
    """One row per (G, S). The exponent between neighbours tells the growth: at most 1 in S, at most 2 in G."""
    rows = []
    for G, S in [(4, 32), (8, 32), (16, 32), (32, 32), (64, 32), (16, 128), (16, 512), (16, 2048), (16, 8192)]:
        generated, expert = torch.randn(B, G, S, requires_grad=True), torch.randn(B, 1, S)
        (ms,) = milliseconds(lambda: dbp_loss(generated, expert)[0].mean().backward(), rounds=15)  # noqa: B023
        rows.append({"B": B, "G": G, "S": S, "ms": ms})
    return rows


def main() -> None:
    torch.manual_seed(0)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "share_of_step": share_of_step(),
        "stepwise": stepwise_against_loop(),
        "growth": growth(),
    }
    print(json.dumps(result, indent=1))
    (ROOT / "benchmark" / "results").mkdir(exist_ok=True)
    (ROOT / "benchmark" / "results" / "drift_cost.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
