"""Drifting Field Policy (DFP): a one-step policy, improved off-policy towards the actions that a critic likes best.

    python dfp_finetune.py --env cube-single-task2 --offline-steps 300 --online-steps 300     proves the installation
    python dfp_finetune.py --env cube-single-task2                     records play first, then learns; an hour on two cores
    python dfp_finetune.py --env cube-double-task2 --preset paper      the published settings; wants a GPU
    python dfp_finetune.py --env cube-single-task2 --resume            go on where a run was stopped

The loss is DBP's (drift.py) with other positives. Offline, the positive is the chunk of the data: L_BC. Online, a second term
with the same samples is added, L_BC + lambda L_topK, whose positives are those K of N chunks, proposed by an older self, that the
critic values highest. No gradient of the critic enters the policy: the drift pulls towards good actions that exist.

    cond     observation                     (B, C)         chunk    h actions of the data, normalised   (B, h, Da)
    z        latents                         (B, ., h, Da)  Q        mean of two critics: the return to come
    N_gen    samples that are trained        8              N        proposals of pi_old                 16
    K        of them that are positives      4              N'       candidates when acting, of which the best is executed

Critic: Q(o_t, chunk) -> sum_{i<h} gamma^i r_{t+i} + gamma^h Qbar(o_{t+h}, a'), a' the best of N' samples by the critic, valued
by its slow copy; nothing follows a step that ended the task. Acting: best of N', then the chunk runs to its end without another
look. One call of the network gives all candidates. Source: Drifting Field Policy, Koo et al. 2026, and its released settings.

All results are in runs/<env>/dfp/: offline.pt and dfp.pt (policy and critic; evaluate.py reads them), state.pt (what --resume
needs, the online steps of the buffer included), config.json, metrics.csv, curve.png, rollout.gif, result.json.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import demos
import envs
import evaluate
import vector
from common import (
    Graphed,
    RunLog,
    UserError,
    catch_signals,
    claim_folder,
    plain_errors,
    read_config,
    run_main,
    save_checkpoint,
    saved_before,
    seed_everything,
    usable_device,
)
from drift import dbp_loss
from encoders import kind
from policy import Policy, PolicyConfig, best_of
from replay import Recorder, ReplayBuffer


@dataclasses.dataclass(frozen=True)
class Config:
    """Defaults are the preset `fast`; the preset `paper` changes what PRESETS lists."""

    env: str = "cube-single-task2"  # task, a row of envs.TASKS with state observations
    demos: str = "embedded"  # offline data: embedded, official, scripted:N (episodes), minari:ID or a path
    ckpt: str = ""  # stage-1 policy to start the actor from; empty: from scratch
    method: Literal["dfp", "best-of-n", "random-k", "gradient"] = "dfp"  # rivals on the same path, see METHODS
    preset: Literal["fast", "paper"] = "fast"  # fast: two cores, an hour; paper: the published settings
    out: str = ""  # run folder; empty: runs/<env>/dfp
    resume: bool = False  # go on from state.pt in the run folder, bit for bit
    seed: int = 0  # of networks, minibatches, latents and episode starts
    device: str = "auto"  # auto (cuda where there is one), cpu, cuda, cuda:1, ...
    threads: int = 0  # of torch on the CPU; 0: as torch likes
    compile: bool = False  # torch.compile the networks

    offline_steps: int = 20_000  # updates before the first step in the environment; published: 1,000,000
    online_steps: int = 20_000  # environment steps after that; published: 1,000,000
    start_after: int = 2_000  # of these, steps before the first online update; published: 5,000
    updates_per_step: float = 1.0  # online updates per environment step, such as 0.25 for 8 environments; published: 1
    num_envs: int = 1  # environments; published: 1

    horizon: int = 5  # h, actions of a chunk, all executed; published: 5
    gamma: float = 0.99  # discount per step; published: 0.99
    batch_size: int = 128  # B; published: 256
    lr: float = 3e-4  # of Adam, actor and critic; published: 3e-4
    hypotheses: int = 4  # N_gen; published: 8
    temperatures: tuple[float, ...] = (0.05,)  # T of the drift; published: 0.05, on RoboMimic 0.005 and 0.05
    proposals: int = 16  # N; published: 16
    positives: int = 4  # K; published: 4, on RoboMimic 2
    topk_weight: float = 0.5  # lambda; published: 0.5. Of the value's term where --method is gradient
    clone: Literal["all", "successes"] = "all"  # what L_BC clones; DEPARTS successes: only episodes in which the task ended
    latent_scale: float = 0.25  # std of the latents of proposals, and when acting; DEPARTS published: 1, see `Learner.latents`
    explore: float = 0.0  # std of noise, one draw per chunk, on what is executed online and on proposals; DEPARTS above 0
    candidates: int = 8  # N', of acting and of the critic's target; published: 16, on RoboMimic 4
    old_rate: float = 1e-4  # pi_old follows the actor by so much per update; published: 1e-4
    target_rate: float = 5e-3  # the critic's slow copy, likewise; published: 0.005
    acting_rate: float = 1e-3  # the actor's average, which acts, likewise; DEPARTS published: 1, the newest, see `Learner`

    state_scale: Literal["range", "std"] = "range"  # states: to [-1, 1], or by their mean and std; DEPARTS std
    backbone: Literal["mlp", "tanh", "plain"] = "mlp"  # mlp: small residual MLP; tanh: smooth; plain: published, 4 layers of 512
    cond_width: int = 256  # mlp, tanh: features of the observation trunk
    width: int = 128  # mlp, tanh: features of the chunk trunk; plain: of each layer
    depth: int = 2  # mlp: residual blocks of each trunk; tanh: layers of the observation's, blocks of the chunk's; plain: layers
    critic_trunk: int = 256  # features of two layers of the critics that see the observation alone; 0: none, as published
    critic_width: int = 128  # features of each layer of the critics; published: 512
    critic_depth: int = 3  # their layers; published: 4

    eval_every: int = 10_000  # updates or environment steps between evaluations; the best by success is kept
    eval_episodes: int = 30  # episodes of such an evaluation, starts from seed 50,000 on
    report_episodes: int = 50  # episodes of the final ones, starts from seed 100,000 on
    save_every: int = 5_000  # updates or environment steps between saves of state.pt


PRESETS: dict[str, dict] = {
    "fast": {},
    "paper": {
        "offline_steps": 1_000_000,
        "online_steps": 1_000_000,
        "start_after": 5_000,
        "candidates": 16,
        "backbone": "plain",
        "width": 512,
        "depth": 4,
        "latent_scale": 1.0,
        "acting_rate": 1.0,
        "batch_size": 256,
        "hypotheses": 8,
        "critic_trunk": 0,
        "critic_width": 512,
        "critic_depth": 4,
        "eval_every": 100_000,
        "save_every": 50_000,
    },
}

METHODS = {
    "dfp": "L_BC, and online lambda L_topK",
    "best-of-n": "L_BC alone; the critic only picks among candidates (as QC-BFN, with the drift in place of a flow)",
    "random-k": "as dfp, with K random proposals in place of the best",
    "gradient": "L_BC and, offline and online, lambda times minus Q of the policy's own sample, in units of mean |Q| (as FQL)",
}
TRAIN_SEED = 2_000_000  # first start of the training episodes
LOG_EVERY = 200  # updates or environment steps between rows of metrics.csv
FREE_ON_RESUME = {"resume", "out", "device", "compile"}  # what --resume may change
ONLINE = {"online_steps", "start_after", "updates_per_step", "proposals", "positives", "topk_weight", "old_rate", "explore"}
ONLINE |= {"method", "eval_every", "save_every"}  # what it may change, too, as long as no online step was made


# --- the equations ------------------------------------------------------------------------------------------------------


def critic_target(returns: Tensor, alive: Tensor, next_value: Tensor, discount: float) -> Tensor:
    """sum_{i<h} gamma^i r_{t+i} + gamma^h * alive * Qbar(o_{t+h}, a'). All (B,); discount: gamma^h."""
    return returns + discount * alive * next_value


def critic_loss(q: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each critic, averaged over both. q (E, B), target (B,)."""
    return (q - target).square().mean()


def top_k_positives(chunks: Tensor, q: Tensor, k: int) -> Tensor:
    """The K proposals of highest Q of each observation. chunks (B, N, S), q (B, N) -> (B, K, S). Raises ValueError for K > N."""
    if not 1 <= k <= chunks.shape[1]:
        raise ValueError(f"K is {k}; it must be between 1 and the number of proposals N = {chunks.shape[1]}")
    best = q.topk(k, dim=1, sorted=False).indices  #                            (B, K)
    return chunks.gather(1, best.unsqueeze(-1).expand(-1, -1, chunks.shape[-1]))


def actor_loss(
    generated: Tensor,
    expert: Tensor,
    positives: Tensor | None,
    weight: float,
    temperatures: tuple[float, ...],
    cloned: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = L_BC + lambda L_topK, two drift losses of the same samples; L_BC alone without positives.

    Args: generated (B, N_gen, S), the policy's samples, which are also the negatives; expert (B, 1, S), the chunk of the data;
        positives (B, K, S) or None; weight: lambda; cloned (B,): 0 where L_BC shall not count, else 1, None for 1 everywhere.
    Returns: loss, a scalar, and dbp_loss's diagnostics of L_BC.
    """
    loss, diagnostics = dbp_loss(generated, expert, temperatures=temperatures)
    loss = (loss if cloned is None else loss * cloned).mean()
    if positives is not None:
        improvement, _ = dbp_loss(generated, positives, temperatures=temperatures)
        loss = loss + weight * improvement.mean()
    return loss, diagnostics


@torch.no_grad()  # with gradients the copy would hold on to every step's graph
def follow(slow: torch.nn.Module, newest: torch.nn.Module, rate: float) -> None:
    """The slow copy's weights move by `rate` of the way towards the newest ones."""
    torch._foreach_lerp_(list(slow.parameters()), list(newest.parameters()), rate)


# --- the learner ----------------------------------------------------------------------------------------------------------


class Learner:
    """Actor, critics, their slow copies pi_old and Qbar, and one update of all. One call of a network serves all candidates.

    `step[online](*batch)` makes one update; on a GPU it replays a recording of `update`: hundreds of small kernels, one launch.

    `acting` is the policy that collects, is evaluated and saved. DEPARTS: it is not the newest one but an average of the actor,
    as in stage 1, that chooses by Qbar. One step can cost the newest policy a sixth of its successes (benchmark/trials.md).
    """

    def __init__(self, policy: Policy, cfg: Config, generator: torch.Generator):
        """generator: of the latents, on the policy's device."""
        self.cfg, self.policy, self.critic, self.generator = cfg, policy, policy.critic, generator
        self.acting = copy.deepcopy(policy).requires_grad_(False)
        self.target_critic = self.acting.critic
        self.old = copy.deepcopy(policy.backbone).requires_grad_(False)
        self.actor_weights = list(policy.backbone.parameters())
        self.on_gpu = self.actor_weights[0].is_cuda
        adam = {"lr": cfg.lr, "fused": True, "capturable": self.on_gpu}
        self.actor_optimizer = torch.optim.Adam(self.actor_weights, **adam)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), **adam)
        self.shape = cfg.horizon, policy.config.action_dim  # of a chunk
        if cfg.compile:
            for module in (policy.backbone, self.critic, self.target_critic, self.old):
                module.compile()
        self.step: dict[bool, Callable] = {online: partial(self.update, online) for online in (False, True)}
        if self.on_gpu:
            self.step = {online: Graphed(update, generator) for online, update in self.step.items()}

    def latents(self, number: int, scale: float = 1.0) -> Tensor:
        """(B, number, h, Da), with std `scale`: 1 for the samples that are trained and for the critics' target.

        DEPARTS from 1 for proposals and when acting: the rare samples far from all data are those of which the critics know
        least, and the more candidates there are, the surer the best of them is one of these (benchmark/trials.md). In the
        target they stay: near the middle of the samples the best of them is what the data do, and play does nothing that it
        values.
        """
        shape = (self.cfg.batch_size, number, *self.shape)
        return scale * torch.randn(shape, generator=self.generator, device=self.generator.device)

    def next_value(self, cond: Tensor) -> Tensor:
        """What the best of N' samples is worth by the slow critics: mean of both. cond (B, C) -> (B,)."""
        chosen = best_of(*self.policy.propose(cond, self.latents(self.cfg.candidates)))
        return self.target_critic(cond, chosen.unsqueeze(1)).mean(0)[:, 0]

    def proposals(self, cond: Tensor) -> tuple[Tensor, Tensor]:
        """N chunks of pi_old (B, N, h, Da), and the critics' mean of each (B, N)."""
        chunks = self.old(self.latents(self.cfg.proposals, self.cfg.latent_scale), cond).clamp(-1, 1)
        chunks = self.explored(chunks, self.generator) if self.cfg.explore else chunks
        return chunks, self.critic(cond, chunks).mean(0)

    def explored(self, chunks: Tensor, generator: torch.Generator) -> Tensor:
        """Chunks (..., h, Da), normalised actions, each moved by a draw that lasts for it, within the data's range.

        DEPARTS with --explore above 0. Play has many ways to choose from; ten demonstrations of one expert have one: its samples
        differ by less than the critics can tell, and who fails from a start fails from it again (benchmark/trials.md).
        """
        shape = (*chunks.shape[:-2], 1, chunks.shape[-1])
        noise = torch.randn(shape, generator=generator, device=generator.device).to(chunks.device)
        return (chunks + self.cfg.explore * noise).clamp(-1, 1)

    def update(
        self, online: bool, cond: Tensor, chunk: Tensor, returns: Tensor, alive: Tensor, next_cond: Tensor, succeeded: Tensor
    ) -> dict[str, Tensor]:
        """One step of the critics, of their slow copy, of the actor and, online, of pi_old. Tensors: see ReplayBuffer.sample."""
        cfg = self.cfg

        # Critics.
        with torch.no_grad():
            target = critic_target(returns, alive, self.next_value(next_cond), cfg.gamma**cfg.horizon)
        self.critic.requires_grad_(True)
        q = self.critic(cond, chunk.unsqueeze(1))[..., 0]  #                       (E, B)
        loss = critic_loss(q, target)
        self.critic_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.critic_optimizer.step()
        follow(self.target_critic, self.critic, cfg.target_rate)

        # Actor: towards the data's chunk and, online, towards the best of pi_old's proposals. No gradient enters the critics.
        self.critic.requires_grad_(False)
        row = {"critic_loss": loss.detach(), "q": q.detach().mean(), "q_error": loss.detach().sqrt()}
        generated = self.policy.backbone(self.latents(cfg.hypotheses), cond)  # (B, N_gen, h, Da)
        positives = None
        if online and cfg.method in ("dfp", "random-k"):
            with torch.no_grad():
                proposals, value = self.proposals(cond)
            rank = value
            if cfg.method == "random-k":
                rank = torch.rand(value.shape, generator=self.generator, device=value.device)
            positives = top_k_positives(proposals.flatten(2), rank, cfg.positives)
            row["gain"] = value.gather(1, rank.topk(cfg.positives, 1).indices).mean() - value.mean()
        expert = chunk.flatten(1).unsqueeze(1)  #                                  (B, 1, S)
        cloned = succeeded if cfg.clone == "successes" else None
        loss, diagnostics = actor_loss(generated.flatten(2), expert, positives, cfg.topk_weight, cfg.temperatures, cloned)
        if cfg.method == "gradient":  # the rival: uphill through the critics
            value = self.critic(cond, generated.clamp(-1, 1))
            loss = loss - cfg.topk_weight * value.mean() / value.detach().abs().mean().clamp_min(1e-6)
        self.actor_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.actor_optimizer.step()
        follow(self.acting.backbone, self.policy.backbone, cfg.acting_rate)
        if online:
            follow(self.old, self.policy.backbone, cfg.old_rate)
        return {**row, **diagnostics}

    def state(self) -> dict:
        parts = ("acting", "old", "actor_optimizer", "critic_optimizer")
        latents = {"latents": self.generator.get_state()}
        return {"policy": self.policy.state(), **{name: getattr(self, name).state_dict() for name in parts}, **latents}

    def load(self, state: dict) -> None:
        self.policy.load_state_dict(state["policy"]["weights"])
        for name in ("acting", "old", "actor_optimizer", "critic_optimizer"):
            getattr(self, name).load_state_dict(state[name])
        for group in self.actor_optimizer.param_groups + self.critic_optimizer.param_groups:
            group["capturable"] = self.on_gpu  # the run may have begun on another device
        saved = state.get("latents", state["generator"])  # they were one until there were recordings
        if len(saved) == len(self.generator.get_state()):  # the generators of another device do not fit here
            self.generator.set_state(saved)


