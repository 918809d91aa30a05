"""Hopper, Walker2d, HalfCheetah, Ant: gymnasium's MuJoCo bodies, simulated side by side in threads; their demonstrations.

`Locomotion` is a vectorised environment (vector.py) of our own, equal to gymnasium's and faster; `record_locomotion` draws
embedded demonstrations from the behaviour policies of data/<body>.npz, in the layout of D4RL's files, which `locomotion_demos`
reads.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium
import numpy as np

import manipulation
from vector import Arrays, SimulationError, check_chunks


@dataclasses.dataclass(frozen=True)
class Body:
    """A MuJoCo environment of gymnasium. "-v4" is the old "-v2" on today's bindings: same bodies, observations, rewards."""

    gym_id: str
    obs_skip: int  # leading positions that the observation leaves out
    velocity_limit: float  # velocities are clipped to this in the observation
    height: int = 1  # index of the height in qpos
    angle_range: tuple[float, float] | None = None  # of qpos[2]
    state_range: tuple[float, float] | None = None  # of qpos[2:] and qvel
    falls: bool = True  # an unhealthy state ends the episode
    moves_by_xpos: bool = False  # forward speed from the torso's cartesian position, not from qpos[0]


BODIES = {
    "hopper": Body("Hopper-v4", 1, 10.0, angle_range=(-0.2, 0.2), state_range=(-100.0, 100.0)),
    "walker2d": Body("Walker2d-v4", 1, 10.0, angle_range=(-1.0, 1.0)),
    "halfcheetah": Body("HalfCheetah-v4", 1, np.inf, falls=False),
    "ant": Body("Ant-v4", 2, np.inf, height=2, moves_by_xpos=True),
}
OBS_DIMS = {"hopper": (11, 3), "walker2d": (17, 6), "halfcheetah": (17, 6), "ant": (27, 8)}  # observation, action


