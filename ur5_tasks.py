"""Lift, Can and Transport in the twin of ur5_twin.py: the environment, scripted experts that need no memory, and recordings.

    observation key              shape          meaning; of each arm that acts: left, right
    <arm>_pos                    (3,)           tool centre in the cell, metres
    <arm>_rot                    (6,)           its orientation, 6-D (two columns of the matrix)
    <arm>_grip                   (1,)           0 open .. 1 shut, measured
    object                       (features,)    position, 6-D orientation, position from each acting hand; not with pictures
    <camera>_image               (84, 84, 3)    RGB, uint8: left_wrist, right_wrist, head; only with pictures

    action, per acting arm       (10,)          where the hand shall be one step (0.1 s) from now: position, 6-D orientation, grip

Actions are places, not displacements: a way-point that comes late can be dropped without an error that stays. The experts look
at nothing but what is in the observation; where they pause, they wait for something that is seen to move. In recordings the
hands are pushed off their way (DART, Laskey et al. 2017), so that a policy learns to come back.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np

from manipulation import Arrays, Eye, observation_space, record_successes
from robomimic_tasks import clip_norm
from rotations import matrix, six, vector
from ur5_motion import ARMS, inverse, pose_of
from ur5_twin import BASES, CAMERAS, DOWN, PERIOD, Cell, TwinArm

STEP_S = 0.1  # seconds between two actions
PIXELS = 84  # side of the pictures, as robomimic's
SPEED = 0.045  # metres that the experts go per step
SLOW = 0.02  # ... the last centimetres down to an object, so that the hand can brake above the table
TURN = 0.2  # rad per step
SHAKE = 0.01  # metres by which a recording's hands are pushed at the most, standard deviation per step, where they go fast
BLUR = 0.02  # noise on the orientations of recordings, standard deviation of a matrix entry, about 1 degree
MAX_JOINT_STEP = 0.25  # rad per step that the environment executes: 2.5 rad/s

BIN = np.array([0.45, -0.5, 0.0])  # Can: middle of the bin
TRAY = np.array([0.42, -0.42, 0.0])  # Transport: middle of the tray where the bar has to lie
MEETING = np.array([0.42, 0.0, 0.3])  # Transport: where the middle of the bar changes hands
REACH = 0.1  # Transport: each hand holds the bar so far from its middle, metres
CLOSED_ON = {"lift": 0.48, "can": 0.36, "transport": 0.64}  # grip, measured, of fingers that have met the object


def walls(at: np.ndarray, half_x: float, half_y: float, height: float = 0.025) -> str:
    """An open box on the table, half sizes in metres."""
    sides = [(half_x, 0, 0.004, half_y), (-half_x, 0, 0.004, half_y), (0, half_y, half_x, 0.004), (0, -half_y, half_x, 0.004)]
    return "".join(
        f'<geom type="box" size="{sx} {sy} {height}" pos="{at[0] + x} {at[1] + y} {height}" rgba="0.3 0.45 0.4 1" class="thing"/>'
        for x, y, sx, sy in sides
    )


def thing(shape: str, rgba: str) -> str:
    return f'<body name="object"><freejoint/><geom {shape} rgba="{rgba}" class="thing"/></body>'


@dataclasses.dataclass(frozen=True)
class Scene:
    """One task: what lies on the table, who acts, and where it begins."""

    objects: str  # MJCF
    arms: tuple[int, ...]  # that act; the other one rests
    low: tuple[float, float, float, float]  # of the object's start: x, y, z in metres, yaw in rad
    high: tuple[float, float, float, float]
    max_steps: int


SCENES = {
    "lift": Scene(
        thing('type="box" size="0.02 0.02 0.02" mass="0.08"', "0.8 0.2 0.15 1"),
        (1,),
        (0.34, -0.34, 0.02, -0.75),
        (0.5, -0.1, 0.02, 0.75),
        80,
    ),
    "can": Scene(
        thing('type="cylinder" size="0.026 0.05" mass="0.12"', "0.75 0.12 0.15 1") + walls(BIN, 0.1, 0.1),
        (1,),
        (0.34, -0.3, 0.05, 0.0),
        (0.5, -0.08, 0.05, 0.0),
        120,
    ),
    "transport": Scene(
        thing('type="box" size="0.013 0.17 0.02" mass="0.12"', "0.85 0.6 0.1 1") + walls(TRAY, 0.09, 0.21),
        (0, 1),
        (0.36, 0.26, 0.02, -0.4),
        (0.46, 0.36, 0.02, 0.4),
        200,
    ),
}  # fmt: skip


def shapes(task: str, view: str) -> dict[str, tuple[int, ...]]:
    arms = SCENES[task].arms
    found = {f"{ARMS[i]}_{name}": (n,) for i in arms for name, n in (("pos", 3), ("rot", 6), ("grip", 1))}
    if view == "image":
        return found | {f"{camera}_image": (PIXELS, PIXELS, 3) for camera in CAMERAS}
    return found | {"object": (9 + 3 * len(arms),)}


def actions(task: str) -> int:
    return 10 * len(SCENES[task].arms)


def arm_observation(name: str, hand: np.ndarray, grip: float) -> Arrays:
    """What an arm contributes to the observation. hand (4, 4) in the cell."""
    return {f"{name}_pos": hand[:3, 3], f"{name}_rot": six(hand[:3, :3]), f"{name}_grip": np.array([grip])}


class Table(gymnasium.Env):
    """One task in the twin, 10 actions per second. Reward and score: 1 at success, which ends an episode.

    An episode is a function of its seed. Success: Lift, the cube 10 cm above the table and held; Can, it is in the bin and the
    gripper has let go; Transport, the bar lies in the tray and both have let go.
    """

    render_mode = "rgb_array"
    observing = True  # see vector.Chunked

    def __init__(self, task: str, view: str = "state", cell: Cell | None = None):
        """task: a key of SCENES; view: "state" or "image"; cell: the twin, built if None."""
        self.task, self.scene, self.view = task, SCENES[task], view
        self.MAX_STEPS = self.scene.max_steps
        self.cell = cell or Cell(self.scene.objects)
        self.acting = [self.cell.arms[i] for i in self.scene.arms]
        self.eyes: dict[str, Eye] = {}
        self.action_space = gymnasium.spaces.Box(-np.inf, np.inf, (actions(task),), np.float32)
        self.observation_space = observation_space(shapes(task, view))

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.cell.reset()
        x, y, z, yaw = self.np_random.uniform(self.scene.low, self.scene.high)
        data = self.cell.data
        data.qpos[-7:] = x, y, z, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)  # the object's joint is the last one
        self.cell.mujoco.mj_forward(self.cell.model, data)
        self.steps = 0
        return self._observe(), {}

    def step(self, action):
        action = np.asarray(action, np.float64)
        if not np.isfinite(action).all():
            raise ValueError("the action holds NaN or infinity")
        self.aim(action)
        starts = [arm.target.copy() for arm in self.acting]
        count = round(STEP_S / PERIOD)
        for k in range(1, count + 1):
            for arm, start, goal in zip(self.acting, starts, self.goals, strict=True):
                arm.servo_joints(start + (goal - start) * k / count)
            self.cell.step()
        self.steps += 1
        success = self.success()
        late = not success and self.steps >= self.MAX_STEPS
        obs = self._observe() if self.observing or success or late else None
        return obs, float(success), success, late, {"score": float(success), "success": success}

    def aim(self, action: np.ndarray) -> None:
        """The joints that an action means. Out of reach, an arm stays where it is sent already."""
        self.goals = []
        for arm, mine in zip(self.acting, action.reshape(-1, 10), strict=True):
            try:
                goal = inverse(np.linalg.inv(BASES[arm.arm]) @ pose_of(mine[:3], mine[3:9]), arm.target)
            except ValueError:
                goal = arm.target
            self.goals.append(arm.target + np.clip(goal - arm.target, -MAX_JOINT_STEP, MAX_JOINT_STEP))
            arm.grip(mine[9])

    def success(self) -> bool:
        at, R = self.cell.body("object")
        grips = [arm.state().grip for arm in self.acting]
        if self.task == "lift":
            return bool(at[2] > 0.12 and grips[0] > 0.4)
        if self.task == "can":
            return bool((np.abs(at - BIN)[:2] < 0.09).all() and at[2] < 0.07 and grips[0] < 0.25)
        return bool((np.abs(at - TRAY)[:2] < (0.07, 0.1)).all() and at[2] < 0.05 and abs(R[2, 1]) < 0.2 and max(grips) < 0.35)

    def sense(self) -> Arrays:
        """The observation but for the pictures."""
        obs: Arrays = {}
        at, R = self.cell.body("object")
        hands = [arm.hand() for arm in self.acting]
        for arm, hand in zip(self.acting, hands, strict=True):
            obs |= arm_observation(ARMS[arm.arm], hand, arm.state().grip)
        obs["object"] = np.concatenate([at, six(R), *(at - hand[:3, 3] for hand in hands)])
        return {key: value.astype(np.float32) for key, value in obs.items()}

    def _observe(self) -> Arrays:
        obs = self.sense()
        if self.view == "image":
            del obs["object"]
            obs |= {f"{camera}_image": self.eye(camera, PIXELS).picture(self.cell.data) for camera in CAMERAS}
        return obs

    def eye(self, camera: str, pixels: int) -> Eye:
        if (camera, pixels) not in self.eyes:
            self.eyes[camera, pixels] = Eye(self.cell.model, camera, pixels, pixels)
        return self.eyes[camera, pixels]

    def render(self) -> np.ndarray:
        return self.eye("film", 256).picture(self.cell.data)

    def close(self) -> None:
        for eye in self.eyes.values():
            eye.close()


class Twin:
    """The simulated cell in real time: it follows the clock, keeps a film, shows a window, and knows when the task is done."""

    def __init__(self, task: str, window: bool):
        self.table = Table(task)
        self.cell = self.table.cell
        self.cell.clock = time.monotonic
        self.film: list[np.ndarray] = []
        self.viewer = None
        if window and (os.environ.get("DISPLAY") or sys.platform == "darwin"):
            import mujoco.viewer

            self.viewer = mujoco.viewer.launch_passive(self.cell.model, self.cell.data, show_left_ui=False, show_right_ui=False)

    def reset(self, seed: int) -> None:
        self.table.reset(seed=seed)
        self.began = self.shown = time.monotonic()
        self.steps = 0

    def advance(self, now: float) -> str:
        """Simulate up to now. Returns: "success" when the task is done. A machine that is too slow lets the twin's time lag."""
        behind = int((now - self.began) / PERIOD) - self.steps
        if behind > 50:
            self.began += (behind - 50) * PERIOD
            behind = 50
        for _ in range(behind):
            self.cell.step()
        self.steps += behind
        if now - self.shown < STEP_S:
            return ""
        self.shown = now
        self.film.append(self.cell.data.qpos.copy())
        if self.viewer:
            self.viewer.sync()
        return "success" if self.table.success() else ""

    def settle(self) -> float:
        """A second on, after the stop. Returns: the fastest joint then, rad/s."""
        for _ in range(round(1 / PERIOD)):
            self.cell.step()
        return float(max(np.abs(arm.state().qd).max() for arm in self.cell.arms))

    def write_film(self, path: Path, most: int = 400) -> None:
        """The film as a GIF at twice the real speed, at most so many pictures."""
        import imageio.v3 as iio

        pictures = []
        for qpos in self.film[:most]:
            self.cell.data.qpos[:] = qpos
            self.cell.mujoco.mj_forward(self.cell.model, self.cell.data)
            pictures.append(self.table.render())
        path.parent.mkdir(parents=True, exist_ok=True)
        iio.imwrite(path, np.stack(pictures), extension=".gif", duration=50, loop=0)

    def close(self) -> None:
        self.table.close()
        if self.viewer:
            self.viewer.close()


