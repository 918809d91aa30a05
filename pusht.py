"""Push-T: a round pusher, a T on a table, its place to be; gym-pusht's physics with the paper's observation and score.

One gymnasium.Env, and what turns demonstrations (Diffusion Policy's arrays) into observations and actions. Lengths are
gym-pusht's pixels, the table has 512 x 512; the agent is steered at 10 Hz by the point that it shall go to.

    observation key     shape              meaning
    state               (20,)              nine keypoints of the T, x y each, and the agent
    agent               (2,)               where the agent is: what goes with the picture
    image               (96, 96, 3)        RGB, uint8
"""

from __future__ import annotations

import os
from pathlib import Path

import gymnasium
import numpy as np

from manipulation import Arrays, observation_space, save_episodes

MAX_STEPS = 300  # of an episode
PIXELS = 96  # side of the pictures, as in the published demonstrations, which these pictures equal but for their edges
IMAGE_SHAPES = {"agent": (2,), "image": (PIXELS, PIXELS, 3)}

# Diffusion Policy's nine keypoints in the T's own frame, pixels. Their program drew them at random once; these are recovered from
# the published data (median over its frames of the keypoints turned back by the block's pose, residual 0.002 pixels).
KEYPOINTS = np.array(
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


def keypoint_state(agent: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """The paper's observation: nine keypoints and the agent. agent (N, 2) pixels, pose (N, 3) pixels, rad -> (N, 20)."""
    (x, y), cos, sin = KEYPOINTS.T, np.cos(pose[:, 2:]), np.sin(pose[:, 2:])  # (9,) each; (N, 1) each
    state = np.empty((len(pose), 20))
    state[:, 0:18:2] = cos * x - sin * y + pose[:, 0:1]
    state[:, 1:18:2] = sin * x + cos * y + pose[:, 1:2]
    state[:, 18:] = agent
    return state


def state_demos(arrays: Arrays) -> tuple[Arrays, np.ndarray]:
    """state (N, 5) = agent x y, block x y angle; action (N, 2) = where the agent shall go. Pixels, rad."""
    for name, width in (("state", 5), ("action", 2)):
        if name not in arrays:
            raise ValueError(f"it has no array {name}, shape (steps, {width})")
        if arrays[name].shape[1:] != (width,):
            raise ValueError(f"{name} has shape {arrays[name].shape}; it must be (steps, {width})")
    state = np.asarray(arrays["state"], np.float64)
    return {"state": keypoint_state(state[:, :2], state[:, 2:])}, arrays["action"]


def mirror(arrays: Arrays) -> Arrays:
    """The same episodes, reflected in the axis of the target: x + y = 512, which is a diagonal of the table too.

    The physics do not know left from right, so that a mirrored demonstration is one that somebody could have given.
    """
    state, action = np.asarray(arrays["state"], np.float64), arrays["action"]
    agent, block, angle = 512 - state[:, 1::-1], 512 - state[:, 3:1:-1], np.pi / 2 - state[:, 4:]
    pictures = {"img": arrays["img"][:, ::-1, ::-1].swapaxes(1, 2)} if "img" in arrays else {}  # a view: they may fill a disk
    return {"state": np.concatenate([agent, block, angle], -1), "action": 512 - action[:, ::-1], **pictures}


def make_env(view: str = "state") -> gymnasium.Env:
    """One Push-T table. Physics, resets and coverage are gym-pusht's; observation and score are the paper's.

    view: "state", keypoints and agent, or "image", the agent's position and a picture of the table.
    Score: largest coverage / 0.95 reached so far, at most 1; an episode ends above 0.95 (success) or after 300 steps.
    Reward: 1 for success, and a tenth of the change of coverage / 0.95. Paid per step for coverage, as gym-pusht pays, an agent
    learns to hover just below success, which would end the episode and the income. More than a tenth drowns the rare success in
    the noise of the way there; the progress of the largest coverage would depend on a past that the observation does not show.
    Starts: gym-pusht's own, numpy's PCG64 from the seed (Diffusion Policy draws other starts from the same seed).
    """
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws into memory, no display needed
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    try:
        from gym_pusht.envs import pusht
    except ImportError as error:
        hint = "apt-get install libgl1" if "libGL" in str(error) else "pip install gym-pusht==0.1.8"
        raise ImportError(f"Push-T needs gym-pusht, which does not import here ({error}): {hint}") from error

    import shapely

    class Table(pusht.PushTEnv):
        """gym-pusht's step in plain numbers and with a goal that is built once: the same bits, two to three times faster."""

        def _handle_collision(self, *_):
            """gym-pusht counts points of contact here, which nobody reads."""

        def reset(self, **kwargs):
            state, info = super().reset(**kwargs)
            self.parts = [shape.get_vertices() for shape in self._block_shapes]  # in this order, not in that of a set
            self.goal = self._polygons(self.get_goal_pose_body(self.goal_pose))
            self.score, self.steps, self.coverage = 0.0, 0, self._coverage()
            return self._see(state[:2], state[2:]), info

        def _see(self, agent: np.ndarray, pose: np.ndarray) -> np.ndarray | Arrays:
            if view == "state":
                return keypoint_state(agent[None], pose[None])[0]
            picture = self._get_img(self._draw(), PIXELS, PIXELS)
            return {"agent": agent.astype(np.float32), "image": picture}

        def _polygons(self, body):
            return shapely.multipolygons(shapely.polygons([[body.local_to_world(v) for v in part] for part in self.parts]))

        def _coverage(self) -> float:
            return shapely.intersection(self.goal, self._polygons(self.block)).area / self.goal.area

        def step(self, action):
            (x, y), agent = np.asarray(action, np.float64).tolist(), self.agent
            for _ in range(int(1 / (self.dt * self.control_hz))):  # PD control towards the action
                (px, py), (vx, vy) = agent.position, agent.velocity
                ax, ay = self.k_p * (x - px) + self.k_v * (0 - vx), self.k_p * (y - py) + self.k_v * (0 - vy)
                agent.velocity = vx + ax * self.dt, vy + ay * self.dt
                self.space.step(self.dt)
            self._last_action = action  # for the film
            before, self.coverage = self.coverage, self._coverage()
            success = self.coverage > self.success_threshold
            reward = 0.1 * (self.coverage - before) / self.success_threshold + success
            self.score = max(self.score, min(self.coverage / self.success_threshold, 1.0))
            self.steps += 1
            pose = np.array([*self.block.position, self.block.angle % (2 * np.pi)])
            late = not success and self.steps >= MAX_STEPS
            info = {"score": self.score, "success": success}
            obs = self._see(np.array(agent.position), pose) if self.observing or success or late else None
            return obs, reward, success, late, info

    table = Table(obs_type="state", render_mode="rgb_array", visualization_width=256, visualization_height=256)
    table.observing, table.MAX_STEPS = True, MAX_STEPS  # see vector.Chunked
    table.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (20,)) if view == "state" else observation_space(IMAGE_SHAPES)
    return table


def image_demos(arrays: Arrays) -> tuple[Arrays, np.ndarray]:
    """img (N, 96, 96, 3), 0 to 255; state (N, 5), its first two numbers the agent; action (N, 2). Pixels."""
    _, actions = state_demos(arrays)
    if "img" not in arrays or arrays["img"].shape[1:] != IMAGE_SHAPES["image"]:
        found = arrays["img"].shape if "img" in arrays else "nothing"
        raise ValueError(f"img must have shape (steps, 96, 96, 3); it has {found}")
    if arrays["img"].dtype != np.uint8:
        raise ValueError(f"img holds {arrays['img'].dtype}; pictures must be uint8, 0 to 255")
    return {"agent": np.asarray(arrays["state"], np.float64)[:, :2], "image": arrays["img"]}, actions


def record_images(path: Path, episodes: int = 200) -> None:
    """Draw the first embedded demonstrations, which hold states, as pictures; a minute."""
    with np.load(Path(__file__).parent / "data" / "pusht.npz", allow_pickle=False) as file:
        ends = file["episode_ends"][:episodes]
        state, action = file["state"][: ends[-1]], file["action"][: ends[-1]]
    table = make_env("image")
    pictures = np.empty((len(state), *IMAGE_SHAPES["image"]), np.uint8)
    table.reset(seed=0)
    for row, picture in zip(state.astype(float), pictures, strict=True):
        table.agent.position, table.block.angle, table.block.position = row[:2].tolist(), float(row[4]), row[2:4].tolist()
        for body in (table.agent, table.block):  # pymunk draws shapes where the last step or this left them
            table.space.reindex_shapes_for_body(body)
        picture[:] = table._see(row[:2], row[2:])["image"]
    save_episodes(path, ends, {"img": pictures, "state": state, "action": action})
