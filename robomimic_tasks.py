"""RoboMimic's five tasks on robosuite, and their demonstrations.

Lift, Can, Square and Tool-Hang have one Panda arm, Transport two. Observations carry robomimic's names, so its files are read as
they are; pictures are upright, as robomimic stores them.

    observation key            shape         meaning
    robot0_eef_pos             (3,)          hand, metres, world frame (Transport has robot1_* too)
    robot0_eef_quat            (4,)          its orientation, x y z w; the network sees robot0_eef_rot_6d (6,), see as_seen
    robot0_gripper_qpos        (2,)          fingers, metres
    object                     (features,)   the objects' poses, world frame and from the hand; not with pictures
    <camera>_image             (H, W, 3)     RGB, uint8; only with pictures

    action, per arm            shape         meaning
    delta (robomimic's)        (7,)          displacement / 0.05 m, rotation vector / 0.5 rad, world frame; gripper -1 open 1 shut
    absolute (-abs)            (10,)         position in metres, rotation as 6-D (two columns of the matrix), gripper. The file's
                                             rotation vectors jump at pi, where these hands are; the 6-D form does not

robosuite is imported when it is first used; ImportError says what to install.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import warnings

import gymnasium
import numpy as np

from manipulation import Arrays, Eye, draw_without_display, observation_space, plain_demos
from rotations import from_quaternion, from_six, matrix, six, vector

VERSION = "1.5.1"  # of robosuite; 1.4 has other controllers, 1.5.2 wants another mujoco
STEP, TURN = 0.05, 0.5  # a delta action of 1: metres, rad


@dataclasses.dataclass(frozen=True)
class Scene:
    """One task: robosuite's name and robomimic's settings for it."""

    env: str
    features: int  # of `object`
    max_steps: int
    cameras: tuple[str, ...]
    quaternions: tuple[int, ...]  # where they begin in `object`
    arms: int = 1
    pixels: int = 84


SCENES = {
    "lift": Scene("Lift", 10, 400, ("agentview", "robot0_eye_in_hand"), (3,)),
    "can": Scene("PickPlaceCan", 14, 400, ("agentview", "robot0_eye_in_hand"), (3, 10)),
    "square": Scene("NutAssemblySquare", 14, 400, ("agentview", "robot0_eye_in_hand"), (3, 10)),
    "transport": Scene(
        "TwoArmTransport",
        41,
        700,
        ("shouldercamera0", "shouldercamera1", "robot0_eye_in_hand", "robot1_eye_in_hand"),
        (3, 10, 17),
        arms=2,
    ),
    "tool-hang": Scene("ToolHang", 44, 700, ("sideview", "robot0_eye_in_hand"), (3, 10, 17, 24, 31, 38), pixels=240),
}


def file_shapes(task: str, view: str) -> dict[str, tuple[int, ...]]:
    """Of an observation in robomimic's files and in our recordings."""
    scene = SCENES[task]
    found = {
        f"robot{i}_{name}": (n,) for i in range(scene.arms) for name, n in (("eef_pos", 3), ("eef_quat", 4), ("gripper_qpos", 2))
    }
    if view == "image":
        return found | {f"{camera}_image": (scene.pixels, scene.pixels, 3) for camera in scene.cameras}
    return found | {"object": (scene.features,)}


def shapes(task: str, view: str) -> dict[str, tuple[int, ...]]:
    """Of an observation as the network sees it."""
    empty = {key: np.zeros((1, *shape), np.float32) for key, shape in file_shapes(task, view).items()}
    return {key: value.shape[1:] for key, value in as_seen(empty, task).items()}


def as_seen(obs: Arrays, task: str) -> Arrays:
    """robomimic's observations (N, ...) -> the same with rotations as 6-D: `<robot>_eef_rot_6d`, and a longer `object`.

    A quaternion and its negative are one rotation, and robosuite jumps from one to the other: the square nut's in 7 % of steps.
    """
    seen = {}
    for key, value in obs.items():
        if key.endswith("_eef_quat"):
            seen[key.replace("quat", "rot_6d")] = six(from_quaternion(value)).astype(np.float32)
        elif key == "object":
            parts = np.split(value, [i for at in SCENES[task].quaternions for i in (at, at + 4)], axis=-1)
            parts[1::2] = [six(from_quaternion(part)) for part in parts[1::2]]
            seen[key] = np.concatenate(parts, -1).astype(np.float32)
        else:
            seen[key] = value
    return seen


