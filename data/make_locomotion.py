"""Makes data/<body>.npz: behaviour policies of this project's own, whose rollouts are the embedded locomotion demonstrations.

    python data/make_locomotion.py --body hopper         a quarter of an hour on one core

Plain PPO, one action per decision, on the fast environments of locomotion.py. Every so often the stochastic policy is rolled
out, as for D4RL's "medium" data; the snapshot whose mean return is nearest to theirs is kept as `medium`, the best one as
`expert`. The file holds both as plain arrays in float16. locomotion.record_locomotion draws the demonstrations from it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import tyro
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import dbpo_finetune as ppo
import locomotion
import vector
from policy import Critic

MEDIUM = {"hopper": 1_400, "walker2d": 2_900, "halfcheetah": 4_800, "ant": 3_000}  # mean returns of D4RL's medium data


@dataclasses.dataclass(frozen=True)
class Config:
    body: str = "hopper"  # hopper, walker2d, halfcheetah or ant
    steps: int = 5_000_000  # environment steps
    num_envs: int = 40  # environments
    horizon: int = 50  # steps per environment and iteration
    minibatch: int = 250  # steps per update
    epochs: int = 10  # passes over an iteration
    lr: float = 3e-4  # of Adam at the start, linear to a tenth
    gamma: float = 0.99  # discount
    clip: float = 0.2  # of the ratio
    target_kl: float = 0.02  # an iteration's updates of the actor stop above this
    sigma: float = 0.5  # noise at the start, before tanh
    sigma_min: float = 0.05  # smallest noise
    width: int = 128  # of the two hidden layers
    every: int = 100_000  # steps between snapshots
    episodes: int = 20  # full-length episodes that measure a snapshot
    threads: int = 0  # of the simulation; 0: one per processor
    seed: int = 0
    out: str = ""  # empty: data/<body>.npz


class Actor(nn.Module):
    """u ~ N(mu(o), sigma(o)^2), action tanh(u). Ratios are taken of u: the tanh stands in both policies and cancels."""

    def __init__(self, obs_dim: int, action_dim: int, cfg: Config):
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Linear(obs_dim, cfg.width),
                nn.Linear(cfg.width, cfg.width),
                nn.Linear(cfg.width, action_dim),
                nn.Linear(cfg.width, action_dim),
            ]
        )
        self.bounds = math.log(cfg.sigma_min), 0.5
        nn.init.orthogonal_(self.layers[2].weight, 0.01)
        nn.init.zeros_(self.layers[2].bias)
        nn.init.zeros_(self.layers[3].weight)
        nn.init.constant_(self.layers[3].bias, math.log(cfg.sigma))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        h = self.layers[1](self.layers[0](obs).relu()).relu()
        return self.layers[2](h), self.layers[3](h).clamp(*self.bounds).exp()

    @torch.no_grad()
    def arrays(self, mean: np.ndarray, std: np.ndarray) -> dict[str, np.ndarray]:
        """As locomotion.Behaviour reads it, with the observation's normalisation inside the first layer."""
        weights = {f"w{i}": layer.weight.numpy().T.copy() for i, layer in enumerate(self.layers)}
        biases = {f"b{i}": layer.bias.numpy().copy() for i, layer in enumerate(self.layers)}
        weights["w0"] /= std[:, None]
        biases["b0"] -= mean @ weights["w0"]
        return {name: value.astype(np.float16) for name, value in (weights | biases).items()}


