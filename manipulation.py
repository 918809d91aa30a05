"""Manipulation tasks as gymnasium environments: Meta-World, Adroit; and what all simulators share: cameras, recordings.

Each is a class that builds one gymnasium.Env, and what turns its demonstrations into observations and actions;
envs.py has the table of tasks, vector.py steps these environments by chunks. Info holds `score` and `success`. The simulators
are in requirements-simulators.txt, imported when they are first used; ImportError says what to install.

    observation key     shape              meaning
    state               (features,)        all that there is to know, positions in the simulator's units
    robot               (features,)        the robot's own sensors: what goes with a camera or a cloud
    image               (H, W, 3)          RGB, uint8
    points              (points, 3)        xyz in the robot's frame, metres, of the workspace; Meta-World: without the robot
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import gymnasium
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pointcloud import crop, depth_to_points, farthest_points, intrinsics

Arrays = dict[str, np.ndarray]


def observation_space(shapes: dict[str, tuple[int, ...]]) -> gymnasium.spaces.Dict:
    """Pictures are uint8, everything else float32 without bounds."""
    box = gymnasium.spaces.Box
    return gymnasium.spaces.Dict(
        {
            key: box(0, 255, shape, np.uint8) if len(shape) == 3 else box(-np.inf, np.inf, shape, np.float32)
            for key, shape in shapes.items()
        }
    )


def save_episodes(path: Path, ends: Sequence[int], arrays: Arrays) -> None:
    """Recorded episodes, an .npz as demos.read_npz reads it; the file appears only when whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.npz")  # processes of one training do not meet
    np.savez_compressed(temporary, episode_ends=ends, **arrays)
    temporary.replace(path)


def record_successes(path: Path, run: Callable[[int], tuple[list[Arrays], bool]], episodes: int) -> None:
    """Write `episodes` successes of an expert to path, an .npz, and how many attempts they took. Starts: seeds from 4,000,000 on.

    run: seed -> rows (observations and "actions") and whether it succeeded. ValueError where the expert fails too often.
    """
    rows, ends, seed = [], [], 4_000_000
    with tqdm(total=episodes, desc="recording", unit="episode") as bar:  # ten minutes for Transport
        while len(ends) < episodes:
            if seed == 4_000_000 + 3 * episodes + 10:
                few = f"the expert succeeded in {len(ends)} of {3 * episodes + 10} episodes only; {episodes} are needed"
                raise ValueError(few)
            mine, success = run(seed)
            seed += 1
            if success:
                rows += mine
                ends.append(len(rows))
                bar.update()
    arrays = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    save_episodes(path, ends, {**arrays, "attempts": np.array(seed - 4_000_000)})


# --- drawing ------------------------------------------------------------------------------------------------------------


def draw_without_display() -> None:
    """To be called before mujoco is imported for the first time, by whatever: it chooses its library for drawing then."""
    if not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")


def aim(camera, at: tuple[float, float, float], place: tuple[float, float, float], fovy: float) -> None:
    """Turn a camera of a MuJoCo model, upright: place and at in metres, vertical field of view in degrees."""
    import mujoco

    backward = np.subtract(place, at) / np.linalg.norm(np.subtract(place, at))  # MuJoCo's cameras look along -z with y up
    right = np.cross([0, 0, 1], backward) / np.linalg.norm(np.cross([0, 0, 1], backward))
    axes = np.stack([right, np.cross(backward, right), backward], -1)
    mujoco.mju_mat2Quat(camera.quat, axes.flatten())
    camera.pos[:], camera.fovy[:] = place, fovy