class Locomotion:
    """N bodies, each chunk simulated by one call of mujoco.rollout per body, on a pool of threads that lives as long as this.

    Equal to the gymnasium environment of the same name, bit for bit (tests/test_locomotion.py). rollout's rows hold no warm
    start of the contact solver, and without it the next chunk would start from another guess and end in other last
    digits; so every body keeps an MjData of its own, in which the warm start stays behind, and rollout gets it back.
    Actions are clipped to [-1, 1], as deployment on a robot would.
    Score: the undiscounted return of the episode so far. Success: the body reached the time limit of 1,000 steps.
    """

    MAX_STEPS = 1000

    def __init__(self, num_envs: int, obs_steps: int, body: str, threads: int = 0):
        """threads: 0 for one per processor."""
        manipulation.draw_without_display()
        import mujoco
        from mujoco import rollout

        with warnings.catch_warnings():  # that v4 is not the newest
            warnings.simplefilter("ignore")
            self.gym = gymnasium.make(BODIES[body].gym_id).unwrapped  # model, constants and resets are gymnasium's own
        self.body, self.model, self.frame_skip = BODIES[body], self.gym.model, self.gym.frame_skip
        self.num_envs, self.obs_steps, self.action_dim = num_envs, obs_steps, self.model.nu
        self.threads = min(num_envs, threads or os.cpu_count() or 1)
        self.pool = ThreadPoolExecutor(self.threads)
        self.rollouts = [rollout.Rollout(nthread=0) for _ in range(self.threads)]  # each runs in the thread that calls it
        self.datas = [mujoco.MjData(self.model) for _ in range(num_envs)]
        self.mujoco, self.drawn = mujoco, mujoco.MjData(self.model)  # what a film shows
        self.warm = np.array([data.qacc_warmstart for data in self.datas])  # (N, nv)
        width = mujoco.mj_stateSize(self.model, mujoco.mjtState.mjSTATE_FULLPHYSICS)  # time, qpos, qvel
        self.control = int(mujoco.mjtState.mjSTATE_CTRL)
        self.state = np.zeros((num_envs, width))
        self.forward = np.zeros(num_envs)  # position along the track, metres
        self.history = np.zeros((num_envs, obs_steps, self._observation(self.state).shape[-1]), np.float32)
        self.length, self.score = np.zeros(num_envs, int), np.zeros(num_envs)
        self.fallen = np.zeros(num_envs, bool)
        self.eye: manipulation.Eye | None = None
        self.record(())

    def reset(self, seeds: Sequence[int], which: Sequence[int] | None = None) -> Arrays:
        which = range(self.num_envs) if which is None else which
        for i, seed in zip(which, seeds, strict=True):
            self.gym.reset(seed=int(seed))
            data = self.gym.data
            self.state[i] = np.concatenate([[0.0], data.qpos, data.qvel])
            self.warm[i] = data.qacc_warmstart
            self.forward[i] = data.qpos[0]
            self.history[i] = self._observation(self.state[i])
            self.length[i], self.score[i], self.fallen[i] = 0, 0.0, False
            self._film(i, self.state[i])
        return {"state": self.history.copy()}

    def step(self, chunks: np.ndarray) -> tuple[Arrays, np.ndarray, np.ndarray, np.ndarray, Arrays]:
        check_chunks(chunks, self.num_envs, self.action_dim)
        actions = np.asarray(chunks, np.float64).clip(-1, 1)  #                             (N, Ta, Da)
        steps = actions.shape[1]
        running = ~self.fallen & (self.length < self.MAX_STEPS)
        controls = np.repeat(actions, self.frame_skip, 1)
        states = np.zeros((self.num_envs, steps * self.frame_skip, self.state.shape[1]))
        forward = np.zeros((self.num_envs, steps))
        shares = [np.flatnonzero(running)[k :: self.threads] for k in range(self.threads)]
        jobs = [
            self.pool.submit(self._simulate, r, s, controls, states, forward) for r, s in zip(self.rollouts, shares, strict=True)
        ]
        for job in jobs:
            job.result()
        states = states[:, self.frame_skip - 1 :: self.frame_skip]  #                        (N, Ta, state)
        expected = self.state[:, :1] + self.gym.dt * np.arange(1, steps + 1)  # rollout stops the clock of a body that blew up
        broken = running & ~(np.isfinite(states).all((1, 2)) & (abs(states[..., 0] - expected) < self.gym.dt / 2).all(1))
        if broken.any():
            i = int(np.flatnonzero(broken)[0])
            raise SimulationError(
                f"{self.body.gym_id}: the simulation of environment {i} became unstable after its step {self.length[i]}"
            )
        if not self.body.moves_by_xpos:
            forward = states[..., 1]  # qpos[0]
        speed = np.diff(forward, axis=1, prepend=self.forward[:, None]) / self.gym.dt  #       (N, Ta) m/s
        alive_reward = getattr(self.gym, "_healthy_reward", 0.0)
        rewards = speed + alive_reward - self.gym._ctrl_cost_weight * np.square(actions).sum(-1)  # (N, Ta)

        # An episode ends at its first unhealthy state or at the time limit; what was simulated behind it does not count.
        fell = ~self._healthy(states)
        over = fell | (self.length[:, None] + np.arange(1, steps + 1) >= self.MAX_STEPS)
        last = np.where(over.any(1), over.argmax(1), steps - 1)  # index of the last step that counts, (N,)
        counts = running[:, None] & (np.arange(steps) <= last[:, None])
        reward = (rewards * counts).sum(1)
        rows = np.arange(self.num_envs)
        seen = np.concatenate([self.history, self._observation(states).astype(np.float32)], 1)
        newest = last[:, None] + 1 + np.arange(self.obs_steps)  # To observations, the last of them that of step `last`
        self.history[running] = seen[rows[:, None], newest][running]
        self.state[running], self.forward[running] = states[rows, last][running], forward[rows, last][running]
        self.length += counts.sum(1)
        self.score += reward
        self.fallen |= running & fell[rows, last]
        for i in self.recorded:
            for t in range(counts[i].sum()):
                self._film(i, states[i, t])
        truncated = ~self.fallen & (self.length >= self.MAX_STEPS)
        info = {"score": self.score.copy(), "success": truncated.copy(), "length": self.length.copy()}
        return {"state": self.history.copy()}, reward, self.fallen.copy(), truncated, info

    def _simulate(self, roll, share: np.ndarray, controls: np.ndarray, states: np.ndarray, forward: np.ndarray) -> None:
        """Fill states (and forward) of the environments in `share`. Runs in a thread, the simulation without Python's lock."""
        pieces = forward.shape[1] if self.body.moves_by_xpos else 1  # the torso's position has to be read after every step
        length = controls.shape[1] // pieces
        for i in share:
            data, start, warm = self.datas[i], self.state[i], self.warm[i]
            for piece in range(pieces):
                rows = slice(piece * length, (piece + 1) * length)
                roll.rollout_.rollout(
                    [self.model], [data], length, self.control,
                    start[None], warm[None], controls[i : i + 1, rows], states[i : i + 1, rows], None, None,
                )  # fmt: skip
                start, warm = states[i, rows][-1], data.qacc_warmstart
                if self.body.moves_by_xpos:
                    forward[i, piece] = data.xpos[1, 0]
            self.warm[i] = warm

    def _observation(self, state: np.ndarray) -> np.ndarray:
        """time, qpos, qvel (..., 1 + nq + nv) -> (..., features)"""
        nq, limit = self.model.nq, self.body.velocity_limit
        return np.concatenate([state[..., 1 + self.body.obs_skip : 1 + nq], state[..., 1 + nq :].clip(-limit, limit)], -1)

    def _healthy(self, state: np.ndarray) -> np.ndarray:
        if not self.body.falls:
            return np.ones(state.shape[:-1], bool)
        low, high = self.gym._healthy_z_range
        height, angle, rest = state[..., 1 + self.body.height], state[..., 3], state[..., 3:]
        healthy = (low < height) & (height < high)
        if self.body.angle_range:
            healthy &= (self.body.angle_range[0] < angle) & (angle < self.body.angle_range[1])
        if self.body.state_range:
            healthy &= ((self.body.state_range[0] < rest) & (rest < self.body.state_range[1])).all(-1)
        return healthy

    def record(self, which: Sequence[int]) -> None:
        if len(which) > 0:
            self.eye = self.eye or manipulation.Eye(self.model, "track", 320, 240)  # OSError where nothing can be drawn
        self.recorded, self.frames = list(which), [[] for _ in which]

    def _film(self, i: int, state: np.ndarray) -> None:
        step = round(state[0] / self.gym.dt)
        if i in self.recorded and step % 2 == 0 and step <= 600:
            self.drawn.qpos[:] = state[1 : 1 + self.model.nq]
            self.mujoco.mj_forward(self.model, self.drawn)
            self.frames[self.recorded.index(i)].append(self.eye.picture(self.drawn))

    def close(self) -> None:
        self.pool.shutdown()
        if self.eye:
            self.eye.close()
        self.gym.close()


