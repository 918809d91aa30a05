"""README's picture of what the policies see: a picture, and a point cloud beside the camera that gave it.

python benchmark/eyes.py     ten seconds; writes benchmark/pictures/eyes.png; needs requirements-simulators.txt
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import manipulation
import pusht


def main() -> None:
    figure = plt.figure(figsize=(13, 2.9), layout="constrained")
    table = pusht.make_env("image")
    panels = [("pusht-image, 96 x 96", table.reset(seed=3)[0]["image"])]
    for name, env in (
        ("metaworld-hammer", manipulation.MetaWorld("hammer", "points")),
        ("adroit-door", manipulation.Adroit("door", "points")),
    ):
        obs, _ = env.reset(seed=3)
        panels += [(f"{name}: camera", env.render()), (f"{name}-points: {len(obs['points'])} points", obs["points"])]
        env.close()
    for i, (title, seen) in enumerate(panels):
        if seen.ndim == 3:
            ax = figure.add_subplot(1, len(panels), i + 1)
            ax.imshow(seen)
            ax.axis("off")
        else:
            ax = figure.add_subplot(1, len(panels), i + 1, projection="3d")
            ax.scatter(*seen.T, c=seen[:, 2], s=3)
            ax.view_init(35, -60)
            ax.set_box_aspect(seen.max(0) - seen.min(0))
            ax.tick_params(labelsize=6)
            ax.set_xlabel("metres", fontsize=7)
        ax.set_title(title, fontsize=9)
    figure.savefig(ROOT / "benchmark" / "pictures" / "eyes.png", dpi=110)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__.split("\n")[0])  # --help shall not begin to measure
