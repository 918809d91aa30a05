"""Stage 2, Drift-Based Policy Optimisation: Algorithm 2 of the paper, a one-step policy improved online by PPO.

    python dbpo_finetune.py --env hopper-medium-v2 --env-steps 100000     proves the installation
    python dbpo_finetune.py --env hopper-medium-v2                        seven minutes on two cores with stage 1, return 3,300
    python dbpo_finetune.py --env hopper-medium-v2 --preset paper         the released settings
    python dbpo_finetune.py --env hopper-medium-v2 --resume               go on where a run was stopped
    torchrun --nproc-per-node 2 dbpo_finetune.py --env hopper-medium-v2   half of the environments in each process

Why the likelihood is exact: one call gives mu from (o, z), Gaussian noise around it gives the chunk, and z is stored. Given
z the chunk has a plain Gaussian density, and p(z) cancels in the ratio, so PPO needs no chain of denoising steps (Eqs. 12-14).

One iteration: every environment executes `decisions` chunks (47); advantages over chunks; some epochs of minibatches on the
clipped surrogate, the value, the entropy and the anchor to the pretrained policy (15)-(17). Deployment executes mu: the
checkpoint is an ordinary policy, one call, no noise. Symbols and shapes:

    cond     condition vector of o           (B, C)         z       latent of the decision      (B, Tp, Da)
    mu       chunk mean                      (B, Tp, Da)    sigma   noise of the prefix         (B, Ta, Da)
    executed the executed prefix with noise  (B, Ta, Da)    T, N    decisions, environments of an iteration
    Actions are normalised, as the policy's output; noise and likelihood live there.

All results are in runs/<env>/dbpo/: dbpo.pt (the policy; evaluate.py reads it), state.pt (what --resume needs), config.json,
metrics.csv, tensorboard/, curve.png, rollout.gif, result.json.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import envs
import evaluate
import vector
from common import (
    GradientAverage,
    RunLog,
    UserError,
    average_over_ranks,
    catch_signals,
    claim_folder,
    plain_errors,
    read_config,
    run_main,
    save_checkpoint,
    saved_before,
    seed_everything,
    start_process_group,
)
from policy import Critic, GaussianActor, Policy


@dataclasses.dataclass(frozen=True)
class Config:
    """Defaults are the preset `fast`; the preset `paper` changes what PRESETS lists."""

    env: str = "hopper-medium-v2"  # task, a row of envs.TASKS
    ckpt: str = ""  # pretrained policy; empty: runs/<env>/dbp.pt, which is trained first where it is missing
    demos: str = "embedded"  # for that training: embedded, official, minari:ID or a path
    preset: Literal["fast", "paper"] = "fast"  # fast: two cores, minutes; paper: the released settings
    out: str = ""  # run folder; empty: runs/<env>/dbpo
    resume: bool = False  # go on from state.pt in the run folder, bit for bit
    seed: int = 0  # of latents, noise, minibatches, critic and episode starts
    device: str = "auto"  # auto (cuda where there is one), cpu, cuda, cuda:1, ...
    threads: int = 1  # of torch on the CPU; idle ones spin and slow the simulation, which has a thread per processor of its own

    env_steps: int = 1_500_000  # environment steps in all
    num_envs: int = 40  # N, over all processes; released: 40
    decisions: int = 25  # chunks per environment and iteration: few, and many iterations; released: 500
    minibatch: int = 250  # decisions per update, over all processes; 0: all of the iteration, as released
    epochs: int = 5  # passes over an iteration; released: 5
    actor_lr: float = 1e-4  # of Adam, at the start; released: 1e-5
    actor_lr_end: float = 1e-5  # at the end, linear between; released: 3e-6 (cosine)
    critic_lr: float = 1e-3  # of Adam; released: 1e-4
    grad_clip: float = 0.5  # largest norm of the gradient, of actor and critic each; released: 0.5
    critic_only: int = 10  # first iterations that train the critic alone; released: 5

    gamma: float = 0.99  # discount per decision; released: 0.99
    gae_lambda: float = 0.95  # lambda of the advantages; released: 0.95
    clip: float = 0.1  # clip of the ratio, Eq. (51); released: 0.02
    target_kl: float = 0.02  # an iteration's updates stop above this; released: 0.02
    value_weight: float = 0.5  # of the value loss in Eq. (17); released: 0.5
    entropy_weight: float = 0.0  # of the entropy bonus in Eq. (17); released: 0.01
    anchor: float = 1.0  # weight of Eq. (16) at the start; released: 1
    anchor_end: float = 0.0  # ... at the end, linear between (Appendix F5: strong early, relaxed later)

    sigma_start: float = 0.15  # exploration noise at the start, normalised action units
    sigma_min: float = 0.03  # smallest; released: 0.03
    sigma_max: float = 0.2  # largest; released: 0.10
    noise_clip: float = 3.0  # exploration noise is clipped at so many sigma; released: 3
    latent_scale: float | None = None  # std of the latents from here on, kept in the policy; None: the checkpoint's
    noise_color: float = 0.0  # 0: independent noise at each step; above, low frequencies dominate; DEPARTS Eq. (12)
    mean_log_prob: bool = False  # DEPARTS Eq. (13), as released: log-prob averaged over coordinates, floored at -2

    eval_every: int = 25  # iterations between evaluations; of those within a standard error of the best the newest is kept
    eval_episodes: int = 20  # episodes of such an evaluation, starts from seed 50,000 on
    report_episodes: int = 100  # episodes of the final one, starts from seed 100,000 on
    save_every: int = 25  # iterations between saves of state.pt


PRESETS: dict[str, dict] = {
    "fast": {},
    "paper": {
        "env_steps": 80_000_000,
        "decisions": 500,
        "minibatch": 0,
        "actor_lr": 1e-5,
        "actor_lr_end": 3e-6,
        "critic_lr": 1e-4,
        "critic_only": 5,
        "sigma_start": 0.1,
        "eval_every": 10,
        "save_every": 1,
        "clip": 0.02,
        "entropy_weight": 0.01,
        "anchor_end": 1.0,
        "sigma_max": 0.1,
        "mean_log_prob": True,
    },
}

TRAIN_SEED = 2_000_000  # first start of the training episodes
FREE_ON_RESUME = {"resume", "out", "device"}  # what --resume may change


# --- the equations ------------------------------------------------------------------------------------------------------


def prefix_log_prob(executed: Tensor, mu: Tensor, sigma: Tensor, unmix: Tensor | None = None) -> Tensor:
    """Eqs. (13), (48), (57): log N(executed; mu, sigma^2), summed over the executed prefix and the action's coordinates.

    Args: all (B, Ta, Da); mu is the executed prefix of the chunk mean; unmix (Ta, Ta): executed - mu = unmix^-1 (sigma eps), see
        GaussianActor; None for independent noise. Returns: (B,).
    The rest of the chunk was never executed: the reward cannot tell anything about it, and its likelihood stays out.
    """
    noise, volume = executed - mu, 0.0
    if unmix is not None:
        noise, volume = unmix @ noise, executed.shape[-1] * torch.linalg.slogdet(unmix).logabsdet
    return (-0.5 * (noise / sigma).square() - sigma.log() - 0.5 * math.log(2 * math.pi)).sum((-2, -1)) + volume


def released_log_prob(executed: Tensor, mu: Tensor, sigma: Tensor, unmix: Tensor | None = None) -> Tensor:
    """DEPARTS Eq. (13), as released: the average over coordinates instead of the sum, floored at -2. (B, Ta, Da) -> (B,)."""
    return (prefix_log_prob(executed, mu, sigma, unmix) / executed[0].numel()).clamp_min(-2)


def ratio(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """Eqs. (14), (49)-(50): pi_new(chunk, z | o) / pi_old(chunk, z | o); p(z) stands in both and cancels. (B,) -> (B,)."""
    return (log_prob - old_log_prob).exp()


def kl_estimate(r: Tensor) -> Tensor:
    """KL(old || new) from the ratios (B,) of samples of the old policy: mean of (r - 1) - log r, never negative."""
    return ((r - 1) - r.log()).mean()


def surrogate(r: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Eqs. (15), (51): - mean min(r A, clip(r, 1 - clip, 1 + clip) A). r, advantage (B,)."""
    return -torch.minimum(r * advantage, r.clamp(1 - clip, 1 + clip) * advantage).mean()


