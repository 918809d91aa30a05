"""Experience for off-policy learning: steps of whole episodes, and the chunks of h actions among them that count.

What an off-policy learner of chunks gets wrong most easily stands here alone: which h steps lie in one episode, what they earned,
and whether a value follows. A chunk that would cross an episode's end was never executed and is never drawn.

    N    steps of all episodes      h   horizon, actions of a chunk      C   numbers of an observation
    Da   numbers of an action       B   batch
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def n_step(
    reward: np.ndarray, terminated: np.ndarray, ends: np.ndarray, horizon: int, gamma: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the h steps from each step on earned, and whether they may be learned from.

    Args: reward (N,); terminated (N,) bool, the task ended with this step; ends (episodes,): index behind each last step.
    Returns:
        returns (N,): sum_{i<h} gamma^i r_{t+i}, up to the step that ended the task.
        alive (N,): 1 where the task goes on after the h steps, so that a value follows; else 0.
        valid (N,) bool: the h steps lie in one episode, and so does what they led to, if anything follows. A chunk across
            an episode's end was never executed: it has no part in the critic's loss, nor in L_BC (released: forgotten there).
    """
    rows = np.arange(len(reward))
    last = ends[np.searchsorted(ends, rows, "right")] - 1  # of each step's episode
    returns, alive = np.zeros(len(reward)), np.ones(len(reward))
    for i in range(horizon):
        step = np.minimum(rows + i, last)
        returns += gamma**i * alive * reward[step]
        alive = alive * ~terminated[step]
    valid = (rows + horizon - 1 <= last) & ((rows + horizon <= last) | (alive == 0))
    return returns, alive, valid


class ReplayBuffer:
    """Steps of whole episodes in preallocated tensors; the offline data lie first and stay. Draws only valid chunks (n_step)."""

    def __init__(self, capacity: int, features: int, action_dim: int, horizon: int, gamma: float, device: torch.device):
        """capacity: steps that will ever come, last observations of unfinished tasks included."""
        self.horizon, self.gamma, self.device = horizon, gamma, device
        self.obs = torch.zeros(capacity, features, device=device)
        self.actions = torch.zeros(capacity, action_dim, device=device)
        self.rewards, self.terminated = torch.zeros(capacity), torch.zeros(capacity, dtype=torch.bool)
        self.returns, self.alive = torch.zeros(capacity, device=device), torch.zeros(capacity, device=device)
        self.valid = torch.zeros(capacity, dtype=torch.bool)
        self.succeeded = torch.zeros(capacity, device=device)  # 1 for steps of episodes in which the task ended, else 0
        self.starts = torch.zeros(capacity, dtype=torch.long)  # rows where valid is true, in order
        self.size, self.chunks = 0, 0  # steps, valid starts
        self.ends: list[int] = []

    def add(self, obs: np.ndarray, actions: np.ndarray, rewards: np.ndarray, terminated: np.ndarray, ends: np.ndarray) -> None:
        """Whole episodes: obs (N, C) as `condition` gives it, actions (N, Da) normalised, rewards (N,), terminated (N,) bool,
        ends as in n_step.

        Raises: ValueError for rewards that are not finite, and more steps than there is room for.
        """
        first, last = self.size, self.size + len(rewards)
        rewards = np.asarray(rewards, np.float32)  # as stored: a resumed run adds them up from there
        if not np.isfinite(rewards).all():
            raise ValueError(f"the rewards hold NaN or infinity, first at step {int(np.flatnonzero(~np.isfinite(rewards))[0])}")
        if last > len(self.obs):
            raise ValueError(f"the buffer has room for {len(self.obs):,} steps; {last:,} came")
        returns, alive, valid = n_step(rewards, terminated, ends, self.horizon, self.gamma)
        starts = torch.from_numpy(first + np.flatnonzero(valid))
        lengths = np.diff(ends, prepend=0)
        succeeded = np.repeat(np.add.reduceat(np.asarray(terminated, int), ends - lengths) > 0, lengths)
        for store, values in (
            (self.obs, obs),
            (self.actions, actions),
            (self.rewards, rewards),
            (self.terminated, terminated),
            (self.returns, returns),
            (self.alive, alive),
            (self.valid, valid),
            (self.succeeded, succeeded),
        ):
            store[first:last] = torch.from_numpy(np.asarray(values)).to(store.dtype)
        self.starts[self.chunks : self.chunks + len(starts)] = starts
        self.size, self.chunks = last, self.chunks + len(starts)
        self.ends += [first + int(end) for end in ends]

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """cond (B, C), chunk (B, h, Da), returns (B,), alive (B,), cond after the chunk (B, C), 1 for steps of a success,
        else 0, (B,). All chunks have equal chance."""
        which = torch.randint(self.chunks, (batch,), generator=generator)
        t = self.starts[which].to(self.device)
        chunk = self.actions[t.unsqueeze(1) + torch.arange(self.horizon, device=self.device)]
        following = (t + self.horizon).clamp(max=self.size - 1)  # where nothing follows, alive is 0 and any row will do
        return self.obs[t], chunk, self.returns[t], self.alive[t], self.obs[following], self.succeeded[t]

    def state(self, since: int) -> dict:
        """All steps from row `since` on."""
        rows = slice(since, self.size)
        kept = {name: getattr(self, name)[rows].cpu() for name in ("obs", "actions", "rewards", "terminated")}
        return {**kept, "ends": torch.tensor([end - since for end in self.ends if end > since])}

    def load(self, state: dict) -> None:
        if len(state["ends"]):
            self.add(**{name: value.numpy() for name, value in state.items()})


class Recorder:
    """The unfinished episodes of N environments, step by step; a finished one goes to the buffer."""

    def __init__(self, num_envs: int):
        self.rows: list[list[tuple]] = [[] for _ in range(num_envs)]

    def note(self, i: int, obs: np.ndarray, action: np.ndarray, reward: float, terminated: bool) -> None:
        self.rows[i].append((obs, action, reward, terminated))

    def finish(self, i: int, final: np.ndarray, buffer: ReplayBuffer) -> None:
        """final: the observation after the last step, whose value counts where the time limit ended the episode."""
        if not self.rows[i][-1][3]:
            self.rows[i].append((final, np.zeros_like(self.rows[i][-1][1]), 0.0, False))
        buffer.add(*(np.array(column) for column in zip(*self.rows[i], strict=True)), np.array([len(self.rows[i])]))
        self.rows[i] = []

    def state(self) -> list:
        return [[torch.from_numpy(np.array(column)) for column in zip(*mine, strict=True)] for mine in self.rows]

    def load(self, state: list) -> None:
        self.rows = [list(zip(*(column.numpy() for column in mine), strict=True)) for mine in state]
