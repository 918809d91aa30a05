"""Consistency training, in its improved form (Song and Dhariwal 2023): neighbours on a noise path shall have the same end.

    x_sigma = x + sigma z,  f(x_sigma, sigma) = c_skip x_sigma + c_out F(c_in x_sigma, sigma),  f = identity at sigma_min
    loss = w(sigma_i) d( f(x + sigma_{i+1} z, sigma_{i+1}), stopgrad f(x + sigma_i z, sigma_i) ),  w = 1 / (sigma_{i+1} - sigma_i)

d is the pseudo-Huber distance; sigma_i is Karras' grid, which doubles its steps from 10 to 1,280 as training proceeds; i is
drawn so that ln sigma is about normal (-1.1, 2). Both sides see the same z and the same dropout. Acting: one step,
f(sigma_max z, sigma_max).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from .network import Rival, wide

SIGMA_MIN, SIGMA_MAX, SIGMA_DATA, RHO = 0.002, 80.0, 0.5, 7.0  # Karras et al. 2022; chunks in [-1, 1] have a spread near 0.5
FIRST, LAST = 10, 1280  # steps of the grid
LOG_MEAN, LOG_STD = -1.1, 2.0  # of ln sigma
HUBER = 0.00054  # c of the pseudo-Huber distance, times the square root of the chunk's size


class Consistency(Rival):
    TOP = 10.0  # the network is told ln(sigma) / 4, from -1.6 to 1.1
    SAMPLERS: ClassVar = {"consistency-1": 1}

    def end(self, x: Tensor, cond: Tensor, sigma: Tensor) -> Tensor:
        """f: where the path through x (B, 1, Tp, Da) at sigma (B,) ends."""
        s = wide(sigma)
        norm = (s.square() + SIGMA_DATA**2).sqrt()
        skip = SIGMA_DATA**2 / ((s - SIGMA_MIN).square() + SIGMA_DATA**2)
        out = SIGMA_DATA * (s - SIGMA_MIN) / norm
        return skip * x + out * self.network(x / norm, cond, sigma.log() / 4)

    def grid(self, progress: float) -> Tensor:
        """Noise levels (steps + 1,), rising; their number doubles at equal shares of the training."""
        doublings = int(math.log2(LAST / FIRST)) + 1
        steps = min(FIRST * 2 ** int(progress * doublings), LAST)
        low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
        return torch.linspace(low, high, steps + 1) ** RHO

    def loss(self, x: Tensor, cond: Tensor, progress: float) -> Tensor:
        grid = self.grid(progress)
        edges = torch.erf((grid.log() - LOG_MEAN) / (LOG_STD * 2**0.5))
        i = torch.multinomial(edges.diff(), len(x), replacement=True)
        low, high, z = grid[i].to(x.device), grid[i + 1].to(x.device), torch.randn_like(x)
        with torch.no_grad(), torch.random.fork_rng():  # the state comes back: the same dropout below
            teacher = self.end(x + wide(low) * z, cond, low)
        student = self.end(x + wide(high) * z, cond, high)
        c = HUBER * x[0].numel() ** 0.5
        distance = ((student - teacher).square().flatten(1).sum(1) + c**2).sqrt() - c  # (B,)
        return (distance / (high - low)).mean()

    def sample(self, cond: Tensor, z: Tensor) -> Tensor:
        return self.end(SIGMA_MAX * z, cond, torch.full((len(z),), SIGMA_MAX, device=z.device))
