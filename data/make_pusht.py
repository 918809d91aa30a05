"""Makes data/pusht.npz: Push-T demonstrations of this project's own, the successes of a trained policy.

    python dbp_train.py --env pusht --demos PATH/pusht_cchi_v7_replay.zarr --preset best --out runs/pusht-human
    python data/make_pusht.py --ckpt runs/pusht-human/dbp.pt --out data/pusht.npz

From every start the policy tries several times with other latents; the shortest success is kept (coverage above 0.95, the
simulator's own criterion), so that the set is short, clean, and comes from all over the table. Starts count from seed
1,000,000, far from those that training selects on and reports on. data/README.md says how the file in the repository was made.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import envs
import vector
from common import run_main
from policy import Policy

Episode = tuple[np.ndarray, np.ndarray]  # states (T, 5), actions (T, 2)


@dataclasses.dataclass(frozen=True)
class Config:
    ckpt: str = "runs/pusht-human/dbp.pt"  # the policy
    out: str = "data/pusht.npz"  # where to write
    starts: int = 800  # how many starts to try
    attempts: int = 3  # attempts per start, each with latents of its own
    latent_scale: float = 0.5  # smaller latents than in training: less variety, more successes
    seed_start: int = 1_000_000  # seed of the first start
    max_steps: int = 200  # longer successes are left out
    size_mb: float = 1.9  # stop adding episodes here


def attempt(policy: Policy, env: vector.GymVector, seeds: list[int], latent_seed: int) -> list[Episode | None]:
    """One episode per seed; None where it did not succeed."""
    c = policy.config
    generator = torch.Generator().manual_seed(latent_seed)
    obs = env.reset(seeds)
    states: list[list[np.ndarray]] = [[] for _ in seeds]
    actions: list[list[np.ndarray]] = [[] for _ in seeds]
    done = np.zeros(len(seeds), bool)
    while not done.all():
        # Rounded to 1/64 pixel, which compresses to half the size; the simulator gets just what the file says.
        chunks = np.round(policy.act(obs, generator=generator).numpy() * 64) / 64
        for t in range(c.action_steps):
            for i in np.flatnonzero(~done):
                states[i].append(env.vector.envs[i].unwrapped.get_obs())
                actions[i].append(chunks[i, t])
            obs, _, terminated, truncated, info = env.step(chunks[:, t : t + 1])
            done = terminated | truncated
            if done.all():
                break
    return [(np.array(s), np.array(a)) if ok else None for s, a, ok in zip(states, actions, info["success"], strict=True)]


def main() -> None:
    cfg = tyro.cli(Config, description=__doc__.split("\n")[0])
    policy = Policy.load(cfg.ckpt)
    policy.config = dataclasses.replace(policy.config, latent_scale=cfg.latent_scale)
    batch, kept, successes = 50, [], 0
    bar = tqdm(total=cfg.starts * cfg.attempts, unit="episode")
    for first in range(0, cfg.starts, batch):
        seeds = list(range(cfg.seed_start + first, cfg.seed_start + min(first + batch, cfg.starts)))
        env = envs.get_task("pusht").make(len(seeds), policy.config.obs_steps)
        best: list[Episode | None] = [None] * len(seeds)
        for k in range(cfg.attempts):
            for i, episode in enumerate(attempt(policy, env, seeds, cfg.seed_start + 1000 * first + k)):
                successes += episode is not None
                if episode is not None and (best[i] is None or len(episode[0]) < len(best[i][0])):
                    best[i] = episode
            bar.update(len(seeds))
        kept += [episode for episode in best if episode is not None and len(episode[0]) <= cfg.max_steps]
    bar.close()

    out, count = Path(cfg.out), len(kept)
    while count:  # the largest number of episodes that fits the size; order is that of the seeds, so no selection by ease
        states = np.round(np.concatenate([s for s, _ in kept[:count]]) * [64, 64, 64, 64, 4096]) / [64, 64, 64, 64, 4096]
        actions = np.concatenate([a for _, a in kept[:count]])
        ends = np.cumsum([len(s) for s, _ in kept[:count]])
        np.savez_compressed(out, state=states.astype(np.float32), action=actions.astype(np.float32), episode_ends=ends)
        if out.stat().st_size <= cfg.size_mb * 1e6:
            break
        count = int(count * cfg.size_mb * 1e6 / out.stat().st_size)
    lengths = np.array([len(s) for s, _ in kept[:count]])
    turns = []  # which way the agent goes round the T: the angle it sweeps about the block
    for s, _ in kept[:count]:
        angle = np.unwrap(np.arctan2(s[:, 1] - s[:, 3], s[:, 0] - s[:, 2]))
        turns.append(angle[-1] - angle[0])
    starts = np.array([s[0] for s, _ in kept[:count]])
    print(
        f"{successes} of {cfg.starts * cfg.attempts} attempts succeeded; {len(kept)} of {cfg.starts} starts kept\n"
        f"{count} episodes written: {lengths.sum():,} steps, {lengths.mean():.0f} each ({lengths.min()} to {lengths.max()})\n"
        f"round the T: {np.mean(np.array(turns) > 0):.2f} one way, {np.mean(np.array(turns) < 0):.2f} the other\n"
        f"block starts x {starts[:, 2].min():.0f} to {starts[:, 2].max():.0f}, y {starts[:, 3].min():.0f} to "
        f"{starts[:, 3].max():.0f}, angles in quarters {np.histogram(starts[:, 4], 4, (0, 2 * np.pi))[0] / count}\n"
        f"{out}: {out.stat().st_size / 1e6:.2f} MB"
    )


if __name__ == "__main__":
    run_main(main)