# --- experts: functions of the scene as it is, without memory ---------------------------------------------------------------


def facing(yaw: float) -> np.ndarray:
    """A hand that points down, turned about the vertical by yaw, rad."""
    return matrix(np.array([0, 0, yaw])) @ DOWN


def towards(arm: TwinArm, place: np.ndarray, yaw: float, grip: float, speed: float = SPEED) -> np.ndarray:
    """The action (10,) of one arm: at most one step's way from the measured hand."""
    hand = arm.hand()
    turn = clip_norm(vector(facing(yaw) @ hand[:3, :3].T), TURN)
    return np.concatenate([hand[:3, 3] + clip_norm(place - hand[:3, 3], speed), six(matrix(turn) @ hand[:3, :3]), [grip]])


def fetch(arm: TwinArm, place: np.ndarray, yaw: float) -> np.ndarray:
    """Over the place, down to it, and shut: one arm's action until something is held there."""
    gap = arm.hand()[:3, 3] - place
    aside = np.linalg.norm(gap[:2])
    if aside < 0.012 and abs(gap[2]) < 0.012:
        return towards(arm, place, yaw, 1.0)
    if aside < 0.012 + 0.12 * max(gap[2], 0):  # within a cone above the place
        return towards(arm, place, yaw, 0.0, SLOW if gap[2] < 0.05 else SPEED)
    return towards(arm, place + np.array([0, 0, 0.09]), yaw, 0.0)


