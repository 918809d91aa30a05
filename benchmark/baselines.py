"""DBP beside its rivals: the same network, data, normaliser, windows, clock and evaluation; only the objective differs.

    python benchmark/baselines.py --demos PATH/pusht_cchi_v7_replay.zarr       all six, 3 seeds, 160 s each: 100 minutes
    python benchmark/baselines.py --demos PATH --seconds 240 --clock cpu       README's: beside other work, 50 minutes per seed
    python benchmark/baselines.py --demos PATH --only dbp diffusion --seeds 0       one pair: 9 minutes
    python benchmark/baselines.py --demos PATH --only diffusion --seconds 1600      diffusion with ten times DBP's time
    python benchmark/baselines.py --demos PATH --steps 200 --seeds 0                does every objective run? no row is written
    python benchmark/baselines.py --print                                           table and pictures of what there is

One file per objective in benchmark/rivals/. Every rival has what DBP's preset `fast` has: batch, learning rate and its cosine
(over the seconds), averaged weights, noise on the observation. At fixed seconds of training (evaluations not counted) its average
acts on 50 selection starts (seeds 50,000 on); the best one is reported on 100 starts that no choice has seen (100,000 on).
Rows go to benchmark/results/baselines.jsonl; one that is there is not run again. Pictures: benchmark/pictures/baselines.png.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import record
import torch
import tyro
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results" / "baselines.jsonl"
PICTURE = ROOT / "benchmark" / "pictures" / "baselines.png"
sys.path.insert(0, str(ROOT))
from rivals.bc import BehaviourCloning
from rivals.consistency import Consistency
from rivals.dbp import DBP
from rivals.diffusion import Diffusion
from rivals.flow import Flow
from rivals.meanflow import MeanFlow
from rivals.network import Rival

import dbp_train
import demos
import envs
import evaluate
from policy import EMA, PolicyConfig

OBJECTIVES: dict[str, type[Rival]] = {
    "dbp": DBP,
    "bc": BehaviourCloning,
    "diffusion": Diffusion,
    "flow": Flow,
    "meanflow": MeanFlow,
    "consistency": Consistency,
}
SELECTION_EPISODES, REPORT_EPISODES = 50, 100  # as dbp_train.py
FIRST_MARK, MARK_RATIO = 10.0, 1.35  # seconds of the first evaluation, and from one to the next: dense where curves are steep
PUBLISHED = {  # Push-T, state, max coverage; both lines of work use other starts than ours
    "dbp": "0.87",
    "ddpm-100": "0.91 (0.85 as reproduced in the DBPO paper)",
}


@dataclasses.dataclass(frozen=True)
class Config:
    demos: str = "embedded"  # demonstrations of all, as dbp_train.py takes them
    only: tuple[str, ...] = tuple(OBJECTIVES)  # objectives to train
    seeds: tuple[int, ...] = (0, 1, 2)  # of network, minibatches and noise
    seconds: float = 160.0  # training time of each, about that of the preset fast
    clock: Literal["wall", "cpu"] = "wall"  # cpu: seconds that this process computed, for a machine with other work
    steps: int = 0  # stop after so many steps and write no row; 0: --seconds decide
    backbone: Literal["mlp", "unet"] = "mlp"  # unet: Table VIII; wants a GPU
    device: str = "auto"
    lr: float = 1e-3  # peak learning rate; preset fast: 1e-3
    threads: int = 1  # of torch on the CPU
    print: bool = False  # print the table and draw the pictures of what there is, run nothing


def settings(env: str) -> dbp_train.Config:
    """Those of DBP's preset fast for this task: sizes, horizons, batch, rates."""
    return dbp_train.Config(**{**envs.get_task(env).train, "env": env})


def make_policy(name: str, backbone: str, env: str = "pusht") -> Rival:
    cfg, task = settings(env), envs.get_task(env)
    shared = {f.name for f in dataclasses.fields(PolicyConfig)} & {f.name for f in dataclasses.fields(cfg)} - {"backbone"}
    sizes = {field: getattr(cfg, field) for field in shared}
    return OBJECTIVES[name](PolicyConfig(obs_shapes=task.obs_shapes, action_dim=task.action_dim, backbone=backbone, **sizes))


def marks(seconds: float) -> list[float]:
    """Seconds of training after which the policy is evaluated: geometric, the end included."""
    times = [FIRST_MARK * MARK_RATIO**k for k in range(100)]
    return [t for t in times if t < seconds / MARK_RATIO**0.5] + [seconds]


