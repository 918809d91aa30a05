"""What the rivals of DBP share: our policy, whose network is told a time.

Encoder, normalisers, backbone, sizes and acting are those of `Policy`; a rival adds the time to the condition vector, a loss, and
a way to draw a chunk. So nothing but the objective differs.

    x       expert chunks, normalised        (B, 1, Tp, Da)      cond    condition vector      (B, C)
    z       N(0, I)                          (B, 1, Tp, Da)      t       time                  (B,)
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch
from torch import Tensor

from policy import Policy, PolicyConfig, make_backbone

TIME_DIM = 64  # features of one time; Diffusion Policy's U-Net has 128 for its 256 channels and more


class Rival(Policy):
    """A policy with a loss of its own.

    SAMPLERS: ways to act with the same weights, name -> network passes. SCALES: std of their latents, where it is not 1.
    """

    TIMES = 1  # how many times the network is told
    TOP = 100.0  # highest frequency of the time's features, rad per unit of time: enough to tell 100 levels apart
    SAMPLERS: ClassVar[dict[str, int]]
    SCALES: ClassVar[dict[str, float]] = {}

    def __init__(self, config: PolicyConfig):
        super().__init__(config)
        self.backbone = make_backbone(config, config.obs_steps * self.encoder.feature_dim + self.TIMES * TIME_DIM)
        self.act_with(next(iter(self.SAMPLERS)))

    def act_with(self, sampler: str) -> None:
        self.sampler = sampler
        self.config = dataclasses.replace(self.config, latent_scale=self.SCALES.get(sampler, 1.0))

    def network(self, x: Tensor, cond: Tensor, *times: Tensor) -> Tensor:
        """x (B, 1, Tp, Da), cond (B, C), each time (B,) -> what the objective wants to know, as x."""
        half = TIME_DIM // 2
        frequency = torch.exp(torch.linspace(0, math.log(self.TOP), half, device=x.device))
        angles = [t.unsqueeze(-1) * frequency for t in times]
        return self.backbone(x, torch.cat([cond, *(f(angle) for angle in angles for f in (torch.sin, torch.cos))], -1))

    def loss(self, x: Tensor, cond: Tensor, progress: float) -> Tensor:
        """The objective of a minibatch, a scalar. progress: share of the training that is over, 0 to 1."""
        raise NotImplementedError

    def sample(self, cond: Tensor, z: Tensor) -> Tensor:
        """A chunk for each row, from noise z, with `self.sampler`: (B, 1, Tp, Da)."""
        raise NotImplementedError

    def forward(self, obs, z: Tensor) -> Tensor:
        return self.sample(self.encode(obs), z)


def wide(t: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return t.view(-1, 1, 1, 1)