class Behaviour:
    """A trained Gaussian policy of data/<body>.npz, the source of our own demonstrations: tanh(mu(o) + sigma(o) * eps)."""

    def __init__(self, weights: Arrays):
        self.w, self.b = ([weights[f"{kind}{i}"].astype(np.float32) for i in range(4)] for kind in "wb")

    def __call__(self, obs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """obs (N, features) -> actions (N, Da) in [-1, 1]"""
        h = obs
        for w, b in zip(self.w[:2], self.b[:2], strict=True):
            h = np.maximum(h @ w + b, 0)
        mu, log_std = h @ self.w[2] + self.b[2], (h @ self.w[3] + self.b[3]).clip(-20, 2)
        return np.tanh(mu + np.exp(log_std) * rng.standard_normal(mu.shape, np.float32))


def roll_out(
    body: str, behaviour: Behaviour, steps: int, seed_start: int, num_envs: int = 40
) -> tuple[Arrays, np.ndarray, np.ndarray, np.ndarray]:
    """Whole episodes of a behaviour policy, at least `steps` steps of them.

    Returns: arrays as D4RL has them, {observations, actions, rewards, terminals}; episode_ends; seeds; returns of the episodes.
    """
    env, rng = Locomotion(num_envs, 1, body), np.random.default_rng(seed_start)
    running: list[list[tuple]] = [[] for _ in range(num_envs)]
    seeds, next_seed = list(range(seed_start, seed_start + num_envs)), seed_start + num_envs
    obs, kept, total = env.reset(seeds)["state"][:, 0], [], 0
    active = np.ones(num_envs, bool)
    while active.any():
        actions = behaviour(obs, rng)
        following, reward, terminated, truncated, _ = env.step(actions[:, None])
        for i in np.flatnonzero(active):
            running[i].append((obs[i], actions[i], reward[i], terminated[i]))
        obs = following["state"][:, 0]
        for i in np.flatnonzero(active & (terminated | truncated)):
            kept.append((seeds[i], running[i]))
            total += len(running[i])
            if total + sum(len(r) for k, r in enumerate(running) if k != i and active[k]) >= steps:
                active[i] = False
            else:
                seeds[i], running[i], next_seed = next_seed, [], next_seed + 1
                obs = env.reset([seeds[i]], [i])["state"][:, 0]
    env.close()
    kept.sort(key=lambda episode: episode[0])
    columns = [np.array(column) for column in zip(*(row for _, episode in kept for row in episode), strict=True)]
    arrays = dict(zip(("observations", "actions", "rewards", "terminals"), columns, strict=True))
    ends = np.cumsum([len(episode) for _, episode in kept])
    returns = np.array([sum(row[2] for row in episode) for _, episode in kept])
    return arrays, ends, np.array([seed for seed, _ in kept]), returns


def record_locomotion(path: Path, body: str, levels: Sequence[str], steps: int = 200_000) -> None:
    """Draw demonstrations from the behaviour policies of data/<body>.npz into `path`, in D4RL's layout; some ten seconds."""
    import h5py

    source = Path(__file__).parent / "data" / f"{body}.npz"
    try:
        with np.load(source, allow_pickle=False) as file:
            weights = dict(file)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"there is no behaviour policy for {body} to record embedded demonstrations with ({source}: {error}); give --demos "
            "official, minari:ID or a path"
        ) from error
    parts = []
    for k, level in enumerate(levels):
        policy = Behaviour({name.split("_")[1]: x for name, x in weights.items() if name.startswith(level)})
        arrays, ends, _, _ = roll_out(body, policy, steps, seed_start=4_000_000 + 1_000_000 * k)
        last = np.isin(np.arange(len(arrays["rewards"])), ends - 1)
        parts.append({**arrays, "timeouts": last & ~arrays["terminals"]})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # processes of one training do not meet
    with h5py.File(temporary, "w") as file:
        for name in parts[0]:
            file[name] = np.concatenate([part[name] for part in parts])
    temporary.replace(path)


def locomotion_demos(arrays: Arrays, obs_dim: int, action_dim: int) -> tuple[Arrays, np.ndarray]:
    """D4RL's arrays. Its Ant files hold 111 numbers per observation, of which the last 84 (contact forces) are zeros."""
    if "rewards" not in arrays:
        raise ValueError(f"it has no array rewards (it has {', '.join(arrays)})")
    for name, width in (("observations", obs_dim), ("actions", action_dim)):
        found = arrays[name].shape[1:] if name in arrays else "nothing"
        if (
            name not in arrays
            or arrays[name].ndim != 2
            or arrays[name].shape[1] < width
            or (name == "actions" and found != (width,))
        ):
            raise ValueError(f"{name} must have shape (steps, {width}); it has {found} per step")
    return {"state": arrays["observations"][:, :obs_dim]}, arrays["actions"]
