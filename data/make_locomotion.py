"""Makes data/<body>.npz: behaviour policies of this project's own, whose rollouts are the embedded locomotion demonstrations.

    pip install stable-baselines3                        a tool for this script alone, not a requirement of the project
    python data/make_locomotion.py --body hopper         an hour or two on one core

Soft actor-critic on the gymnasium environment. Every few thousand steps the stochastic policy is rolled out, as for D4RL's
"medium" data; the snapshot whose mean return is nearest to theirs is kept as `medium`, the best one as `expert`. The file holds
both as plain arrays in float16. envs.record_locomotion draws the demonstrations from it.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import envs

MEDIUM = {"hopper": 1_400, "walker2d": 2_900, "halfcheetah": 4_800, "ant": 3_000}  # mean returns of D4RL's medium data


@dataclasses.dataclass(frozen=True)
class Config:
    body: str = "hopper"  # hopper, walker2d, halfcheetah or ant
    steps: int = 600_000  # environment steps, one update each
    every: int = 10_000  # steps between snapshots
    episodes: int = 20  # episodes that measure a snapshot
    expert: float = float("inf")  # stop at this mean return
    seed: int = 0
    out: str = ""  # empty: data/<body>.npz


def arrays(actor) -> dict[str, np.ndarray]:
    """The actor of stable-baselines3 (two hidden layers, mean and log-std) as envs.Behaviour reads it."""
    layers = [actor.latent_pi[0], actor.latent_pi[2], actor.mu, actor.log_std]
    values = {f"w{i}": layer.weight.detach().numpy().T for i, layer in enumerate(layers)}
    values |= {f"b{i}": layer.bias.detach().numpy() for i, layer in enumerate(layers)}
    return {name: value.astype(np.float16) for name, value in values.items()}


def main() -> None:
    cfg = tyro.cli(Config, description=__doc__.split("\n")[0])
    from stable_baselines3 import SAC

    warnings.simplefilter("ignore")
    sac = SAC("MlpPolicy", gymnasium.make(envs.BODIES[cfg.body].gym_id), learning_starts=10_000, seed=cfg.seed)
    medium, expert, gap, best = None, None, float("inf"), -float("inf")
    out = Path(cfg.out or ROOT / "data" / f"{cfg.body}.npz")
    for step in range(cfg.every, cfg.steps + 1, cfg.every):
        sac.learn(cfg.every, reset_num_timesteps=step == cfg.every)
        snapshot = arrays(sac.policy.actor)
        _, _, _, returns = envs.roll_out(cfg.body, envs.Behaviour(snapshot), cfg.episodes * 1_000, seed_start=3_000_000)
        mean = returns.mean()
        print(
            f"{cfg.body} step {step:,}: mean return {mean:,.0f} (std {returns.std():,.0f}), {len(returns)} episodes", flush=True
        )
        if abs(mean - MEDIUM[cfg.body]) < gap:
            gap, medium = abs(mean - MEDIUM[cfg.body]), snapshot
        if mean > best:
            best, expert = mean, snapshot
        levels = {"medium": medium, "expert": expert}
        np.savez_compressed(out, **{f"{level}_{name}": x for level, policy in levels.items() for name, x in policy.items()})
        if best >= cfg.expert:
            break


if __name__ == "__main__":
    main()
