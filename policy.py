"""The one-step policy: a chunk of actions from an observation history and a latent, in ONE network call.

Equations covered: (1), (6), (7), (18)-(24); (12), (43)-(46), the actor of stage 2.

    a_chunk = f_theta(o_hist, z),   z ~ N(0, I)                       Eqs. (1), (7), (20), (21)

Symbols                                     shape
    obs         dict of observations        {key: (B, To, ...)}   environment units
    cond        o_hist after the encoder    (B, C)                C = To * features
    z           latent                      (B, G, Tp, Da)        same size as the chunk
    chunk       predicted actions           (B, G, Tp, Da)        normalised to [-1, 1]
    G           hypotheses per observation; 1 when acting

All backbones have the signature (z, cond) -> chunk and work on cond once per observation, not once per hypothesis: with
G = 4 that is three quarters of the condition network saved. DEPARTS the paper feeds a constant "generation index"; a network
without that input computes the same functions. SILENT Table VIII lists a latent of 256 numbers, Eq. (7) one with the size of
the chunk; ours has the size of the chunk, as released.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import UserError, load_checkpoint, save_checkpoint
from encoders import Encoder, kind


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """Everything that fixes the architecture. It travels in the checkpoint, so that loading needs nothing else."""

    env: str  # task that it was trained for
    obs_shapes: dict[str, tuple[int, ...]]  # shape of one step of each observation key
    action_dim: int  # Da
    obs_steps: int = 2  # To
    horizon: int = 16  # Tp
    action_steps: int = 8  # Ta
    latent_scale: float = 1.0  # std of the latents drawn when acting; Eq. (7): 1
    state_scale: str = "range"  # states are scaled by their "range" or by their "std"; see Normalizer.fit
    backbone: str = "mlp"  # "mlp", "tanh", "plain" or "unet"
    cond_width: int = 512  # mlp, tanh: features of the observation trunk
    cond_depth: int = 2  # mlp: its residual blocks; tanh: its layers
    width: int = 128  # mlp, tanh: features of the chunk trunk; plain: of each layer
    depth: int = 2  # mlp, tanh: its residual blocks; plain: layers
    channels: tuple[int, ...] = (512, 1024, 2048)  # unet: Table VIII
    kernel_size: int = 5  # unet: Table VIII
    cond_dim: int = 256  # unet: Table VIII
    dropout: float = 0.1  # unet: Table VIII
    image_network: str = "cnn"  # cameras: "cnn" or "resnet18"
    image_pooling: str = "spatial_softmax"  # cameras: "spatial_softmax" or "average"
    image_crop: float = 0.9  # cameras: side of the crop, share of the image's; random in training, the middle when acting
    image_dim: int = 64  # cameras: features of each
    shared_cameras: bool = False  # cameras: one network for all of them
    point_widths: tuple[int, ...] = (64, 128, 256)  # clouds: features of each point, layer by layer
    point_dim: int = 64  # clouds: features of the cloud
    cloud_origin: str = ""  # clouds: xyz is measured from the first three numbers of this observation; empty: from the frame's
    candidates: int = 1  # DFP: N', chunks of one call, of which the critic's favourite is executed; 1: no critic
    critic_trunk: int = 0  # DFP: features of two layers that see the observation alone; 0: none, as published
    critic_width: int = 512  # DFP: features of each layer of the critic
    critic_depth: int = 4  # DFP: its layers


def check_horizons(obs_steps: int, horizon: int, action_steps: int) -> None:
    """Eq. (23): 1 <= To <= Tp, Ta >= 1, To - 1 + Ta <= Tp. Raises ValueError otherwise."""
    if not 1 <= obs_steps <= horizon:
        raise ValueError(f"obs_steps is {obs_steps}; it must be between 1 and horizon = {horizon} (Eq. 23)")
    if action_steps < 1 or obs_steps - 1 + action_steps > horizon:
        raise ValueError(
            f"action_steps is {action_steps}; with obs_steps = {obs_steps} and horizon = {horizon} it must be between 1 "
            f"and {horizon - obs_steps + 1}, since obs_steps - 1 + action_steps <= horizon (Eq. 23)"
        )


class Normalizer(nn.Module):
    """Scaling per coordinate, stored with the policy: min-max to [-1, 1] (Diffusion Policy's convention), or by mean and std.

    A coordinate that is constant in the data is only centred: dividing by its zero range would amplify noise.
    """

    CONSTANT = 1e-4  # range below which a coordinate counts as constant (Diffusion Policy's value)

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.register_buffer("center", torch.zeros(shape))
        self.register_buffer("half_range", torch.ones(shape))

    def fit(self, data: Tensor, scale: str = "range") -> None:
        """data: (steps, *shape), finite, environment units; scale: "range" or "std".

        With "std" (DEPARTS the convention) `half_range` holds the std: what a velocity does most of the time is not squeezed
        together by the one step in which something fell.
        """
        low, high = data.amin(0), data.amax(0)
        center, unit = ((high + low) / 2, (high - low) / 2) if scale == "range" else (data.mean(0), data.std(0))
        self.center.copy_(center)
        self.half_range.copy_(torch.where(high - low < self.CONSTANT, torch.ones_like(unit), unit))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.center) / self.half_range

    def inverse(self, x: Tensor) -> Tensor:
        return x * self.half_range + self.center


# --- backbones: (z (B, G, Tp, Da), cond (B, C)) -> chunk (B, G, Tp, Da), Eqs. (19)-(20) -----------------------------------


class ResidualBlock(nn.Module):
    """h <- h + W2 GELU(W1 LayerNorm(h) + u), u an optional shift from outside."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h: Tensor, u: Tensor | float = 0.0) -> Tensor:
        return h + self.second(F.gelu(self.first(self.norm(h)) + u))


class ResidualMLP(nn.Module):
    """Small backbone for state observations: a wide trunk for the observation, a slim one for the chunk.

    The observation trunk runs on B rows, the chunk trunk on B*G, so the wide one costs little; it is also where the work is:
    on Push-T, a slim chunk trunk under a wide observation trunk beats one trunk of the same cost by far (README, tuning).
    The observation enters every block of the chunk trunk as a shift.
    """

    def __init__(self, chunk_dim: int, cond_dim: int, cond_width: int, cond_depth: int, width: int, depth: int):
        super().__init__()
        self.embed_cond = nn.Linear(cond_dim, cond_width)
        self.cond_blocks = nn.Sequential(*(ResidualBlock(cond_width) for _ in range(cond_depth)))
        self.project_cond = nn.Sequential(nn.LayerNorm(cond_width), nn.Linear(cond_width, (depth + 1) * width))
        self.embed_z = nn.Linear(chunk_dim, width, bias=False)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, chunk_dim))

    def forward(self, z: Tensor, cond: Tensor) -> Tensor:
        return self.chunk(z, self.cond_blocks(self.embed_cond(cond)))

    def chunk(self, z: Tensor, c: Tensor) -> Tensor:
        """c (B, cond_width): what the observation trunk makes of the observation."""
        shifts = self.project_cond(c).unsqueeze(1).chunk(len(self.blocks) + 1, -1)  # each (B, 1, width)
        h = self.embed_z(z.flatten(2)) + shifts[0]  #                        (B, G, width)
        for block, shift in zip(self.blocks, shifts[1:], strict=True):
            h = block(h, shift)
        return self.head(h).view_as(z)  #                                    (B, G, Tp, Da)