def main() -> None:
    cfg = tyro.cli(Config, description=__doc__.split("\n")[0])
    began = time.perf_counter()
    torch.set_num_threads(1)
    torch.manual_seed(cfg.seed)
    obs_dim, action_dim = locomotion.OBS_DIMS[cfg.body]
    T, N = cfg.horizon, cfg.num_envs
    episodes = vector.Episodes(locomotion.Locomotion(N, 1, cfg.body, cfg.threads), 5_000_000 + 100_000 * cfg.seed, 1)
    actor, critic, scale = Actor(obs_dim, action_dim, cfg), Critic(obs_dim), ppo.RewardScale(N, cfg.gamma)
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()], lr=cfg.lr, eps=1e-5, fused=True)
    mean, variance, count = np.zeros(obs_dim), np.ones(obs_dim), 1.0  # of the observations so far
    medium, expert, gap, best = None, None, float("inf"), -float("inf")
    out = Path(cfg.out or ROOT / "data" / f"{cfg.body}.npz")

    def normalized(obs: np.ndarray) -> Tensor:
        return torch.from_numpy((obs - mean) / np.sqrt(variance + 1e-6)).float()

    iterations = cfg.steps // (T * N)
    for iteration in range(iterations):
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * (1 - 0.9 * iteration / iterations)
        steps = []
        for _ in range(T):
            obs = episodes.obs["state"][:, 0].astype(np.float64)
            with torch.no_grad():
                mu, sigma = actor(normalized(obs))
                u = mu + sigma * torch.randn_like(mu)
            final, reward, terminated, truncated, _ = episodes.step(u.tanh().numpy()[:, None])
            steps.append((obs, u, reward, terminated, truncated, final["state"][:, 0].astype(np.float64)))
        obs, reward, final = (np.stack([step[k] for step in steps]) for k in (0, 2, 5))
        terminated, truncated = (np.stack([step[k] for step in steps]) for k in (3, 4))
        scale.update(reward, terminated | truncated)
        flags = torch.from_numpy(terminated), torch.from_numpy(truncated)
        with torch.no_grad():
            value, following = critic(normalized(obs)), critic(normalized(final))
        scaled = torch.from_numpy(reward / scale.std).float()
        advantage = ppo.gae(scaled, value, following, *flags, cfg.gamma, 0.95)
        target = (advantage + value).flatten()
        advantage = ((advantage - advantage.mean()) / (advantage.std() + 1e-8)).flatten()
        x, u = normalized(obs).flatten(0, 1), torch.cat([step[1] for step in steps])
        with torch.no_grad():
            mu, sigma = actor(x)
            old = ppo.prefix_log_prob(u[:, None], mu[:, None], sigma[:, None])
        acting = True
        for _ in range(cfg.epochs):
            for which in torch.randperm(T * N).split(cfg.minibatch):
                loss = 0.5 * ppo.value_loss(critic(x[which]), target[which])
                if acting:
                    mu, sigma = actor(x[which])
                    r = ppo.ratio(ppo.prefix_log_prob(u[which, None], mu[:, None], sigma[:, None]), old[which])
                    acting = ppo.kl_estimate(r.detach()).item() <= cfg.target_kl
                    if acting:
                        loss = loss + ppo.surrogate(r, advantage[which], cfg.clip)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_([*actor.parameters(), *critic.parameters()], 0.5)
                optimizer.step()
        flat = obs.reshape(-1, obs_dim)  # the statistics move between iterations only: within one the policy stays one
        share = len(flat) / (count + len(flat))
        variance = (1 - share) * variance + share * flat.var(0) + share * (1 - share) * np.square(flat.mean(0) - mean)
        mean, count = mean + share * (flat.mean(0) - mean), count + len(flat)

        done = (iteration + 1) * T * N
        if done // cfg.every > (done - T * N) // cfg.every:
            snapshot = actor.arrays(mean, np.sqrt(variance + 1e-6))
            behaviour = locomotion.Behaviour(snapshot)
            _, _, _, returns = locomotion.roll_out(cfg.body, behaviour, cfg.episodes * 1_000, 3_000_000)
            score = returns.mean()
            print(
                f"{cfg.body} step {done:,}: mean return {score:,.0f} (std {returns.std():,.0f}, {len(returns)} episodes), "
                f"sigma {sigma.mean():.2f}, {time.perf_counter() - began:.0f} s",
                flush=True,
            )
            if abs(score - MEDIUM[cfg.body]) < gap:
                gap, medium = abs(score - MEDIUM[cfg.body]), snapshot
            if score > best:
                best, expert = score, snapshot
            levels = {"medium": medium, "expert": expert}
            np.savez_compressed(out, **{f"{level}_{name}": x for level, policy in levels.items() for name, x in policy.items()})


if __name__ == "__main__":
    main()