def try_out(policy: Rival, sampler: str, first_start: int, episodes: int) -> dict[str, np.ndarray]:
    policy.act_with(sampler)
    torch.manual_seed(0)  # of the noise inside DDPM's steps
    return evaluate.rollout(policy, envs.get_task("pusht"), list(range(first_start, first_start + episodes)))


def training(policy: Rival, cfg: Config) -> Iterator[tuple[int, float, Rival, float]]:
    """Train the policy until the caller stops; after every step: (steps done, seconds of training, averaged policy, loss).

    What the caller does between two steps is not on the clock.
    """
    fast, task = settings(policy.config.env), envs.get_task(policy.config.env)
    data = demos.load(cfg.demos, task.name, task.demo_arrays, task.demo_convert, record=task.demo_record)
    policy.fit_normalizers(data.obs, data.actions)
    policy.to(cfg.device).train()
    windows = demos.Windows(data, fast.obs_steps, fast.horizon, fast.action_steps, cfg.device)
    ema, weights = EMA(policy, fast.ema_power, fast.ema_max_decay), list(policy.parameters())
    optimizer = torch.optim.AdamW(weights, lr=cfg.lr, betas=fast.betas, weight_decay=fast.weight_decay, fused=True)
    noise_std = {key: fast.obs_noise * normalizer.half_range for key, normalizer in policy.normalize_obs.items()}
    clock, step, spent = time.process_time if cfg.clock == "cpu" else time.perf_counter, 0, 0.0
    while True:
        began, progress = clock(), min(1.0, spent / cfg.seconds)
        obs, chunk = windows[torch.randint(len(windows), (fast.batch_size,)).to(cfg.device)]
        obs = {key: value + noise_std[key] * torch.randn_like(value) for key, value in obs.items()}
        x = policy.normalize_action(chunk).unsqueeze(1)  #                    (B, 1, Tp, Da)
        loss = policy.loss(x, policy.encode(obs), progress)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, fast.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min(1, (step + 1) / fast.warmup) * 0.5 * (1 + math.cos(math.pi * progress))
        optimizer.step()
        ema.update(step)
        step += 1
        value = loss.item()  # waits for the device
        spent += clock() - began
        yield step, spent, ema.policy, value


def train(name: str, seed: int, cfg: Config) -> list[dict]:
    """One training with its evaluations; a row per sampler of the objective."""
    torch.manual_seed(seed)
    policy, remaining = make_policy(name, cfg.backbone), marks(cfg.seconds)
    curves: dict[str, list] = {sampler: [] for sampler in policy.SAMPLERS}
    best: dict[str, Rival] = {}
    bar = tqdm(total=round(cfg.seconds), unit="s", desc=f"{name}, seed {seed}")
    for step, spent, average, loss in training(policy, cfg):
        bar.update(round(spent) - bar.n)
        if spent >= remaining[0]:
            remaining.pop(0)
            random = torch.get_rng_state()
            for sampler, curve in curves.items():
                score = float(try_out(average, sampler, evaluate.SELECTION_SEED, SELECTION_EPISODES)["score"].mean())
                if score > max((point[2] for point in curve), default=-1):
                    best[sampler] = copy.deepcopy(average)
                curve.append([round(spent, 1), step, round(score, 4)])
            torch.set_rng_state(random)
            bar.set_postfix({sampler: curve[-1][2] for sampler, curve in curves.items()})
        if step == cfg.steps:
            print(f"{name}: {step} steps, {1e3 * spent / step:.1f} ms each, loss {loss:.3g}", flush=True)
            return []
        if not remaining:
            break
    bar.close()
    rows = []
    for sampler, acting in best.items():
        results = try_out(acting, sampler, evaluate.REPORT_SEED, REPORT_EPISODES)
        line = evaluate.report(acting, results, evaluate.REPORT_SEED)
        rows.append({"method": sampler, "steps": step, "curve": curves[sampler], **line})
    return rows


# --- table and pictures ---------------------------------------------------------------------------------------------------


def label(row: dict) -> str:
    """The method, and what its run had other than the rest."""
    lr = "" if row["lr"] == Config.lr else f", rate {row['lr']:g}"
    return row["method"] + (", U-Net" if row["backbone"] == "unet" else "") + lr


def groups(rows: list[dict]) -> dict[tuple[str, float], list[dict]]:
    """Rows of the same label and seconds, in the order of OBJECTIVES."""
    order = [sampler for objective in OBJECTIVES.values() for sampler in objective.SAMPLERS]
    found: dict[tuple[str, float], list[dict]] = {}
    for row in sorted(rows, key=lambda row: (order.index(row["method"]), label(row), row["seconds"])):
        found.setdefault((label(row), row["seconds"]), []).append(row)
    return found


