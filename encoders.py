"""Observation -> condition vector.

An encoder maps a dict of normalised observations, each (B, To, ...), to one feature per step, (B, To, F); the policy
flattens it into the condition vector o_hist of Eqs. (6), (18). It runs once per observation, never once per hypothesis.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StateEncoder(nn.Module):
    """Low-dimensional state: every observation key flattened and concatenated, in the order of the keys.

    Args: obs_shapes {key: shape of one step}. forward: {key: (B, To, *shape)} -> (B, To, F), F = sum of the sizes.
    """

    def __init__(self, obs_shapes: dict[str, tuple[int, ...]]):
        super().__init__()
        self.keys = list(obs_shapes)
        self.feature_dim = sum(int(torch.Size(shape).numel()) for shape in obs_shapes.values())

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        return torch.cat([obs[key].flatten(2) for key in self.keys], -1)
