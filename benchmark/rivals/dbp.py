"""DBP itself in the rivals' loop, so that its learning curve comes from the same clock. See drift.py.

The second sampler acts with latents of std 1, Eq. (7), as the rivals do; the first with the preset's 0.8.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from drift import dbp_loss

from .network import Rival

HYPOTHESES, TEMPERATURES = 4, (0.2,)  # G and T of Table VII


class DBP(Rival):
    TIMES = 0
    SAMPLERS: ClassVar = {"dbp": 1, "dbp, latents of std 1": 1}
    SCALES: ClassVar = {"dbp": 0.8}

    def loss(self, x: Tensor, cond: Tensor, progress: float) -> Tensor:
        z = torch.randn(len(x), HYPOTHESES, *x.shape[2:], device=x.device)
        return dbp_loss(self.network(z, cond).flatten(2), x.flatten(2), temperatures=TEMPERATURES)[0].mean()

    def sample(self, cond: Tensor, z: Tensor) -> Tensor:
        return self.network(z, cond)
