"""Diffusion Policy (Chi et al. 2023): predict the noise, act by removing it in 100 steps (DDPM) or 10 (DDIM).

    x_k = sqrt(a_k) x + sqrt(1 - a_k) eps,   a_k the cumulative product of 1 - beta_k,   loss = |eps_theta(x_k, k) - eps|^2

As its authors have it: squared-cosine schedule of Nichol and Dhariwal, 100 levels in training, the estimate of x clipped to
[-1, 1] on the way, variance "fixed small"; DDIM (Song et al. 2021) without noise, the same weights.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from policy import PolicyConfig

from .network import Rival, wide

LEVELS = 100  # noise levels; Diffusion Policy: 100
BETA_MAX = 0.999  # of the schedule; Nichol and Dhariwal 2021


class Diffusion(Rival):
    SAMPLERS: ClassVar = {"ddpm-100": LEVELS, "ddim-10": 10}

    def __init__(self, config: PolicyConfig):
        super().__init__(config)
        angle = (torch.arange(LEVELS + 1) / LEVELS + 0.008) / 1.008 * math.pi / 2
        alpha_bar = angle.cos() ** 2
        beta = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=BETA_MAX)
        self.register_buffer("alpha_bar", (1 - beta).cumprod(0))

    def noise(self, x: Tensor, cond: Tensor, k: Tensor) -> Tensor:
        """x_k (B, 1, Tp, Da), k (B,) levels 0 .. 99 -> the noise that is in it."""
        return self.network(x, cond, k / LEVELS)

    def loss(self, x: Tensor, cond: Tensor, progress: float) -> Tensor:
        k, eps = torch.randint(LEVELS, (len(x),), device=x.device), torch.randn_like(x)
        level = wide(self.alpha_bar[k])
        return F.mse_loss(self.noise(level.sqrt() * x + (1 - level).sqrt() * eps, cond, k), eps)

    def sample(self, cond: Tensor, z: Tensor) -> Tensor:
        """From level k to the level before it on the sampler's grid: all 100 levels with fresh noise (DDPM), or each
        tenth without (DDIM)."""
        stride = LEVELS // self.SAMPLERS[self.sampler]
        levels = list(range(0, LEVELS, stride))
        alpha = self.alpha_bar.tolist()
        x = z
        for k, before in zip(reversed(levels), [*reversed(levels[:-1]), None], strict=True):
            eps = self.noise(x, cond, torch.full((len(x),), k, device=x.device))
            here, there = alpha[k], 1.0 if before is None else alpha[before]
            x0 = ((x - (1 - here) ** 0.5 * eps) / here**0.5).clamp(-1, 1)
            if self.sampler == "ddim-10":
                eps = (x - here**0.5 * x0) / (1 - here) ** 0.5  # that of the clipped estimate, as in the authors' library
                x = there**0.5 * x0 + (1 - there) ** 0.5 * eps
            else:  # the Gaussian q(x_before | x_k, x0)
                beta = 1 - here / there
                mean = (there**0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - there) * x) / (1 - here)
                x = mean + (beta * (1 - there) / (1 - here)) ** 0.5 * torch.randn_like(x) if before is not None else mean
        return x
