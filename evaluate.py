"""A checkpoint -> score with its interval, latency of one policy call, and a picture.

    python evaluate.py --ckpt runs/pusht/dbp.pt                               100 unseen starts, about 15 s
    python evaluate.py --ckpt runs/pusht/dbp.pt --gif push.gif --episodes 3   watch it, at four times the real speed
    python evaluate.py --ckpt runs/pusht/dbp.pt --json                        one line for programs
    python evaluate.py --ckpt runs/pusht/dbp.pt --export policy.onnx          the policy for onnxruntime, no simulator needed

Protocol: episode i starts from seed seed_start + i; each decision draws one latent and makes one network call (1 NFE, no
exploration noise). All episodes run side by side; the latents come from --seed, whichever episodes are still running.
Training selects its best checkpoint on starts from 50,000 on, and reports on starts from 100,000 on: no start serves both.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor, nn

import envs
import vector
from common import UserError, plain_errors, run_main, usable_device
from encoders import kind
from policy import Policy

SELECTION_SEED = 50_000  # first start of the evaluations that choose a checkpoint
REPORT_SEED = 100_000  # first start of the final evaluation
COLUMNS = ["score", "score_low", "score_high", "success_rate", "mean_return"]  # of a training's log
Z95 = 1.96  # standard errors in half of a normal 95 % interval
FILMED = 3  # episodes shown next to each other in a GIF
EXPORT_TOLERANCE = 1e-5  # of the actions' half range: float32 rounding stays below, a wrong graph does not


@dataclasses.dataclass(frozen=True)
class Config:
    ckpt: str = "runs/pusht/dbp.pt"  # checkpoint of any training script
    env: str = ""  # task; empty: the one the checkpoint was trained for, another is refused
    episodes: int = 100  # number of episodes
    seed_start: int = REPORT_SEED  # seed of the first start; other starts than Diffusion Policy's of the same seed
    seed: int = 0  # seed of the latents
    latent_scale: float | None = None  # std of the latents; None: the checkpoint's; 1: Eq. (7); 0: the centre
    device: str = "auto"  # auto (cuda where there is one), cpu, cuda, cuda:1, ...
    gif: str = ""  # write a film of the first three episodes here
    json: bool = False  # print nothing but one JSON line
    export: str = ""  # write the policy as an ONNX file here, check it, and run no episodes


def rollout(policy: Policy, task: envs.Task, seeds: list[int], latent_seed: int = 0, film: bool = False) -> dict[str, np.ndarray]:
    """Run one episode per seed. Returns: score, success, return, length, each (episodes,), and frames (list) if film."""
    c = policy.config
    results = {"score": [], "success": [], "return": [], "length": []}
    N = min(len(seeds), task.side_by_side)
    env = task.make(N, c.obs_steps)  # once: a simulator's scene can take seconds
    frames: list = []
    for first in range(0, len(seeds), N):
        batch = seeds[first : first + N]
        generator = torch.Generator().manual_seed(latent_seed + first)
        filming = film and first == 0
        try:
            if film:
                env.record(range(min(FILMED, N)) if filming else ())
        except (OSError, vector.SimulationError) as error:  # nothing can be drawn here: numbers without pictures
            print(f"no film: {error}", file=sys.stderr)
        try:
            obs = env.reset(batch, range(len(batch)))
        except vector.SimulationError as error:
            env.close()
            if not filming:
                raise UserError(f"the evaluation could not begin: {error}") from error
            print(f"no film: {error}", file=sys.stderr)
            return {**rollout(policy, task, seeds, latent_seed), "frames": []}
        done, total = np.arange(N) >= len(batch), np.zeros(N)  # the last batch may be smaller: the others rest
        while not done.all():
            z = policy.sample_latents(N, generator)  # for all, so that they do not depend on who is still running
            running = np.flatnonzero(~done)
            chunks = np.zeros((N, c.action_steps, c.action_dim), np.float32)
            chunks[running] = policy.act({k: v[running] for k, v in obs.items()}, z[running]).cpu().numpy()
            try:
                obs, reward, terminated, truncated, info = env.step(chunks)
            except vector.SimulationError as error:
                raise UserError(f"the evaluation ended: {error}. The checkpoints that are saved stay as they are.") from error
            done |= terminated | truncated
            total += reward
        for name, values in (("return", total), *((name, info[name]) for name in ("score", "success", "length"))):
            results[name].append(np.array(values[: len(batch)]))
        if filming:
            frames = env.frames
    env.close()
    results = {name: np.concatenate(values) for name, values in results.items()}
    return {**results, "frames": frames} if film else results


def interval95(x: np.ndarray) -> tuple[float, float]:
    """Normal 95 % interval of the mean, (low, high); one episode tells nothing of the spread: (-inf, inf)."""
    half = Z95 * x.std(ddof=1) / len(x) ** 0.5 if len(x) > 1 else np.inf
    return float(x.mean() - half), float(x.mean() + half)


def share95(share: float, episodes: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of episodes: 100 of 100 do not prove that none will ever fail (0.963 to 1)."""
    middle = (share + Z95**2 / (2 * episodes)) / (1 + Z95**2 / episodes)
    half = Z95 / (1 + Z95**2 / episodes) * (share * (1 - share) / episodes + (Z95 / (2 * episodes)) ** 2) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def latency(policy: Policy, calls: int = 200) -> tuple[np.ndarray, int]:
    """Milliseconds of single policy calls, batch 1, observation in and action out, after 20 warm-up calls; and the
    number of network passes that one call was seen to make (NFE)."""
    obs = policy.blank_obs()
    passes = 0

    def count(*_):
        nonlocal passes
        passes += 1

    hook = policy.backbone.register_forward_hook(count)
    policy.act(obs)
    hook.remove()
    generator, times = torch.Generator().manual_seed(0), []
    for call in range(20 + calls):
        start = time.perf_counter()
        policy.act(obs, generator=generator).cpu()  # .cpu() waits for the device
        if call >= 20:
            times.append((time.perf_counter() - start) * 1e3)
    return np.array(times), passes