def value_loss(value: Tensor, target: Tensor) -> Tensor:
    """Eq. (52): mean (V(o) - target)^2. (B,)."""
    return (value - target).square().mean()


def entropy(sigma: Tensor) -> Tensor:
    """Eq. (53): mean entropy of the executed prefix given z, sum of log sigma + log(2 pi e) / 2. sigma (B, Ta, Da)."""
    return (sigma.log() + 0.5 * math.log(2 * math.pi * math.e)).sum((-2, -1)).mean()


def anchor_loss(mu: Tensor, mu_pretrained: Tensor) -> Tensor:
    """Eqs. (16), (54): mean squared distance of the chunk means of the two policies for the same (o, z). (B, Tp, Da)."""
    return (mu - mu_pretrained).square().mean()


def total_loss(policy: Tensor, value: Tensor, entropy: Tensor, anchor: Tensor, weights: tuple[float, float, float]) -> Tensor:
    """Eqs. (17), (55): surrogate + value - entropy + anchor, the last three weighted. All scalars."""
    value_weight, entropy_weight, anchor_weight = weights
    return policy + value_weight * value - entropy_weight * entropy + anchor_weight * anchor


def gae(
    reward: Tensor, value: Tensor, next_value: Tensor, terminated: Tensor, truncated: Tensor, gamma: float, lam: float
) -> Tensor:
    """Generalised advantage estimation over chunks: one decision is one step.

    Args: all (T, N); next_value: V of the observation that the chunk led to, which at the end of an episode is its final one,
        not the first of the next. terminated, truncated: bool.
    Returns: advantages (T, N). A terminated chunk bootstraps 0, a truncated one its next_value; the trace is cut at both.
    """
    advantage, trace = torch.zeros_like(reward), torch.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        delta = reward[t] + gamma * next_value[t] * ~terminated[t] - value[t]
        trace = delta + gamma * lam * trace * ~(terminated[t] | truncated[t])
        advantage[t] = trace
    return advantage