class TanhMLP(ResidualMLP):
    """The same with a smooth trunk for the observation: tanh layers, nothing normalised on the way, and straight from them to
    the chunk's middle, to which the chunk trunk adds what the latent makes of it.

    Between ten demonstrations of a hand with 24 joints it interpolates as a smooth kernel does, where LayerNorm and GELU bend
    (benchmark/trials.md, Adroit).
    """

    def __init__(self, chunk_dim: int, cond_dim: int, cond_width: int, cond_depth: int, width: int, depth: int):
        super().__init__(chunk_dim, cond_dim, cond_width, cond_depth, width, depth)
        hidden = [m for _ in range(cond_depth - 1) for m in (nn.Linear(cond_width, cond_width), nn.Tanh())]
        self.cond_blocks = nn.Sequential(nn.Tanh(), *hidden)
        self.project_cond = nn.Linear(cond_width, (depth + 1) * width)
        self.middle = nn.Linear(cond_width, chunk_dim)

    def forward(self, z: Tensor, cond: Tensor) -> Tensor:
        c = self.cond_blocks(self.embed_cond(cond))
        return self.middle(c).unsqueeze(1).unflatten(-1, z.shape[2:]) + self.chunk(z, c)


class PlainMLP(nn.Module):
    """DFP's actor: no residuals, GELU. The observation's part of the first layer is computed once per observation."""

    def __init__(self, chunk_dim: int, cond_dim: int, width: int, depth: int):
        super().__init__()
        self.embed_cond, self.embed_z = nn.Linear(cond_dim, width), nn.Linear(chunk_dim, width, bias=False)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.head = nn.Linear(width, chunk_dim)

    def forward(self, z: Tensor, cond: Tensor) -> Tensor:
        h = F.gelu(self.embed_z(z.flatten(2)) + self.embed_cond(cond).unsqueeze(1))  # (B, G, width)
        for layer in self.layers:
            h = F.gelu(layer(h))
        return self.head(h).view_as(z)  #                                    (B, G, Tp, Da)


