"""OGBench's cubes: a UR5e arm moves one to four cubes to their places, from play data that were made for no task at all.

    observation `state`, as OGBench gives it        numbers
    joint positions, velocities                     6 + 6      rad, rad/s
    hand                                            3 + 2      (xyz - CENTER) * 10, metres; cos and sin of its yaw
    fingers                                         1 + 1      opening * 3; contact force / 50 N, at most 1
    per cube                                        9          (xyz - CENTER) * 10, quaternion, cos and sin of its yaw

    action (5,) in [-1, 1]: displacement of the hand / 0.05 m, turn about the vertical / 0.3 rad, closing of the fingers

Reward, of the state that an action starts from: cubes in place (within 4 cm) - cubes, so 0 once all are; that step ends the
episode ("singletask" variants, Park et al. 2025). Play data hold no rewards: `rewards` gives those of a task. The simulator and
the play are OGBench's own; it is imported when it is first used, and ImportError says what to install.
"""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np

from manipulation import Arrays, draw_without_display, save_episodes

SIZES = {"single": (1, 200), "double": (2, 500), "triple": (3, 1000), "quadruple": (4, 1000)}  # cubes, steps of an episode
TASKS = 5  # of each size
ACTIONS = 5
PLAY_STEPS = 1000  # of an episode of play, as OGBench's; 1001 rows with the last observation
CENTER, UNIT = np.array([0.425, 0.0, 0.0]), 10.0  # of positions in the observation: metres, 1 / metre
REACH = 0.04  # a cube is in place within so many metres
BODY, CUBE = 19, 9  # numbers of the observation: of the arm, of each cube


def features(size: str) -> int:
    return BODY + CUBE * SIZES[size][0]


def simulator(size: str, **settings):
    """OGBench's environment, without gymnasium's wrappers."""
    draw_without_display()
    try:
        with warnings.catch_warnings():  # about the display
            warnings.simplefilter("ignore")
            from ogbench.manipspace.envs.cube_env import CubeEnv
    except ImportError as error:
        raise ImportError(f"the cubes need OGBench: pip install -r requirements-simulators.txt ({error})") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CubeEnv(size, permute_blocks=False, **settings)


class Cubes(gymnasium.Env):
    """One task of one size. Score: 1 once all cubes were in place at once."""

    def __init__(self, size: str, task: int):
        """size: a key of SIZES; task: 1 to TASKS."""
        self.sim = simulator(size, success_timing="pre", reward_task_id=task)
        self.action_space = gymnasium.spaces.Box(-1, 1, (ACTIONS,), np.float32)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (features(size),), np.float32)
        self.max_steps = SIZES[size][1]

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        import mujoco

        with warnings.catch_warnings():  # about the type of its action space
            warnings.simplefilter("ignore")
            self.sim.reset(seed=seed)
        # OGBench has taken two steps with unseeded actions at the goal. What they left behind in the contact solver and in the
        # fingers' force goes: an episode is a function of its seed and its actions.
        model, data = self.sim.model, self.sim.data
        data.time, data.qacc_warmstart[:], data.ctrl[:] = 0.0, 0.0, 0.0
        mujoco.mj_forward(model, data)
        mujoco.mj_rnePostConstraint(model, data)
        self.sim.pre_step()
        self.steps = 0
        return self.sim.compute_observation().astype(np.float32), {}

    def step(self, action):
        obs, reward, success, _, _ = self.sim.step(np.asarray(action, np.float64).clip(-1, 1))
        self.steps += 1
        late = not success and self.steps >= self.max_steps
        return obs.astype(np.float32), reward, bool(success), late, {"score": float(success), "success": bool(success)}

    def render(self) -> np.ndarray:
        return self.sim.render()

    def close(self) -> None:
        self.sim.close()


def goals(size: str, task: int) -> np.ndarray:
    """Where the cubes shall go, (cubes, 3), metres."""
    return np.array(simulator(size, reward_task_id=task).task_infos[task - 1]["goal_xyzs"])


def rewards(obs: Arrays, size: str, task: int) -> tuple[np.ndarray, np.ndarray]:
    """Reward and end of every step of the play, as the task's environment would have given them.

    Args: obs with `state` (steps, features). Returns: reward (steps,), terminated (steps,) bool: all cubes were in place before
    the step. Play goes on after that; what would have followed has no part in the value (dfp_finetune.py).
    """
    cubes = obs["state"][:, BODY:].reshape(len(obs["state"]), SIZES[size][0], CUBE)[..., :3]
    placed = np.linalg.norm(cubes / UNIT + CENTER - goals(size, task), axis=-1) <= REACH  #            (steps, cubes)
    return (placed.sum(1) - placed.shape[1]).astype(np.float32), placed.all(1)


def play_demos(arrays: Arrays, size: str) -> tuple[Arrays, np.ndarray]:
    """OGBench's arrays (observations, actions) or ours (state, action) -> observation, action."""
    state, action = arrays.get("state", arrays.get("observations")), arrays.get("action", arrays.get("actions"))
    for name, array, width in (("observations", state, features(size)), ("actions", action, ACTIONS)):
        found = "nothing" if array is None else array.shape
        if array is None or array.ndim != 2 or array.shape[1] != width:
            raise ValueError(f"{name} must have shape (steps, {width}); found {found}")
    return {"state": state}, action


# --- play: OGBench's oracle, from one random goal to the next -----------------------------------------------------------------


def play(seed: int, size: str) -> tuple[np.ndarray, np.ndarray]:
    """One episode: observations (PLAY_STEPS + 1, features), actions (PLAY_STEPS + 1, 5), of which the last is never taken.

    OGBench's recipe for "play": plans with temporally correlated noise of 0.1; a new goal when the plan is done.
    """
    from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle

    env = simulator(size, mode="data_collection", terminate_at_goal=False)
    oracle = CubePlanOracle(env=env, noise=0.1, noise_smoothing=0.5)
    np.random.seed(seed)  # the oracle draws from numpy's global generator
    obs, info = env.reset(seed=seed)
    oracle.reset(obs, info)
    rows, actions = [obs], []
    while len(rows) <= PLAY_STEPS:
        action = oracle.select_action(obs, info).astype(np.float32)
        obs, _, _, _, info = env.step(action)
        rows.append(obs)
        actions.append(action)
        if oracle.done:
            obs, info = env.set_new_target(p_stack=0.5)
            oracle.reset(obs, info)
    env.close()
    return np.array(rows, np.float32), np.array([*actions, np.zeros(ACTIONS)], np.float32)


def record_play(path: Path, size: str, episodes: int = 200) -> None:
    """Write so many episodes of play to path, an .npz; 200 take a quarter of an hour on two cores. Seeds from 4,000,000 on."""
    simulator(size)  # says what is missing, before any process starts
    with ProcessPoolExecutor(min(episodes, os.cpu_count() or 1)) as pool:
        played = list(pool.map(partial(play, size=size), range(4_000_000, 4_000_000 + episodes)))
    states, actions = (np.concatenate([episode[k] for episode in played]) for k in (0, 1))
    ends = (1 + np.arange(episodes)) * (PLAY_STEPS + 1)
    save_episodes(path, ends, {"state": states, "action": actions})