class RewardScale:
    """Divides rewards by the running standard deviation of the discounted return, so that one critic rate fits all tasks.

    The spread is pooled over environments, time and ranks; it starts from 1 decision's worth of nothing (no prior).
    """

    def __init__(self, num_envs: int, gamma: float):
        self.gamma, self.running = gamma, np.zeros(num_envs)  # discounted return up to now, of each environment
        self.count, self.mean, self.square = 0.0, 0.0, 0.0  # of those returns so far, over all ranks

    def update(self, reward: np.ndarray, ended: np.ndarray) -> None:
        """reward (T, N) and ended (T, N) bool of one iteration."""
        returns = np.empty_like(reward)
        for t in range(len(reward)):
            self.running = self.gamma * self.running + reward[t]
            returns[t] = self.running
            self.running = self.running * ~ended[t]
        mean, square = average_over_ranks(torch.tensor([returns.mean(), np.square(returns).mean()])).tolist()
        share = returns.size / (self.count + returns.size)
        self.mean += share * (mean - self.mean)
        self.square += share * (square - self.square)
        self.count += returns.size

    @property
    def std(self) -> float:
        return max(self.square - self.mean**2, 1e-8) ** 0.5

    def state(self) -> dict:
        return {"running": torch.from_numpy(self.running), "moments": [self.count, self.mean, self.square]}

    def load(self, state: dict) -> None:
        self.running = state["running"].numpy().copy()
        self.count, self.mean, self.square = state["moments"]


# --- the script ---------------------------------------------------------------------------------------------------------