def report(policy: Policy, results: dict[str, np.ndarray], seed_start: int, stages: int = 1) -> dict:
    """The numbers of a JSON line, from `rollout`'s results.

    stages: subtasks of an episode (Task.stages); of several, p1, p2, ... are the shares of episodes with at least so many done.
    """
    times, nfe = latency(policy)
    score = results["score"]
    share = np.isin(score, (0, 1)).all()  # whether an episode succeeds, nothing between
    low, high = share95(float(score.mean()), len(score)) if share else interval95(score)
    return {
        "env": policy.config.env,
        "episodes": len(score),
        "seed_start": seed_start,
        "score": round(float(score.mean()), 4),
        "score_ci95": [round(low, 4), round(high, 4)] if len(score) > 1 else None,  # JSON knows no infinity
        "success_rate": round(float(results["success"].mean()), 4),
        **(stage_shares(score, stages) if stages > 1 else {}),
        "mean_return": round(float(results["return"].mean()), 3),
        "latency_ms_p50": round(float(np.percentile(times, 50)), 3),
        "latency_ms_p99": round(float(np.percentile(times, 99)), 3),
        "nfe": nfe,
        "parameters": sum(p.numel() for p in policy.parameters()),
    }


def stage_shares(score: np.ndarray, stages: int) -> dict[str, float]:
    """p_k = mean[score >= k / stages], k = 1 .. stages, the measure of BlockPush and Kitchen. score (episodes,)."""
    return {f"p{k}": round(float((score * stages > k - 0.5).mean()), 4) for k in range(1, stages + 1)}  # 0.5: of rounding


def select(policy: Policy, task: envs.Task, episodes: int) -> dict[str, float]:
    """An evaluation in the middle of a training, from which the best checkpoint is chosen: COLUMNS of the run log."""
    results = rollout(policy, task, list(range(SELECTION_SEED, SELECTION_SEED + episodes)))
    low, high = interval95(results["score"])
    values = (float(results["score"].mean()), low, high, float(results["success"].mean()), float(results["return"].mean()))
    return dict(zip(COLUMNS, values, strict=True))


