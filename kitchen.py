"""Franka Kitchen: an arm that opens, turns and moves seven things in a kitchen; gymnasium-robotics' FrankaKitchen-v1.

The seven are the microwave, the kettle, the light switch, the slide cabinet, the hinge cabinet and the two burners; each of the
relay data's demonstrations (Gupta et al. 2019) does four of them, in any of many orders. p1 to p4, the published measure, are
the shares of episodes with at least so many done, whichever they are, in 280 steps (Behavior Transformers, Diffusion Policy).

    number of the observation   meaning
    0:9                         the robot's joints, two fingers last; rad and metres
    9:30                        the joints of the things; rad and metres, the kettle's quaternion at 26:30
    action (9,)                 velocities of the robot's joints, in [-1, 1] of +-2 rad/s or m/s

These are the first 30 of the relay data's 60 numbers (the goal follows) and columns 0:9 and 18:39 of gymnasium-robotics' 59.
"""

from __future__ import annotations

import warnings

import gymnasium
import numpy as np

import manipulation

Arrays = dict[str, np.ndarray]

MAX_STEPS = 280
SUBTASKS = 4  # that count, of the seven: as many as each demonstration does
FEATURES, ACTIONS = 30, 9
COLUMNS = {59: np.r_[0:9, 18:39], 60: np.arange(30)}  # of an observation so wide


class Kitchen(gymnasium.Env):
    """Score: subtasks done so far / 4, at most 1. Reward: 1 for each of them, once. Four end the episode, or 280 steps do.

    An episode is a function of its seed and its actions; the seed draws nothing but the noise of the sensors, which the
    simulator's controller sees too.
    """

    render_mode = "rgb_array"
    SIZE = 256  # side of a picture, pixels

    def __init__(self):
        manipulation.draw_without_display()
        try:
            with warnings.catch_warnings():  # about versions
                warnings.simplefilter("ignore")
                import gymnasium_robotics

                gymnasium.register_envs(gymnasium_robotics)
                self.sim = gymnasium.make("FrankaKitchen-v1").unwrapped
        except (ImportError, gymnasium.error.Error) as error:  # not there, or of another version
            raise ImportError(
                f"Kitchen needs gymnasium-robotics: pip install -r requirements-simulators.txt ({error})"
            ) from error
        manipulation.aim(self.sim.model.camera("left_cap"), at=(-0.2, 0.4, 2.0), place=(-1.0, -1.7, 2.9), fovy=50.0)
        self.eye = None
        self.action_space = gymnasium.spaces.Box(-1, 1, (ACTIONS,), np.float32)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (FEATURES,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        full, _ = self.sim.reset(seed=seed)
        self.steps, self.done = 0, 0
        return kitchen_state(full["observation"]), {}

    def step(self, action):
        action = np.asarray(action, np.float64)
        if action.shape != (ACTIONS,) or not np.isfinite(action).all():
            raise ValueError(f"the action is {action}; it must be {ACTIONS} finite numbers in [-1, 1]")
        full, _, _, _, info = self.sim.step(action.clip(-1, 1))
        self.steps += 1
        before, self.done = self.done, min(len(info["episode_task_completions"]), SUBTASKS)  # each of the seven counts once
        success = self.done == SUBTASKS
        late = not success and self.steps >= MAX_STEPS
        info = {"score": self.done / SUBTASKS, "success": success}
        return kitchen_state(full["observation"]), float(self.done - before), success, late, info

    def render(self) -> np.ndarray:
        self.eye = self.eye or manipulation.Eye(self.sim.model, "left_cap", self.SIZE, self.SIZE)
        return self.eye.picture(self.sim.data)

    def close(self) -> None:
        if self.eye:
            self.eye.close()
            self.eye = None
        self.sim.close()


def kitchen_state(observations: np.ndarray) -> np.ndarray:
    """(..., 59) of gymnasium-robotics or (..., 60) of the relay data -> (..., 30) float32."""
    return observations[..., COLUMNS[observations.shape[-1]]].astype(np.float32)


def kitchen_demos(arrays: Arrays) -> tuple[Arrays, np.ndarray]:
    """Minari's episodes, observations/observation (N, 59) and actions (N, 9), or the relay data's, observations_seq (N, 60) and
    actions_seq (N, 9)."""
    found = {}
    for kind, names in {
        "observations": ("observations/observation", "observations_seq"),
        "actions": ("actions", "actions_seq"),
    }.items():
        name = next((name for name in names if name in arrays), None)
        if name is None:
            raise ValueError(f"it has no array {' or '.join(names)}")
        widths = COLUMNS if kind == "observations" else (ACTIONS,)
        if arrays[name].ndim != 2 or arrays[name].shape[1] not in widths:
            raise ValueError(f"{name} must have shape (steps, {' or '.join(map(str, widths))}); it has {arrays[name].shape}")
        found[kind] = arrays[name]
    return {"state": kitchen_state(found["observations"])}, found["actions"]
