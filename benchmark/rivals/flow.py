"""Flow matching (Lipman et al. 2023; rectified flow, Liu et al. 2023): learn the velocity of straight lines from noise to chunks.

x_t = (1 - t) z + t x,   loss = |v_theta(x_t, t) - (x - z)|^2,   acting: Euler's method over t = 0 .. 1, in 10 steps or in 1
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .network import Rival, wide


class Flow(Rival):
    SAMPLERS: ClassVar = {"flow-10": 10, "flow-1": 1}

    def loss(self, x: Tensor, cond: Tensor, progress: float) -> Tensor:
        t, z = torch.rand(len(x), device=x.device), torch.randn_like(x)
        return F.mse_loss(self.network(torch.lerp(z, x, wide(t)), cond, t), x - z)

    def sample(self, cond: Tensor, z: Tensor) -> Tensor:
        steps, x = self.SAMPLERS[self.sampler], z
        for step in range(steps):
            x = x + self.network(x, cond, torch.full((len(x),), step / steps, device=x.device)) / steps
        return x