def check(cfg: Config) -> None:
    """Refuse settings that cannot work. Raises UserError, status 2."""
    at_least_1 = (
        "threads",
        "env_steps",
        "num_envs",
        "decisions",
        "epochs",
        "eval_every",
        "eval_episodes",
        "report_episodes",
        "save_every",
    )
    above_0 = ("actor_lr", "critic_lr", "grad_clip", "clip", "target_kl", "sigma_start", "sigma_min", "sigma_max", "noise_clip")
    from_0 = (
        "minibatch",
        "critic_only",
        "actor_lr_end",
        "value_weight",
        "entropy_weight",
        "anchor",
        "anchor_end",
        "noise_color",
        "seed",
    )
    for names, holds, text in (
        (at_least_1, lambda x: x >= 1, "at least 1"),
        (above_0, lambda x: 0 < x < math.inf, "above 0"),
        (from_0, lambda x: 0 <= x < 2**63, "a number from 0 on"),
        (("gamma", "gae_lambda"), lambda x: 0 <= x <= 1, "between 0 and 1"),
    ):
        for name in names:
            if not holds(getattr(cfg, name)):
                raise UserError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}; it must be {text}", 2)
    if cfg.latent_scale is not None and not 0 <= cfg.latent_scale < math.inf:
        raise UserError(f"--latent-scale is {cfg.latent_scale}; it must be a number from 0 on", 2)
    if not cfg.sigma_min <= cfg.sigma_start <= cfg.sigma_max:
        raise UserError(f"--sigma-start is {cfg.sigma_start}; it must lie in [{cfg.sigma_min}, {cfg.sigma_max}]", 2)


def defaults(given: Config) -> Config:
    with plain_errors(2):
        task = envs.get_task(given.env)
    settings = task.finetune if given.preset == "fast" else {}  # the released settings know no tasks
    return Config(**{**settings, **PRESETS[given.preset]}, preset=given.preset)


def pretrain(cfg: Config) -> Path:
    """The stage-1 policy, trained first where there is none."""
    path = Path(cfg.ckpt or f"runs/{cfg.env}/dbp.pt")
    if cfg.ckpt or path.is_file():
        return path
    print(f"no pretrained policy at {path}: training one first, with dbp_train.py's defaults", flush=True)
    command = [sys.executable, str(Path(__file__).with_name("dbp_train.py")), "--env", cfg.env, "--demos", cfg.demos]
    ranks = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}  # the training runs alone
    environment = {name: value for name, value in os.environ.items() if name not in ranks}
    status = subprocess.run(command, env=environment, check=False).returncode
    if status != 0:
        raise UserError(f"stage 1 ended with status {status}; its message stands above", status if status > 0 else 1)
    return path