# --- the script ---------------------------------------------------------------------------------------------------------


def check(cfg: Config) -> None:
    """Refuse settings that cannot work. Raises UserError, status 2."""
    at_least_1 = ("num_envs", "horizon", "batch_size", "hypotheses", "proposals", "positives")
    at_least_1 += ("width", "depth", "cond_width", "critic_width", "critic_depth")
    at_least_1 += ("eval_every", "eval_episodes", "report_episodes", "save_every", "offline_steps")
    for names, holds, text in (
        (at_least_1, lambda x: x >= 1, "at least 1"),
        (("online_steps", "start_after", "threads", "seed", "critic_trunk"), lambda x: 0 <= x < 2**63, "a number from 0 on"),
        (("lr", "latent_scale", "updates_per_step"), lambda x: 0 < x < math.inf, "above 0"),
        (("topk_weight", "explore"), lambda x: 0 <= x < math.inf, "a number from 0 on"),
        (("gamma", "old_rate", "target_rate", "acting_rate"), lambda x: 0 <= x <= 1, "between 0 and 1"),
        (("candidates",), lambda x: x >= 2, "at least 2: the critic picks one of them"),
    ):
        for name in names:
            if not holds(getattr(cfg, name)):
                raise UserError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}; it must be {text}", 2)
    if cfg.positives > cfg.proposals:
        raise UserError(f"--positives is {cfg.positives}; K of N = {cfg.proposals} proposals (--proposals) cannot be more", 2)
    if not cfg.temperatures or any(not 0 < tau < math.inf for tau in cfg.temperatures):
        raise UserError(f"--temperatures is {cfg.temperatures}; each must be above 0, for example 0.05", 2)


