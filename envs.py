"""Tasks, one table row each, and their environments, stepped by whole action chunks.

A vectorised environment here is any object with

    num_envs                 number of environments N
    reset(seeds, which)      start an episode in the environments `which` (all if None), one seed for each of them
        -> obs               {key: (N, To, ...)} of all environments; at a start the first observation is repeated
    step(chunks)             chunks (N, Ta, Da), environment units
        -> (obs, reward, terminated, truncated, info)
                             reward (N,) summed over the chunk. terminated (N,) bool: the task ended the episode; truncated: the
                             time limit did. An ended environment rests: it shows its last observation, ignores its
                             chunks and earns 0 until its next reset, so nobody has to dig out a "final observation"
    record(which)            keep pictures of these environments (OSError: cannot draw), after every environment step, or
                             where episodes are long after every second of the first 600, in
    frames                   one list per recorded environment, of (H, W, 3) uint8
    close()

info holds `score` (N,), the task's measure so far in the episode, `success` (N,) bool, `length` (N,) steps. An environment is a
function of its seed and its chunks: who repeats them gets the same episode. Simulators are imported when they are first used.
Errors are ValueError, ImportError with the pip line, or SimulationError where a simulator fails in the middle of an episode.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import torch

import blockpush
import kitchen
import manipulation
import robomimic_tasks
import scripted
import ur5_tasks

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Task:
    """One row: what the scripts need to know of a task."""

    name: str
    score: str  # what `score` measures, for people
    obs_shapes: dict[str, tuple[int, ...]]  # shape of one step of each observation key
    action_dim: int
    make: Callable[[int, int], object]  # (num_envs, obs_steps) -> vectorised environment
    demo_arrays: tuple[str, ...]  # arrays to read from a demonstration file, as far as it has them
    demo_convert: Callable[[Arrays], tuple[Arrays, np.ndarray]]  # those arrays -> (obs, actions), environment units
    demo_mirror: Callable[[Arrays], Arrays] | None = None  # those arrays -> the same episodes in the task's mirror, if it has one
    demo_record: Callable[[Path], None] | None = None  # makes the embedded demonstrations on first use, where they are recorded
    demo_origin: str = ""  # ... and who acts there
    demo_scripted: bool = False  # ... it is a scripted expert, and demo_record takes episodes=N
    demo_expert: Callable[[Path, Path], None] | None = None  # (file to make, policy) the same with an expert policy that is given
    shift: Callable[[dict, torch.Tensor], dict] | None = None  # the observation of a scene that stands elsewhere
    make_training: Callable[[int, int], object] | None = None  # the same for dbpo_finetune.py, where another is faster
    side_by_side: int = 100  # environments of an evaluation; one that draws takes 100 MB
    stages: int = 1  # subtasks of an episode; score is the share of them that is done
    train: dict[str, object] = dataclasses.field(default_factory=dict)  # defaults of dbp_train.py that this task changes
    finetune: dict[str, object] = dataclasses.field(default_factory=dict)  # and of dbpo_finetune.py

    def check(self, obs_steps: int) -> None:
        """Build one environment and look at it: ImportError or ValueError where a simulator is missing or cannot draw."""
        env = self.make(1, obs_steps)
        try:
            env.reset([0])
        except SimulationError as error:
            raise ValueError(f"{self.name} does not run here: {error}") from error
        finally:
            env.close()


class SimulationError(RuntimeError):
    """The simulator failed: NaN, an exception of its own, a worker process that died."""


def get_task(name: str) -> Task:
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 5, 0.4)
        families = sorted({task.split("-")[0] for task in TASKS})
        raise ValueError(
            f"unknown task {name!r}; near to it are {', '.join(near) or 'none'}, of {len(TASKS)}: {', '.join(families)}"
        )
    return TASKS[name]


def check_chunks(chunks: np.ndarray, num_envs: int, action_dim: int) -> None:
    if chunks.ndim != 3 or len(chunks) != num_envs or chunks.shape[1] < 1 or chunks.shape[2] != action_dim:
        raise ValueError(f"chunks has shape {chunks.shape}; it must be ({num_envs}, Ta, {action_dim})")


class Episodes:
    """The training episodes of N environments: starts the next one where one ended, and remembers what it takes to repeat them.

    An environment is a function of its seed and its chunks (envs.py), so a resumed run repeats the unfinished episodes from
    their first chunk and stands where the saved one stood, whatever the simulator.
    """

    def __init__(self, env, first_seed: int, stride: int):
        self.env, self.next_seed, self.stride = env, first_seed, stride  # ranks interleave: each start is used once
        self.chunks: list[list[np.ndarray]] = [[] for _ in range(env.num_envs)]
        self.seeds = [self._seed() for _ in range(env.num_envs)]
        self.obs = env.reset(self.seeds)

    def _seed(self) -> int:
        self.next_seed += self.stride
        return self.next_seed - self.stride

    def step(self, chunks: np.ndarray) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray, dict]:
        """As env.step, whose observation, the final one of episodes that end here, is returned; `self.obs` is what to act on."""
        final, reward, terminated, truncated, info = self.env.step(chunks)
        for mine, chunk in zip(self.chunks, chunks, strict=True):
            mine.append(chunk)
        self.obs = final
        which = np.flatnonzero(terminated | truncated)
        if len(which):
            for i in which:
                self.seeds[i], self.chunks[i] = self._seed(), []
            self.obs = self.env.reset([self.seeds[i] for i in which], which)
        return final, reward, terminated, truncated, info

    def state(self) -> dict:
        chunks = [torch.from_numpy(np.array(mine, np.float32)) for mine in self.chunks]
        return {"next_seed": self.next_seed, "seeds": list(self.seeds), "chunks": chunks}

    def load(self, state: dict) -> None:
        self.next_seed, self.seeds = state["next_seed"], list(state["seeds"])
        self.chunks = [list(chunks.numpy()) for chunks in state["chunks"]]
        longest = max(len(mine) for mine in self.chunks)
        self.obs = self.env.reset(self.seeds)
        idle = next((mine[0] for mine in self.chunks if mine), None)
        for t in range(longest):  # the longest episode first; the others start so that all arrive together
            batch = [mine[t - longest + len(mine)] if longest - len(mine) <= t else idle for mine in self.chunks]
            self.obs = self.env.step(np.stack(batch))[0]
            starting = [i for i, mine in enumerate(self.chunks) if len(mine) == longest - t - 1]
            if starting:
                self.obs = self.env.reset([self.seeds[i] for i in starting], starting)


# --- any gymnasium environment ------------------------------------------------------------------------------------------


class Chunked(gymnasium.Wrapper):
    """One gymnasium environment, stepped by chunks: keeps the observation history, and rests after the end of an episode.

    An environment without a Dict observation gives its Box under the key "state". It may put `score` and `success` into its
    info; without them the score is the return, and success is to reach the time limit. Where an observation is dear, as cameras
    are, the environment may have attributes `observing` and `MAX_STEPS`: the first is False for steps whose observation nobody
    will see, and the environment then may return None instead of one, unless the episode ends there.
    """

    def __init__(self, env: gymnasium.Env, obs_steps: int, number: int):
        super().__init__(env)
        self.number, self.history, self.filming = number, deque(maxlen=obs_steps), False
        self.sparing = hasattr(env.unwrapped, "observing")
        space = env.observation_space
        self.keyed = isinstance(space, gymnasium.spaces.Dict)
        spaces = space.spaces if self.keyed else {"state": space}
        kept = {key: (np.float32 if np.issubdtype(box.dtype, np.floating) else box.dtype) for key, box in spaces.items()}
        wide = {key: (0, 255) if kept[key] == np.uint8 else (-np.inf, np.inf) for key in spaces}
        boxes = {key: gymnasium.spaces.Box(*wide[key], (obs_steps, *box.shape), kept[key]) for key, box in spaces.items()}
        self.observation_space = gymnasium.spaces.Dict(boxes)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Arrays, dict]:
        obs, _ = self.env.reset(seed=seed, options=options)
        self.history.extend([obs if self.keyed else {"state": obs}] * self.history.maxlen)
        self.terminated, self.truncated, self.length, self.total = False, False, 0, 0.0
        self.info: dict = {}
        self._film()
        return self._observe(), {}

    def step(self, chunk: np.ndarray) -> tuple[Arrays, float, bool, bool, dict]:
        reward = 0.0
        last = min(len(chunk), getattr(self.env.unwrapped, "MAX_STEPS", np.inf) - self.length)  # steps up to the time limit
        for k, action in enumerate(chunk):
            if self.terminated or self.truncated:
                break
            if self.sparing:
                self.env.unwrapped.observing = k >= last - self.history.maxlen
            obs, step_reward, self.terminated, self.truncated, self.info = self.env.step(action)
            if obs is not None:
                self.history.append(obs if self.keyed else {"state": obs})
            self.length += 1
            reward += float(step_reward)
            self._film()
        self.total += reward
        late = bool(self.truncated and not self.terminated)
        score, success = self.info.get("score", self.total), self.info.get("success", late)
        info = {"score": float(score), "success": bool(success), "length": self.length}
        # The ends travel in info: gymnasium's vector environments forbid to step on after one, and here the others do.
        return self._observe(), reward, False, False, {**info, "terminated": bool(self.terminated), "truncated": late}

    def _observe(self) -> Arrays:
        return {
            key: np.stack([obs[key] for obs in self.history]).astype(box.dtype) for key, box in self.observation_space.items()
        }

    def record(self, which: Sequence[int]) -> None:
        self.filming, self.film = self.number in which, []

    def _film(self) -> None:
        if self.filming:
            self.film.append(self.env.render())


class GymVector:
    """N gymnasium environments, in this process or in one worker process each (gymnasium's Sync- and AsyncVectorEnv)."""

    def __init__(self, make: Callable[[], gymnasium.Env], num_envs: int, obs_steps: int, processes: bool = False):
        """make: builds one environment; it goes to the workers, so with processes it must be a function of a module."""
        vector = gymnasium.vector.AsyncVectorEnv if processes else gymnasium.vector.SyncVectorEnv
        builders = [partial(_chunked, make, obs_steps, i) for i in range(num_envs)]
        self.vector = vector(builders, autoreset_mode=gymnasium.vector.AutoresetMode.DISABLED)
        self.num_envs, self.recorded = num_envs, []
        self.action_dim = self.vector.single_action_space.shape[0]

    def reset(self, seeds: Sequence[int], which: Sequence[int] | None = None) -> Arrays:
        which = np.arange(self.num_envs) if which is None else np.asarray(which)
        every, mask = np.zeros(self.num_envs, object), np.zeros(self.num_envs, bool)
        every[which], mask[which] = [int(seed) for seed in seeds], True
        return self._run(lambda: self.vector.reset(seed=list(every), options={"reset_mask": mask}))[0]

    def step(self, chunks: np.ndarray) -> tuple[Arrays, np.ndarray, np.ndarray, np.ndarray, Arrays]:
        check_chunks(chunks, self.num_envs, self.action_dim)
        obs, reward, _, _, info = self._run(lambda: self.vector.step(chunks))
        return obs, reward, info["terminated"], info["truncated"], {name: info[name] for name in ("score", "success", "length")}

    def _run(self, call: Callable[[], tuple]) -> tuple:
        try:
            return call()
        except (EOFError, ConnectionError) as error:
            raise SimulationError(
                f"a worker process of the environments died ({type(error).__name__}); see its output"
            ) from error
        except Exception as error:  # whatever a simulator raises
            raise SimulationError(f"an environment raised {type(error).__name__}: {error}") from error

    def record(self, which: Sequence[int]) -> None:
        self.recorded = list(which)
        self.vector.call("record", tuple(which))

    @property
    def frames(self) -> list[list[np.ndarray]]:
        films = self.vector.get_attr("film")
        return [films[i] for i in self.recorded]

    def close(self) -> None:
        self.vector.close()


def _chunked(make: Callable[[], gymnasium.Env], obs_steps: int, number: int) -> Chunked:
    return Chunked(make(), obs_steps, number)


# --- locomotion: Hopper, Walker2d, HalfCheetah, Ant ---------------------------------------------------------------------


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
                if pieces > 1:
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


# Training and fine-tuning of each body. A decision of Hopper lasts for 4 steps, as in the papers; a cheetah's stride is no longer
# than that and needs an eye on every step (README).
LOCOMOTION = {
    "hopper": ({"action_steps": 4, "cond_width": 256}, {}),
    "walker2d": (
        {"action_steps": 2, "cond_width": 128, "width": 64},
        {
            "env_steps": 3_000_000,
            "decisions": 50,
            "minibatch": 500,
            "clip": 0.2,
            "target_kl": 0.05,
            "sigma_start": 0.1,
            "anchor": 0.3,
        },
    ),
    "halfcheetah": (
        {"action_steps": 1, "cond_width": 256},
        {
            "env_steps": 1_000_000,
            "decisions": 50,
            "minibatch": 500,
            "actor_lr": 4e-5,
            "gamma": 0.98,
            "clip": 0.2,
            "target_kl": 0.05,
            "sigma_start": 0.1,
            "anchor": 0.1,
        },
    ),
    "ant": ({"action_steps": 1, "cond_width": 128, "width": 64}, {}),
}


def locomotion_task(body: str, level: str) -> Task:
    obs_dim, action_dim = OBS_DIMS[body]
    train, finetune = LOCOMOTION[body]
    return Task(
        name=f"{body}-{level}-v2",
        score="undiscounted return",
        obs_shapes={"state": (obs_dim,)},
        action_dim=action_dim,
        make=partial(Locomotion, body=body),
        demo_arrays=("observations", "actions", "rewards"),
        demo_convert=partial(locomotion_demos, obs_dim=obs_dim, action_dim=action_dim),
        demo_record=partial(record_locomotion, body=body, levels=level.split("-")),
        demo_origin="recorded with our own behaviour policy, not D4RL's",
        # The spread in these data is the behaviour's noise, not a choice between ways to act: latents of std 0.2 act better
        # than 1, and the observation needs no noise, the data have enough.
        train={
            "obs_steps": 1,
            "horizon": 4,
            "obs_noise": 0.0,
            "latent_scale": 0.2,
            "steps": 3_000,
            "eval_every": 1_500,
            **train,
        },
        finetune=finetune,
    )


def adroit_task(task: str, view: str) -> Task:
    shapes, actions = manipulation.adroit_shapes(task, view), manipulation.ADROIT[task].actions
    return Task(
        name=f"adroit-{task}" + ("" if view == "state" else f"-{view}"),
        score="success",
        obs_shapes=shapes,
        action_dim=actions,
        make=partial(GymVector, partial(manipulation.Adroit, task, view)),
        side_by_side=100 if view == "state" else 20,
        # Minari's and the human demonstrations hold states, an expert's recorded episodes hold what the policy is to see
        demo_arrays=("observations", "actions", "rewards", *shapes, "action"),
        demo_convert=partial(manipulation.adroit_demos, shapes=shapes, action_dim=actions),
        demo_expert=partial(manipulation.record_adroit, task=task, view=view),
        train={"obs_steps": 2, "horizon": 4, "action_steps": 3, "batch_size": 128, "steps": 3_000, "eval_every": 1_500}
        | {"eval_episodes": 20, "report_episodes": 20},
    )


def metaworld_task(task: str, view: str) -> Task:
    shapes = manipulation.metaworld_shapes(view)
    return Task(
        name=f"metaworld-{task}" + ("" if view == "state" else f"-{view}"),
        score="success",
        obs_shapes=shapes,
        action_dim=4,
        make=partial(GymVector, partial(manipulation.MetaWorld, task, view)),
        side_by_side=100 if view == "state" else 20,
        demo_arrays=(*shapes, "action", "actions"),
        demo_convert=partial(manipulation.plain_demos, shapes=shapes, action_dim=4),
        demo_record=partial(manipulation.record_metaworld, task=task, view=view),
        demo_origin="Meta-World's scripted expert",
        demo_scripted=True,
        shift=manipulation.shift_scene if view == "points" else None,
        # The experts look at the newest state alone, and so do the policies: To = 1. Ten demonstrations cover few places: clouds
        # are measured from the hand, and the scene stands elsewhere in each minibatch.
        train={
            "obs_steps": 1,
            "horizon": 4,
            "action_steps": 3,
            "batch_size": 128,
            "steps": 3_000,
            "obs_noise": 0.005,
            "eval_every": 1_500,
            "eval_episodes": 20,
            "report_episodes": 20,
            **({"point_widths": (32, 64, 128), "cloud_origin": "robot", "shift": 0.1} if view == "points" else {}),
        },
    )


def robomimic_task(task: str, absolute: bool, view: str) -> Task:
    make = partial(robomimic_tasks.Robosuite, task, absolute, view)
    return Task(
        name=task + ("-abs" if absolute else "") + ("-image" if view == "image" else ""),
        score="success",
        obs_shapes=robomimic_tasks.shapes(task, view),
        action_dim=(10 if absolute else 7) * robomimic_tasks.SCENES[task].arms,
        make=partial(GymVector, make, processes=True),
        side_by_side=10,  # each of them builds its scene in two seconds
        demo_arrays=(*robomimic_tasks.shapes(task, view), "actions", "env_args"),
        demo_convert=partial(robomimic_tasks.robomimic_demos, task=task, absolute=absolute, view=view),
        demo_record=partial(scripted.record, task=task, absolute=absolute, view=view) if task in scripted.EXPERTS else None,
        demo_origin="our own scripted expert, not robomimic's humans",
        demo_scripted=task in scripted.EXPERTS,
        train={"steps": 4_000, "eval_every": 2_000, "eval_episodes": 30, "report_episodes": 50, "obs_noise": 0.005},
        finetune={
            "env_steps": 300_000,
            "num_envs": 10,
            "decisions": 40,
        },  # a process of 200 MB each; SILENT: untried beyond a start
    )


def ur5_task(task: str, view: str) -> Task:
    shapes = ur5_tasks.shapes(task, view)
    return Task(
        name=f"ur5-{task}" + ("-image" if view == "image" else ""),
        score="success",
        obs_shapes=shapes,
        action_dim=ur5_tasks.actions(task),
        make=partial(GymVector, partial(ur5_tasks.Table, task, view)),
        side_by_side=10,
        demo_arrays=(*shapes, "actions"),
        demo_convert=partial(manipulation.plain_demos, shapes=shapes, action_dim=ur5_tasks.actions(task)),
        demo_record=partial(ur5_tasks.record, task=task, view=view),
        demo_origin="our own scripted expert in the twin",
        demo_scripted=True,
        # The experts have no memory, and so To = 1. A step lasts for a tenth of a second: 0.4 s from one look to the next.
        train={
            "obs_steps": 1,
            "horizon": 8,
            "action_steps": 4,
            "obs_noise": 0.005,
            "latent_scale": 0.5,
            "batch_size": 128,
            "steps": 4_000,
            "eval_every": 2_000,
            "eval_episodes": 30,
            "report_episodes": 50,
        },
    )


TASKS = {
    "pusht": Task(
        name="pusht",
        score="largest coverage / 0.95",
        obs_shapes={"state": (20,)},
        action_dim=2,
        make=partial(GymVector, manipulation.pusht_env),
        make_training=partial(GymVector, manipulation.pusht_env, processes=True),
        demo_arrays=("state", "action"),
        demo_convert=manipulation.pusht_demos,
        demo_mirror=manipulation.pusht_mirror,
        # Success is rare and late: large batches, small noise that lasts for a chunk, slim latents (dbpo_finetune.py, Config).
        finetune={
            "env_steps": 4_000_000,
            "num_envs": 32,
            "decisions": 80,
            "minibatch": 640,
            "actor_lr": 1.5e-5,
            "actor_lr_end": 5e-6,
            "critic_only": 3,
            "gae_lambda": 0.9,
            "clip": 0.2,
            "target_kl": 0.05,
            "anchor": 0.05,
            "latent_scale": 0.4,
            "sigma_start": 0.04,
            "sigma_min": 0.02,
            "noise_color": 2.0,
            "eval_every": 20,
            "eval_episodes": 100,
        },
    ),
}
TASKS["pusht-image"] = Task(
    name="pusht-image",
    score=TASKS["pusht"].score,
    obs_shapes=manipulation.PUSHT_IMAGE_SHAPES,
    action_dim=2,
    make=partial(GymVector, partial(manipulation.pusht_env, "image")),
    demo_arrays=("img", "state", "action"),
    demo_convert=manipulation.pusht_image_demos,
    demo_record=manipulation.record_pusht_images,
    demo_origin="the embedded states, drawn",
    train={"batch_size": 64, "steps": 6_000, "eval_every": 3_000},
)
TASKS["blockpush"] = Task(
    name="blockpush",
    score="share of the two targets filled",
    stages=2,
    obs_shapes={"state": (16,)},
    action_dim=2,
    make=partial(GymVector, blockpush.BlockPush),
    demo_arrays=("state", "action"),
    demo_convert=partial(manipulation.plain_demos, shapes={"state": (16,)}, action_dim=2),
    demo_record=blockpush.record_blockpush,
    demo_origin="a scripted oracle",
    demo_scripted=True,
    # Millimetres decide which way a block slips: hardly any noise on the observation. Chunks are short because a point that
    # pushes soon slips; 2, 4 and 6 steps between two looks scored alike, by 50 episodes.
    train={
        "horizon": 8,
        "action_steps": 2,
        "latent_scale": 0.5,
        "obs_noise": 0.002,
        "cond_width": 256,
        "steps": 8_000,
        "eval_every": 4_000,
        "report_episodes": 50,
    },
)
TASKS["kitchen"] = Task(
    name="kitchen",
    score="subtasks done / 4",
    stages=kitchen.SUBTASKS,
    obs_shapes={"state": (kitchen.FEATURES,)},
    action_dim=kitchen.ACTIONS,
    make=partial(GymVector, kitchen.Kitchen),
    side_by_side=10,  # a model of 100 MB each
    demo_arrays=("observations/observation", "actions", "rewards", "observations_seq", "actions_seq"),
    demo_convert=kitchen.kitchen_demos,
    # To 2, Tp 16, Ta 8 are the defaults. SILENT: the rest is Push-T's, untried: the data could not be had here. The data hold the
    # noise of the sensors already.
    train={"steps": 30_000, "obs_noise": 0.01, "eval_every": 10_000, "eval_episodes": 20, "report_episodes": 50},
)
TASKS |= {task.name: task for body in BODIES for level in ("medium", "medium-expert") for task in [locomotion_task(body, level)]}
TASKS |= {
    task.name: task for name in manipulation.ADROIT for view in ("state", "image", "points") for task in [adroit_task(name, view)]
}
TASKS |= {
    task.name: task
    for name in robomimic_tasks.SCENES
    for absolute in (False, True)
    for view in ("state", "image")
    for task in [robomimic_task(name, absolute, view)]
}
TASKS |= {
    task.name: task
    for name in [name for group in manipulation.METAWORLD.values() for name in group]
    for view in ("state", "image", "points")
    for task in [metaworld_task(name, view)]
}
TASKS |= {task.name: task for name in ur5_tasks.SCENES for view in ("state", "image") for task in [ur5_task(name, view)]}