# --- rotations in actions -------------------------------------------------------------------------------------------------


def to_network(actions: np.ndarray, arms: int) -> np.ndarray:
    """Absolute actions of a file (N, 7 arms), rotation vectors -> (N, 10 arms), 6-D."""
    a = actions.reshape(len(actions), arms, 7)
    return np.concatenate([a[..., :3], six(matrix(a[..., 3:6])), a[..., 6:]], -1).reshape(len(actions), -1)


def to_controller(action: np.ndarray, arms: int) -> np.ndarray:
    """One absolute action (10 arms,) -> what robosuite's controllers take, (7 arms,)."""
    return np.concatenate([np.concatenate([a[:3], vector(from_six(a[3:9])), a[9:]]) for a in action.reshape(arms, 10)])


# --- the environment --------------------------------------------------------------------------------------------------------


def import_robosuite():
    draw_without_display()
    logging.disable(logging.WARNING)  # of a macro file and of robots that are not there
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import robosuite
    except ImportError as error:
        raise ImportError(f"RoboMimic's tasks need robosuite: pip install robosuite=={VERSION} ({error})") from error
    finally:
        logging.disable(logging.NOTSET)
    if robosuite.__version__.rsplit(".", 1)[0] != VERSION.rsplit(".", 1)[0]:
        raise ImportError(
            f"robosuite {robosuite.__version__} has other controllers and other scenes than RoboMimic's tasks here; "
            f"pip install robosuite=={VERSION}"
        )
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)  # a warning per part of a humanoid that a Panda has not
    return robosuite


