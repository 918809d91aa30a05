"""Behaviour cloning: the mean squared error to the expert's chunk.

It has no latent, so where the expert chooses between two ways it learns their mean, which may be neither.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .network import Rival


class BehaviourCloning(Rival):
    TIMES = 0
    SAMPLERS: ClassVar = {"bc": 1}

    def sample(self, cond: Tensor, z: Tensor) -> Tensor:
        return self.network(torch.zeros_like(z), cond)

    def loss(self, x: Tensor, cond: Tensor, progress: float) -> Tensor:
        return F.mse_loss(self.sample(cond, x), x)
