"""BlockPush: a cylinder pushes two square blocks over a table into two square targets, in either order and either assignment.

The task is the one published with Implicit BC (Florence et al. 2021) in its multimodal form (Behavior Transformers, Diffusion
Policy); the simulation is our own, in MuJoCo, and so are the demonstrations: a scripted oracle draws, per episode, which block
goes first and which target it goes to, so that a policy has four ways to begin and has to represent all of them.

    number of the observation     meaning, metres and rad in the table's frame
    0:2, 2      3:5, 5            block 1 and block 2: centre, yaw
    6:8, 8:10                     effector: where it is, where it was told to be
    10:12, 12   13:15, 15         target 1 and target 2: centre, yaw
    action      (2,)              displacement of the place where the effector is told to be, metres per step of 0.1 s

Score: targets filled / 2, the largest so far; p1 and p2, the published measure, are the shares of episodes with at least one and
with both. DEPARTS: no robot arm, which only carried the cylinder; blocks slide and turn in the plane, where a table's friction
is friction of their three joints. So a step costs a quarter of a millisecond, and numbers are comparable in kind, not digit by
digit. A yaw is given as the same square's in [-pi/4, pi/4).
"""

from __future__ import annotations

from pathlib import Path

import gymnasium
import numpy as np

import manipulation

MAX_STEPS = 350  # as in Diffusion Policy; the oracle takes 65 on average
MAX_ACTION = 0.03  # metres per step and axis: 0.3 m/s at 10 Hz; longer ones are cut
REACHED = 0.05  # metres from a target's centre to that of the block that fills it, as published
SIDE, RADIUS = 0.05, 0.0125  # of a block, of the effector, metres; SILENT: our own
LOW, HIGH = np.array([0.15, -0.35]), np.array([0.5, 0.35])  # where the effector may be told to be, metres
RIM = 0.05  # blocks stay so far inside, so that the effector can always get behind them
STARTS = {"block": (-0.22, -0.08), "target": (0.08, 0.25), "anywhere": (-0.3, 0.3)}  # y of their centres, metres
APART = {"block": 0.11, "target": 0.13, "anywhere": 0.08}  # metres between the two; no block fills both targets
SUBSTEPS = 10  # of 0.01 s


def block_xml(number: int, colour: str) -> str:
    """One square block of 0.1 kg. Friction of its joints is a table's, coefficient 0.3; damping keeps it from coasting."""
    (x0, y0), (x1, y1) = LOW + RIM, HIGH - RIM
    slide = 'type="slide" limited="true" frictionloss="0.3" damping="0.5"'
    return f"""<body name="block{number}" pos="0 0 {SIDE / 2}">
      <joint axis="1 0 0" range="{x0} {x1}" {slide}/>
      <joint axis="0 1 0" range="{y0} {y1}" {slide}/>
      <joint axis="0 0 1" type="hinge" frictionloss="0.006" damping="0.0005"/>
      <geom type="box" size="{SIDE / 2} {SIDE / 2} {SIDE / 2}" mass="0.1" friction="0.5" rgba="{colour}"/></body>"""


def target_xml(number: int, colour: str) -> str:
    """A picture of a target, which nothing touches."""
    geom = f'type="box" size="{REACHED} {REACHED} 0.001" rgba="{colour}" contype="0" conaffinity="0"'
    return f"""<body name="target{number}" mocap="true"><geom {geom}/></body>"""


# The effector is a capsule longer than the blocks are high: in their plane a cylinder, and quicker to collide. Its drive is
# stiff, there within a step: a point that pushes slips off to the side as fast as a soft drive corrects.
XML = f"""<mujoco>
  <option timestep="0.01" integrator="implicitfast" gravity="0 0 0" cone="elliptic"/>
  <visual><headlight ambient="0.5 0.5 0.5" diffuse="0.5 0.5 0.5" specular="0 0 0"/></visual>
  <worldbody>
    <camera name="eye"/>
    <geom type="box" pos="0.325 0 -0.01" size="0.3 0.45 0.01" rgba="0.85 0.83 0.8 1" contype="0" conaffinity="0"/>
    {target_xml(1, "0.55 0.8 0.55 1")}
    {target_xml(2, "0.8 0.6 0.8 1")}
    {block_xml(1, "0.85 0.25 0.2 1")}
    {block_xml(2, "0.2 0.4 0.85 1")}
    <body pos="0 0 0.05">
      <joint name="x" axis="1 0 0" type="slide"/>
      <joint name="y" axis="0 1 0" type="slide"/>
      <geom type="capsule" size="{RADIUS} 0.05" mass="0.5" friction="0.5" rgba="0.2 0.2 0.2 1"/></body>
  </worldbody>
  <actuator> <position joint="x" kp="2000" kv="45"/> <position joint="y" kp="2000" kv="45"/> </actuator>
</mujoco>"""