def check_branch(cfg: Config, state: dict | None) -> None:
    """One offline phase may be continued in several ways, as long as it would not have been another. Raises UserError."""
    if state is None:
        return
    then = state["config"]
    acts_offline = {"method", "topk_weight"} if "gradient" in (cfg.method, then["method"]) else set()
    for name in sorted(ONLINE):
        if getattr(cfg, name) != then[name] and (state["step"] > cfg.offline_steps or name in acts_offline):
            raise UserError(
                f"--{name.replace('_', '-')} is {getattr(cfg, name)}, but the run in {cfg.out} has {then[name]} and has used it; "
                "omit the flag to resume it",
                2,
            )


def defaults(given: Config) -> Config:
    with plain_errors(2):
        task = envs.get_task(given.env)
    return Config(**{**task.improve, **PRESETS[given.preset]}, preset=given.preset)


def offline_data(cfg: Config, task: envs.Task) -> tuple[demos.Demos, np.ndarray, np.ndarray]:
    """The data, and reward and end of each of their steps."""
    made = {"record": task.demo_record, "origin": task.demo_origin, "record_expert": task.demo_expert}
    data = demos.load(cfg.demos, cfg.env, task.demo_arrays, task.demo_convert, scripted=task.demo_scripted, **made)
    if task.demo_rewards is not None:
        return data, *task.demo_rewards(data.obs)
    success = np.zeros(len(data.actions), bool)
    success[data.episode_ends - 1] = True  # every demonstration ends with it
    if task.demo_success is not None:  # ... and some go on after it
        success |= task.demo_success(data.obs, data.episode_ends)
    free = success
    if task.reached is not None:  # by the step: the observation after it, the last of all that there is for an episode's last
        after = np.arange(1, len(success) + 1)
        after[data.episode_ends - 1] -= 1
        free = success | task.reached(data.obs)[after]
    return data, free - 1.0, success