class Eye:
    """One camera of a MuJoCo model: pictures and point clouds. OSError where nothing can be drawn; close it."""

    def __init__(self, model, camera: str, width: int, height: int, hidden_group: int | None = None):
        """hidden_group: of shapes that shall not be drawn, where a model keeps those for collisions apart."""
        import mujoco

        model.vis.quality.shadowsize, model.vis.quality.offsamples = 0, 0  # without a graphics card nearly the whole cost
        model.vis.global_.offwidth, model.vis.global_.offheight = width, height
        try:
            self.renderer = mujoco.Renderer(model, height, width)
        except Exception as error:  # OpenGL fails in many ways
            raise OSError(
                f"MuJoCo cannot draw here ({type(error).__name__}). Without a display: apt-get install libegl1 libgl1-mesa-dri "
                "libopengl0, and set MUJOCO_GL=egl"
            ) from error
        self.name, self.close, self.option = camera, self.renderer.close, mujoco.MjvOption()
        if hidden_group is not None:
            self.option.geomgroup[hidden_group] = 0
        self.camera = intrinsics(model.camera(camera).fovy[0], width, height)

    def picture(self, data) -> np.ndarray:
        """(H, W, 3) uint8"""
        self.renderer.disable_depth_rendering()
        self.renderer.update_scene(data, self.name, self.option)
        return self.renderer.render().copy()

    def points(
        self, data, low: np.ndarray, high: np.ndarray, count: int, surface: float = -np.inf, own: np.ndarray | None = None
    ) -> np.ndarray:
        """(count, 3) float32, metres in the world's frame, of what lies in the box; surface: see `crop`.

        own: (shapes of the model,) bool, the robot's own ones, to be left out; what is behind them stays hidden. Where they hide
        all there is, as a hand above a small puck does, the cloud is theirs. Raises ValueError where nothing lies in the box.
        """
        self.renderer.enable_depth_rendering()
        self.renderer.update_scene(data, self.name, self.option)
        pose = np.eye(4)  # camera -> world
        pose[:3, :3], pose[:3, 3] = data.camera(self.name).xmat.reshape(3, 3) * [1, -1, -1], data.camera(self.name).xpos
        points = depth_to_points(self.renderer.render(), self.camera, pose)
        inside = crop(points, low, high, surface)
        if own is not None:
            shapes = self._shapes()[inside]
            others = inside[(shapes < 0) | ~own[shapes]]
            inside = others if len(others) else inside
        points = points[inside]
        return points[farthest_points(points, count)].astype(np.float32)

    def _shapes(self) -> np.ndarray:
        """(H*W,) which shape of the model each pixel of the depth just drawn shows, -1: none.

        A Renderer draws depth with every shape in a colour of its own, and the colours are still there: no second drawing.
        """
        import mujoco

        r, geom = self.renderer, int(mujoco.mjtObj.mjOBJ_GEOM)
        colours = np.empty((r.height, r.width, 3), np.uint8)
        mujoco.mjr_readPixels(colours, None, r._rect, r._mjr_context)  # rows from below; red is the number's lowest byte
        shapes = np.full(r.scene.ngeom + 1, -1)  # of each number; 0 is the background
        for drawn in r.scene.geoms[: r.scene.ngeom]:
            if drawn.segid >= 0 and drawn.objtype == geom:
                shapes[drawn.segid + 1] = drawn.objid
        return shapes[np.flipud(colours).reshape(-1, 3) @ np.array([1, 256, 65536])]


class Seen(gymnasium.Env):
    """What the simulators below share: `view` and `camera` choose what the policy sees of `sim`, a MuJoCo environment."""

    MAX_STEPS, SIZE, POINTS = 200, 128, 512
    render_mode = "rgb_array"
    observing = True  # see vector.Chunked
    eye: Eye | None = None  # made when something is drawn first
    own: np.ndarray | None = None  # the robot's shapes, where clouds come without them: see Eye.points

    def _eye(self) -> Eye:
        self.eye = self.eye or Eye(self.sim.model, self.camera, self.SIZE, self.SIZE)
        return self.eye

    def _seen(self, robot: np.ndarray, low: np.ndarray, high: np.ndarray, surface: float = -np.inf) -> Arrays:
        """robot: its own sensors; low, high: corners of the workspace, metres; surface: see `crop`."""
        if self.view == "image":
            return {"robot": robot, "image": self._eye().picture(self.sim.data)}
        return {"robot": robot, "points": self._eye().points(self.sim.data, low, high, self.POINTS, surface, self.own)}

    def render(self) -> np.ndarray:
        return self._eye().picture(self.sim.data)

    def close(self) -> None:
        if self.eye:
            self.eye.close()
        self.sim.close()