def holds(env: Table, arm: TwinArm, place: np.ndarray) -> bool:
    """Whether the fingers have met the object at that place of it."""
    return arm.state().grip > CLOSED_ON[env.task] and np.linalg.norm(arm.hand()[:3, 3] - place) < 0.03


def lift(env: Table) -> np.ndarray:
    """Grasp the cube across the sides that face the hand, and up."""
    arm, (at, R) = env.acting[0], env.cell.body("object")
    at[2] += 0.01  # the fingers reach below the tool centre, and not into the table
    yaw = float(np.arctan2(R[1, 0], R[0, 0]))
    if holds(env, arm, at):
        return towards(arm, arm.hand()[:3, 3] + [0, 0, 0.1], yaw, 1.0)
    return fetch(arm, at, yaw)


def can(env: Table) -> np.ndarray:
    """Grasp the can, lift it, carry it over the bin, let go near its bottom."""
    arm, (at, _) = env.acting[0], env.cell.body("object")
    hand = arm.hand()[:3, 3]
    grasp = at + np.array([0, 0, 0.01])
    if not holds(env, arm, grasp):
        return fetch(arm, grasp, 0.0)
    aside = np.linalg.norm((hand - BIN)[:2])
    if aside < 0.025:
        return towards(arm, BIN + np.array([0, 0, 0.09]), 0.0, 0.0 if hand[2] < 0.11 else 1.0)
    if hand[2] < 0.17 and aside > 0.05:
        return towards(arm, np.array([*hand[:2], 0.22]), 0.0, 1.0)
    return towards(arm, BIN + np.array([0, 0, 0.21]), 0.0, 1.0)