def seconds_to(curve: list, score: float) -> float:
    """Seconds of the first evaluation at or above the score; infinity where there is none."""
    return next((seconds for seconds, _, reached in curve if reached >= score), math.inf)


def table(rows: list[dict]) -> str:
    lines = [
        "| method | network calls | seconds | seeds | score, 100 episodes | std | success | seconds to 0.90 | steps per second "
        "| one chunk, p50 | published |",
        "|---" * 11 + "|",
    ]
    for (method, seconds), mine in groups(rows).items():
        scores = np.array([row["score"] for row in mine])
        score = f"{scores.mean():.3f} | {scores.std(ddof=1):.3f}" if len(mine) > 1 else f"{scores.mean():.3f} | -"
        reached = [seconds_to(row["curve"], 0.9) for row in mine]
        to = ", ".join("not reached" if math.isinf(t) else f"{t:.0f}" for t in reached)
        success, latency = (np.mean([row[name] for row in mine]) for name in ("success_rate", "latency_ms_p50"))
        speed = np.mean([row["steps"] / row["curve"][-1][0] for row in mine])
        lines.append(
            f"| {method} | {mine[0]['nfe']} | {seconds:.0f} | {len(mine)} | {score} | {success:.2f} | {to} | {speed:.0f} | "
            f"{latency:.2f} ms | {PUBLISHED.get(mine[0]['method'], '-')} |"
        )
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """Left: score on the selection starts over the seconds of training. Right: final score against the time of one chunk."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    methods = list(dict.fromkeys(method for method, _ in groups(rows)))
    colors = {method: f"C{i}" for i, method in enumerate(methods)}
    for (method, seconds), mine in groups(rows).items():
        label = method if seconds == min(s for m, s in groups(rows) if m == method) else None
        style = {"color": colors[method], "ls": "-" if label else "--"}
        for row in mine:
            times, _, scores = zip(*row["curve"], strict=True)
            left.plot(times, scores, lw=0.6, alpha=0.5, **style)
        shortest = min(len(row["curve"]) for row in mine)
        curves = np.array([row["curve"][:shortest] for row in mine])  #     (seeds, marks, 3)
        left.plot(curves[..., 0].mean(0), curves[..., 2].mean(0), lw=2, label=label, **style)
        point = np.mean([row["latency_ms_p50"] for row in mine]), np.mean([row["score"] for row in mine])
        right.scatter(*point, color=colors[method], s=40, marker="o" if label else "s")
        longer = "" if label else f", {seconds:,.0f} s"
        side = {"xytext": (7, -3)} if label else {"xytext": (-7, -3), "ha": "right"}  # of its mark
        right.annotate(method + longer, point, textcoords="offset points", fontsize=8, color=colors[method], **side)
    left.axhline(0.9, color="0.6", lw=0.8, ls=":")
    left.set(xscale="log", xlabel="seconds of training", ylabel="score, 50 selection starts", ylim=(0, 1.02))
    left.set_title("the same network, data and clock (dashed: a longer budget)", fontsize=10)
    left.legend(fontsize=8)
    right.set(xscale="log", xlabel="milliseconds per chunk, batch 1", ylabel="score, 100 unseen starts")
    right.set_title("what a chunk costs, and what it is worth", fontsize=10)
    right.margins(x=0.3)  # room for the names
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    cfg = tyro.cli(Config, description=__doc__.split("\n")[0])
    for name in cfg.only:
        record.check_known(name, OBJECTIVES)
    cfg = dataclasses.replace(cfg, device=str(evaluate.usable_device(cfg.device)))
    torch.set_num_threads(cfg.threads)
    source = Path(cfg.demos).name
    for seed in () if cfg.print else cfg.seeds:
        for name in cfg.only:
            key = {"objective": name, "backbone": cfg.backbone, "demos": source, "train_seed": seed}
            key |= {"seconds": cfg.seconds, "clock": cfg.clock, "lr": cfg.lr}
            if cfg.steps == 0 and any(key.items() <= row.items() for row in record.read(RESULTS)):
                continue
            for row in train(name, seed, cfg):
                record.append(RESULTS, key, row)
    rows = record.read(RESULTS)
    if rows:
        print(table(rows))
        draw(rows, PICTURE)


if __name__ == "__main__":
    main()