# --- Meta-World ---------------------------------------------------------------------------------------------------------


# The 50 tasks by DP3's grouping (after Seo et al. 2023).
METAWORLD = {
    group: names.split()
    for group, names in {
        "easy": """
            button-press button-press-topdown button-press-topdown-wall button-press-wall coffee-button dial-turn door-close
            door-lock door-open door-unlock drawer-close drawer-open faucet-close faucet-open handle-press handle-press-side
            handle-pull handle-pull-side lever-pull plate-slide plate-slide-back plate-slide-back-side plate-slide-side reach
            reach-wall window-close window-open peg-unplug-side""",
        "medium": """
            basketball bin-picking box-close coffee-pull coffee-push hammer peg-insert-side push-wall soccer sweep sweep-into""",
        "hard": "assembly hand-insert pick-out-of-hole pick-place push push-back",
        "very hard": "shelf-place disassemble stick-pull stick-push pick-place-wall",
    }.items()
}

STEP = 0.01  # metres, how far an action of 1 moves the hand

# Metres: tables with a hole are higher, and the box begins above the hole's floor.
SURFACE, HOLES = 0.05, {"hand-insert": -0.045, "pick-out-of-hole": 0.01, "sweep-into": -0.045}


class MetaWorld(Seen):
    """One task of Meta-World v3: a Sawyer arm, actions are the hand's displacement (3) and the gripper's force (1), in [-1, 1].

    The goal is random and visible: as numbers in `state`, as the drawn marker in pictures and clouds. The camera stands where
    DP3's does and is turned to the middle of the workspace: DP3's does not see the goals of stick-pull, stick-push and sweep.
    DEPARTS clouds come without the arm, DP3's with it: three quarters of their points were its own, and `robot` says where it is.
    Score and reward: 1 at success, which ends an episode; time limit 200 steps, as in DP3. An episode is a function of its seed.
    """

    LOW, HIGH = np.array([-0.6, 0.3, 0.003]), np.array([0.6, 0.95, 0.7])  # above the table, within its rim, metres
    camera = "corner2"

    def __init__(self, task: str, view: str):
        """task: name without "-v3"; view: "state", "image" or "points"."""
        sims, self.expert = metaworld_tasks()
        self.expert = self.expert[f"{task}-v3"]
        self.sim, self.view = sims[f"{task}-v3"](), view
        self.low, self.surface = self.LOW, -np.inf
        if task in HOLES:
            self.low, self.surface = np.array([*self.LOW[:2], HOLES[task]]), SURFACE
        self.sim._freeze_rand_vec, self.sim.seeded_rand_vec, self.sim._set_task_called = False, True, True
        self.sim._partially_observable = False  # the goal is part of the observation
        self.sim.__dict__.pop("sawyer_observation_space", None)  # cached with the goal left out
        model = self.sim.model
        self.own = (model.body_rootid == model.body("hand").rootid)[model.geom_bodyid]
        aim(model.camera("corner2"), at=(0.1, 0.65, 0.1), place=(0.6, 0.295, 0.8), fovy=50.0)
        self.action_space = gymnasium.spaces.Box(-1, 1, (4,), np.float32)
        self.observation_space = observation_space(metaworld_shapes(view))

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        if seed is not None:
            self.sim.seed(seed)
        self.full, _ = self.sim.reset()
        self.steps = 0
        return self._observe(), {}

    def step(self, action):
        self.full, _, _, _, info = self.sim.step(np.asarray(action, np.float64).clip(-1, 1))
        self.steps += 1
        success = bool(info["success"])
        info = {"score": float(success), "success": success}
        late = not success and self.steps >= self.MAX_STEPS
        obs = self._observe() if self.observing or success or late else None
        return obs, float(success), success, late, info

    def _observe(self) -> Arrays:
        if self.view == "state":
            return {"state": np.concatenate([self.full[:18], self.full[36:]]).astype(np.float32)}
        bodies = [self.sim.data.body(name).xpos for name in ("hand", "rightclaw", "leftclaw")]
        robot = np.concatenate(bodies).astype(np.float32)
        for name, position in self.sim._target_site_config:  # the markers: a step puts them back to where the model has them
            self.sim.data.site(name).xpos[:] = self.sim._target_pos if name == "goal" else position
        return self._seen(robot, self.low, self.HIGH, self.surface)


