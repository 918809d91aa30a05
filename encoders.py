"""Observation -> condition vector: state, RGB images of one or several cameras, point clouds.

An encoder maps a dict of observations, each (B, To, ...), to one feature per step, (B, To, F); the policy flattens it into
the condition vector o_hist of Eqs. (6), (18). It runs once per observation, never once per hypothesis: the G chunks of Eq. (24)
share its output.

    observation         shape of one step   type                       encoder
    state               any other           float, normalised          StateEncoder: as it is
    camera              (H, W, 3)           uint8, scaled here         ImageEncoder, one or several cameras
    point cloud         (points, 3 or 6)    float, normalised, xyz     PointEncoder
                                            in metres before, or xyz
                                            and rgb in [0, 1]

The paper names encoders without their sizes: SILENT, the sizes are those of the sources named at each class.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shapes = Mapping[str, tuple[int, ...]]


def kind(shape: tuple[int, ...]) -> str:
    """What an observation of this shape is: "image", "cloud" or "state"."""
    if len(shape) == 3 and shape[-1] == 3:
        return "image"
    if len(shape) == 2 and shape[-1] in (3, 6):
        return "cloud"
    return "state"


class StateEncoder(nn.Module):
    """Low-dimensional state: every key flattened and concatenated, in the order of the keys.

    Args: obs_shapes {key: shape of one step}. forward: {key: (B, To, *shape)} -> (B, To, F), F = sum of the sizes.
    """

    def __init__(self, obs_shapes: Shapes):
        super().__init__()
        self.keys = list(obs_shapes)
        self.feature_dim = sum(int(torch.Size(shape).numel()) for shape in obs_shapes.values())

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([obs[key].flatten(2) for key in self.keys], -1)


# --- images -------------------------------------------------------------------------------------------------------------


class SpatialSoftmax(nn.Module):
    """Feature maps -> where each of `points` maps is active: the mean position under a softmax, in [-1, 1].

    (B, C, H, W) -> (B, 2 points). Source: Levine et al. 2016, as used by robomimic and Diffusion Policy.
    """

    def __init__(self, channels: int, points: int):
        super().__init__()
        self.maps = nn.Conv2d(channels, points, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.maps(x)
        height, width = maps.shape[-2:]
        mass = maps.flatten(2).softmax(-1).unflatten(-1, (height, width))  #       (B, K, H, W), sums to 1 over H, W
        x = (mass.sum(-2) * torch.linspace(-1, 1, width, device=maps.device)).sum(-1)
        y = (mass.sum(-1) * torch.linspace(-1, 1, height, device=maps.device)).sum(-1)
        return torch.cat([x, y], -1)


class ResidualConvs(nn.Module):
    """ResNet's basic block: two 3x3 convolutions and a shortcut, with GroupNorm, whose result does not depend on the batch.

    Batch statistics and an averaged network (EMA) do not go together, which is why Diffusion Policy replaced BatchNorm.
    """

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False),
            nn.GroupNorm(c_out // 16, c_out),
            nn.ReLU(inplace=True),
            nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False),
            nn.GroupNorm(c_out // 16, c_out),
        )
        same = stride == 1 and c_in == c_out
        self.skip = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.GroupNorm(c_out // 16, c_out))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x), inplace=True)


def resnet18() -> tuple[nn.Sequential, int]:
    """ResNet-18 (He et al. 2016) without its last layer, GroupNorm for BatchNorm: 11.2 million weights. And its channels."""
    stages = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
    blocks = [b for i, o, stride in stages for b in (ResidualConvs(i, o, stride), ResidualConvs(o, o, 1))]
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.GroupNorm(4, 64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks), 512


def small_cnn() -> tuple[nn.Sequential, int]:
    """Four convolutions for the CPU, resolution down by 8: 0.2 million weights. And its channels."""
    sizes = [(3, 32, 5, 2), (32, 64, 3, 2), (64, 96, 3, 2), (96, 96, 3, 1)]  # in, out, kernel, stride
    layers = [m for i, o, k, s in sizes for m in (nn.Conv2d(i, o, k, s, k // 2), nn.GroupNorm(o // 16, o), nn.ReLU(inplace=True))]
    return nn.Sequential(*layers), 96


class ImageEncoder(nn.Module):
    """RGB images of one or several cameras: crop, network, pooling, one feature vector per camera, concatenated.

    Args: obs_shapes {key: (H, W, 3)}, all cameras; network "cnn" or "resnet18"; pooling "spatial_softmax" (where things are) or
        "average" (what there is); crop: side of the square cut out, as a share of the image's, a random one in training (the same
        for the To images of a history), the middle otherwise; shared: one network for all cameras, else one for each; dim:
        features per camera.
    forward: {key: (B, To, H, W, 3) uint8} -> (B, To, F), F = cameras * dim.
    """

    def __init__(self, obs_shapes: Shapes, network: str, pooling: str, crop: float, shared: bool, dim: int):
        super().__init__()
        if network not in ("cnn", "resnet18") or pooling not in ("spatial_softmax", "average"):
            raise ValueError(
                f"image network is {network!r}, pooling {pooling!r}; they must be cnn or resnet18, spatial_softmax or average"
            )
        if not 0 < crop <= 1:
            raise ValueError(f"image crop is {crop}; it must be above 0 and at most 1")
        if shared and len(set(obs_shapes.values())) > 1:
            raise ValueError(f"cameras of different sizes cannot share an encoder: {dict(obs_shapes)}")
        smallest = min(round(crop * side) for shape in obs_shapes.values() for side in shape[:2])
        if smallest < 8:
            raise ValueError(f"image crop {crop} leaves {smallest} pixels; the network needs 8")
        self.keys, self.crop, self.feature_dim = list(obs_shapes), crop, dim * len(obs_shapes)

        def build() -> nn.Sequential:
            convs, channels = resnet18() if network == "resnet18" else small_cnn()
            if pooling == "average":
                return nn.Sequential(convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, dim))
            return nn.Sequential(convs, SpatialSoftmax(channels, 32), nn.Linear(64, dim))

        self.networks = nn.ModuleList(build() for _ in (self.keys[:1] if shared else self.keys))

    def cropped(self, images: Tensor) -> Tensor:
        """(B, To, H, W, 3) -> (B, To, h, w, 3)."""
        batch, _, height, width, _ = images.shape
        h, w = round(self.crop * height), round(self.crop * width)
        if (h, w) == (height, width):
            return images
        top, left = (height - h) // 2, (width - w) // 2
        if not self.training:
            return images[:, :, top : top + h, left : left + w]
        top = torch.randint(height - h + 1, (batch, 1), device=images.device) + torch.arange(h, device=images.device)
        left = torch.randint(width - w + 1, (batch, 1), device=images.device) + torch.arange(w, device=images.device)
        each = torch.arange(batch, device=images.device)
        # indices between slices: numpy's rule puts their axes first, (B, h, w, To, 3)
        return images[each[:, None, None], :, top[:, :, None], left[:, None, :]].permute(0, 3, 1, 2, 4)

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        features = []
        for i, key in enumerate(self.keys):
            images = self.cropped(obs[key])
            x = images.flatten(0, 1).permute(0, 3, 1, 2)  #                         (B*To, 3, h, w) uint8
            x = x.to(self.networks[0][-1].weight.dtype) / 127.5 - 1
            features.append(self.networks[i % len(self.networks)](x).unflatten(0, images.shape[:2]))
        return torch.cat(features, -1)


# --- point clouds -------------------------------------------------------------------------------------------------------


class PointEncoder(nn.Module):
    """A point cloud: the same small network on every point, the maximum over the points, a projection.

    It does not depend on the order of the points. Widths 64, 128, 256 with LayerNorm and 64 features as in DP3 (Ze et al. 2024)
    and MP1. forward: (B, To, points, 3 or 6) -> (B, To, dim).
    In training only the points that hold a maximum have a gradient. They are found first, without one, and the network with its
    gradient sees them alone: the same numbers, at half the cost.
    """

    def __init__(self, channels: int, widths: tuple[int, ...], dim: int):
        super().__init__()
        layers, last = [], channels
        for width in widths:
            layers += [nn.Linear(last, width), nn.LayerNorm(width), nn.ReLU(inplace=True)]
            last = width
        self.points = nn.Sequential(*layers)
        self.project = nn.Sequential(nn.Linear(last, dim), nn.LayerNorm(dim))
        self.feature_dim = dim

    def forward(self, cloud: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            with torch.no_grad():
                holders = self.points(cloud).argmax(-2)  #                            (B, To, F) which point holds each maximum
                held = torch.zeros(cloud.shape[:-1], device=cloud.device).scatter_(-1, holders, 1.0)  # (B, To, points)
                count = int(held.sum(-1).max())  # the cloud with the most of them; in the others some idle ones come along
                chosen = held.topk(count).indices
            cloud = cloud.gather(-2, chosen.unsqueeze(-1).expand(*chosen.shape, cloud.shape[-1]))
        return self.project(self.points(cloud).amax(-2))


class Encoder(nn.Module):
    """All of an observation: state as it is, cameras and clouds through their networks, concatenated.

    Args: obs_shapes {key: shape of one step}; image and cloud: keyword arguments of ImageEncoder and PointEncoder.
    forward: {key: (B, To, *shape)} -> (B, To, F). Images uint8, everything else normalised.
    """

    def __init__(self, obs_shapes: Shapes, image: Mapping, cloud: Mapping):
        super().__init__()
        of = {name: {k: tuple(s) for k, s in obs_shapes.items() if kind(s) == name} for name in ("state", "image", "cloud")}
        self.state = StateEncoder(of["state"]) if of["state"] else None
        self.images = ImageEncoder(of["image"], **image) if of["image"] else None
        self.clouds = nn.ModuleDict({key: PointEncoder(shape[-1], **cloud) for key, shape in of["cloud"].items()})
        parts = [part for part in (self.state, self.images, *self.clouds.values()) if part is not None]
        self.feature_dim = sum(part.feature_dim for part in parts)

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        features = [part(obs) for part in (self.state, self.images) if part is not None]
        features += [encode(obs[key]) for key, encode in self.clouds.items()]
        return torch.cat(features, -1)