def make_policy(cfg: Config, task: envs.Task, data: demos.Demos) -> Policy:
    """A new one, or that of stage 1, and a critic."""
    settings = {
        name: getattr(cfg, name) for name in ("candidates", "latent_scale", "critic_trunk", "critic_width", "critic_depth")
    }
    if cfg.ckpt:
        start = Policy.load(cfg.ckpt)
        c = start.config
        if c.candidates > 1:
            raise UserError(f"--ckpt {cfg.ckpt} is a policy of this script; it takes one of stage 1. --resume goes on with a run")
        wanted = {"env": cfg.env, "obs_steps": 1, "horizon": cfg.horizon, "action_steps": cfg.horizon}
        differ = [f"{name} {getattr(c, name)} (here {value})" for name, value in wanted.items() if getattr(c, name) != value]
        if differ:
            raise UserError(
                f"--ckpt {cfg.ckpt} does not fit: {', '.join(differ)}. Here chunks run to their end and To is 1; "
                f"train with --obs-steps 1 --horizon {cfg.horizon} --action-steps {cfg.horizon}"
            )
        policy = Policy(dataclasses.replace(c, **settings))
        policy.load_state_dict({**policy.state_dict(), **start.state_dict()})
        return policy
    policy = Policy(
        PolicyConfig(
            env=cfg.env,
            obs_shapes=task.obs_shapes,
            action_dim=task.action_dim,
            obs_steps=1,
            horizon=cfg.horizon,
            action_steps=cfg.horizon,
            state_scale=cfg.state_scale,
            backbone=cfg.backbone,
            cond_width=cfg.cond_width,
            cond_depth=cfg.depth,
            width=cfg.width,
            depth=cfg.depth,
            **settings,
        )
    )
    policy.fit_normalizers(data.obs, data.actions)
    return policy