def metaworld_tasks() -> tuple[dict, dict]:
    """{name: environment class}, {name: scripted expert class}, names with "-v3"."""
    draw_without_display()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from metaworld.env_dict import ALL_V3_ENVIRONMENTS
            from metaworld.policies import ENV_POLICY_MAP
    except ImportError as error:
        raise ImportError(f"Meta-World needs metaworld: pip install -r requirements-simulators.txt ({error})") from error
    return ALL_V3_ENVIRONMENTS, ENV_POLICY_MAP


def metaworld_shapes(view: str) -> dict[str, tuple[int, ...]]:
    size, points = MetaWorld.SIZE, MetaWorld.POINTS
    return {
        "state": {"state": (21,)},
        "image": {"robot": (9,), "image": (size, size, 3)},
        "points": {"robot": (9,), "points": (points, 3)},
    }[view]


def shift_scene(obs: dict[str, Tensor], offset: Tensor) -> dict[str, Tensor]:
    """The scene `offset` (B, 3) metres elsewhere: robot (B, To, 9), three positions, and points (B, To, points, 3)."""
    robot, offset = obs["robot"].unflatten(-1, (3, 3)), offset[:, None, None]
    return {**obs, "robot": (robot + offset).flatten(-2), "points": obs["points"] + offset}