class Robosuite(gymnasium.Env):
    """One task of RoboMimic. Reward and score: 1 at success, which ends an episode; 20 steps per second.

    An episode is a function of its seed: starts are robosuite's own distributions.
    """

    render_mode = "rgb_array"
    observing = True  # see vector.Chunked

    def __init__(self, task: str, absolute: bool, view: str):
        """task: a key of SCENES; absolute: actions are poses; view: "state" or "image"."""
        robosuite = import_robosuite()
        self.task, self.scene, self.absolute, self.view = task, SCENES[task], absolute, view
        self.MAX_STEPS = self.scene.max_steps
        config = robosuite.controllers.load_composite_controller_config(controller="BASIC", robot="Panda")
        frame = {"input_ref_frame": "world", "input_type": "absolute" if absolute else "delta"}
        config["body_parts"] = {"right": {**config["body_parts"]["right"], **frame}}
        with seeded(0):  # some scenes draw the size of their objects
            self.sim_env = robosuite.make(
                self.scene.env,
                robots=["Panda"] * self.scene.arms,
                controller_configs=config,
                has_renderer=False,
                has_offscreen_renderer=False,
                use_camera_obs=False,
                use_object_obs=True,
                control_freq=20,
                ignore_done=True,  # the time limit is ours
                hard_reset=False,  # the model stays, episodes differ in positions only
            )
        self.eyes: dict[str, Eye] = {}
        self.action_space = gymnasium.spaces.Box(-np.inf, np.inf, ((10 if absolute else 7) * self.scene.arms,), np.float32)
        self.observation_space = observation_space(shapes(task, view))

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        with seeded(seed) if seed is not None else contextlib.nullcontext():  # robosuite draws from numpy's global generator
            self.sim_env.reset()
        self.arms = [PandaArm(robot) for robot in self.sim_env.robots]  # a reset makes new controllers
        self.steps = 0
        self._look()
        return self._observe(), {}

    def step(self, action):
        action = np.asarray(action, np.float64)
        if not np.isfinite(action).all():
            raise ValueError("the action holds NaN or infinity")
        action = to_controller(action, self.scene.arms) if self.absolute else action.clip(-1, 1)
        self._simulate(action)
        self.steps += 1
        success = bool(self.sim_env._check_success())
        late = not success and self.steps >= self.MAX_STEPS
        seen = self.observing or success or late
        if seen:
            self._look()
        obs = self._observe() if seen else None
        return obs, float(success), success, late, {"score": float(success), "success": success}

    def _simulate(self, action: np.ndarray) -> None:
        """What robosuite's step does, without what nobody reads: 40 observables looked at 25 times, and names looked up."""
        import mujoco

        sim, env = self.sim_env.sim, self.sim_env
        model, data = sim.model._model, sim.data._data
        for i in range(int(env.control_timestep / env.model_timestep)):
            mujoco.mj_step1(model, data)
            if i == 0:
                for arm, mine in zip(self.arms, np.split(action, len(self.arms)), strict=True):
                    arm.aim(mine, data)
            for arm in self.arms:
                arm.drive(model, data)
            mujoco.mj_step2(model, data)
        env.update_state()

    def _look(self) -> None:
        """The simulator's numbers. Twice: those from the hand are computed from others of the same round."""
        self.sim_env._update_observables(force=True)
        self.raw = self.sim_env._get_observations(force_update=True)

    def _observe(self) -> Arrays:
        obs = {}
        for key, shape in file_shapes(self.task, self.view).items():
            if len(shape) == 3:
                obs[key] = self._eye(key.removesuffix("_image"), self.scene.pixels).picture(self.sim_env.sim.data._data)
            else:
                obs[key] = np.asarray(self.raw["object-state" if key == "object" else key], np.float32)
        self.as_in_file = obs
        return as_seen(obs, self.task)

    def _eye(self, camera: str, pixels: int) -> Eye:
        if (camera, pixels) not in self.eyes:
            self.eyes[camera, pixels] = Eye(self.sim_env.sim.model._model, camera, pixels, pixels, hidden_group=0)
        return self.eyes[camera, pixels]

    def command(self, moves: list[tuple[np.ndarray, np.ndarray, float]]) -> np.ndarray:
        """Per arm (displacement, metres; rotation vector, rad; gripper -1 .. 1) -> an action of this environment."""
        actions = []
        for i, (move, turn, grip) in enumerate(moves):
            move, turn = clip_norm(move, STEP), clip_norm(turn, TURN)
            if self.absolute:
                at, R = self.hand(i)
                actions.append(np.concatenate([at + move, six(matrix(turn) @ R), [grip]]))
            else:
                actions.append(np.concatenate([move / STEP, turn / TURN, [grip]]))
        return np.concatenate(actions).astype(np.float32)

    def hand(self, arm: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Position (3,) and orientation (3, 3) of what the controller moves."""
        sim, robot = self.sim_env.sim, self.sim_env.robots[arm]
        site = robot.eef_site_id["right"]
        return sim.data.site_xpos[site].copy(), sim.data.site_xmat[site].reshape(3, 3).copy()

    def body(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Position (3,) and orientation (3, 3) of a body of the scene."""
        data = self.sim_env.sim.data
        return data.get_body_xpos(name).copy(), data.get_body_xmat(name).reshape(3, 3).copy()

    def render(self) -> np.ndarray:
        return self._eye(self.scene.cameras[0], 256).picture(self.sim_env.sim.data._data)

    def close(self) -> None:
        for eye in self.eyes.values():
            eye.close()
        self.sim_env.close()


@functools.cache
def compiled_torques():
    """robosuite's operational space control of one arm as one compiled function, which calls robosuite's own for its formulas."""
    from robosuite.utils.control_utils import nullspace_torques, opspace_matrices, orientation_error
    from robosuite.utils.numba import jit_decorator

    @jit_decorator
    def torques(J, M, bias, qpos, qvel, at, R, goal_at, goal_R, kp, kd, rest):
        velocity = np.dot(J, qvel)
        force = (goal_at - at) * kp[:3] - velocity[:3] * kd[:3]
        torque = orientation_error(goal_R, R) * kp[3:] - velocity[3:] * kd[3:]
        _, lambda_pos, lambda_ori, nullspace = opspace_matrices(M, J, J[:3], J[3:])
        wrench = np.concatenate((np.dot(lambda_pos, force), np.dot(lambda_ori, torque)))
        return np.dot(J.T, wrench) + bias + nullspace_torques(M, nullspace, rest, qpos, qvel)

    return torques


class PandaArm:
    """robosuite's operational space controller of one arm, with its own formulas and goals; tests/test_robomimic.py compares.

    Its own loop spends most of its time on looking up names, in copies and in numbers that only a moving base needs.
    """

    def __init__(self, robot):
        self.controllers, self.ids = robot.composite_controller, robot._ref_actuators_indexes_dict
        self.arm, self.gripper = robot.part_controllers["right"], robot.part_controllers["right_gripper"]
        self.site, self.torques = robot.eef_site_id["right"], compiled_torques()
        nv = robot.sim.model.nv
        self.J, self.M = np.zeros((6, nv)), np.zeros((nv, nv))
        self.dofs, self.joints = (slice(ids[0], ids[-1] + 1) for ids in (self.arm.qvel_index, self.arm.qpos_index))  # 7 each
        self.motors = slice(self.ids["right"][0], self.ids["right"][-1] + 1)
        self.low, self.high = robot.sim.model.actuator_ctrlrange[self.ids["right"]].T

    def aim(self, action: np.ndarray, data) -> None:
        """A new goal for arm and gripper, action (7,) in robosuite's form."""
        self.arm.new_update = True  # its numbers are old
        self.controllers.update_state()
        self.controllers.set_goal(action)
        data.ctrl[self.ids["right_gripper"]] = self.gripper.run_controller()
        arm = self.arm
        self.goal = [np.asarray(x, np.float64) for x in (arm.goal_pos, arm.goal_ori, arm.kp, arm.kd, arm.initial_joint)]

    def drive(self, model, data) -> None:
        """The torques of this moment."""
        import mujoco

        dofs = self.dofs
        mujoco.mj_jacSite(model, data, self.J[:3], self.J[3:], self.site)
        mujoco.mj_fullM(model, self.M, data.qM)
        J, M = np.ascontiguousarray(self.J[:, dofs]), np.ascontiguousarray(self.M[dofs, dofs])
        moment = data.qfrc_bias[dofs], data.qpos[self.joints], data.qvel[dofs]
        pose = data.site_xpos[self.site], data.site_xmat[self.site].reshape(3, 3)
        ctrl = self.torques(J, M, *moment, *pose, *self.goal)
        data.ctrl[self.motors] = np.minimum(np.maximum(ctrl, self.low), self.high)


@contextlib.contextmanager
def seeded(seed: int):
    """numpy's global generator, seeded inside and as it was outside."""
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)