def finish(
    policy: Policy, task: envs.Task, out: Path, episodes: int, wall: Callable[[], float], extra: dict | None = None
) -> None:
    """The final numbers of a training, on starts that no decision has seen, and the film.

    wall: seconds since the training began; extra: more for the JSON line. Writes rollout.gif and result.json; the JSON line ends
    the output.
    """
    results = rollout(policy, task, list(range(REPORT_SEED, REPORT_SEED + episodes)), film=True)
    write_gif(results["frames"], out / "rollout.gif")
    line = report(policy, results, REPORT_SEED, task.stages)
    film = f"watch {out / 'rollout.gif'}, " if results["frames"] else ""
    print(
        f"best policy, {episodes} unseen starts: score {number_text(line['score'])}, {interval_text(line)}, "
        f"success rate {line['success_rate']:.2f}, {line['latency_ms_p50']:.2f} ms per call\n"
        f"{film}see {out / 'curve.png'}"
    )
    text = json.dumps({**line, "wall_s": round(wall(), 1), **(extra or {})})
    with plain_errors():
        (out / "result.json").write_text(text + "\n")
    print(text)


def number_text(x: float) -> str:
    """A share of 1 with three decimals, a return without any."""
    return f"{x:.3f}" if abs(x) < 10 else f"{x:,.0f}"


def interval_text(line: dict) -> str:
    if not line["score_ci95"]:
        return "no interval from one episode"
    return "95 % interval [{}, {}]".format(*map(number_text, line["score_ci95"]))


def write_gif(frames: list[list[np.ndarray]], path: str | Path, every: int = 2, fps: int = 20) -> None:
    """Episodes next to each other; a finished one holds its last frame. frames[episode][step] (H, W, 3) uint8.

    every: show each so many-th frame. No frames, no file.
    """
    import imageio.v3 as iio

    if not frames:
        return
    length = max(len(f) for f in frames) + 10  # the end stays on for a moment
    steps = [np.concatenate([f[min(t, len(f) - 1)] for f in frames], 1) for t in range(0, length, every)]
    with plain_errors():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        iio.imwrite(path, np.stack(steps), extension=".gif", duration=1000 / fps, loop=0)


# --- export -------------------------------------------------------------------------------------------------------------


class Deployed(nn.Module):
    """What a robot calls: raw observation history and latent in, raw actions out, Eq. (22); the normalisers are inside.

    forward: obs {key: (1, To, *shape)}, environment units, images uint8; z (1, Tp, Da), already scaled -> (1, Ta, Da).
    It is `Policy.act` without its checks, which no graph can hold, and without the draw of z, which stays the caller's.
    """

    def __init__(self, policy: Policy):
        super().__init__()
        self.policy = policy

    def forward(self, obs: dict[str, Tensor], z: Tensor) -> Tensor:
        return self.policy.deployed(obs, z)


def typical_inputs(policy: Policy, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """One observation history within the range of the demonstrations, and one latent: ({key: (1, To, *shape)}, (1, Tp, Da))."""
    c, obs = policy.config, {}
    for key, shape in c.obs_shapes.items():
        if kind(shape) == "image":
            obs[key] = torch.randint(0, 256, (1, c.obs_steps, *shape), generator=generator, dtype=torch.uint8)
        else:  # clouds that are measured from the hand are then some centimetres off, which changes nothing here
            obs[key] = policy.normalize_obs[key].inverse(2 * torch.rand(1, c.obs_steps, *shape, generator=generator) - 1)
    return obs, policy.sample_latents(1, generator)


def export_onnx(policy: Policy, path: str | Path) -> float | None:
    """Write `Deployed` as one ONNX file: inputs named as the observations, and `z`; output `actions`; batch 1.

    Returns: the largest difference to the eager policy over 20 inputs, in units of the actions' half range, or None where
    onnxruntime is not installed. Raises ImportError with the pip command where the exporter's packages are missing; ValueError
    where the difference is above EXPORT_TOLERANCE, and then no file is left.
    """
    for name in ("onnx", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"--export needs the package {name}, not installed here: pip install -r requirements-export.txt")
    path, policy = Path(path), copy.deepcopy(policy).cpu().float().eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    names, generator = [*policy.config.obs_shapes, "z"], torch.Generator().manual_seed(0)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # of torchvision, which nothing here uses
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"input_names": names, "output_names": ["actions"], "dynamo": True, "external_data": False, "verbose": False}
        torch.onnx.export(Deployed(policy).eval(), typical_inputs(policy, generator), str(path), **options)
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session, worst = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]), 0.0
    for _ in range(20):
        obs, z = typical_inputs(policy, generator)
        (actions,) = session.run(None, {key: x.numpy() for key, x in {**obs, "z": z}.items()})
        apart = (torch.from_numpy(actions) - policy.act(obs, z)) / policy.normalize_action.half_range
        worst = max(worst, apart.abs().max().item())
    if not worst <= EXPORT_TOLERANCE:
        path.unlink()
        raise ValueError(f"the exported graph differs from the policy by {worst:.1e} of the actions' half range; it was removed")
    return worst