def beside_its_way(obs: dict[str, Tensor], chunk: Tensor, offset: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The hand `offset` (B, 3) metres from where it was, nothing else moved, and the chunk (B, Tp, 4) that leads it back.

    Of the offset only what is across the chunk's mean direction is taken: along it the hand would be earlier or later on the same
    way, where the demonstration has another chunk, and grippers would close at the wrong time. A hand that waits has no such one.
    """
    way = chunk[..., :3].mean(1)  #                                                              (B, 3), 1: a full step
    along = (offset * way).sum(-1, keepdim=True) / (way.square().sum(-1, keepdim=True) + 0.05**2)
    offset = offset - along * way
    back = offset / (chunk.shape[1] * STEP)  # by equal parts within the chunk
    chunk = torch.cat([(chunk[..., :3] - back[:, None]).clamp(-1, 1), chunk[..., 3:]], -1)
    robot = obs["robot"].unflatten(-1, (3, 3)) + offset[:, None, None]
    return {**obs, "robot": robot.flatten(-2)}, chunk


def record_expert(
    path: Path,
    env: gymnasium.Env,
    act: Callable[[np.ndarray], np.ndarray],
    episodes: int = 10,
    after: int = 0,
    slowest: float = np.inf,
) -> None:
    """Write `episodes` successes of an expert to path, an .npz: the observations' keys, action, episode_ends.

    after: an episode goes on for so many steps after its success, and so shows how what was reached is held: a policy that passes
    beside the goal has seen nothing else that could bring it back. slowest: successes that took more than so many times as long
    as the fastest are left out: where the expert missed and tried again, a policy learns from ten demonstrations to miss too.
    act: full state of the simulator (env.full) -> action. Starts: seeds from 4,000,000 on. ValueError where it fails too often.
    """
    found: list[tuple[int, list[dict]]] = []  # steps until success, the episode
    for seed in range(4_000_000, 4_000_000 + 10 * episodes):
        obs, _ = env.reset(seed=seed)
        episode, reached, late = [], 0, False
        while len(episode) < reached + after if reached else not late:
            action = np.asarray(act(env.full)).clip(-1, 1).astype(np.float32)
            episode.append({**obs, "action": action})
            obs, _, success, late, _ = env.step(action)
            if success and not reached:
                reached = len(episode)
        found += [(reached, episode)] if reached else []
        fastest = min((steps for steps, _ in found), default=0)
        kept = [episode for steps, episode in found if steps <= slowest * fastest]
        if len(kept) == episodes:
            break
    else:
        raise ValueError(f"the expert succeeded at once in {len(kept)} of {10 * episodes} episodes only; {episodes} are needed")
    env.close()
    rows = [row for episode in kept for row in episode]
    save_episodes(
        path, np.cumsum([len(episode) for episode in kept]), {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    )


def record_metaworld(path: Path, task: str, view: str, episodes: int = 10) -> None:
    """Successes of Meta-World's own scripted expert."""
    env = MetaWorld(task, view)
    record_expert(path, env, env.expert().get_action, episodes, after=20, slowest=1.6)


def plain_demos(arrays: Arrays, shapes: dict[str, tuple[int, ...]], action_dim: int) -> tuple[Arrays, np.ndarray]:
    """Arrays that are named as the observations are, and `action`. Raises ValueError where one lacks or has another shape."""
    if "action" not in arrays and "actions" in arrays:  # robomimic's name
        arrays = {**arrays, "action": arrays["actions"]}
    for name, shape in {**shapes, "action": (action_dim,)}.items():
        found = arrays[name].shape[1:] if name in arrays else "nothing"
        if found != shape:
            raise ValueError(f"{name} must have shape (steps, {', '.join(map(str, shape))}); it has {found} per step")
        if len(shape) == 3 and arrays[name].dtype != np.uint8:
            raise ValueError(f"{name} holds {arrays[name].dtype}; images must be uint8, 0 to 255")
    return {name: arrays[name] for name in shapes}, arrays["action"]


# --- Adroit ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Hand:
    """One task of the Adroit hand, gymnasium-robotics' AdroitHand<Name>-v1."""

    features: int  # of the full observation
    robot: int  # ... the first so many are the hand's and arm's own joints
    actions: int
    camera: str
    hold: int  # steps with the goal reached that make a success, over the whole episode (DAPG's criterion)
    low: tuple[float, float, float]  # corners of the workspace, metres
    high: tuple[float, float, float]


ADROIT = {
    "hammer": Hand(46, 26, 26, "fixed", 25, (-0.4, -0.6, 0.04), (0.4, 0.4, 0.7)),
    "door": Hand(39, 27, 28, "vil_camera", 25, (-0.5, -0.6, 0.04), (0.5, 0.5, 0.8)),
    "pen": Hand(45, 24, 24, "fixed", 20, (-0.4, -0.4, 0.04), (0.4, 0.3, 0.5)),
    "relocate": Hand(39, 30, 30, "fixed", 25, (-0.5, -0.6, 0.04), (0.5, 0.5, 0.7)),
}


class Adroit(Seen):
    """One task of the Adroit hand. Actions: positions of the joints, normalised to [-1, 1] (gymnasium-robotics).

    Score and reward: 1 at success, which ends an episode: the goal reached in 25 steps (pen 20). Time limit 200 steps.
    """

    def __init__(self, task: str, view: str):
        """task: hammer, door, pen or relocate; view: "state", "image" or "points"."""
        draw_without_display()
        try:
            with warnings.catch_warnings():  # about versions
                warnings.simplefilter("ignore")
                import gymnasium_robotics

                gymnasium.register_envs(gymnasium_robotics)
                self.sim = gymnasium.make(f"AdroitHand{task.capitalize()}-v1").unwrapped
        except (ImportError, gymnasium.error.Error) as error:  # not there, or of another version
            raise ImportError(f"Adroit needs gymnasium-robotics: pip install -r requirements-simulators.txt ({error})") from error
        self.hand, self.view, self.camera = ADROIT[task], view, ADROIT[task].camera
        self.action_space = gymnasium.spaces.Box(-1, 1, (self.hand.actions,), np.float32)
        self.observation_space = observation_space(adroit_shapes(task, view))

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        self.full, _ = self.sim.reset(seed=seed)
        self.steps, self.held = 0, 0
        return self._observe(), {}

    def step(self, action):
        self.full, _, _, _, info = self.sim.step(np.asarray(action, np.float64).clip(-1, 1))
        self.steps, self.held = self.steps + 1, self.held + bool(info["success"])
        success = self.held >= self.hand.hold
        late = not success and self.steps >= self.MAX_STEPS
        obs = self._observe() if self.observing or success or late else None
        return obs, float(success), success, late, {"score": float(success), "success": success}

    def _observe(self) -> Arrays:
        if self.view == "state":
            return {"state": self.full.astype(np.float32)}
        return self._seen(self.full[: self.hand.robot].astype(np.float32), self.hand.low, self.hand.high)


def adroit_shapes(task: str, view: str) -> dict[str, tuple[int, ...]]:
    robot = {"robot": (ADROIT[task].robot,)}
    return {
        "state": {"state": (ADROIT[task].features,)},
        "image": {**robot, "image": (Adroit.SIZE, Adroit.SIZE, 3)},
        "points": {**robot, "points": (Adroit.POINTS, 3)},
    }[view]


ADROIT_REACHED: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # states (N, features) -> the goal is reached (N,)
    "door": lambda s: s[:, 28] >= 1.35,  # angle of the hinge, radians
    "pen": lambda s: (np.linalg.norm(s[:, 39:42], axis=1) < 0.075) & ((s[:, 33:36] * s[:, 36:39]).sum(1) > 0.95),
    "relocate": lambda s: np.linalg.norm(s[:, 36:39], axis=1) < 0.1,
}


