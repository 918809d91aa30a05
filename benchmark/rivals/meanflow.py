"""MeanFlow (Geng et al. 2025), the objective of the one-step policies MP1 and DMPO: learn the mean velocity over an interval.

    x_t = (1 - t) x + t z,  v = z - x                         t = 0 is the chunk, t = 1 the noise
    u(x_t, r, t) = 1/(t - r) * integral of v from r to t      so that x_r = x_t - (t - r) u, one step for any interval
    u = v - (t - r) du/dt                                     the MeanFlow identity, d/dt along the path: (v, 0, 1) . grad u

The right-hand side, by a Jacobian-vector product and without gradient, is the target. Acting: x = z - u(z, 0, 1).
Settings are those of the MeanFlow paper: times logit-normal (-0.4, 1), r = t in three quarters of the rows (there the objective
is flow matching), loss weighted with 1 / (error^2 + 1e-3).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .network import Rival, wide

TIME_MEAN, TIME_STD = -0.4, 1.0  # of the logit of the times
INTERVALS = 0.25  # share of the rows with r < t
WEIGHT_FLOOR = 1e-3  # of the squared error in the weight


class MeanFlow(Rival):
    TIMES = 2
    TOP = 10.0  # low: the target holds the derivative by the time, which a high frequency multiplies
    SAMPLERS: ClassVar = {"meanflow-1": 1}

    def target(self, x: Tensor, z: Tensor, cond: Tensor, r: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The network's u, with gradient, and what the identity asks of it, without: both as x. r <= t, (B,)."""
        v = z - x
        with sdpa_kernel(SDPBackend.MATH):  # the fast attention kernels have no forward-mode derivative
            u, du_dt = torch.func.jvp(
                lambda x_t, r, t: self.network(x_t, cond, r, t),
                (torch.lerp(x, z, wide(t)), r, t),
                (v, torch.zeros_like(r), torch.ones_like(t)),
            )
        return u, (v - wide(t - r) * du_dt).detach()

    def loss(self, x: Tensor, cond: Tensor, progress: float) -> Tensor:
        times = torch.sigmoid(TIME_MEAN + TIME_STD * torch.randn(2, len(x), device=x.device))
        t, r = times.amax(0), times.amin(0)
        r = torch.where(torch.rand_like(t) < INTERVALS, r, t)
        u, target = self.target(x, torch.randn_like(x), cond, r, t)
        error = (u - target).square().flatten(1).sum(1)  #                    (B,)
        return (error / (error.detach() + WEIGHT_FLOOR)).mean()

    def sample(self, cond: Tensor, z: Tensor) -> Tensor:
        start, end = torch.ones(len(z), device=z.device), torch.zeros(len(z), device=z.device)
        return z - self.network(z, cond, end, start)