class FilmBlock(nn.Module):
    """Two convolutions with GroupNorm and SiLU, the features between them scaled and shifted by the condition (FiLM)."""

    def __init__(self, c_in: int, c_out: int, cond_dim: int, kernel_size: int, dropout: float):
        super().__init__()
        pad = kernel_size // 2
        self.first = nn.Sequential(nn.Conv1d(c_in, c_out, kernel_size, padding=pad), nn.GroupNorm(8, c_out), nn.SiLU())
        self.film = nn.Sequential(nn.SiLU(), nn.Linear(cond_dim, 2 * c_out))
        self.second = nn.Sequential(
            nn.Conv1d(c_out, c_out, kernel_size, padding=pad), nn.GroupNorm(8, c_out), nn.SiLU(), nn.Dropout(dropout)
        )
        self.skip = nn.Conv1d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x (B*G, c_in, L), cond (B, cond_dim) -> (B*G, c_out, L)."""
        film = self.film(cond).unsqueeze(-1).repeat_interleave(len(x) // len(cond), 0)  # projected B times, then repeated
        scale, shift = film.chunk(2, 1)
        return self.second(self.first(x) * (1 + scale) + shift) + self.skip(x)


class SelfAttention(nn.Module):
    """Residual self-attention over the L steps, at the middle resolution only (Table VIII)."""

    def __init__(self, channels: int, heads: int = 8):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).unflatten(1, (3, self.heads, -1)).transpose(-1, -2)  # (B*G, 3, heads, L, C/heads)
        attended = F.scaled_dot_product_attention(*qkv.unbind(1))
        return x + self.out(attended.transpose(-1, -2).flatten(1, 2))


class ConditionalUNet1D(nn.Module):
    """The paper's generator: a U-Net along the chunk, conditioned by FiLM (Table VIII).

    DEPARTS the released network has Mish, no dropout, no attention, and FiLM from the raw condition vector; this is
    the paper's. SILENT the paper gives no order of the layers; ours is two blocks per resolution, as in Diffusion Policy.
    """

    def __init__(self, action_dim: int, cond_dim: int, config: PolicyConfig):
        super().__init__()
        channels, embed = config.channels, config.cond_dim

        def block(c_in: int, c_out: int) -> FilmBlock:
            return FilmBlock(c_in, c_out, embed, config.kernel_size, config.dropout)

        self.embed_cond = nn.Sequential(nn.Linear(cond_dim, embed), nn.SiLU(), nn.Linear(embed, embed))
        levels = list(zip((action_dim, *channels[:-1]), channels, strict=True))  # (channels in, channels out), fine to coarse
        self.down = nn.ModuleList(nn.ModuleList([block(i, o), block(o, o)]) for i, o in levels)
        self.shrink = nn.ModuleList(nn.Conv1d(o, o, 3, stride=2, padding=1) for _, o in levels[:-1])
        self.middle = nn.ModuleList([block(channels[-1], channels[-1]), block(channels[-1], channels[-1])])
        self.attention = SelfAttention(channels[-1])
        self.up = nn.ModuleList(nn.ModuleList([block(2 * o, i), block(i, i)]) for i, o in reversed(levels[1:]))
        self.grow = nn.ModuleList(nn.ConvTranspose1d(i, i, 4, stride=2, padding=1) for i, _ in reversed(levels[1:]))
        self.head = nn.Sequential(
            nn.Conv1d(channels[0], channels[0], config.kernel_size, padding=config.kernel_size // 2),
            nn.GroupNorm(8, channels[0]),
            nn.SiLU(),
            nn.Conv1d(channels[0], action_dim, 1),
        )

    def forward(self, z: Tensor, cond: Tensor) -> Tensor:
        c = self.embed_cond(cond)  #                                         (B, 256)
        h = z.flatten(0, 1).transpose(1, 2)  #                               (B*G, Da, Tp)
        skips = []
        for level, (one, two) in enumerate(self.down):
            h = two(one(h, c), c)
            skips.append(h)
            if level < len(self.shrink):
                h = self.shrink[level](h)  #                                 halves the length
        one, two = self.middle
        h = two(self.attention(one(h, c)), c)
        for (one, two), grow in zip(self.up, self.grow, strict=True):
            h = grow(two(one(torch.cat([h, skips.pop()], 1), c), c))
        return self.head(h).transpose(1, 2).view_as(z)  #                    (B, G, Tp, Da)


def make_backbone(config: PolicyConfig, cond_dim: int) -> nn.Module:
    chunk_dim = config.horizon * config.action_dim
    if config.backbone == "mlp":
        return ResidualMLP(chunk_dim, cond_dim, config.cond_width, config.cond_depth, config.width, config.depth)
    if config.backbone == "tanh":
        return TanhMLP(chunk_dim, cond_dim, config.cond_width, config.cond_depth, config.width, config.depth)
    if config.backbone == "plain":
        return PlainMLP(chunk_dim, cond_dim, config.width, config.depth)
    if config.backbone == "unet":
        factor = 2 ** (len(config.channels) - 1)
        if config.horizon % factor:
            raise ValueError(
                f"horizon is {config.horizon}; this U-Net halves it {len(config.channels) - 1} times, so it must "
                f"be a multiple of {factor}"
            )
        return ConditionalUNet1D(config.action_dim, cond_dim, config)
    raise ValueError(f"backbone is {config.backbone!r}; it must be mlp, tanh, plain or unet")


# --- the policy -------------------------------------------------------------------------------------------------------


class Policy(nn.Module):
    """pi_theta(. | o): the pushforward of z ~ N(0, I) through one network call, Eqs. (1), (7), (20)-(22).

    Holds the normaliser, the encoder and the backbone; what it takes and gives is in the environment's units.
    """

    def __init__(self, config: PolicyConfig):
        super().__init__()
        check_horizons(config.obs_steps, config.horizon, config.action_steps)
        self.config = config
        if config.state_scale not in ("range", "std"):
            raise ValueError(f"state_scale is {config.state_scale!r}; it must be range or std")
        normalized = {key: shape for key, shape in config.obs_shapes.items() if kind(shape) != "image"}
        self.normalize_obs = nn.ModuleDict(
            {key: Normalizer(shape[-1:] if kind(shape) == "cloud" else shape) for key, shape in normalized.items()}
        )
        self.normalize_action = Normalizer((config.action_dim,))
        if config.cloud_origin:
            origin = config.obs_shapes.get(config.cloud_origin, (0,))
            if kind(origin) != "state" or origin[0] < 3 or "cloud" not in map(kind, config.obs_shapes.values()):
                raise ValueError(
                    f"cloud_origin is {config.cloud_origin!r}; it must name an observation of 3 numbers or more beside a cloud, "
                    f"and there are {config.obs_shapes}"
                )
        if min((*config.point_widths, 1)) < 1 or not config.point_widths:
            raise ValueError(f"point_widths is {config.point_widths}; it must hold one number from 1 on per layer")
        image = {name: getattr(config, f"image_{name}") for name in ("network", "pooling", "crop", "dim")}
        image["shared"] = config.shared_cameras
        self.encoder = Encoder(config.obs_shapes, image, {"widths": config.point_widths, "dim": config.point_dim})
        self.backbone = make_backbone(config, config.obs_steps * self.encoder.feature_dim)
        if config.candidates > 1:
            chunk_dim = config.action_steps * config.action_dim
            cond_dim = config.obs_steps * self.encoder.feature_dim
            self.critic = QEnsemble(cond_dim, chunk_dim, config.critic_trunk, config.critic_width, config.critic_depth)

    def fit_normalizers(self, obs: Mapping[str, np.ndarray], actions: np.ndarray) -> None:
        """obs {key: (N, *shape)}, actions (N, Da): all steps of the demonstrations, environment units."""
        centered = self.center({key: torch.from_numpy(obs[key]) for key in self.normalize_obs})
        for key, normalizer in self.normalize_obs.items():
            scale = self.config.state_scale if kind(self.config.obs_shapes[key]) == "state" else "range"
            normalizer.fit(centered[key].reshape(-1, *normalizer.center.shape), scale)
        self.normalize_action.fit(torch.from_numpy(actions))

    def center(self, obs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Clouds (..., points, 3 or more) with xyz measured from `cloud_origin`, in practice the hand. Everything else as it is.

        What the hand has to do depends on where things are from it: ten demonstrations then tell as much as many more.
        """
        if not self.config.cloud_origin:
            return dict(obs)
        origin = obs[self.config.cloud_origin][..., None, :3]
        clouds = [key for key, shape in self.config.obs_shapes.items() if kind(shape) == "cloud"]
        return {**obs, **{key: torch.cat([obs[key][..., :3] - origin, obs[key][..., 3:]], -1) for key in clouds}}

    def encode(self, obs: Mapping[str, Tensor]) -> Tensor:
        """o_hist of Eqs. (6), (18): obs {key: (B, To, *shape)}, environment units, images uint8 -> cond (B, C)."""
        obs = self.center(obs)
        return self.encoder({**obs, **{key: scale(obs[key]) for key, scale in self.normalize_obs.items()}}).flatten(1)

    def forward(self, obs: Mapping[str, Tensor], z: Tensor) -> Tensor:
        """Eqs. (7), (24): G chunks per observation. z (B, G, Tp, Da) -> (B, G, Tp, Da), normalised actions."""
        return self.backbone(z, self.encode(obs))

    def sample_latents(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Latents to act with, (batch, Tp, Da) or, where a critic picks, (batch, N', Tp, Da), with std `latent_scale`.

        DEPARTS below 1 the policy stays nearer to the middle of each mode and its rare bad chunks become rarer (README, tuning);
        0 puts it between the modes.
        """
        return self.config.latent_scale * torch.randn(self._latent_shape(batch), generator=generator)

    def blank_obs(self) -> dict[str, np.ndarray]:
        """Zeros, as one environment would give them: {key: (1, To, ...)}, pictures uint8, the rest float32."""
        return {
            key: np.zeros((1, self.config.obs_steps, *shape), np.uint8 if kind(shape) == "image" else np.float32)
            for key, shape in self.config.obs_shapes.items()
        }

    def _latent_shape(self, batch: int) -> tuple[int, ...]:
        c = self.config
        return (batch, *((c.candidates,) if c.candidates > 1 else ()), c.horizon, c.action_dim)

    @torch.no_grad()
    def act(
        self,
        obs: Mapping[str, Tensor | np.ndarray],
        z: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The executed prefix of one chunk, Eq. (22), in exactly one forward pass; of several where a critic picks one (DFP).

        Args: obs {key: (B, To, *shape)}, arrays or tensors, environment units; z (B, Tp, Da), or (B, N', Tp, Da): the latents,
            drawn by `sample_latents` with `generator` (a CPU generator) if None.
        Returns: (B, Ta, Da), environment units, on the policy's device: chunk indices To-1 ... To-1+Ta-1.
        Raises: ValueError for a missing key, a shape that does not fit, or images that are not uint8.
        """
        c = self.config
        device = self.normalize_action.center.device
        tensors = {}
        unknown = [key for key in obs if key not in c.obs_shapes]
        if unknown:
            raise ValueError(f"this policy has never seen {', '.join(unknown)}; it was trained with {list(c.obs_shapes)}")
        for key, shape in c.obs_shapes.items():
            if key not in obs:
                raise ValueError(f"the observation lacks {key!r}; this policy needs {list(c.obs_shapes)}")
            tensors[key] = torch.as_tensor(obs[key], device=device)
            if kind(shape) != "image":
                tensors[key] = tensors[key].float()
            elif tensors[key].dtype != torch.uint8:
                raise ValueError(f"obs[{key!r}] holds {tensors[key].dtype}; images must be uint8, 0 to 255")
            if tensors[key].shape[1:] != (c.obs_steps, *shape):
                raise ValueError(f"obs[{key!r}] has shape {tuple(tensors[key].shape)}; it must be (B, {c.obs_steps}, {shape})")
        batch = len(next(iter(tensors.values())))
        if z is None:
            z = self.sample_latents(batch, generator)
        if z.shape != self._latent_shape(batch):
            raise ValueError(f"z has shape {tuple(z.shape)}; it must be {self._latent_shape(batch)}")
        return self.deployed(tensors, z.to(device))

    def deployed(self, obs: dict[str, Tensor], z: Tensor) -> Tensor:
        """`act` without its checks: tensors alone, for an exported graph, too. z as sample_latents gives it -> (B, Ta, Da)."""
        if self.config.candidates > 1:
            prefix = best_of(*self.propose(self.encode(obs), z))  #                (B, Ta, Da)
        else:
            prefix = self.executed(self(obs, z.unsqueeze(1))[:, 0])
        return self.normalize_action.inverse(prefix.float())

    def propose(self, cond: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """DFP: candidates and what the critic says of them. cond (B, C), z (B, N', Tp, Da) -> (B, N', Ta, Da), Q (B, N').

        The mean of the two critics; actions are kept in the range of the data, outside of which the critic was never right.
        """
        chunks = self.executed(self.backbone(z, cond)).clamp(-1, 1)
        return chunks, self.critic(cond, chunks).mean(0)

    def executed(self, chunk: Tensor) -> Tensor:
        """Eq. (22): the prefix that is executed, indices To-1 ... To-1+Ta-1. (..., Tp, Da) -> (..., Ta, Da)."""
        first = self.config.obs_steps - 1
        return chunk[..., first : first + self.config.action_steps, :]

    def state(self) -> dict:
        """Plain values and tensors from which `from_state` builds the same policy."""
        return {"config": dataclasses.asdict(self.config), "weights": self.state_dict()}

    @classmethod
    def from_state(cls, state: dict) -> Policy:
        """Raises UserError where configuration and weights do not belong together."""
        try:
            policy = cls(PolicyConfig(**state["config"]))
            policy.load_state_dict(state["weights"], strict=True)
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]  # torch lists every tensor, on a line each
            raise UserError(f"the checkpoint's policy does not fit this version of the project: {reason}") from error
        return policy

    def save(self, path: str | Path) -> None:
        """Write a checkpoint that `Policy.load` and evaluate.py read. Atomic: see common.save_checkpoint."""
        save_checkpoint({"policy": self.state()}, path)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Policy:
        """Read a policy, from a deployment checkpoint or from a training state (its averaged policy), ready to act."""
        content = load_checkpoint(path, device)
        if "policy" not in content:
            raise UserError(f"{path} holds no policy, only {', '.join(content)}.")
        return cls.from_state(content["policy"]).to(device).eval()


# --- stage 2: actor and critic ----------------------------------------------------------------------------------------


class GaussianActor(nn.Module):
    """N(mu_theta(o, z), diag sigma^2(o)), conditional on the latent z: Eqs. (12), (43)-(46).

    The noise exists in training only, where it gives the executed actions a likelihood; deployment executes mu, which is
    `self.policy`, an ordinary one-step policy. SILENT the observation feature h of Eq. (43) is the condition vector, and there
    is one sigma per coordinate of the executed prefix.

    Noise of colour beta has the power (1 + k)^-beta at the k-th cosine wave along the prefix, the same in sum: executed = mu +
    mix (sigma * eps). 0 is white, mix = 1, the paper's. DEPARTS above 0: what a body low-passes explores little if each step has
    noise of its own, and an offset that lasts for the prefix explores much. The density stays a Gaussian and exact.
    """

    def __init__(self, policy: Policy, sigma_start: float, sigma_min: float, sigma_max: float, noise_color: float = 0.0):
        super().__init__()
        c = policy.config
        self.policy, self.bounds = policy, (math.log(sigma_min), math.log(sigma_max))
        self.log_std = nn.Linear(c.obs_steps * policy.encoder.feature_dim, c.action_steps * c.action_dim)  # Eq. (44)
        nn.init.zeros_(self.log_std.weight)
        nn.init.constant_(self.log_std.bias, math.log(sigma_start))
        mix, unmix = torch.eye(c.action_steps), torch.eye(c.action_steps)
        if noise_color > 0:
            k = torch.arange(c.action_steps, dtype=torch.float64)
            waves = torch.cos(math.pi / c.action_steps * torch.outer(k + 0.5, k))  # columns: orthogonal cosine waves (DCT-II)
            waves = waves / waves.norm(dim=0)
            amplitude = (1 + k) ** (-noise_color / 2)
            amplitude = amplitude / amplitude.square().mean().sqrt()
            mix, unmix = ((waves * scale @ waves.T).float() for scale in (amplitude, 1 / amplitude))
        self.register_buffer("mix", mix, persistent=False)  # (Ta, Ta)
        self.register_buffer("unmix", unmix, persistent=False)  # its inverse

    def forward(self, cond: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """cond (B, C) from `Policy.encode`, z (B, Tp, Da) -> mu (B, Tp, Da), sigma (B, Ta, Da); normalised actions."""
        c = self.policy.config
        mu = self.policy.backbone(z.unsqueeze(1), cond)[:, 0]  # Eq. (43)
        log_std = self.log_std(cond).clamp(*self.bounds)  # Eq. (45)
        return mu, log_std.exp().view(-1, c.action_steps, c.action_dim)


class Critic(nn.Module):
    """V(o): the scaled return that is still to come, from the condition vector. cond (B, C) -> (B,)."""

    def __init__(self, cond_dim: int, width: int = 256):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(cond_dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )  # fmt: skip

    def forward(self, cond: Tensor) -> Tensor:
        return self.layers(cond).squeeze(-1)


class EnsembleLinear(nn.Module):
    """One linear layer of each member, as one batched product. (E, R, in) -> (E, R, out), nn.Linear's initialisation."""

    def __init__(self, members: int, features_in: int, features_out: int):
        super().__init__()
        bound = features_in**-0.5
        self.weight = nn.Parameter(torch.empty(members, features_in, features_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, features_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class QEnsemble(nn.Module):
    """Q_e(o, chunk), DFP's critics: the return to come if this chunk is executed from o. MLPs with GELU and LayerNorm.

    All members and all candidates are one pass. What depends on the observation alone, the optional trunk and its part of the
    first layer, is computed once per observation, not once per candidate.
    """

    def __init__(self, cond_dim: int, chunk_dim: int, trunk: int = 0, width: int = 512, depth: int = 4, members: int = 2):
        super().__init__()
        self.members = members
        sizes = [cond_dim, trunk, trunk, width] if trunk else [cond_dim, width]
        self.cond_layers = nn.ModuleList(EnsembleLinear(members, *pair) for pair in itertools.pairwise(sizes))
        self.embed_chunk = EnsembleLinear(members, chunk_dim, width)
        self.gains = nn.Parameter(torch.ones(depth, members, 1, width))  # of the LayerNorms, each member its own
        self.shifts = nn.Parameter(torch.zeros(depth, members, 1, width))
        self.layers = nn.ModuleList(EnsembleLinear(members, width, width) for _ in range(depth - 1))
        self.head = EnsembleLinear(members, width, 1)

    def forward(self, cond: Tensor, chunks: Tensor) -> Tensor:
        """cond (B, C), chunks (B, N, Ta, Da), normalised actions -> (E, B, N)."""
        B, N = chunks.shape[:2]
        c = cond.expand(self.members, -1, -1)  #                             (E, B, C)
        for layer in self.cond_layers[:-1]:
            c = F.layer_norm(F.gelu(layer(c)), layer.bias.shape[-1:])
        c = self.cond_layers[-1](c)  #                                       (E, B, width)
        h = self.embed_chunk(chunks.flatten(2).flatten(0, 1).expand(self.members, -1, -1))  # (E, B*N, width)
        h = (h.unflatten(1, (B, N)) + c.unsqueeze(2)).flatten(1, 2)
        for k, (gain, shift) in enumerate(zip(self.gains, self.shifts, strict=True)):
            h = self.layers[k - 1](h) if k else h
            h = F.layer_norm(F.gelu(h), h.shape[-1:]) * gain + shift
        return self.head(h).view(self.members, B, N)


def best_of(chunks: Tensor, q: Tensor) -> Tensor:
    """The chunk of highest Q of each observation. chunks (B, N, Ta, Da), q (B, N) -> (B, Ta, Da)."""
    return chunks[torch.arange(len(q), device=q.device), q.argmax(1)]


class EMA:
    """Moving average of the weights: decay 1 - (1 + t)^-power, at most max_decay (Diffusion Policy's power form).

    The average forgets the first steps quickly and becomes long as training goes on. `policy` is the averaged copy: it is
    the one that is evaluated and saved. SILENT the paper gives decay 0.9999 and power 0.75, not the formula.
    """

    def __init__(self, policy: Policy, power: float = 0.75, max_decay: float = 0.9999):
        self.policy = copy.deepcopy(policy).eval().requires_grad_(False)
        self.power, self.max_decay = power, max_decay
        self._pairs = list(self.policy.parameters()), list(policy.parameters())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """step: optimiser steps done before this one, from 0 (the first update copies the weights)."""
        decay = min(self.max_decay, 1 - (1 + step) ** -self.power)
        torch._foreach_lerp_(self._pairs[0], self._pairs[1], 1 - decay)