def place(rng: np.random.Generator, what: str) -> np.ndarray:
    """Two centres and yaws, (2, 3), metres and rad."""
    margin = RIM + (0 if what == "anywhere" else 0.02)
    x0, x1 = LOW[0] + margin, HIGH[0] - margin
    while True:
        pose = rng.uniform([x0, STARTS[what][0], -np.pi], [x1, STARTS[what][1], np.pi], (2, 3))
        if np.linalg.norm(pose[0, :2] - pose[1, :2]) >= APART[what]:
            return pose


class BlockPush(gymnasium.Env):
    """One table. An episode is a function of its seed and its actions.

    Reward: 1 when a target is filled that was not before, counted by the most that were filled at once, so that a block which
    goes in and out earns nothing. Success: both are filled, which ends the episode; otherwise 350 steps do.
    `first` is (block, target) of the first that was filled, 0 or 1 each, or None.
    """

    render_mode = "rgb_array"
    SIZE = 256  # side of a picture, pixels

    def __init__(self):
        manipulation.draw_without_display()
        import mujoco

        self.mujoco, self.model = mujoco, mujoco.MjModel.from_xml_string(XML)
        manipulation.aim(self.model.camera("eye"), at=(0.3, 0.0, 0.0), place=(0.95, 0.0, 0.75), fovy=45.0)
        self.data, self.eye = mujoco.MjData(self.model), None
        self.action_space = gymnasium.spaces.Box(-MAX_ACTION, MAX_ACTION, (2,), np.float32)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (16,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """options {"anywhere": True}: blocks and effector start anywhere, as if an episode had gone astray."""
        super().reset(seed=seed)
        anywhere = bool(options and options.get("anywhere"))
        self.mujoco.mj_resetData(self.model, self.data)
        self.targets = place(self.np_random, "target")  # (2, 3)
        blocks = place(self.np_random, "anywhere" if anywhere else "block")
        low, high = (LOW, HIGH) if anywhere else ([0.3, -0.32], [0.35, -0.28])
        self.told = self.np_random.uniform(low, high)  # where the effector is told to be, metres
        while np.linalg.norm(blocks[:, :2] - self.told, axis=1).min() < SIDE:
            self.told = self.np_random.uniform(low, high)
        self.data.qpos[:6] = blocks.ravel()
        self.data.qpos[6:] = self.told
        self.data.mocap_pos[:, :2] = self.targets[:, :2]
        self.data.mocap_quat[:, 0], self.data.mocap_quat[:, 3] = np.cos(self.targets[:, 2] / 2), np.sin(self.targets[:, 2] / 2)
        self.mujoco.mj_forward(self.model, self.data)
        self.steps, self.filled, self.first = 0, 0, None
        return self._observe(), {}

    def step(self, action):
        action = np.asarray(action, np.float64)
        if action.shape != (2,) or not np.isfinite(action).all():
            raise ValueError(f"the action is {action}; it must be two finite numbers, metres, up to {MAX_ACTION} each")
        self.told = np.clip(self.told + action.clip(-MAX_ACTION, MAX_ACTION), LOW, HIGH)
        self.data.ctrl[:] = self.told
        self.mujoco.mj_step(self.model, self.data, SUBSTEPS)
        self.steps += 1
        blocks = self.data.qpos[:6].reshape(2, 3)
        inside = ((blocks[:, None, :2] - self.targets[None, :, :2]) ** 2).sum(-1) < REACHED**2  # (block, target)
        if self.first is None and inside.any():
            self.first = tuple(int(i) for i in np.argwhere(inside)[0])
        now = int(inside.any(0).sum())
        reward, self.filled = float(max(0, now - self.filled)), max(self.filled, now)
        success = self.filled == 2
        late = not success and self.steps >= MAX_STEPS
        return self._observe(), reward, success, late, {"score": self.filled / 2, "success": success}

    def _observe(self) -> np.ndarray:
        obs = np.empty(16, np.float32)
        obs[:8], obs[8:10], obs[10:] = self.data.qpos, self.told, self.targets.ravel()
        obs[[2, 5, 12, 15]] = square(obs[[2, 5, 12, 15]])
        return obs

    def render(self) -> np.ndarray:
        self.eye = self.eye or manipulation.Eye(self.model, "eye", self.SIZE, self.SIZE)
        return self.eye.picture(self.data)

    def close(self) -> None:
        if self.eye:
            self.eye.close()
            self.eye = None


def square(yaw: np.ndarray) -> np.ndarray:
    """The same square's yaw in [-pi/4, pi/4)."""
    return (yaw + np.pi / 4) % (np.pi / 2) - np.pi / 4


# --- the oracle ---------------------------------------------------------------------------------------------------------


def detour(start: np.ndarray, goal: np.ndarray, obstacles: list[np.ndarray], clearance: float) -> np.ndarray:
    """Where to head for from start to get to goal around round obstacles: (2,) each, metres."""
    way = goal - start
    length = max(float(np.linalg.norm(way)), 1e-6)
    for centre in sorted(obstacles, key=lambda c: float(np.linalg.norm(c - start))):
        along = float((centre - start) @ way) / length**2
        off = start + along * way - centre  # from the obstacle to the straight way
        if 0 < along < 1 and np.linalg.norm(off) < 0.9 * clearance:
            normal = np.array([-way[1], way[0]]) / length
            return centre + clearance * (1 if off @ normal >= 0 else -1) * normal
    return goal


class Oracle:
    """Pushes one block after the other along a straight line, from behind; who goes first, and where to, its seed draws.

    It looks at the table in every step: where it has slipped off the line it goes behind the block again, and it walks and
    pushes around the other block. Of the past it knows only whether it was pushing.
    """

    WALK, PUSH = 0.028, 0.016  # metres per step
    BEHIND = 0.06  # metres from the block's centre to where a push begins

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        self.order = rng.permutation(2)  # blocks
        self.goals = rng.permutation(2)  # goals[block] is its target
        self.pushing = False

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """obs (16,) -> action (2,), metres."""
        obs = obs.astype(np.float64)
        blocks, hand, targets = obs[:6].reshape(2, 3)[:, :2], obs[8:10], obs[10:].reshape(2, 3)[:, :2]
        left = [k for k in self.order if np.linalg.norm(blocks[k] - targets[self.goals[k]]) > 0.8 * REACHED]
        if not left:
            return np.zeros(2)
        block, other = blocks[left[0]], blocks[1 - left[0]]
        way = detour(block, targets[self.goals[left[0]]], [other], 0.09) - block
        ahead = way / max(float(np.linalg.norm(way)), 1e-6)
        offset = hand - block
        aside = offset - (offset @ ahead) * ahead  # beside the line along which it pushes
        width = float(np.linalg.norm(aside))
        near = RADIUS < -float(offset @ ahead) < 1.5 * self.BEHIND
        self.pushing = near and width < (0.03 if self.pushing else 0.008)  # begins on the line, goes on near to it
        if self.pushing:
            return self.PUSH * max(0.2, 1 - width / 0.03) * ahead - aside  # the farther beside, the slower
        goal = detour(hand, block - self.BEHIND * ahead, [block, other], 0.07)
        step = goal - hand
        return step * min(1.0, self.WALK / max(float(np.linalg.norm(step)), 1e-6))


def record_blockpush(path: Path, episodes: int = 2000) -> None:
    """Write that many successes of the oracle to path, an .npz of state, action, episode_ends; a minute.

    Every other episode starts anywhere, and the hand trembles, each episode by as much as its seed says, up to 6 mm per step:
    who only sees how things go well does not learn to mend them. The action is what the oracle meant, not what the hand did
    (DART, Laskey et al. 2017). Starts: seeds from 4,000,000 on.
    """
    env, states, actions, ends, seed = BlockPush(), [], [], [], 4_000_000
    while len(ends) < episodes:
        obs, _ = env.reset(seed=seed, options={"anywhere": seed % 2 == 1})
        oracle, rng, rows, success, late = Oracle(seed), np.random.default_rng([seed, 1]), [], False, False
        tremble = rng.uniform(0, 0.006)  # standard deviation, metres
        while not (success or late):
            action = oracle(obs).clip(-MAX_ACTION, MAX_ACTION).astype(np.float32)
            rows.append((obs, action))
            obs, _, success, late, _ = env.step(action + rng.normal(0, tremble, 2))
        if success:
            states += [row[0] for row in rows]
            actions += [row[1] for row in rows]
            ends.append(len(states))
        seed += 1
    manipulation.save_episodes(path, ends, {"state": np.array(states), "action": np.array(actions)})
