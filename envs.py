"""Tasks, one table row each, and their environments, stepped by whole action chunks.

A vectorised environment here is any object with

    num_envs                 number of environments N
    reset(seeds) -> obs      one seed per environment; obs {key: (N, To, ...)}, the first observation repeated
    step(chunks) -> (obs, reward, done, info)
                             chunks (N, Ta, Da) in environment units; reward (N,) summed over the chunk; done (N,) bool: the
                             episode is over, and what follows for that environment is ignored until the next reset
    record(which)            keep a picture of these environments after every environment step, in
    frames                   one list per recorded environment, of (H, W, 3) uint8
    close()

info holds `score` (N,), the task's measure so far in the episode, `success` (N,) bool, `length` (N,) steps. Simulators are
imported when they are first used. Errors are ValueError, or ImportError with the pip line.
"""

from __future__ import annotations

import dataclasses
import os
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Task:
    """One row: what the scripts need to know of a task."""

    name: str
    score: str  # what `score` measures, for people
    obs_shapes: dict[str, tuple[int, ...]]  # shape of one step of each observation key
    action_dim: int
    make: Callable[[int, int], object]  # (num_envs, obs_steps) -> vectorised environment
    demo_arrays: tuple[str, ...]  # arrays to read from a demonstration file
    demo_convert: Callable[[Arrays], tuple[Arrays, np.ndarray]]  # those arrays -> (obs, actions), environment units
    demo_mirror: Callable[[Arrays], Arrays] | None = None  # those arrays -> the same episodes in the task's mirror, if it has one


def get_task(name: str) -> Task:
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]


# --- Push-T -----------------------------------------------------------------------------------------------------------

# Diffusion Policy's nine keypoints in the T's own frame, pixels. Their program drew them at random once; these are recovered from
# the published data (median over its frames of the keypoints turned back by the block's pose, residual 0.002 pixels).
PUSHT_KEYPOINTS = np.array(
    [
        [9.26979, 90.04097],
        [-60.98347, -1.18673],
        [60.91276, -1.39337],
        [-0.27050, 25.54363],
        [-14.06493, 122.81586],
        [39.00274, 32.85740],
        [-39.96642, 32.72966],
        [-16.82435, 62.86318],
        [23.54146, -1.70029],
    ]
)


def pusht_state(agent: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """The paper's observation: nine keypoints and the agent. agent (N, 2) pixels, pose (N, 3) pixels, rad -> (N, 20)."""
    cos, sin = np.cos(pose[:, 2]), np.sin(pose[:, 2])
    rotation = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)  # (N, 2, 2)
    keypoints = PUSHT_KEYPOINTS @ rotation.swapaxes(-1, -2) + pose[:, None, :2]  # (N, 9, 2)
    return np.concatenate([keypoints.reshape(-1, 18), agent], -1)


def pusht_demos(arrays: Arrays) -> tuple[Arrays, np.ndarray]:
    """state (N, 5) = agent x y, block x y angle; action (N, 2) = where the agent shall go. Pixels, rad."""
    for name, width in (("state", 5), ("action", 2)):
        if name not in arrays:
            raise ValueError(f"it has no array {name}, shape (steps, {width})")
        if arrays[name].shape[1:] != (width,):
            raise ValueError(f"{name} has shape {arrays[name].shape}; it must be (steps, {width})")
    state = np.asarray(arrays["state"], np.float64)
    return {"state": pusht_state(state[:, :2], state[:, 2:])}, arrays["action"]


def pusht_mirror(arrays: Arrays) -> Arrays:
    """The same episodes, reflected in the axis of the target: x + y = 512, which is a diagonal of the table too.

    The physics do not know left from right, so that a mirrored demonstration is one that somebody could have given.
    """
    state, action = np.asarray(arrays["state"], np.float64), arrays["action"]
    agent, block, angle = 512 - state[:, 1::-1], 512 - state[:, 3:1:-1], np.pi / 2 - state[:, 4:]
    return {"state": np.concatenate([agent, block, angle], -1), "action": 512 - action[:, ::-1]}


