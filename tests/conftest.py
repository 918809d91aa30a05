"""Shared by all tests: import path, one thread, a small network, small synthetic demonstrations. Nothing here needs a network."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules are files at the top level, not an installed package

torch.set_num_threads(1)  # idle torch threads spin and slow down every other process on a small machine

# The only place that knows the size settings of the networks, by their names in PolicyConfig and (the mlp's) on the command line.
TINY_MLP = {"cond_width": 24, "cond_depth": 1, "width": 16, "depth": 1}
TINY_UNET = {"backbone": "unet", "channels": (8, 16, 32), "cond_dim": 16}


def synthetic_pusht(seed: int = 0, lengths: tuple[int, ...] = (40, 25, 33)) -> dict[str, np.ndarray]:
    """Random walks within Push-T's pixel ranges: state (N, 5) = agent, block, angle; action (N, 2) = where the agent shall go."""
    rng = np.random.default_rng(seed)
    states, actions = [], []
    for n in lengths:
        agent = rng.uniform(100, 400, 2) + rng.normal(0, 8, (n, 2)).cumsum(0)
        block = rng.uniform(150, 350, 2) + rng.normal(0, 2, (n, 2)).cumsum(0)
        angle = rng.uniform(0, 6, 1) + rng.normal(0, 0.02, (n, 1)).cumsum(0)
        states.append(np.concatenate([agent.clip(0, 512), block.clip(0, 512), angle], 1))
        actions.append((agent + rng.normal(0, 10, (n, 2))).clip(0, 512))
    return {
        "state": np.concatenate(states).astype(np.float32),
        "action": np.concatenate(actions).astype(np.float32),
        "episode_ends": np.cumsum(lengths),
    }


@pytest.fixture
def pusht_arrays() -> dict[str, np.ndarray]:
    return synthetic_pusht()


@pytest.fixture(scope="session")
def pusht_npz(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("demos") / "synthetic.npz"
    np.savez(path, **synthetic_pusht())
    return path
