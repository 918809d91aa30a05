"""Vectorised environments, stepped by whole action chunks.

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

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import gymnasium
import numpy as np
import torch

Arrays = dict[str, np.ndarray]


class SimulationError(RuntimeError):
    """The simulator failed: NaN, an exception of its own, a worker process that died."""


def check_chunks(chunks: np.ndarray, num_envs: int, action_dim: int) -> None:
    if chunks.ndim != 3 or len(chunks) != num_envs or chunks.shape[1] < 1 or chunks.shape[2] != action_dim:
        raise ValueError(f"chunks has shape {chunks.shape}; it must be ({num_envs}, Ta, {action_dim})")


class Episodes:
    """The training episodes of N environments: starts the next one where one ended, and remembers what it takes to repeat them.

    An environment is a function of its seed and its chunks, so a resumed run repeats the unfinished episodes from
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
            self._kill()
            raise SimulationError(
                f"a worker process of the environments died ({type(error).__name__}); see its output"
            ) from error
        except Exception as error:  # whatever a simulator raises
            raise SimulationError(f"an environment raised {type(error).__name__}: {error}") from error

    def record(self, which: Sequence[int]) -> None:
        self.recorded = list(which)
        self._run(lambda: self.vector.call("record", tuple(which)))

    @property
    def frames(self) -> list[list[np.ndarray]]:
        films = self._run(lambda: self.vector.get_attr("film"))
        return [films[i] for i in self.recorded]

    def close(self) -> None:
        try:
            self.vector.close()
        except (EOFError, ConnectionError):
            self._kill()

    def _kill(self) -> None:
        """A worker is dead: so shall be the others. gymnasium's own close would wait for the answer of the dead one for ever."""
        for process in getattr(self.vector, "processes", ()):
            process.kill()
        self.vector.closed = True


def _chunked(make: Callable[[], gymnasium.Env], obs_steps: int, number: int) -> Chunked:
    if multiprocessing.parent_process() is not None:  # a worker: Ctrl-C is its parent's to hear, who ends it with SIGTERM,
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # and handlers that it inherited would keep it alive
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return Chunked(make(), obs_steps, number)