def updates_due(steps: int, cfg: Config) -> int:
    """How many updates follow so many online steps, of which the last num_envs are new."""
    before = steps - cfg.num_envs
    return int(steps * cfg.updates_per_step) - int(before * cfg.updates_per_step) if steps > cfg.start_after else 0


@torch.no_grad()
def condition(policy: Policy, obs: dict[str, np.ndarray]) -> np.ndarray:
    """What the networks see of states, which nothing encodes: normalised, one after the other. {key: (N, *shape)} -> (N, C)."""
    device = policy.normalize_action.center.device
    return policy.encode({key: torch.from_numpy(value).to(device).unsqueeze(1) for key, value in obs.items()}).cpu().numpy()


def plot_curves(log: RunLog, task: envs.Task, offline_steps: int, path: Path) -> None:
    """Evaluations and training episodes; critic; drift. The offline phase is shaded."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    steps, share = (np.array(values) for values in log.column("episode_success"))
    parts = [part for part in np.array_split(np.arange(len(steps)), 20) if len(part)]  # a row holds few episodes: 0 or 1
    means = ([values[part].mean() for part in parts] for values in (steps, share))
    axes[0].plot(*means, ".-", color="tab:gray", label="training episodes, success")
    axes[0].plot(*log.column("success_rate"), "o-", label="evaluation, success")
    if log.column("score")[1] != log.column("success_rate")[1]:
        axes[0].plot(*log.column("score"), "o-", label=f"evaluation, score: {task.score}")
    axes[0].set(title="success", ylim=(-0.02, 1.05))
    axes[1].plot(*log.column("q"), label="Q of the data's chunks")
    axes[1].plot(*log.column("q_error"), label="RMS error against the target")
    axes[1].set(title="critic")
    axes[2].plot(*log.column("distance"), label="samples to the data's chunk")
    axes[2].plot(*log.column("gain"), label="Q of the positives - Q of all proposals")
    axes[2].set(title="actor", ylim=(0, None))
    for ax in axes:
        ax.axvspan(0, offline_steps, color="tab:gray", alpha=0.12)
        ax.set_xlabel("updates offline, then environment steps")
        ax.grid(alpha=0.3)
        ax.legend()
    with plain_errors():
        figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    began = time.perf_counter()

    # ---- config -----------------------------------------------------------------------------------------------------
    cfg, state = read_config(Config, __doc__, defaults, "runs/{env}/dfp", FREE_ON_RESUME | ONLINE)
    check(cfg)
    check_branch(cfg, state)
    device = usable_device(cfg.device)
    if device.type == "cpu" and cfg.threads:
        torch.set_num_threads(cfg.threads)

    # ---- seed -------------------------------------------------------------------------------------------------------
    seed_everything(cfg.seed)
    generator = torch.Generator().manual_seed(cfg.seed)  # minibatches and latents
    latents = generator if device.type == "cpu" else torch.Generator(device).manual_seed(cfg.seed)  # of the updates

    # ---- data and environments --------------------------------------------------------------------------------------
    with plain_errors(2):
        task = envs.get_task(cfg.env)
        if set(map(kind, task.obs_shapes.values())) != {"state"}:
            raise ValueError(f"{cfg.env} has the observations {task.obs_shapes}; dfp_finetune.py takes tasks with states alone")
        if not task.sparse:
            raise ValueError(f"{cfg.env}: its reward is not success; dfp_finetune.py takes tasks that end with success")
    with plain_errors():
        data, rewards, terminated = offline_data(cfg, task)
        task.check(1)
        env = (task.make_training or task.make)(cfg.num_envs, 1)
        episodes = vector.Episodes(env, TRAIN_SEED, 1)
    if task.demo_rewards is None:
        sooner = " if it has not come sooner" if task.demo_success is not None else ""
        free = "" if task.reached is None else " away from the goal"
        print(f"rewards: -1 per step{free}; the end of every demonstration is taken for its success{sooner}")
    if cfg.clone == "successes" and not terminated.any():
        raise UserError("--clone successes: the task succeeds nowhere in these data; there is nothing to clone")
    if not terminated.any():
        print("the task succeeds nowhere in these data: the critic can learn only that every step costs 1, until it does")

    # ---- model ------------------------------------------------------------------------------------------------------
    with plain_errors():
        policy = make_policy(cfg, task, data).to(device).eval()
    learner = Learner(policy, cfg, latents)
    with plain_errors():
        # of an unfinished episode the last observation is kept, too: at most one row more per environment step
        buffer = ReplayBuffer(
            len(rewards) + 2 * cfg.online_steps + cfg.num_envs,
            policy.encoder.feature_dim,
            task.action_dim,
            cfg.horizon,
            cfg.gamma,
            device,
        )
        actions = policy.normalize_action(torch.from_numpy(data.actions).to(device)).cpu().numpy()
        buffer.add(condition(policy, data.obs), actions, rewards, terminated, data.episode_ends)
        if not buffer.chunks:
            raise ValueError(f"{data.source}: no episode is as long as a chunk of {cfg.horizon} steps")
    offline_rows, recorder = buffer.size, Recorder(cfg.num_envs)
    actor, critics = (sum(p.numel() for p in part.parameters()) for part in (policy.backbone, policy.critic))
    print(
        f"DFP on {cfg.env}: {data.source}, {len(data.episode_ends)} episodes, {offline_rows:,} steps, of which "
        f"{int(terminated.sum()):,} succeed\n"
        f"{cfg.method}: {METHODS[cfg.method]}\n"
        f"actor {actor:,}, critics {critics:,} parameters, {device}, "
        f"{torch.get_num_threads()} threads; {cfg.offline_steps:,} updates, then {cfg.online_steps:,} steps -> {cfg.out}",
        flush=True,
    )

    # ---- resume -----------------------------------------------------------------------------------------------------
    out, step, best, seconds, offline_line = Path(cfg.out), 0, -math.inf, 0.0, {}
    plans = np.zeros((cfg.num_envs, cfg.horizon, task.action_dim), np.float32)  # chunks on their way
    successes: list[float] = []  # of the training episodes since the last row of the log
    fingerprint = [
        offline_rows,
        float(buffer.obs[:offline_rows].double().sum()),
        float(buffer.actions[:offline_rows].double().sum()),
    ]
    if state is not None:
        if state["data"] != fingerprint:
            raise UserError(f"the run in {out} began with other offline data than {data.source}; give the same with --demos")
        learner.load(state)
        generator.set_state(state["generator"])
        buffer.load(state["buffer"])
        recorder.load(state["recorder"])
        episodes.load(state["episodes"])
        plans, successes = state["plans"].numpy(), state["successes"]
        step, best, seconds, offline_line = state["step"], state["best"], state["seconds"], state["offline"]
        print(f"resumed at step {step:,}")
    claim_folder(out, state is None, print)
    with plain_errors():
        (out / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=2) + "\n")
        forces = [f"force_rms_{tau:g}" for tau in cfg.temperatures]
        columns = ["seconds", "critic_loss", "q", "q_error", "distance", "scale", *forces, "gain", "episode_success"]
        log = RunLog(out, [*columns, *evaluate.COLUMNS], step)
    signals = catch_signals()

    def reported(name: str, **settings) -> dict[str, float]:  # the policy that acts now, on starts that no decision has seen
        acting = copy.copy(learner.acting)
        acting.config = dataclasses.replace(acting.config, **settings)
        results = evaluate.rollout(acting, task, list(range(evaluate.REPORT_SEED, evaluate.REPORT_SEED + cfg.report_episodes)))
        return {f"{name}_{key}": round(float(results[key].mean()), 4) for key in ("score", "success", "return")}

    def wall() -> float:  # seconds of this run, earlier sessions included
        return seconds + time.perf_counter() - began

    kept = partial(saved_before, out, "dfp.pt", "state.pt")  # for messages

    def save_state() -> None:
        if not all(torch.isfinite(weight).all() for weight in policy.parameters()):
            raise UserError(f"step {step:,}: the weights are not finite. {kept()} Try a smaller --lr.")
        content = {
            "config": dataclasses.asdict(cfg),
            **learner.state(),
            "generator": generator.get_state(),
            "data": fingerprint,
            "buffer": buffer.state(offline_rows),
            "recorder": recorder.state(),
            "episodes": episodes.state(),
            "plans": torch.from_numpy(plans),
            "successes": successes,
            "step": step,
            "best": best,
            "seconds": wall(),
            "offline": offline_line,
        }
        save_checkpoint(content, out / "state.pt")

    # ---- loop: collect, update, log, evaluate, save -------------------------------------------------------------------
    total = cfg.offline_steps + cfg.online_steps
    bar = tqdm(total=total, initial=step, unit="step", smoothing=0.05, dynamic_ncols=True)
    shown: dict[str, str] = {}
    while step < total:
        online, row = step >= cfg.offline_steps, {}
        if not online:
            records = [learner.step[False](*buffer.sample(cfg.batch_size, generator))]
            step += 1
        else:
            if step == cfg.offline_steps:
                learner.old.load_state_dict(learner.acting.backbone.state_dict())  # pi_old starts as the actor
            # Collect: every chunk runs to its end; a new one follows, or the next episode.
            deciding = [i for i, mine in enumerate(recorder.rows) if len(mine) % cfg.horizon == 0]
            observation = {key: value.copy() for key, value in episodes.obs.items()}
            if deciding:
                seen = {key: value[deciding] for key, value in observation.items()}
                chosen = learner.acting.act(seen, generator=generator)
                if cfg.explore:
                    chosen = learner.explored(policy.normalize_action(chosen), generator)
                    chosen = policy.normalize_action.inverse(chosen)
                plans[deciding] = chosen.cpu().numpy()
            at = [len(mine) % cfg.horizon for mine in recorder.rows]
            acted = plans[np.arange(cfg.num_envs), at]  #                          (N, Da)
            try:
                final, reward, over, late, info = episodes.step(acted[:, None])
            except vector.SimulationError as error:
                raise UserError(f"step {step:,}: {error}. {kept()}") from error
            if not np.isfinite(reward).all():
                raise UserError(f"step {step:,}: the environment gave a reward that is not finite. {kept()}")
            then, now = ({key: value[:, 0] for key, value in obs.items()} for obs in (observation, final))
            if task.demo_rewards is None:
                free = info["success"] > 0 if task.reached is None else over | task.reached(now)
                reward = free - 1.0
            before, after = condition(policy, then), condition(policy, now)
            normalised = policy.normalize_action(torch.from_numpy(acted).to(device)).cpu().numpy()
            for i in range(cfg.num_envs):
                recorder.note(i, before[i], normalised[i], float(reward[i]), bool(over[i]))
                if over[i] or late[i]:
                    recorder.finish(i, after[i], buffer)
                    successes.append(float(info["success"][i]))
            step += cfg.num_envs
            updates = range(updates_due(step - cfg.offline_steps, cfg))
            records = [learner.step[True](*buffer.sample(cfg.batch_size, generator)) for _ in updates]
        bar.update(min(cfg.num_envs if online else 1, total - bar.n))

        # Log, evaluate, save.
        turning = step == cfg.offline_steps
        evaluating = step % cfg.eval_every < (cfg.num_envs if online else 1) or turning or step >= total
        if step % LOG_EVERY < (cfg.num_envs if online else 1) or evaluating:
            row = {name: value.item() for name, value in records[-1].items()} if records else {}
            if any(not math.isfinite(value) for value in row.values()):
                raise UserError(f"step {step:,}: a loss is not finite. {kept()} Try a smaller --lr.")
            if successes:
                row["episode_success"] = float(np.mean(successes))
                shown["train"], successes = f"{row['episode_success']:.2f}", []
            if "q" in row:
                shown["q"] = f"{row['q']:.1f}"
        if evaluating:
            row |= evaluate.select(learner.acting, task, cfg.eval_episodes)
            if turning:
                learner.acting.save(out / "offline.pt")
                offline_line = {**reported("offline"), "offline_wall_s": round(wall(), 1)}
            if row["success_rate"] >= best:  # which is what is rewarded here; Push-T's score is more
                best = row["success_rate"]  # of equal ones the later: more of the critic's choices have gone into it
                learner.acting.save(out / "dfp.pt")
            shown["success"] = f"{row['success_rate']:.2f} (best {best:.2f})"
        if row:
            bar.set_postfix(shown)
            log.write(step, {"seconds": wall(), **row})
        if evaluating or signals or step % cfg.save_every < (cfg.num_envs if online else 1):
            save_state()
        if evaluating:
            plot_curves(log, task, cfg.offline_steps, out / "curve.png")
        if signals:
            bar.close()
            log.close()
            print(f"stopped at step {step:,}; {out / 'state.pt'} is saved. Go on with --resume.")
            sys.exit(128 + signals[0])
    bar.close()
    env.close()
    last_line = reported("last") | reported("alone", candidates=1, latent_scale=1.0)  # alone: one chunk, unseen by the critics

    # ---- final evaluation: starts that no decision has seen --------------------------------------------------------------
    for number in (signal.SIGINT, signal.SIGTERM):  # the training is saved: from here on they stop at once
        signal.signal(number, signal.default_int_handler)
    log.close()
    extra = {"method": cfg.method, "offline_steps": cfg.offline_steps, **offline_line, **last_line}
    evaluate.finish(Policy.load(out / "dfp.pt", device), task, out, cfg.report_episodes, wall, extra)


if __name__ == "__main__":
    run_main(main)