def transport(env: Table) -> np.ndarray:
    """The left arm brings the bar to the middle, the right one takes its other end in the air and lays it into the tray."""
    (left, right), (at, R) = env.acting, env.cell.body("object")
    along = R[:, 1]  # the bar's length; to the left
    yaw = float(np.arctan2(-R[0, 1], R[1, 1]))
    up = np.array([0, 0, 0.01])  # the fingers reach a little below the tool centre
    ends = at + REACH * along + up, at - REACH * along + up
    held = [holds(env, arm, end) for arm, end in zip(env.acting, ends, strict=True)]
    away = np.linalg.norm(left.hand()[:3, 3] - ends[0]) > 0.05
    meeting = np.linalg.norm(at - MEETING) < 0.02
    waiting = MEETING + np.array([0, -REACH - 0.06, 0.12])

    if held[1]:
        bring = towards(left, left.hand()[:3, 3], yaw, 0.0) if left.state().grip > 0.3 and not away else home_of(left)
    elif held[0]:
        high = at[2] > 0.2 or np.linalg.norm((at - MEETING)[:2]) < 0.1
        goal = MEETING + REACH * along if high else left.hand()[:3, 3] + [0, 0, 0.1]
        bring = towards(left, goal, 0.0 if high else yaw, 1.0)
    else:
        bring = fetch(left, ends[0], yaw) if at[1] > 0 and at[2] < 0.1 else home_of(left)

    aside = (at - TRAY)[:2]
    if not held[1]:
        take = fetch(right, ends[1], yaw) if held[0] and meeting else towards(right, waiting, 0.0, 0.0)
        if at[1] < TRAY[1] + 0.15 and at[2] < 0.08:  # it lies in the tray
            take = towards(right, right.hand()[:3, 3] + [0, 0, 0.1], 0.0, 0.0)
    elif not away or left.state().grip > 0.3:
        take = towards(right, right.hand()[:3, 3], yaw, 1.0)
    elif np.linalg.norm(aside) < 0.03:
        take = towards(right, np.array([*(TRAY - REACH * along)[:2], 0.035]), 0.0, 0.0 if at[2] < 0.055 else 1.0)
    else:
        take = towards(right, np.array([*(TRAY - REACH * along)[:2], 0.26]), 0.0, 1.0)
    return np.concatenate([bring, take])