def plot_curves(log: RunLog, task: envs.Task, path: Path) -> None:
    """Evaluations and training episodes over environment steps; what PPO did; how far the policy went from the anchor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    axes[0].plot(*log.column("episode_score"), color="tab:gray", label="training episodes, with noise")
    steps, score = log.column("score")
    axes[0].fill_between(steps, log.column("score_low")[1], log.column("score_high")[1], alpha=0.2)
    axes[0].plot(steps, score, "o-", label="evaluation")
    axes[0].set(title=f"score ({task.score})", ylim=(0, None))
    for name in ("kl", "clip_fraction", "explained_variance"):
        axes[1].plot(*log.column(name), label=name.replace("_", " "))
    axes[1].set(title="updates", ylim=(-0.05, 1.05))
    axes[2].plot(*log.column("anchor_distance"), label="RMS distance to the pretrained policy")
    axes[2].plot(*log.column("sigma"), label="mean sigma")
    axes[2].set(title="actions (normalised)", ylim=(0, None))
    for ax in axes:
        ax.set_xlabel("environment steps")
        ax.grid(alpha=0.3)
        ax.legend()
    with plain_errors():
        figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    began = time.perf_counter()

    # ---- config -----------------------------------------------------------------------------------------------------
    cfg, state = read_config(Config, __doc__, defaults, "runs/{env}/dbpo", FREE_ON_RESUME)
    check(cfg)
    rank, world, device = start_process_group(cfg.device)
    if cfg.num_envs % world or cfg.minibatch % world:
        raise UserError(
            f"--num-envs is {cfg.num_envs}, --minibatch {cfg.minibatch}; they must be multiples of {world} processes", 2
        )
    if device.type == "cpu":
        torch.set_num_threads(cfg.threads)
    first = rank == 0  # the process that evaluates, writes and talks
    say = print if first else lambda *_: None

    # ---- seed -------------------------------------------------------------------------------------------------------
    seed_everything(cfg.seed)
    generator = torch.Generator().manual_seed(cfg.seed * world + rank)  # latents, noise, minibatches of this process

    # ---- data and environments --------------------------------------------------------------------------------------
    with plain_errors(2):
        task = envs.get_task(cfg.env)
    if state is None and first:
        pretrain(cfg)
    if world > 1:
        dist.barrier()
    pretrained = Policy.from_state(state["pretrained"]) if state else Policy.load(cfg.ckpt or f"runs/{cfg.env}/dbp.pt")
    if cfg.latent_scale is not None:
        pretrained.config = dataclasses.replace(pretrained.config, latent_scale=cfg.latent_scale)
    c = pretrained.config
    if (c.env, c.obs_shapes, c.action_dim) != (task.name, task.obs_shapes, task.action_dim):
        raise UserError(
            f"the checkpoint was trained for {c.env}, observations {c.obs_shapes}, {c.action_dim} action dimensions; "
            f"{task.name} has {task.obs_shapes} and {task.action_dim}. Name another with --ckpt."
        )
    if c.candidates > 1:
        raise UserError(
            f"the checkpoint acts on its critic's choice of {c.candidates} chunks (DFP); PPO needs a policy of one latent"
        )
    N, T = cfg.num_envs // world, cfg.decisions
    with plain_errors():
        task.check(c.obs_steps)
        env = (task.make_training or task.make)(N, c.obs_steps)

    # ---- model ------------------------------------------------------------------------------------------------------
    pretrained.to(device).eval().requires_grad_(False)
    actor = GaussianActor(
        copy.deepcopy(pretrained).requires_grad_(True), cfg.sigma_start, cfg.sigma_min, cfg.sigma_max, cfg.noise_color
    )
    actor.to(device)  # in eval mode throughout: dropout would make the ratio differ from 1 before the first update
    policy, critic = actor.policy, Critic(c.obs_steps * pretrained.encoder.feature_dim).to(device)
    actor_weights, critic_weights = list(actor.parameters()), list(critic.parameters())
    actor_optimizer = torch.optim.Adam(actor_weights, lr=cfg.actor_lr, eps=1e-5, fused=True)
    critic_optimizer = torch.optim.Adam(critic_weights, lr=cfg.critic_lr, eps=1e-5, fused=True)
    average_actor, average_critic = GradientAverage(actor_weights), GradientAverage(critic_weights)
    unmix = actor.unmix if cfg.noise_color > 0 else None
    log_prob_of = released_log_prob if cfg.mean_log_prob else prefix_log_prob
    scale = RewardScale(N, cfg.gamma)
    per_iteration = cfg.num_envs * T * c.action_steps
    iterations = math.ceil(cfg.env_steps / per_iteration)
    rows = T * N  # decisions of this process per iteration
    minibatch = min(rows, cfg.minibatch // world or rows)
    say(
        f"DBPO on {cfg.env}: {sum(p.numel() for p in actor_weights):,} parameters, {device}, {world} process(es), "
        f"{torch.get_num_threads()} threads\n"
        f"{iterations} iterations of {cfg.num_envs} x {T} chunks of {c.action_steps} -> {cfg.out}"
    )

    # ---- resume -----------------------------------------------------------------------------------------------------
    out, iteration, best, seconds = Path(cfg.out), 0, -math.inf, 0.0
    with plain_errors():
        episodes = vector.Episodes(env, TRAIN_SEED + rank, world)
    if state is not None:
        if len(state["ranks"]) != world:
            raise UserError(f"the run in {out} had {len(state['ranks'])} process(es), now there are {world}; take as many", 2)
        actor.load_state_dict(state["actor"])
        critic.load_state_dict(state["critic"])
        actor_optimizer.load_state_dict(state["actor_optimizer"])
        critic_optimizer.load_state_dict(state["critic_optimizer"])
        mine = state["ranks"][rank]
        generator.set_state(mine["generator"])
        scale.load(mine["scale"])
        episodes.load(mine["episodes"])
        iteration, best, seconds = state["iteration"], state["best"], state["seconds"]
        say(f"resumed at iteration {iteration}, {iteration * per_iteration:,} environment steps")
    if first:
        claim_folder(out, state is None, say)
        with plain_errors():
            if state is None:
                (out / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=2) + "\n")
            columns = [
                "seconds",
                "actor_lr",
                "anchor_weight",
                "episodes",
                "episode_score",
                "episode_length",
                "episode_success",
                "kl",
                "clip_fraction",
            ]
            columns += ["explained_variance", "value_loss", "anchor_distance", "sigma", "actor_updates", "reward_std"]
            columns += ["simulation_s", "network_s", "other_s", *evaluate.COLUMNS]
            log = RunLog(out, columns, iteration * per_iteration)
    signals = catch_signals()

    def wall() -> float:  # seconds of this run, earlier sessions included
        return seconds + time.perf_counter() - began

    def save_state() -> None:
        mine = {"generator": generator.get_state(), "scale": scale.state(), "episodes": episodes.state()}
        ranks = [mine]
        if world > 1:
            ranks = [None] * world
            dist.all_gather_object(ranks, mine)
        if first:
            content = {
                "config": dataclasses.asdict(cfg),
                "pretrained": pretrained.state(),
                "policy": policy.state(),
                "actor": actor.state_dict(),
                "critic": critic.state_dict(),
                "actor_optimizer": actor_optimizer.state_dict(),
                "critic_optimizer": critic_optimizer.state_dict(),
                "ranks": ranks,
                "iteration": iteration,
                "best": best,
                "seconds": wall(),
            }
            save_checkpoint(content, out / "state.pt")

    kept = partial(saved_before, out, "dbpo.pt", "state.pt")  # for messages

    def evaluation() -> dict[str, float]:
        """Centre of the actor, fresh latents, no noise. The newest policy that is as good as the best becomes the checkpoint.

        As good: to within the standard error of its score. The highest of many scores of like policies is the luckiest one, and
        may lie far back, where less was learned than the score can tell.
        """
        nonlocal best
        row = evaluate.select(policy, task, cfg.eval_episodes)
        best = max(best, row["score"])
        error = (row["score_high"] - row["score"]) / evaluate.Z95
        if row["score"] + error >= best:
            policy.save(out / "dbpo.pt")
        return row

    def tensors(obs: dict[str, np.ndarray]) -> dict[str, Tensor]:
        on_device = {key: torch.as_tensor(value, device=device) for key, value in obs.items()}
        return {key: x if x.dtype == torch.uint8 else x.float() for key, x in on_device.items()}  # pictures stay bytes

    # ---- loop: collect, update, log, evaluate, save -------------------------------------------------------------------
    if first and iteration == 0:
        row = evaluation()
        log.write(0, {"seconds": wall(), **row})
        say(f"pretrained policy: score {evaluate.number_text(row['score'])} ({task.score}), {cfg.eval_episodes} episodes")
    bar = tqdm(
        total=iterations * per_iteration, initial=iteration * per_iteration, disable=not first, unit="step", unit_scale=True,
        dynamic_ncols=True,
    )  # fmt: skip
    shown: dict[str, str] = {}
    while iteration < iterations:
        iteration_began, simulation_s, network_s = time.perf_counter(), 0.0, 0.0
        progress = iteration / iterations

        # Algorithm 2, rollout, Eq. (47): draw z, draw the chunk, execute its prefix, store what the likelihood needs.
        steps: list[dict] = []
        scores, lengths, successes = [], [], []
        for _ in range(T):
            forward_began = time.perf_counter()
            obs = tensors(episodes.obs)
            z = policy.sample_latents(N, generator).to(device)
            noise = torch.randn(N, c.action_steps, c.action_dim, generator=generator).clamp(-cfg.noise_clip, cfg.noise_clip)
            with torch.no_grad():
                mu, sigma = actor(policy.encode(obs), z)
                executed = policy.executed(mu) + actor.mix @ (sigma * noise.to(device))  # Eqs. (12), (46)      (N, Ta, Da)
                chunks = policy.normalize_action.inverse(executed).cpu().numpy()
            simulation_began = time.perf_counter()
            network_s += simulation_began - forward_began
            try:
                final, reward, terminated, truncated, info = episodes.step(chunks)
            except vector.SimulationError as error:
                raise UserError(f"iteration {iteration}: {error}. {kept()}") from error
            if not np.isfinite(reward).all():
                raise UserError(f"iteration {iteration}: the environment gave a reward that is not finite. {kept()}")
            simulation_s += time.perf_counter() - simulation_began
            ended = terminated | truncated
            scores += info["score"][ended].tolist()
            successes += info["success"][ended].tolist()
            lengths += info["length"][ended].tolist()
            step = {"z": z, "executed": executed, "reward": reward, "terminated": terminated, "truncated": truncated, "obs": obs}
            steps.append(step | {"final": {key: value[truncated] for key, value in final.items()}})
        network_began = time.perf_counter()

        # Advantages over chunks, with rewards in units of the spread of the return.
        reward = np.stack([step["reward"] for step in steps])  #                                (T, N)
        terminated, truncated = (np.stack([step[name] for step in steps]) for name in ("terminated", "truncated"))
        scale.update(reward, terminated | truncated)
        obs = {key: torch.stack([step["obs"][key] for step in steps]) for key in c.obs_shapes}  # {key: (T, N, To, ...)}
        with torch.no_grad():
            value = critic(policy.encode({key: x.flatten(0, 1) for key, x in obs.items()})).view(T, N)
            last = critic(policy.encode(tensors(episodes.obs)))
            next_value = torch.cat([value[1:], last[None]])  # of the first observation of the next episode, where one ended:
            if truncated.any():  # there the final observation counts; where it terminated, nothing does
                final = {key: np.concatenate([step["final"][key] for step in steps]) for key in c.obs_shapes}
                next_value[torch.from_numpy(truncated).to(device)] = critic(policy.encode(tensors(final)))
        scaled = torch.from_numpy(reward / scale.std).float().to(device)
        flags = torch.from_numpy(terminated).to(device), torch.from_numpy(truncated).to(device)
        advantage = gae(scaled, value, next_value, *flags, cfg.gamma, cfg.gae_lambda)
        target = advantage + value
        explained = 1 - ((target - value).var() / target.var().clamp_min(1e-8)).item()
        mean = average_over_ranks(advantage.mean())
        std = average_over_ranks((advantage - mean).square().mean()).sqrt()
        advantage = ((advantage - mean) / (std + 1e-8)).flatten()
        target = target.flatten()
        obs = {key: x.flatten(0, 1) for key, x in obs.items()}
        z, executed = (torch.cat([step[name] for step in steps]) for name in ("z", "executed"))

        # What stays fixed in this iteration, computed with the very minibatches of the first epoch: the same numbers in the same
        # order, so that the first ratio is exactly 1 and the first KL exactly 0, and the pretrained policy runs once.
        order = torch.randperm(rows, generator=generator).to(device)
        old_log_prob, mu_pretrained = torch.empty(rows, device=device), torch.empty_like(z)
        with torch.no_grad():
            for which in order.split(minibatch):
                cond = policy.encode({key: x[which] for key, x in obs.items()})
                mu, sigma = actor(cond, z[which])
                old_log_prob[which] = log_prob_of(executed[which], policy.executed(mu), sigma, unmix)
                cond = pretrained.encode({key: x[which] for key, x in obs.items()})
                mu_pretrained[which] = pretrained.backbone(z[which].unsqueeze(1), cond)[:, 0]

        # Updates, Eqs. (15)-(17). Above the KL limit the actor rests for the remaining minibatches, the critic goes on.
        actor_lr = cfg.actor_lr + (cfg.actor_lr_end - cfg.actor_lr) * progress
        anchor_weight = cfg.anchor + (cfg.anchor_end - cfg.anchor) * progress
        for group in actor_optimizer.param_groups:
            group["lr"] = actor_lr
        acting, records = iteration >= cfg.critic_only, []
        for epoch in range(cfg.epochs):
            if epoch > 0:
                order = torch.randperm(rows, generator=generator).to(device)
            for which in order.split(minibatch):
                cond = policy.encode({key: x[which] for key, x in obs.items()})
                loss_value = value_loss(critic(cond.detach()), target[which])
                loss = cfg.value_weight * loss_value
                record = {"value_loss": loss_value.detach()}
                if acting:
                    mu, sigma = actor(cond, z[which])
                    r = ratio(log_prob_of(executed[which], policy.executed(mu), sigma, unmix), old_log_prob[which])
                    kl = average_over_ranks(kl_estimate(r.detach()))
                    acting = kl.item() <= cfg.target_kl
                if acting:
                    distance = anchor_loss(mu, mu_pretrained[which])
                    weights = (cfg.value_weight, cfg.entropy_weight, anchor_weight)
                    loss = total_loss(surrogate(r, advantage[which], cfg.clip), loss_value, entropy(sigma), distance, weights)
                    record |= {"kl": kl, "clip_fraction": ((r.detach() - 1).abs() > cfg.clip).float().mean()}
                    record |= {"anchor_distance": distance.detach().sqrt(), "sigma": sigma.detach().mean()}
                critic_optimizer.zero_grad(set_to_none=True)
                actor_optimizer.zero_grad(set_to_none=True)
                loss.backward()
                average_critic()
                norms = [torch.nn.utils.clip_grad_norm_(critic_weights, cfg.grad_clip)]
                if acting:
                    average_actor()
                    norms.append(torch.nn.utils.clip_grad_norm_(actor_weights, cfg.grad_clip))
                if not all(torch.isfinite(norm) for norm in norms):
                    raise UserError(
                        f"iteration {iteration}: a loss or its gradient is not finite; stopped before the update. {kept()} "
                        "Try a smaller --actor-lr or --critic-lr."
                    )
                critic_optimizer.step()
                if acting:
                    actor_optimizer.step()
                records.append(record)
        network_s += time.perf_counter() - network_began
        iteration += 1
        bar.update(per_iteration)

        # Log, evaluate, save.
        evaluating = iteration % cfg.eval_every == 0 or iteration == iterations
        if first:
            names = {name for record in records for name in record}
            row = {name: float(np.mean([record[name].item() for record in records if name in record])) for name in names}
            row |= {"actor_lr": actor_lr, "anchor_weight": anchor_weight, "explained_variance": explained}
            row |= {"actor_updates": sum("kl" in record for record in records), "reward_std": scale.std, "episodes": len(scores)}
            if scores:
                row |= {"episode_score": float(np.mean(scores)), "episode_length": float(np.mean(lengths))}
                row["episode_success"] = float(np.mean(successes))
            whole = time.perf_counter() - iteration_began
            row |= {"simulation_s": simulation_s, "network_s": network_s, "other_s": whole - simulation_s - network_s}
            if evaluating:
                row |= evaluation()
                shown["score"] = f"{evaluate.number_text(row['score'])} (best {evaluate.number_text(best)})"
            for name, text in (
                ("episode_score", "{:.4g}"),
                ("kl", "{:.3f}"),
                ("clip_fraction", "{:.2f}"),
                ("anchor_distance", "{:.2f}"),
            ):
                if name in row:
                    shown[name.replace("episode_score", "train")] = text.format(row[name])
            shown["ev"] = f"{explained:.2f}"
            bar.set_postfix(shown)
            log.write(iteration * per_iteration, {"seconds": wall(), **row})
        stop = average_over_ranks(torch.tensor(float(bool(signals)), device=device)) > 0 if world > 1 else bool(signals)
        if evaluating or stop or iteration % cfg.save_every == 0:
            save_state()
        if first and evaluating:
            plot_curves(log, task, out / "curve.png")
        if stop:
            bar.close()
            if first:
                log.close()
            say(f"stopped after iteration {iteration}; {out / 'state.pt'} is saved. Go on with --resume.")
            sys.exit(128 + (signals[0] if signals else signal.SIGTERM))
    bar.close()
    env.close()

    # ---- final evaluation: starts that no decision has seen --------------------------------------------------------------
    if first:
        log.close()
        evaluate.finish(Policy.load(out / "dbpo.pt", device), task, out, cfg.report_episodes, wall)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
