"""README's first figure: the drift on a toy with two right answers, as training proceeds.

python benchmark/toy.py     20 seconds; writes benchmark/pictures/toy.png

One observation, actions of two numbers; the expert goes left or right of an obstacle, as a coin decides. A small network maps
latents z ~ N(0, I) to actions. Every step is the one of dbp_train.py: drift of the generated points (drift.py), regression onto
the drifted points. Blue: the expert. Orange: generated. Arrows: the force on every third of them before its normalisation,
Eq. (35), on one scale in all panels: it fades as the two sets become alike. The last panel is the same network trained on the
mean squared error.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import tyro
from torch import Tensor, nn

from drift import dbp_loss, drift_field

SHOWN = (0, 15, 40, 120, 1500)  # steps of the panels; the last is the length of the training
ROWS, POINTS = 24, 24  # minibatch: so many times so many generated and expert points
DRAWN = 7  # rows of the minibatch in a panel
ARROW = 1.5  # length of a force of 1, in the plane's units
TEMPERATURES = (0.2,)  # as Push-T
WAYS = ((-1.0, 0.1), (1.0, 0.1))  # of the expert


def expert(number: int, generator: torch.Generator) -> Tensor:
    """(number, 2): either way, a little spread along it."""
    side = torch.randint(2, (number,), generator=generator)
    across, along = (torch.tensor([0.10, 0.28]) * torch.randn(number, 2, generator=generator)).T
    tilt = torch.tensor([0.35, -0.35])[side]
    return torch.tensor(WAYS)[side] + torch.stack([across + tilt * along, along], -1)


def train(loss_of, seed: int = 1) -> dict[int, tuple[Tensor, Tensor]]:
    """Step -> (generated points, expert points) that it saw, for the steps of SHOWN."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    optimizer, seen = torch.optim.Adam(net.parameters(), 3e-3), {}
    for step in range(SHOWN[-1] + 1):
        x = net(torch.randn(ROWS, POINTS, 2, generator=generator))
        positives = expert(ROWS * POINTS, generator).view(ROWS, POINTS, 2)
        if step in SHOWN:
            seen[step] = x[:DRAWN].detach(), positives[:DRAWN]
        loss = loss_of(x, positives)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / (SHOWN[-1] + 1))  # the drift's gradient does not fade by itself, Eq. (36)
        optimizer.step()
    return seen


def force_on(x: Tensor, positives: Tensor) -> Tensor:
    """F of Eq. (35), (rows, points, 2): V, which has a root mean square of 1, times that of the force."""
    V, _, diagnostics = drift_field(x, positives, temperatures=TEMPERATURES)
    return V * diagnostics[f"force_rms_{TEMPERATURES[0]:g}"]


def panel(ax, x: Tensor, positives: Tensor, title: str) -> None:
    ax.add_patch(plt.Circle((0, 0.1), 0.33, color="0.88", zorder=0))
    ax.text(0, -0.36, "obstacle", ha="center", fontsize=8, color="0.6")
    ax.scatter(*positives.flatten(0, 1).T, s=13, color="#3b75af", alpha=0.45, lw=0, zorder=1)
    ax.scatter(*x.flatten(0, 1).T, s=15, color="#ef8636", lw=0.3, edgecolor="white", zorder=3)
    ax.set(xlim=(-1.75, 1.75), ylim=(-1.15, 1.35), aspect="equal", xticks=[], yticks=[])
    ax.set_title(title, fontsize=10)
    for side in ax.spines.values():
        side.set_color("0.8")


def main() -> None:
    drifted = train(lambda x, positives: dbp_loss(x, positives, temperatures=TEMPERATURES)[0].mean())
    regressed = train(lambda x, positives: (x - positives).square().mean())
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.6), layout="constrained")
    for ax, (step, (x, positives)) in zip(axes.flat, drifted.items(), strict=False):
        panel(ax, x, positives, f"step {step}" if step else "before training")
        arrows = ARROW * force_on(x, positives)[:, ::3].flatten(0, 1)
        ax.quiver(
            *x[:, ::3].flatten(0, 1).T, *arrows.T, angles="xy", scale_units="xy", scale=1, width=0.004, color="0.2", zorder=4
        )
    axes[0, 0].text(-1.65, 1.12, "blue: expert   orange: generated", fontsize=9, color="0.35")
    panel(axes[1, 2], *regressed[SHOWN[-1]], f"mean squared error, step {SHOWN[-1]}: into the obstacle")
    figure.savefig(ROOT / "benchmark" / "pictures" / "toy.png", dpi=110)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__.split("\n")[0])  # --help shall not begin to measure