def main() -> None:
    cfg = tyro.cli(Config, description=__doc__.split("\n")[0])
    if cfg.episodes < 1:
        raise UserError(f"--episodes is {cfg.episodes}; at least 1 is needed", 2)
    for name in ("seed", "seed_start"):
        if not 0 <= getattr(cfg, name) < 2**63:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}; it must be between 0 and 2^63", 2)
    if cfg.latent_scale is not None and not 0 <= cfg.latent_scale < np.inf:
        raise UserError(f"--latent-scale is {cfg.latent_scale}; it must be a number from 0 on", 2)
    device = usable_device(cfg.device)
    policy = Policy.load(cfg.ckpt, device)
    if cfg.latent_scale is not None:
        policy.config = dataclasses.replace(policy.config, latent_scale=cfg.latent_scale)
    if cfg.env not in ("", policy.config.env):
        raise UserError(f"{cfg.ckpt} was trained for {policy.config.env}, not for {cfg.env}; give the checkpoint of that task")
    if cfg.export:
        with plain_errors():
            worst = export_onnx(policy, cfg.export)
        line = {"export": cfg.export, "bytes": Path(cfg.export).stat().st_size, "difference": worst}
        checked = "not checked: pip install onnxruntime" if worst is None else f"equal to {worst:.1e} of the actions' half range"
        print(json.dumps(line) if cfg.json else f"{cfg.export}: {line['bytes'] / 1e6:.1f} MB, {checked}")
        return
    with plain_errors():
        task = envs.get_task(policy.config.env)
        if task.obs_shapes != policy.config.obs_shapes:
            raise ValueError(
                f"{cfg.ckpt} was trained with the observations {policy.config.obs_shapes}; {task.name} has {task.obs_shapes}"
            )
        task.check(policy.config.obs_steps)  # a missing simulator is the user's to mend, a failing one is not
    start = time.perf_counter()
    seeds = list(range(cfg.seed_start, cfg.seed_start + cfg.episodes))
    results = rollout(policy, task, seeds, cfg.seed, film=bool(cfg.gif))
    line = report(policy, results, cfg.seed_start, task.stages)
    if cfg.json:
        print(json.dumps(line))
        if cfg.gif:
            write_gif(results["frames"], cfg.gif)
        return
    print(f"{cfg.ckpt}: {task.name}, {cfg.episodes} episodes from seed {cfg.seed_start}, {time.perf_counter() - start:.0f} s")
    print(f"  score         {number_text(line['score'])}   {interval_text(line)}   ({task.score})")
    print(f"  success rate  {line['success_rate']:.2f}    mean episode {results['length'].mean():.0f} steps")
    print(
        f"  one call      {line['latency_ms_p50']:.2f} ms p50, {line['latency_ms_p99']:.2f} ms p99, {line['nfe']} NFE, "
        f"{line['parameters']:,} parameters, {device}"
    )
    if cfg.gif:
        write_gif(results["frames"], cfg.gif)
        print(f"  film          {cfg.gif}" if results["frames"] else "  film          none")


if __name__ == "__main__":
    run_main(main)