def clip_norm(x: np.ndarray, limit: float) -> np.ndarray:
    return x * min(1.0, limit / max(np.linalg.norm(x), 1e-9))


# --- demonstrations ---------------------------------------------------------------------------------------------------------


# Transport's `object`: poses of what is moved, positions of what stands, whether it is done, and things from the hands.
PAYLOAD, TRASH, LID = slice(0, 7), slice(7, 14), slice(14, 21)
TARGET_BOX, TRASH_BOX, TRASH_DONE = slice(21, 24), slice(24, 27), slice(28, 29)
GAPS = ((0, PAYLOAD, slice(29, 32)), (0, LID, slice(32, 35)), (1, PAYLOAD, slice(35, 38)), (1, TRASH, slice(38, 41)))
MEETING = 0.3  # metres between its two hands, from where on each one's moves depend on the other


def robomimic_demos(arrays: Arrays, task: str, absolute: bool, view: str) -> tuple[Arrays, np.ndarray]:
    """Arrays of robomimic's files, or of our own recordings, which hold absolute actions in the network's form already.

    Raises: ValueError for another task's file, missing keys, and actions of the other kind than the task's (the file says which).
    """
    scene = SCENES[task]
    if "env_args" in arrays:
        try:
            env_args = json.loads(str(arrays["env_args"]))
        except json.JSONDecodeError as error:
            raise ValueError(f"its attribute env_args is not JSON: {error}") from error
        check_file(env_args, task, absolute)
    if absolute and arrays.get("actions", np.zeros((0, 0))).shape[1:] == (7 * scene.arms,):
        arrays = {**arrays, "actions": to_network(np.asarray(arrays["actions"], np.float64), scene.arms)}
    obs, actions = plain_demos(arrays, file_shapes(task, view), (10 if absolute else 7) * scene.arms)
    return as_seen(obs, task), actions