class PushT:
    """N Push-T tables. Physics, resets and coverage are gym-pusht's; observation and score are the paper's.

    Score: largest coverage / 0.95 reached so far, at most 1; an episode ends above 0.95 (success) or after 300 steps.
    Starts: gym-pusht's own, numpy's PCG64 from the seed (Diffusion Policy draws other starts from the same seed).
    """

    MAX_STEPS = 300

    def __init__(self, num_envs: int, obs_steps: int):
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws into memory, no display needed
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
        try:
            from gym_pusht.envs import pusht
        except ImportError as error:
            hint = "apt-get install libgl1" if "libGL" in str(error) else "pip install gym-pusht==0.1.8"
            raise ImportError(f"Push-T needs gym-pusht, which does not import here ({error}): {hint}") from error

        class Table(pusht.PushTEnv):
            def _get_coverage(self):  # gym-pusht's, but for the goal, which never moves and is built once: 1.4 times faster
                if not hasattr(self, "goal"):
                    self.goal = pusht.pymunk_to_shapely(self.get_goal_pose_body(self.goal_pose), self.block.shapes)
                    self.goal_area = self.goal.area
                block = pusht.pymunk_to_shapely(self.block, self.block.shapes)
                return self.goal.intersection(block).area / self.goal_area

        self.tables = [Table(obs_type="state", visualization_width=256, visualization_height=256) for _ in range(num_envs)]
        self.num_envs, self.obs_steps = num_envs, obs_steps
        self.record(())

    def record(self, which: Sequence[int]) -> None:
        self.recorded, self.frames = list(which), [[] for _ in which]

    def _film(self, i: int) -> None:
        if i in self.recorded:
            self.frames[self.recorded.index(i)].append(self.tables[i].render())

    def reset(self, seeds: Sequence[int]) -> dict[str, np.ndarray]:
        states = [table.reset(seed=int(seed))[0] for table, seed in zip(self.tables, seeds, strict=True)]
        self.steps = np.zeros(self.num_envs, int)
        self.done = np.zeros(self.num_envs, bool)
        self.score = np.zeros(self.num_envs)
        self.success = np.zeros(self.num_envs, bool)
        self.states = [deque([state] * self.obs_steps, self.obs_steps) for state in states]
        for i in self.recorded:
            self._film(i)
        return self._observe()

    def step(self, chunks: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        reward = np.zeros(self.num_envs)
        for i, (table, chunk) in enumerate(zip(self.tables, chunks, strict=True)):
            for action in chunk:
                if self.done[i]:
                    break
                state, step_reward, self.success[i], _, _ = table.step(action.astype(np.float64))
                self.states[i].append(state)
                self.steps[i] += 1
                reward[i] += step_reward
                self.score[i] = max(self.score[i], step_reward)
                self.done[i] = self.success[i] or self.steps[i] >= self.MAX_STEPS
                self._film(i)
        info = {"score": self.score.copy(), "success": self.success.copy(), "length": self.steps.copy()}
        return self._observe(), reward, self.done.copy(), info

    def _observe(self) -> dict[str, np.ndarray]:
        states = np.array(self.states)  # (N, To, 5)
        flat = states.reshape(-1, 5)
        obs = pusht_state(flat[:, :2], flat[:, 2:]).reshape(self.num_envs, self.obs_steps, 20)
        return {"state": obs.astype(np.float32)}

    def close(self) -> None:
        for table in self.tables:
            table.close()


TASKS = {
    "pusht": Task(
        name="pusht",
        score="largest coverage / 0.95",
        obs_shapes={"state": (20,)},
        action_dim=2,
        make=PushT,
        demo_arrays=("state", "action"),
        demo_convert=pusht_demos,
        demo_mirror=pusht_mirror,
    ),
}
