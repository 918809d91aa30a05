"""Hypotheses against the expert's modes on Push-T as training proceeds, after the paper's Figure 3.

    python benchmark/modes.py --demos PATH/pusht_cchi_v7_replay.zarr     five minutes; writes benchmark/pictures/modes.png
    python benchmark/modes.py --seconds 5 --shown 20 60 100                 half a minute, to see that it runs

The expert's modes at an observation are what demonstrations did at the observations nearest to it, from other episodes. Shown are
the three observations, among those with near neighbours, whose neighbours disagree most: two ways, far apart, each taken in three
episodes or more. Blue: the neighbours' chunks. Orange: chunks of the policy, one per latent, latents of std 1. Grey: the T's
keypoints and the agent.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import baselines

import demos
import envs

NEIGHBOURS, CANDIDATES, LATENTS = 10, 3000, 24  # neighbours of an observation; observations that are looked at; chunks drawn


@dataclasses.dataclass(frozen=True)
class Config:
    demos: str = "embedded"  # demonstrations, as dbp_train.py takes them
    seconds: float = 160.0  # of computing, about that of the preset fast
    shown: tuple[int, ...] = (30, 150, 600, 2400)  # steps of the panels
    seed: int = 0
    threads: int = 1  # of torch


def neighbours(obs: Tensor, episode: Tensor, which: int) -> list[int]:
    """The NEIGHBOURS windows nearest to one, each from another episode. obs (windows, numbers), normalised."""
    d = torch.cdist(obs[which : which + 1], obs, compute_mode="donot_use_mm_for_euclid_dist")[0]  # without (windows, numbers)
    found: dict[int, int] = {}
    for i in d.argsort()[:400].tolist():
        found.setdefault(int(episode[i]), i)
        if len(found) == NEIGHBOURS:
            break
    return list(found.values())


def disagreement(chunks: Tensor) -> float:
    """How much two ways stand apart among chunks (n, numbers): distance of the two means over the spread within, by 2-means.

    0 where one of the ways has fewer than three chunks.
    """
    one = chunks[(chunks - chunks.mean(0)).norm(dim=-1).argmax()]
    means = torch.stack([one, chunks[(chunks - one).norm(dim=-1).argmax()]])
    for _ in range(10):
        side = torch.cdist(chunks, means).argmin(1)
        if min(side.sum(), (1 - side).sum()) < 3:
            return 0.0
        means = torch.stack([chunks[side == way].mean(0) for way in (0, 1)])
    within = (chunks - means[side]).norm(dim=-1).mean()
    return ((means[0] - means[1]).norm() / (within + 0.1)).item()  # 0.1: no prize for the identical


def most_disputed(obs: Tensor, chunks: Tensor, episode: Tensor, number: int, seed: int) -> list[tuple[int, list[int]]]:
    """(window, its neighbours) of the windows whose neighbours disagree most, from different episodes."""
    looked_at = torch.randperm(len(obs), generator=torch.Generator().manual_seed(seed))[:CANDIDATES].tolist()
    near = {which: neighbours(obs, episode, which) for which in looked_at}
    reach = {which: (obs[near[which]] - obs[which]).norm(dim=-1).max().item() for which in looked_at}
    limit = np.quantile(list(reach.values()), 0.25)
    close = [which for which in looked_at if reach[which] <= limit]  # their neighbours are near
    ranked = sorted(close, key=lambda which: -disagreement(chunks[near[which]].flatten(1)))
    chosen: dict[int, int] = {}
    for which in ranked:
        chosen.setdefault(int(episode[which]), which)
        if len(chosen) == number:
            break
    return [(which, near[which]) for which in chosen.values()]


def panel(ax, history: Tensor, expert: Tensor, generated: Tensor) -> None:
    """history (To, 20), chunks (n, Tp, 2), all in pixels."""
    points = history[-1].view(10, 2)
    ax.scatter(*points[:9].T, s=60, color="0.85", marker="s", zorder=0)
    for chunks, color, width in ((expert, "#3b75af", 1.6), (generated, "#ef8636", 0.8)):
        for chunk in chunks:
            ax.plot(*chunk.T, color=color, lw=width, alpha=0.6)
    ax.scatter(*points[9], s=40, color="0.3", zorder=3)
    ax.set(xticks=[], yticks=[], aspect="equal")


def main() -> None:
    cfg = tyro.cli(Config, description=__doc__.split("\n")[0])
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    task, policy = envs.get_task("pusht"), baselines.make_policy("dbp", "mlp")
    data = demos.load(cfg.demos, "pusht", task.demo_arrays, task.demo_convert)
    c = policy.config
    windows = demos.Windows(data, c.obs_steps, c.horizon, c.action_steps)
    every = torch.arange(len(windows))
    history, chunks = windows[every]
    steps = baselines.training(policy, baselines.Config(demos=cfg.demos, seconds=cfg.seconds, clock="cpu", device="cpu"))
    next(steps)  # fits the normalisers
    normal = policy.normalize_obs["state"](history["state"]).flatten(1)
    episode = torch.from_numpy(np.searchsorted(data.episode_ends, windows.index[:, c.obs_steps - 1], side="right"))
    chosen = most_disputed(normal, policy.normalize_action(chunks), episode, 3, cfg.seed)

    figure, axes = plt.subplots(3, len(cfg.shown), figsize=(2.9 * len(cfg.shown), 8.4), layout="constrained", squeeze=False)
    for step, _, average, _ in steps:
        if step not in cfg.shown:
            continue
        for row, (which, near) in zip(axes, chosen, strict=True):
            with torch.no_grad():
                z = torch.randn(1, LATENTS, c.horizon, c.action_dim, generator=torch.Generator().manual_seed(0))
                obs = {"state": history["state"][which : which + 1]}
                generated = average.normalize_action.inverse(average.network(z, average.encode(obs)))[0]
            panel(row[cfg.shown.index(step)], history["state"][which], chunks[near], generated)
        axes[0, cfg.shown.index(step)].set_title(f"step {step:,}", fontsize=10)
        if step == max(cfg.shown):
            break
    for row in axes:  # one frame per observation, so that contraction shows
        limits = np.array([(*ax.get_xlim(), *ax.get_ylim()) for ax in row[-2:]])
        for ax in row:
            ax.set(xlim=(limits[:, 0].min(), limits[:, 1].max()), ylim=(limits[:, 2].min(), limits[:, 3].max()))
    figure.savefig(ROOT / "benchmark" / "pictures" / "modes.png", dpi=100)


if __name__ == "__main__":
    main()