def recombine(arrays: Arrays, ends: np.ndarray, times: int) -> tuple[Arrays, np.ndarray]:
    """Transport's demonstrations, low-dimensional, and `times` as many again that are put together from two or three of them.

    Until the hands meet, an arm follows its own things alone: the arms of two demonstrations side by side are one that somebody
    could have given. After that the lid and the rubbish lie somewhere, and could lie where another demonstration has left them.
    From the given ones alone a policy learns to mind what does not matter: one arm stood still where the other one's things were
    as they had never been. Pairs are drawn with a fixed seed.

    Args: arrays: named as in robomimic's files, quaternions and all; ends: of the episodes. Returns: both for all episodes, the
    given ones first; arrays that are no observation or action are left out.
    """
    given = {key: np.asarray(arrays[key]) for key in (*file_shapes("transport", "state"), "actions")}
    starts, rng = np.concatenate([[0], ends[:-1]]), np.random.default_rng(0)
    apart = np.linalg.norm(given["robot0_eef_pos"] - given["robot1_eef_pos"], axis=-1) > MEETING
    meet = np.array([b if apart[a:b].all() else a + apart[a:b].argmin() for a, b in zip(starts, ends, strict=True)])

    def lies(thing: slice, episode: int) -> bool:
        places = given["object"][meet[episode] : ends[episode], thing][:, :3]
        return len(places) > 0 and np.ptp(places, axis=0).max() < 0.01  # metres

    made = []
    for _ in range(times):
        for first, second in enumerate(rng.permutation(len(ends))):  # until they meet
            n = min(meet[first] - starts[first], meet[second] - starts[second])
            episode = {key: value[starts[first] : starts[first] + n].copy() for key, value in given.items()}
            other = {key: value[starts[second] : starts[second] + n] for key, value in given.items()}
            episode |= {key: value for key, value in other.items() if key.startswith("robot1")}
            half = episode["actions"].shape[1] // 2
            episode["actions"][:, half:] = other["actions"][:, half:]
            for part in (TRASH, TARGET_BOX, TRASH_BOX, TRASH_DONE):
                episode["object"][:, part] = other["object"][:, part]
            made.append(episode)
        for host, *others in zip(range(len(ends)), rng.permutation(len(ends)), rng.permutation(len(ends)), strict=True):
            episode = {key: value[meet[host] : ends[host]].copy() for key, value in given.items()}  # from then on
            for parts, other in zip(((LID,), (TRASH, TRASH_BOX)), others, strict=True):
                if lies(parts[0], host) and lies(parts[0], other):
                    for part in parts:
                        episode["object"][:, part] = given["object"][ends[other] - 1, part]
            if len(episode["object"]):
                made.append(episode)
    for episode in made:
        for hand, thing, gap in GAPS:
            episode["object"][:, gap] = episode["object"][:, thing][:, :3] - episode[f"robot{hand}_eef_pos"]
    whole = {key: np.concatenate([value, *(episode[key] for episode in made)]) for key, value in given.items()}
    return whole, np.concatenate([ends, ends[-1] + np.cumsum([len(episode["actions"]) for episode in made])])


def check_file(env_args: object, task: str, absolute: bool) -> None:
    """env_args: what robomimic writes of the environment that a file was recorded in, or whatever else is in its place."""

    def entry(values: object, name: str) -> object:
        return (values.get(name) if isinstance(values, dict) else None) or {}

    name = entry(env_args, "env_name") or SCENES[task].env
    if name != SCENES[task].env:
        raise ValueError(f"it was recorded in {name}, and this task is {SCENES[task].env}")
    controller = entry(entry(env_args, "env_kwargs"), "controller_configs")
    arm = entry(entry(controller, "body_parts"), "right") or controller  # robosuite 1.5, or before
    arm = arm if isinstance(arm, dict) else {}
    if "control_delta" in arm or "input_type" in arm:
        found = not arm["control_delta"] if "control_delta" in arm else arm["input_type"] == "absolute"
        if found != absolute:
            kinds = {True: "absolute poses", False: "displacements"}
            row = f"{task}-abs" if found else task
            raise ValueError(f"its actions are {kinds[found]}, the task takes {kinds[absolute]}; train --env {row} on it")
    if arm.get("input_ref_frame", "world") != "world" and (absolute or SCENES[task].arms > 1):
        raise ValueError("its actions are relative to the robots' bases; robomimic's published files use the world's frame")