def home_of(arm: TwinArm) -> np.ndarray:
    return towards(arm, np.array([0.4, 0.27, 0.4]), 0.0, 0.0)


EXPERTS: dict[str, Callable[[Table], np.ndarray]] = {"lift": lift, "can": can, "transport": transport}


def episode(env: Table, seed: int, shake: float = SHAKE) -> tuple[list[Arrays], bool]:
    """One episode of the expert: rows of observations and actions, and whether it succeeded.

    Its hands are pushed off their way by up to `shake` metres (standard deviation per step and axis; the level is drawn per
    episode), less where they go slowly; the action that is kept is what the expert meant. Orientations are blurred: hands point
    down all the time, and from the milliradians by which a moving one does not, stretched to the network's range, a policy would
    learn to tell how far the task has come.
    """
    obs, _ = env.reset(seed=seed)
    rng = np.random.default_rng(seed)
    level, rows, success, late = rng.uniform(0, shake), [], False, False
    while not (success or late):
        action = EXPERTS[env.task](env)
        rows.append({**blurred(obs, rng), "actions": action.astype(np.float32)})
        pushed = action.reshape(-1, 10).copy()
        pace = np.stack([np.linalg.norm(mine[:3] - arm.hand()[:3, 3]) for mine, arm in zip(pushed, env.acting, strict=True)])
        pushed[:, :3] += level * (0.2 + 0.8 * pace[:, None] / SPEED) * rng.normal(size=(len(pushed), 3))
        obs, _, success, late, _ = env.step(pushed.ravel())
    return rows, success


def blurred(obs: Arrays, rng: np.random.Generator) -> Arrays:
    """The observation with BLUR on the orientations of hands and object."""
    obs = {key: value.copy() for key, value in obs.items()}
    turns = [
        value if key.endswith("_rot") else value[3:9] for key, value in obs.items() if key == "object" or key.endswith("_rot")
    ]
    for turn in turns:
        turn += BLUR * rng.normal(size=6).astype(np.float32)
    return obs


def record(path: Path, task: str, view: str, episodes: int = 100) -> None:
    """`episodes` successes to path; manipulation.record_successes says how."""
    env = Table(task, view)
    record_successes(path, partial(episode, env), episodes)
    env.close()


class EpisodeFile:
    """Recorded episodes in robomimic's layout, data/demo_<k>/{actions, times, captured, obs/<key>}, a file each.

    `path` itself holds links to <stem>.episodes/<k>.hdf5, and each file appears only when whole: whatever kills the program, the
    episodes that were finished before can be read.
    """

    def __init__(self, path: Path):
        """Goes on behind the episodes that are there. Raises ValueError where path is something else."""
        import h5py

        self.h5py, self.path, self.folder = h5py, path, path.with_name(f"{path.stem}.episodes")
        if path.suffix not in (".hdf5", ".h5"):
            raise ValueError(f"{path} must end in .hdf5")
        if path.exists() and not self.folder.is_dir():
            raise ValueError(f"{path} exists and is no recording of this program; choose another name")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.count = len(list(self.folder.glob("[0-9]*.hdf5")))

    def add(self, rows: list[Arrays]) -> None:
        """rows: one dict per step: "actions", the observation's keys, "times" when it was complete, "captured" of its oldest part
        (monotonic, s)."""
        part = self.folder / f"{self.count}.hdf5"
        columns = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        with self.h5py.File(part.with_suffix(".tmp"), "w") as file:
            for key, column in columns.items():
                file[f"demo/{key}" if key in ("actions", "times", "captured") else f"demo/obs/{key}"] = column
            file["demo"].attrs["num_samples"] = len(rows)
        settle(part)
        self.count += 1
        with self.h5py.File(self.path.with_suffix(".tmp"), "w") as file:
            data = file.create_group("data")
            for k in range(self.count):
                data[f"demo_{k}"] = self.h5py.ExternalLink(f"{self.folder.name}/{k}.hdf5", "/demo")
        settle(self.path)


def settle(path: Path) -> None:
    """Give <name>.tmp its name when it is on the disk."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
