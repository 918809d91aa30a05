"""Stage 1, the Drift-Based Policy: Algorithm 1 of the paper, demonstrations -> one-step policy.

    python dbp_train.py --env pusht --steps 300             half a minute, proves the installation
    python dbp_train.py --env pusht                         three minutes on two cores, score 0.9 and more
    python dbp_train.py --env pusht --preset best           nine minutes
    python dbp_train.py --env pusht --preset paper          the paper's network and settings (Tables VII, VIII); wants a GPU
    python dbp_train.py --env pusht --resume                go on where a run was stopped
    torchrun --nproc-per-node 2 dbp_train.py --env pusht    the same gradients from two processes

One step: B observations, G latents each, G chunks from one forward pass (24), the drift of every chunk and the regression onto
the drifted chunks (drift.py), one optimiser step, one step of the averaged weights. Now and then the averaged policy
acts in the simulator; the best one by score becomes the checkpoint. All results are in runs/<env>/:

    dbp.pt          the policy: evaluate.py and Policy.load read it
    state.pt        everything that --resume needs
    config.json     the resolved settings     metrics.csv     what the console showed     tensorboard/   the same
    curve.png       learning curves           rollout.gif     the policy at work          result.json    final numbers
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import demos
import envs
import evaluate
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
from drift import dbp_loss, dbp_loss_stepwise
from encoders import kind
from policy import EMA, Policy, PolicyConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """Defaults are the preset `fast`; the other presets change what PRESETS lists."""

    env: str = "pusht"  # task, a row of envs.TASKS
    demos: str = "embedded"  # embedded, official, scripted:N (episodes), minari:ID or a path (.zarr, .zip, .npz, .hdf5)
    preset: Literal["fast", "best", "paper"] = "fast"  # fast: three minutes; best: nine; paper: Tables VII and VIII
    out: str = ""  # run folder; empty: runs/<env>
    ckpt: str = ""  # start from the weights and normaliser of this checkpoint; empty: from scratch
    resume: bool = False  # go on from state.pt in the run folder, bit for bit
    mirror: bool = False  # add each demonstration's mirror image, where the task has a mirror; DEPARTS paper: none
    recombine: int = 0  # so many times as many episodes again, from parts of them, where the task says how; DEPARTS paper: none
    seed: int = 0  # of the network, the minibatches and the latents
    device: str = "auto"  # auto (cuda where there is one), cpu, cuda, cuda:1, ...
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of the network; auto: the faster, timed at the start
    compile: bool = False  # torch.compile the network

    steps: int = 5_500  # gradient steps
    batch_size: int = 256  # B, observations per step, over all processes; DEPARTS Table VII: 32
    hypotheses: int = 4  # G; Table VII: 4
    temperatures: tuple[float, ...] = (0.2,)  # T; Table VII: 0.2 for Push-T
    stepwise: bool = False  # step-wise instead of chunk mode, Eq. (11)

    lr: float = 1e-3  # peak learning rate of AdamW
    lr_schedule: Literal["cosine", "constant"] = "cosine"  # after the warm-up; DEPARTS cosine to 0, Table VII: constant
    warmup: int = 300  # steps of linear warm-up; Table VII: 500
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW; DEPARTS Table VII: 0.95, 0.999
    weight_decay: float = 1e-6  # of AdamW; released: 1e-6
    grad_clip: float = 1.0  # largest norm of the gradient; Table VII: 1.0
    ema_power: float = 0.75  # averaged weights: decay 1 - (1 + t)^-power; Table VII
    ema_max_decay: float = 0.9999  # ... at most this; Table VII

    state_scale: Literal["range", "std"] = "range"  # states: to [-1, 1], or by their mean and std; DEPARTS std
    obs_noise: float = 0.02  # std of noise on the state in training, in halves of its range or in its std; DEPARTS paper: 0
    shift: float = 0.0  # metres; clouds: in training the whole scene stands elsewhere by up to so much; DEPARTS paper: 0
    nudge: float = 0.0  # metres; clouds: ... the hand beside its way, and the chunk leads it back; DEPARTS paper: 0

    obs_steps: int = 2  # To; Table VII
    horizon: int = 16  # Tp; Table VII
    action_steps: int = 8  # Ta; Table VII
    latent_scale: float = 0.8  # std of the latents when acting; DEPARTS Eq. (7): 1
    backbone: Literal["mlp", "tanh", "unet"] = "mlp"  # unet: Table VIII; DEPARTS mlp: residual, small; tanh: smooth, small
    cond_width: int = 512  # mlp, tanh: features of the observation trunk, which runs once per observation
    cond_depth: int = 2  # mlp: its residual blocks; tanh: its layers
    width: int = 128  # mlp, tanh: features of the chunk trunk, which runs G times per observation
    depth: int = 2  # mlp, tanh: its residual blocks
    image_network: Literal["cnn", "resnet18"] = "cnn"  # of cameras; cnn: small, for the CPU
    image_pooling: Literal["spatial_softmax", "average"] = "spatial_softmax"  # of cameras: where things are, or what there is
    image_crop: float = 0.9  # cameras: side of the crop, share of the image's; random in training, the middle when acting
    image_dim: int = 64  # cameras: features of each
    shared_cameras: bool = False  # one network for all cameras
    point_widths: tuple[int, ...] = (64, 128, 256)  # clouds: features of each point, layer by layer
    point_dim: int = 64  # clouds: features of the cloud
    cloud_origin: str = ""  # clouds: xyz from the first three numbers of this observation, as the hand's; DEPARTS paper: empty

    eval_every: int = 2_750  # steps between evaluations; the best by score is kept, of several the newest
    eval_episodes: int = 50  # episodes of such an evaluation, starts from seed 50,000 on; 0: none, the newest policy is kept
    report_episodes: int = 100  # episodes of the final one, starts from seed 100,000 on; 0: none
    protocol: Literal["ours", "papers"] = "ours"  # papers: sets 10 evaluations of 20 episodes; the 5 best's mean beside ours
    save_every: int = 1_000  # steps between saves of state.pt


PRESETS: dict[str, dict] = {
    "fast": {},
    "best": {"steps": 24_000, "batch_size": 128, "mirror": True, "eval_every": 8_000},
    "paper": {
        "steps": 75_600,  # 100 epochs of the 24,208 windows of the human demonstrations, in batches of 32
        "batch_size": 32,
        "lr": 1e-4,  # lost in our copy of the paper; released: 1e-4
        "lr_schedule": "constant",
        "warmup": 500,
        "betas": (0.95, 0.999),
        "state_scale": "range",
        "point_dim": 64,
        "obs_noise": 0.0,
        "recombine": 0,
        "latent_scale": 1.0,
        "backbone": "unet",
        "eval_every": 7_560,
    },
}

LOG_EVERY = 100  # steps between rows of metrics.csv
FREE_ON_RESUME = {"resume", "out", "device", "compile"}  # what --resume may change; another device gives other last digits


def check(cfg: Config) -> None:
    """Refuse settings that cannot work. Raises UserError, status 2."""
    at_least_1 = (
        "steps",
        "batch_size",
        "hypotheses",
        "cond_width",
        "width",
        "depth",
        "eval_every",
        "save_every",
        "image_dim",
        "point_dim",
    )
    for name in at_least_1:
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}; it must be at least 1", 2)
    if not cfg.temperatures or any(not 0 < tau < math.inf for tau in cfg.temperatures):  # so written, it refuses NaN too
        raise UserError(f"--temperatures is {cfg.temperatures}; each must be above 0, for example 0.2", 2)
    if len(set(cfg.temperatures)) < len(cfg.temperatures):
        raise UserError(f"--temperatures is {cfg.temperatures}; name each once", 2)
    if not 0 <= cfg.ema_max_decay < 1:
        raise UserError(f"--ema-max-decay is {cfg.ema_max_decay}; it must be at least 0 and below 1", 2)
    if any(not 0 <= beta < 1 for beta in cfg.betas):
        raise UserError(f"--betas is {cfg.betas}; both must be at least 0 and below 1", 2)
    if cfg.seed >= 2**63:
        raise UserError(f"--seed is {cfg.seed}; it must be below 2^63", 2)
    for name in ("lr", "grad_clip", "ema_power"):
        if not getattr(cfg, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}; it must be above 0", 2)
    from_0 = ("warmup", "weight_decay", "recombine", "obs_noise", "shift", "nudge", "latent_scale", "cond_depth", "seed")
    for name in (*from_0, "eval_episodes", "report_episodes"):
        if not 0 <= getattr(cfg, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}; it must be a number from 0 on", 2)


def defaults(given: Config) -> Config:
    """Preset and task are the defaults under the flags."""
    with plain_errors(2):
        task = envs.get_task(given.env)
    settings = {**task.train, **PRESETS[given.preset]}  # a preset is more than a task's idea of `fast`; horizons are the task's
    if task.demo_mirror is None:
        settings.pop("mirror", None)
    if task.make is None:
        settings |= {"eval_episodes": 0, "report_episodes": 0}
    return Config(**settings, preset=given.preset)


def learning_rate(cfg: Config, step: int) -> float:
    """Linear warm-up, then constant or a cosine that reaches 0 at the last step."""
    warm = min(1.0, (step + 1) / max(1, cfg.warmup))
    return cfg.lr * warm * (0.5 * (1 + math.cos(math.pi * step / cfg.steps)) if cfg.lr_schedule == "cosine" else 1.0)


def faster_precision(cfg: Config, device: torch.device) -> str:
    """Time one hidden layer in both precisions; bfloat16 has to be 1.5 times faster to be worth its lost digits.

    Processors without bfloat16 units emulate it, up to 60 times slower: the type of machine does not tell, the clock does.
    """

    def seconds(dtype: torch.dtype) -> float:
        x = torch.randn(cfg.batch_size * cfg.hypotheses, 256, device=device, dtype=dtype)
        w = torch.randn(256, 256, device=device, dtype=dtype)
        best = math.inf
        for _ in range(5):
            start = time.perf_counter()
            (x @ w).sum().item()  # .item() waits for the device
            best = min(best, time.perf_counter() - start)
        return best

    return "bfloat16" if seconds(torch.float32) > 1.5 * seconds(torch.bfloat16) else "float32"


def plot_curves(log: RunLog, task: envs.Task, path: Path) -> None:
    """Score with its interval, and the diagnostics of the drift, over the gradient steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    steps, score = log.column("score")
    axes[0].fill_between(steps, log.column("score_low")[1], log.column("score_high")[1], alpha=0.2)
    lines = axes[0].plot(steps, score, "o-", label=f"score ({task.score})")
    axes[0].set(ylim=(0, max([1.02, *(1.05 * x for x in score)])), title="averaged policy in the simulator")
    right = axes[0].twinx()
    lines += right.plot(*log.column("success_rate"), "s--", color="tab:green", label="success rate")
    right.set(ylim=(0, 1.02))
    axes[0].legend(handles=lines, loc="lower right")
    axes[1].plot(*log.column("distance"), label="to the expert's chunk")
    axes[1].plot(*log.column("scale"), label="mean distance s")
    axes[1].set(title="distances of the hypotheses (normalised)", ylim=(0, None))
    axes[1].legend()
    for name in (column for column in log.columns if column.startswith("force_rms")):
        axes[2].plot(*log.column(name), label=f"tau = {name.split('_')[-1]}")
    axes[2].set(title="force RMS before Eq. (36)")
    axes[2].legend()
    for ax in axes:
        ax.set_xlabel("gradient steps")
        ax.grid(alpha=0.3)
    with plain_errors():
        figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    began = time.perf_counter()

    # ---- config -----------------------------------------------------------------------------------------------------
    cfg, state = read_config(Config, __doc__, defaults, "runs/{env}", FREE_ON_RESUME)
    check(cfg)
    if cfg.protocol == "papers":
        cfg = dataclasses.replace(cfg, eval_every=math.ceil(cfg.steps / 10), eval_episodes=20)
    rank, world, device = start_process_group(cfg.device)
    if cfg.batch_size % world:
        raise UserError(f"--batch-size is {cfg.batch_size}; it must be a multiple of the {world} processes", 2)
    if cfg.precision == "auto":  # all processes compute what the majority found faster
        faster = torch.tensor(float(faster_precision(cfg, device) == "bfloat16"), device=device)
        cfg = dataclasses.replace(cfg, precision="bfloat16" if average_over_ranks(faster) > 0.5 else "float32")
    first = rank == 0  # the process that evaluates, writes and talks
    say = print if first else lambda *_: None

    # ---- seed -------------------------------------------------------------------------------------------------------
    seed_everything(cfg.seed)
    generator = torch.Generator().manual_seed(cfg.seed)  # minibatches and latents; the same on every rank

    # ---- data and environments --------------------------------------------------------------------------------------
    with plain_errors(2):
        task = envs.get_task(cfg.env)
        if cfg.mirror and task.demo_mirror is None:
            raise ValueError(f"{cfg.env} has no mirror symmetry; omit --mirror")
        if cfg.recombine and task.demo_recombine is None:
            raise ValueError(f"{cfg.env} has no parts to recombine; omit --recombine")
        if cfg.shift and task.shift is None:
            raise ValueError(f"{cfg.env} cannot be shifted; omit --shift")
        if cfg.nudge and task.nudge is None:
            raise ValueError(f"{cfg.env} has no hand that can be nudged; omit --nudge")
    with plain_errors():
        mirror = task.demo_mirror if cfg.mirror else None
        made = {"record": task.demo_record, "origin": task.demo_origin, "record_expert": task.demo_expert}
        made["scripted"] = task.demo_scripted
        made["recombine"] = partial(task.demo_recombine, times=cfg.recombine) if cfg.recombine else None
        data = demos.load(cfg.demos, cfg.env, task.demo_arrays, task.demo_convert, mirror, **made)
        if cfg.eval_episodes or cfg.report_episodes:
            task.check(cfg.obs_steps)  # a missing simulator shows now, not after the training

    # ---- model ------------------------------------------------------------------------------------------------------
    with plain_errors(2):
        policy = Policy(
            PolicyConfig(
                env=cfg.env,
                obs_shapes=task.obs_shapes,
                action_dim=task.action_dim,
                obs_steps=cfg.obs_steps,
                horizon=cfg.horizon,
                action_steps=cfg.action_steps,
                latent_scale=cfg.latent_scale,
                state_scale=cfg.state_scale,
                backbone=cfg.backbone,
                cond_width=cfg.cond_width,
                cond_depth=cfg.cond_depth,
                width=cfg.width,
                depth=cfg.depth,
                image_network=cfg.image_network,
                image_pooling=cfg.image_pooling,
                image_crop=cfg.image_crop,
                image_dim=cfg.image_dim,
                shared_cameras=cfg.shared_cameras,
                point_widths=cfg.point_widths,
                point_dim=cfg.point_dim,
                cloud_origin=cfg.cloud_origin,
            )
        )
    with plain_errors():
        windows = demos.Windows(data, cfg.obs_steps, cfg.horizon, cfg.action_steps, device)
    if cfg.ckpt and state is None:
        start = Policy.load(cfg.ckpt)
        free = {"action_steps": 0, "latent_scale": 0}  # settings of acting, without weights
        if dataclasses.replace(start.config, **free) != dataclasses.replace(policy.config, **free):
            pairs = zip(dataclasses.asdict(start.config).items(), dataclasses.asdict(policy.config).values(), strict=True)
            differ = ", ".join(f"{name} {there} (here {here})" for (name, there), here in pairs if there != here)
            raise UserError(f"--ckpt {cfg.ckpt} has another architecture or task: {differ}. Set the flags to its values.")
        policy.load_state_dict(start.state_dict())
    else:
        policy.fit_normalizers(data.obs, data.actions)
    policy.to(device).train()
    ema = EMA(policy, cfg.ema_power, cfg.ema_max_decay)
    weights = list(policy.parameters())
    optimizer = torch.optim.AdamW(weights, lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay, fused=True)
    average_gradients = GradientAverage(weights)
    network = torch.compile(policy) if cfg.compile else policy
    loss_of = dbp_loss_stepwise if cfg.stepwise else dbp_loss
    earned = "" if data.returns is None else f", mean return {data.returns.mean():,.0f} (std {data.returns.std():,.0f})"
    say(
        f"DBP on {cfg.env}: {data.source}, {len(data.episode_ends)} episodes, {len(data.actions):,} steps{earned}\n"
        f"{cfg.backbone}, {sum(p.numel() for p in weights):,} parameters, {device}, {cfg.precision}, {world} process(es), "
        f"{torch.get_num_threads()} threads; {cfg.steps:,} steps of {cfg.batch_size} x {cfg.hypotheses} chunks -> {cfg.out}"
    )
    if cfg.hypotheses == 1:
        say("G = 1: no second hypothesis to repel, so several ways of the expert are averaged; 2 or more keep them apart")

    # ---- resume -----------------------------------------------------------------------------------------------------
    out, step, best, seconds = Path(cfg.out), 0, -math.inf, 0.0
    if state is not None:
        policy.load_state_dict(state["model"])
        ema.policy.load_state_dict(state["policy"]["weights"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_rng"])
        if device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], device)
        step, best, seconds = state["step"], state["best"], state["seconds"]
        say(f"resumed at step {step:,}")
    forces = [f"force_rms_{tau:g}" for tau in cfg.temperatures]
    if first:
        claim_folder(out, state is None, say)
        with plain_errors():
            if state is None:
                (out / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=2) + "\n")
            columns = ["seconds", "lr", "distance", "scale", *forces, "grad_norm", *evaluate.COLUMNS]
            log = RunLog(out, columns, step)
    signals = catch_signals()

    def wall() -> float:  # seconds of this run, earlier sessions included
        return seconds + time.perf_counter() - began

    def save_state() -> None:
        content = {
            "config": dataclasses.asdict(cfg),
            "model": policy.state_dict(),
            "policy": ema.policy.state(),
            "optimizer": optimizer.state_dict(),
            "generator": generator.get_state(),
            "torch_rng": torch.get_rng_state(),
            "step": step,
            "best": best,
            "seconds": wall(),
        }
        if device.type == "cuda":
            content["cuda_rng"] = torch.cuda.get_rng_state(device)
        save_checkpoint(content, out / "state.pt")

    # ---- loop: collect, update, log, evaluate, save -------------------------------------------------------------------
    states = [key for key, shape in task.obs_shapes.items() if kind(shape) == "state"]
    noise_std = {key: cfg.obs_noise * policy.normalize_obs[key].half_range for key in states}  # environment units

    def noise(key: str) -> torch.Tensor:  # of the whole minibatch, as the latents below
        draw = torch.randn(cfg.batch_size, cfg.obs_steps, *task.obs_shapes[key], generator=generator)[share]
        return draw.to(device) * noise_std[key]

    def offset(largest: float) -> torch.Tensor:  # likewise, uniform in a cube
        return largest * (2 * torch.rand(cfg.batch_size, 3, generator=generator)[share] - 1).to(device)

    share = slice(rank * cfg.batch_size // world, (rank + 1) * cfg.batch_size // world)  # of the minibatch, for this process
    bar = tqdm(total=cfg.steps, initial=step, disable=not first, unit="step", smoothing=0.05, dynamic_ncols=True)
    shown: dict[str, str] = {}
    while step < cfg.steps:
        # Algorithm 1, lines 1-2: a minibatch and its latents. Every process draws all of it and keeps its share, so
        # that the numbers do not depend on how many processes there are.
        which = torch.randint(len(windows), (cfg.batch_size,), generator=generator)[share]
        z = torch.randn(cfg.batch_size, cfg.hypotheses, cfg.horizon, task.action_dim, generator=generator)[share]
        obs, chunk = windows[which.to(device)]
        if cfg.obs_noise:  # with few demonstrations a little noise is worth more than more steps
            obs |= {key: obs[key] + noise(key) for key in states}
        if cfg.shift:  # the actions are displacements: the same wherever the scene stands
            obs = task.shift(obs, offset(cfg.shift))
        if cfg.nudge:  # demonstrations alone do not show how to come back to their way
            obs, chunk = task.nudge(obs, chunk, offset(cfg.nudge))
        expert = policy.normalize_action(chunk).unsqueeze(1)  #                    (B, 1, Tp, Da)

        # Lines 3-7: hypotheses (24), drift and regression (25)-(40).
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bfloat16"):
            generated = network(obs, z.to(device))  #                               (B, G, Tp, Da)
        if not cfg.stepwise:  # chunk mode: one flat vector per chunk, S = Tp * Da
            generated, expert = generated.flatten(2), expert.flatten(2)
        loss, diagnostics = loss_of(
            generated, expert, temperatures=cfg.temperatures, reduce=average_over_ranks if world > 1 else None
        )

        # Line 8: the update, with the gradient of the whole minibatch.
        optimizer.zero_grad(set_to_none=True)
        loss.mean().backward()
        average_gradients()
        norm = torch.nn.utils.clip_grad_norm_(weights, cfg.grad_clip)
        if not torch.isfinite(norm):
            raise UserError(
                f"the loss or its gradient is not finite at step {step:,}; stopped before the update. "
                f"{saved_before(out, 'state.pt', 'dbp.pt')} Try a smaller --lr or --precision float32."
            )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step)
        optimizer.step()
        ema.update(step)
        step += 1
        bar.update()

        # What is worth watching: not the loss, which is constant by Eq. (36).
        evaluating = step % cfg.eval_every == 0 or step == cfg.steps
        row = {}
        if first and (step % LOG_EVERY == 0 or evaluating):
            row = {name: value.item() for name, value in diagnostics.items()}
            row |= {"grad_norm": norm.item(), "lr": learning_rate(cfg, step - 1)}
            shown |= {"distance": f"{row['distance']:.3f}", "force": f"{row[forces[0]]:.1e}"}
            bar.set_postfix(shown)
        if first and evaluating:
            if cfg.eval_episodes:
                row |= evaluate.select(ema.policy, task, cfg.eval_episodes)
                shown["score"] = f"{row['score']:.3f} (best {max(best, row['score']):.3f})"
                bar.set_postfix(shown)
            if row.get("score", best) >= best:
                best = row.get("score", best)
                ema.policy.save(out / "dbp.pt")
        if row:
            log.write(step, {"seconds": wall(), **row})
        stop = average_over_ranks(torch.tensor(float(bool(signals)), device=device)) > 0 if world > 1 else bool(signals)
        if first and (evaluating or stop or step % cfg.save_every == 0):
            save_state()
        if first and evaluating:
            plot_curves(log, task, out / "curve.png")
        if stop:
            bar.close()
            if first:
                log.close()
            say(f"stopped at step {step:,}; {out / 'state.pt'} is saved. Go on with --resume.")
            sys.exit(128 + (signals[0] if signals else signal.SIGTERM))
    bar.close()

    for number in (signal.SIGINT, signal.SIGTERM):  # the training is saved: from here on they stop at once
        signal.signal(number, signal.default_int_handler)

    # ---- final evaluation: starts that no decision has seen --------------------------------------------------------------
    if first:
        log.close()
        best5 = sorted(log.column("score")[1])[-5:]
        extra = {"score_top5": round(sum(best5) / len(best5), 4)} if cfg.protocol == "papers" else {}
        if cfg.report_episodes:
            evaluate.finish(Policy.load(out / "dbp.pt", device), task, out, cfg.report_episodes, wall, extra)
        else:
            say(f"{out / 'dbp.pt'} is the policy; nothing was reported, as there are no episodes for it. See {out / 'curve.png'}")
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
