"""Diffusion Policy (DDPM, 100 steps) beside DBP: same backbone, data, machine, and wall time.

    python benchmark/diffusion.py --demos PATH/pusht_cchi_v7_replay.zarr        about 12 minutes

First `dbp_train.py --preset fast` runs and its training seconds are taken; then the same network, told the noise level, learns to
predict the noise for as many seconds. Both act on the same 100 unseen starts. Diffusion has what its authors give it:
squared-cosine schedule, 100 steps in training and acting, clipped x0, averaged weights; and what DBP's preset has: cosine
learning rate, noise on the observations. DBP acts with latents of std 0.8 (its preset) and, second row, of std 1.
The row goes to benchmark/results/diffusion.jsonl.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm

import demos
import envs
import evaluate
from policy import EMA, Policy, ResidualMLP

LEVELS = 100  # noise levels, and network passes per action
TIME_DIM = 64  # features of the noise level


@dataclasses.dataclass(frozen=True)
class Config:
    demos: str = "embedded"  # demonstrations of both
    seed: int = 0  # of both
    seconds: float = 0.0  # training time of diffusion; 0: as long as DBP took
    dbp: str = "runs/benchmark/diffusion-dbp"  # run folder of DBP; a finished run there is taken as it is
    batch_size: int = 256  # one noise draw per row: more rows cost what DBP's four hypotheses cost
    lr: float = 1e-3  # peak learning rate


class DiffusionPolicy(Policy):
    """The network of a DBP policy, with the noise level k as a further condition: predicts eps from x_k."""

    def __init__(self, config):
        super().__init__(config)
        cond_dim = config.obs_steps * self.encoder.feature_dim + TIME_DIM
        chunk_dim = config.horizon * config.action_dim
        self.backbone = ResidualMLP(chunk_dim, cond_dim, config.cond_width, config.cond_depth, config.width, config.depth)
        angle = (torch.arange(LEVELS + 1) / LEVELS + 0.008) / 1.008 * math.pi / 2
        alpha_bar = (angle.cos() ** 2 / angle[0].cos() ** 2).clamp(1e-8, 1)
        beta = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
        self.register_buffer("beta", beta)
        self.register_buffer("alpha_bar", (1 - beta).cumprod(0))

    def noise(self, x: Tensor, cond: Tensor, k: Tensor) -> Tensor:
        """x (B, 1, Tp, Da), cond (B, C), k (B,) -> predicted noise, as x."""
        frequency = torch.exp(torch.arange(TIME_DIM // 2) * (-math.log(10_000) / (TIME_DIM // 2 - 1)))
        angle = k.float().unsqueeze(-1) * frequency
        return self.backbone(x, torch.cat([cond, angle.sin(), angle.cos()], -1))

    def forward(self, obs, z: Tensor) -> Tensor:
        """Ancestral sampling from z, 100 network passes."""
        cond, x = self.encode(obs), z
        for k in reversed(range(LEVELS)):
            eps = self.noise(x, cond, torch.full((len(cond),), k))
            bar, beta = self.alpha_bar[k], self.beta[k]
            before = self.alpha_bar[k - 1] if k else torch.ones(())
            x0 = ((x - (1 - bar).sqrt() * eps) / bar.sqrt()).clamp(-1, 1)
            mean = (before.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - before) * x) / (1 - bar)
            x = mean + (beta * (1 - before) / (1 - bar)).sqrt() * torch.randn_like(x) if k else mean
        return x


def train(cfg: Config, dbp: Policy, seconds: float, obs_noise: float) -> tuple[DiffusionPolicy, int]:
    torch.manual_seed(cfg.seed)
    task, c = envs.get_task("pusht"), dbp.config
    data = demos.load(cfg.demos, task.name, task.demo_arrays, task.demo_convert)
    windows = demos.Windows(data, c.obs_steps, c.horizon, c.action_steps)
    policy = DiffusionPolicy(dataclasses.replace(c, latent_scale=1.0))
    policy.fit_normalizers(data.obs, data.actions)
    ema, weights = EMA(policy), list(policy.parameters())
    optimizer = torch.optim.AdamW(weights, lr=cfg.lr, weight_decay=1e-6, fused=True)
    start, step = time.perf_counter(), 0
    bar = tqdm(total=round(seconds), unit="s", desc="diffusion")
    while (elapsed := time.perf_counter() - start) < seconds:
        obs, chunk = windows[torch.randint(len(windows), (cfg.batch_size,))]
        obs = {key: o + obs_noise * policy.normalize_obs[key].half_range * torch.randn(o.shape) for key, o in obs.items()}
        x0 = policy.normalize_action(chunk).unsqueeze(1)
        k, eps = torch.randint(LEVELS, (cfg.batch_size,)), torch.randn_like(x0)
        level = policy.alpha_bar[k].view(-1, 1, 1, 1)
        loss = F.mse_loss(policy.noise(level.sqrt() * x0 + (1 - level).sqrt() * eps, policy.encode(obs), k), eps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min(1, (step + 1) / 300) * 0.5 * (1 + math.cos(math.pi * elapsed / seconds))
        optimizer.step()
        ema.update(step)
        step += 1
        bar.update(round(elapsed) - bar.n)
    bar.close()
    return ema.policy, step


def check_dbp(cfg: Config, folder: Path) -> dict:
    """The settings of the DBP run, which must be about the same data and seed."""
    settings = json.loads((folder / "config.json").read_text())
    for name in ("demos", "seed"):
        if settings[name] != getattr(cfg, name):
            sys.exit(f"{folder} was trained with {name} = {settings[name]}, not {getattr(cfg, name)}; give another --dbp")
    return settings


def main() -> None:
    cfg = tyro.cli(Config, description=__doc__.split("\n")[0])
    dbp_folder = ROOT / cfg.dbp
    if not (dbp_folder / "result.json").is_file():
        command = [sys.executable, "dbp_train.py", "--demos", cfg.demos, "--seed", str(cfg.seed), "--out", str(dbp_folder)]
        subprocess.run(command, cwd=ROOT, check=True)
    settings = check_dbp(cfg, dbp_folder)
    dbp = Policy.load(dbp_folder / "dbp.pt")
    rows = (dbp_folder / "metrics.csv").read_text().split("\n")
    seconds = cfg.seconds or float(rows[-2].split(",")[1])  # up to the end of training, selection included
    diffusion, steps = train(cfg, dbp, seconds, settings["obs_noise"])

    seeds, task, lines = list(range(100_000, 100_100)), envs.get_task("pusht"), {}
    for name, policy, scale in (("dbp", dbp, dbp.config.latent_scale), ("dbp_std1", dbp, 1.0), ("diffusion", diffusion, 1.0)):
        torch.manual_seed(0)
        policy.config = dataclasses.replace(policy.config, latent_scale=scale)
        lines[name] = evaluate.report(policy, evaluate.rollout(policy, task, seeds), seeds[0])
    # The ratio of times comes from calls in turn, so that a slow moment of the machine hits both.
    obs, ratios = {"state": np.zeros((1, dbp.config.obs_steps, 20), np.float32)}, []
    for _ in range(30):
        times = []
        for policy in (diffusion, dbp):
            start = time.perf_counter()
            policy.act(obs)
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
    row = {
        "date": time.strftime("%Y-%m-%d"),
        "demos": Path(cfg.demos).name,
        "seed": cfg.seed,
        "training_s": round(seconds),
        "diffusion_steps": steps,
        "time_ratio": round(float(np.median(ratios)), 1),
        **lines,
    }
    print(json.dumps(row))
    (ROOT / "benchmark" / "results").mkdir(exist_ok=True)
    with open(ROOT / "benchmark" / "results" / "diffusion.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
