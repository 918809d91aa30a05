"""What the drift costs: its share of a training step, step-wise mode against a loop, growth with G and S.

    python benchmark/drift_cost.py            about two minutes; writes benchmark/results/drift_cost.json

Every ratio is taken inside one run, medians over many rounds. The growth is timed on one thread: with two, small sizes run on
one and large ones on both, and the exponents would mix.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import record
import torch
import tyro

import demos
import envs
from dbp_train import Config
from drift import dbp_loss, dbp_loss_stepwise
from policy import EMA, Policy, PolicyConfig

RESULTS = ROOT / "benchmark" / "results" / "drift_cost.json"


def milliseconds(*functions: Callable[[], object], rounds: int = 60) -> list[float]:
    """Median time of each function, the functions called in turn."""
    times: list[list[float]] = [[] for _ in functions]
    for round_ in range(rounds + 5):
        for function, mine in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if round_ >= 5:
                mine.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(mine) for mine in times]


def share_of_step(rounds: int = 300) -> dict[str, float]:
    """One training step as in dbp_train.py, from the draw of the minibatch to the averaged weights; the drift is timed inside
    it: `dbp_loss`, and the backward pass from the loss down to the generated chunks."""
    cfg, task = Config(), envs.get_task("pusht")
    data = demos.load("embedded", "pusht", task.demo_arrays, task.demo_convert)
    windows = demos.Windows(data, cfg.obs_steps, cfg.horizon, cfg.action_steps)
    fields = ("obs_steps", "horizon", "action_steps", "backbone", "cond_width", "cond_depth", "width", "depth")
    settings = {name: getattr(cfg, name) for name in fields}
    policy = Policy(PolicyConfig(env="pusht", obs_shapes=task.obs_shapes, action_dim=task.action_dim, **settings))
    policy.fit_normalizers(data.obs, data.actions)
    ema, weights = EMA(policy), list(policy.parameters())
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    B, G = cfg.batch_size, cfg.hypotheses
    shares, steps, drifts = [], [], []
    for round_ in range(rounds):
        start = time.perf_counter()
        obs, chunk = windows[torch.randint(len(windows), (B,))]
        obs = {key: value + cfg.obs_noise * torch.randn(value.shape) for key, value in obs.items()}
        expert = policy.normalize_action(chunk).flatten(1).unsqueeze(1)
        generated = policy(obs, torch.randn(B, G, cfg.horizon, task.action_dim)).flatten(2)
        reached: list[float] = []
        generated.register_hook(lambda _, reached=reached: reached.append(time.perf_counter()))
        before = time.perf_counter()
        loss = dbp_loss(generated, expert, temperatures=cfg.temperatures)[0].mean()
        forward = time.perf_counter() - before
        optimizer.zero_grad(set_to_none=True)
        backward_start = time.perf_counter()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, cfg.grad_clip)
        optimizer.step()
        ema.update(round_)
        whole, drift = time.perf_counter() - start, forward + reached[0] - backward_start
        if round_ >= 20:
            shares.append(drift / whole)
            steps.append(whole * 1e3)
            drifts.append(drift * 1e3)
    return {
        "step_ms": statistics.median(steps),
        "drift_ms": statistics.median(drifts),
        "share": statistics.median(shares),
        "share_p10_p90": [statistics.quantiles(shares, n=10)[0], statistics.quantiles(shares, n=10)[-1]],
    }


def stepwise_against_loop(B: int = 128, G: int = 4, Tp: int = 16, Da: int = 2) -> dict[str, float]:
    generated, expert = torch.randn(B, G, Tp, Da, requires_grad=True), torch.randn(B, 1, Tp, Da)

    def batched() -> None:
        dbp_loss_stepwise(generated, expert)[0].mean().backward()

    def loop() -> None:
        losses = [dbp_loss(generated[:, :, t], expert[:, :, t])[0] for t in range(Tp)]
        torch.stack(losses).mean(0).mean().backward()

    fast, slow = milliseconds(batched, loop)
    return {"batched_ms": fast, "loop_ms": slow, "ratio": slow / fast}


def growth() -> list[dict[str, float]]:
    """One row per (B, G, S). The exponent between neighbours tells the growth: at most 1 in S, at most 2 in G.

    B is 16 where S grows, so that every tensor stays below 32 MiB: glibc maps larger ones afresh from the kernel each time,
    and their page faults cost as much as the arithmetic. The last two rows show that step, at B = 64.
    """
    rows = []
    in_g = [(64, G, 32) for G in (4, 8, 16, 32, 64)]
    in_s = [(16, 16, S) for S in (128, 512, 2048, 8192)]
    for B, G, S in [*in_g, *in_s, (64, 16, 2048), (64, 16, 8192)]:
        generated, expert = torch.randn(B, G, S, requires_grad=True), torch.randn(B, 1, S)
        (ms,) = milliseconds(lambda: dbp_loss(generated, expert)[0].mean().backward(), rounds=15)  # noqa: B023
        rows.append({"B": B, "G": G, "S": S, "ms": ms})
    return rows


def share_table(result: dict) -> str:
    lines = ["| what | measured | wanted |", "|---|---|---|"]
    for key, what, wanted in (
        ("share_of_step", "share of one training step, preset `fast`, two threads", "<= 5 % (the paper: 20-30 %)"),
        ("share_of_step_1_thread", "the same on one thread", "<= 5 %"),
    ):
        row = result[key]
        lines.append(f"| {what} | {100 * row['share']:.1f} % ({row['drift_ms']:.2f} of {row['step_ms']:.1f} ms) | {wanted} |")
    ratio = result["stepwise"]["ratio"]
    return "\n".join([*lines, f"| step-wise mode against a loop over the slices | {ratio:.1f} times faster | >= 5 times |"])


def growth_table(result: dict, name: str, B: int, other: int) -> str:
    """Milliseconds over `name`, G or S, at a fixed B and the other of the two."""
    fixed = "S" if name == "G" else "G"
    rows = [row for row in result["growth"] if (row["B"], row[fixed]) == (B, other)]
    heads = f"| {name}, B = {B}, {fixed} = {other} | " + " | ".join(f"{row[name]:,}" for row in rows) + " |"
    return "\n".join([heads, "|---" * (1 + len(rows)) + "|", "| ms | " + " | ".join(f"{row['ms']:.2f}" for row in rows) + " |"])


def main() -> None:
    torch.manual_seed(0)
    result = {
        **record.stamp(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "share_of_step": share_of_step(),
        "stepwise": stepwise_against_loop(),
    }
    torch.set_num_threads(1)
    result["share_of_step_1_thread"] = share_of_step()
    result["growth"] = growth()
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(share_table(result), growth_table(result, "G", 64, 32), growth_table(result, "S", 16, 16), sep="\n\n")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__.split("\n")[0])  # --help shall not begin to measure