def adroit_reached(obs: Arrays, task: str) -> np.ndarray:
    """Observations (N, ...) -> the goal is reached (N,) bool."""
    return ADROIT_REACHED[task](obs["state"])


def adroit_success(obs: Arrays, episode_ends: np.ndarray, task: str) -> np.ndarray:
    """Where an episode had succeeded before the step, (N,) bool: demonstrations go on after that. Hammer's states do not tell."""
    counts = [np.cumsum(part) for part in np.split(adroit_reached(obs, task), episode_ends[:-1])]
    return np.concatenate(counts) >= ADROIT[task].hold


def adroit_demos(arrays: Arrays, shapes: dict[str, tuple[int, ...]], action_dim: int) -> tuple[Arrays, np.ndarray]:
    """Recorded episodes as they are, or the observations and actions of Minari and of the human demonstrations."""
    if "observations" in arrays:
        arrays = {"state": arrays["observations"], "action": arrays["actions"]}
    return plain_demos(arrays, shapes, action_dim)


def record_adroit(path: Path, policy: Path, task: str, view: str) -> None:
    """Ten successes of an expert policy that is given as arrays."""
    record_expert(path, Adroit(task, view), expert_policy(policy, ADROIT[task].features, ADROIT[task].actions), after=50)


def expert_policy(path: Path, obs_dim: int, action_dim: int) -> Callable[[np.ndarray], np.ndarray]:
    """A policy given as arrays, the published DAPG policies' form: tanh layers w0, b0, w1, b1, ... of (o - in_shift) / in_scale,
    the last one linear, times out_scale plus out_shift."""
    with np.load(path, allow_pickle=False) as file:
        p = dict(file)
    layers = sum(name.startswith("w") for name in p)
    needed = [f"{kind}{k}" for k in range(layers) for kind in "wb"] + ["in_shift", "in_scale", "out_shift", "out_scale"]
    missing = [name for name in needed if name not in p]
    if missing:
        raise ValueError(f"{path}: the policy lacks {', '.join(missing)}")
    found = len(p["in_shift"]), len(p["out_shift"])
    if found != (obs_dim, action_dim):
        raise ValueError(
            f"{path}: the policy takes {found[0]} numbers and gives {found[1]}; the task has {obs_dim} and {action_dim}"
        )

    def act(obs: np.ndarray) -> np.ndarray:
        h = (obs - p["in_shift"]) / (p["in_scale"] + 1e-8)
        for k in range(layers):
            h = h @ p[f"w{k}"].T + p[f"b{k}"]
            h = np.tanh(h) if k < layers - 1 else h
        return h * p["out_scale"] + p["out_shift"]

    return act
