"""What seeing costs: the encoder's share of a training step with 1 to 16 hypotheses, and one policy call from a depth image.

    python benchmark/encoding.py            a minute; writes benchmark/results/encoding.json; needs no simulator

The settings are those of metaworld-basketball-points, the depth image has its size and holds a plane with a block on it: times
do not depend on what is seen. One thread. Medians over rounds, the numbers of hypotheses taken in turn.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np
import record
import torch
import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import envs
from dbp_train import Config
from drift import dbp_loss
from manipulation import MetaWorld
from pointcloud import crop, depth_to_points, farthest_points, intrinsics
from policy import Policy, PolicyConfig


def make_policy() -> tuple[Policy, Config]:
    task = envs.get_task("metaworld-basketball-points")
    cfg = dataclasses.replace(Config(), **task.train)
    names = {field.name for field in dataclasses.fields(PolicyConfig)} & {field.name for field in dataclasses.fields(Config)}
    settings = {name: getattr(cfg, name) for name in names - {"env"}}
    return Policy(PolicyConfig(env=task.name, obs_shapes=task.obs_shapes, action_dim=task.action_dim, **settings)), cfg


def training_step(rounds: int = 15) -> dict[str, dict[str, float]]:
    """Per G: how often the encoder runs in a step and on how many rows, its share of forward and backward, milliseconds."""
    policy, cfg = make_policy()
    B, c = cfg.batch_size, policy.config
    obs = {key: torch.randn(B, c.obs_steps, *shape) for key, shape in c.obs_shapes.items()}
    positives = torch.randn(B, 1, c.horizon * c.action_dim)
    seen: list[int] = []
    policy.encoder.register_forward_hook(lambda _, inputs, __: seen.append(len(next(iter(inputs[0].values())))))
    times: dict[int, list[tuple[float, float]]] = {G: [] for G in (1, 4, 16)}
    counts: dict[int, tuple[int, int]] = {}
    for round_ in range(rounds + 2):
        for G in times:
            z = torch.randn(B, G, c.horizon, c.action_dim)
            seen.clear()
            start = time.perf_counter()
            cond = policy.encode(obs)
            cut = cond.detach().requires_grad_()  # the backward pass stops here, so that the encoder's can be timed alone
            middle = time.perf_counter()
            dbp_loss(policy.backbone(z, cut).flatten(2), positives, temperatures=cfg.temperatures)[0].mean().backward()
            after = time.perf_counter()
            cond.backward(cut.grad)
            end = time.perf_counter()
            counts[G] = len(seen), sum(seen)
            if round_ >= 2:
                times[G].append((middle - start + end - after, end - start))
    names = ("encoder_calls", "encoder_rows", "encoder_ms", "step_ms")
    return {
        str(G): dict(zip(names, (*counts[G], *np.median(np.array(t) * 1e3, 0).round(1).tolist()), strict=True))
        for G, t in times.items()
    }


def call(rounds: int = 200) -> dict[str, float]:
    """Milliseconds from a depth image in memory to an action: points, crop, farthest points, encoder, network."""
    policy, _ = make_policy()
    size, c = MetaWorld.SIZE, policy.config
    camera = intrinsics(50.0, size, size)
    depth = np.full((size, size), 1.0)
    depth[40:80, 40:80] = 0.9
    v, u = np.indices(depth.shape)
    depth += 0.001 * np.sin(u / 3) * np.cos(v / 5)  # no two distances are equal
    low, high = np.array([-0.28, -0.28, 0.5]), np.array([0.28, 0.28, 1.5])
    times = []
    for round_ in range(20 + rounds):
        start = time.perf_counter()
        points = depth_to_points(depth, camera, np.eye(4))
        points = points[crop(points, low, high)]
        inside = len(points)
        cloud = points[farthest_points(points, MetaWorld.POINTS)].astype(np.float32)
        sampled = time.perf_counter()
        policy.act({"robot": np.zeros((1, c.obs_steps, 9), np.float32), "points": cloud[None, None].repeat(c.obs_steps, 1)})
        if round_ >= 20:
            times.append((sampled - start, time.perf_counter() - start))
    sampling, whole = np.array(times).T * 1e3
    return {
        "points_in_the_box": inside,
        "sampling_ms_p50": round(float(np.median(sampling)), 2),
        "call_ms_p50": round(float(np.median(whole)), 2),
        "call_ms_p99": round(float(np.percentile(whole, 99)), 2),
    }


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result = {**record.stamp(), "call": call(), "training": training_step()}
    (ROOT / "benchmark" / "results" / "encoding.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__.split("\n")[0])  # --help shall not begin to measure
