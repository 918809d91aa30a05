"""How fast: milliseconds per action chunk at batch 1 by every path; training samples per second, the released loss beside ours.

    python benchmark/latency.py                                  fast preset and paper-size U-Net, one thread, ten minutes
    python benchmark/latency.py --networks fast --seconds 5      half a minute
    python benchmark/latency.py --released PATH                  ... and the loss of the authors' code, in PATH, in the same run
    python benchmark/latency.py --device cuda                    adds CUDA graphs
    python benchmark/latency.py --print                          the tables of what there is

A call takes an observation history in a numpy array and gives actions in one; the latent is drawn within. The paths take turns,
ten calls each, so that a slow moment of the machine hits all. Weights are random: they do not change the time. 100-step diffusion
is Diffusion Policy's DDPM on the same network (rivals/diffusion.py). onnxruntime: pip install -r requirements-export.txt.
One training sample is one observation with its G hypotheses. Writes benchmark/results/latency.json.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib.util
import inspect
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import record
import torch
import tyro
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results" / "latency.json"
sys.path.insert(0, str(ROOT))
from rivals.diffusion import Diffusion

import dbp_train
import envs
import evaluate
from drift import dbp_loss
from policy import EMA, Policy, PolicyConfig

NETWORKS = {"fast": "mlp", "paper": "unet"}  # preset -> backbone
PER_ROUND = 10  # calls of every one-step path in a round, in which diffusion is called once
LONGEST_TURN = 2.0  # seconds; slower paths get fewer calls: a bfloat16 that the processor emulates takes a minute
TEMPERATURE_NAMES = ("temp_schedule", "R_list", "temperatures", "taus")  # of the argument in drift losses that are public
Preset = Literal["fast", "best", "paper"]
LEAST_ROUNDS = 5  # however slow a path is


@dataclasses.dataclass(frozen=True)
class Config:
    networks: tuple[Preset, ...] = ("fast", "paper")  # presets of dbp_train.py whose network is timed
    training: tuple[Preset, ...] = ("fast",)  # presets whose training step is timed; a step of paper takes 40 s on one core
    seconds: float = 60.0  # of timed calls per network
    rounds: int = 40  # timed steps of each kind of training
    threads: int = 1  # of torch and of onnxruntime
    device: str = "cpu"  # or cuda
    released: str = ""  # folder with the authors' code; its loss is imported and timed beside ours
    print: bool = False  # print the tables of what there is, time nothing


def settings(preset: str) -> dbp_train.Config:
    return dbp_train.Config(**dbp_train.PRESETS[preset])


def make_config(cfg: dbp_train.Config) -> PolicyConfig:
    task = envs.get_task("pusht")
    names = ("obs_steps", "horizon", "action_steps", "latent_scale", "cond_width", "cond_depth", "width", "depth", "backbone")
    sizes = {name: getattr(cfg, name) for name in names}
    return PolicyConfig(env="pusht", obs_shapes=task.obs_shapes, action_dim=task.action_dim, **sizes)


# --- acting ---------------------------------------------------------------------------------------------------------------


class HalfNetwork(evaluate.Deployed):
    """The backbone in bfloat16; normalisers and encoder stay in float32."""

    def __init__(self, policy: Policy):
        super().__init__(copy.deepcopy(policy))
        self.policy.backbone.bfloat16()

    def forward(self, obs: dict[str, Tensor], z: Tensor) -> Tensor:
        cond = self.policy.encode(obs).bfloat16()
        chunk = self.policy.backbone(z.unsqueeze(1).bfloat16(), cond)[:, 0].float()
        return self.policy.normalize_action.inverse(self.policy.executed(chunk))


def by_torch(module: nn.Module, policy: Policy, device: str) -> Callable:
    @torch.inference_mode()
    def call(history: np.ndarray) -> np.ndarray:
        obs = {"state": torch.from_numpy(history).to(device)}
        return module(obs, policy.sample_latents(1).to(device)).cpu().numpy()

    return call


def by_onnxruntime(policy: Policy, threads: int) -> Callable:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        evaluate.export_onnx(policy, Path(folder) / "policy.onnx")
        session = onnxruntime.InferenceSession(Path(folder) / "policy.onnx", options, providers=["CPUExecutionProvider"])
    c, rng = policy.config, np.random.default_rng(0)

    def call(history: np.ndarray) -> np.ndarray:
        z = c.latent_scale * rng.standard_normal((1, c.horizon, c.action_dim), np.float32)
        return session.run(None, {"state": history, "z": np.asarray(z, np.float32)})[0]

    return call


def by_cuda_graph(module: nn.Module, policy: Policy) -> Callable:
    """The whole call recorded once; a replay launches it as one."""
    c = policy.config
    history = torch.zeros(1, c.obs_steps, *c.obs_shapes["state"], device="cuda")
    z = torch.zeros(1, c.horizon, c.action_dim, device="cuda")
    stream = torch.cuda.Stream()
    with torch.no_grad():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm-up outside the recording, as torch asks for
            for _ in range(3):
                module({"state": history}, z)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            actions = module({"state": history}, z)

    def call(seen: np.ndarray) -> np.ndarray:
        history.copy_(torch.from_numpy(seen))
        z.copy_(policy.sample_latents(1))
        graph.replay()
        return actions.cpu().numpy()

    return call


def paths(policy: Policy, cfg: Config) -> dict[str, Callable]:
    """Every way to run the policy on this machine: name -> history (1, To, 20) to actions (1, Ta, 2)."""
    plain, half = evaluate.Deployed(policy), HalfNetwork(policy)
    found = {"eager": lambda history: policy.act({"state": history}).cpu().numpy()}
    found["torch.compile"] = by_torch(torch.compile(plain), policy, cfg.device)
    found["bfloat16"] = by_torch(half, policy, cfg.device)
    found["bfloat16, torch.compile"] = by_torch(torch.compile(half), policy, cfg.device)
    if cfg.device != "cpu":
        found["CUDA graph"] = by_cuda_graph(plain, policy)
        found["bfloat16, CUDA graph"] = by_cuda_graph(half, policy)
    elif importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnxscript"):
        found["onnxruntime"] = by_onnxruntime(policy, cfg.threads)
    else:
        print("onnxruntime not timed: pip install -r requirements-export.txt")
    return found


def time_acting(preset: str, cfg: Config) -> dict:
    config = make_config(settings(preset))
    policy = Policy(config).to(cfg.device).eval()
    diffusion = Diffusion(config).to(cfg.device).eval()
    calls = paths(policy, cfg)
    history = np.zeros((1, config.obs_steps, *config.obs_shapes["state"]), np.float32)
    for call in calls.values():  # compiles
        call(history)
    fit = {name: int(LONGEST_TURN / seconds_of(lambda: call(history))) for name, call in calls.items()}  # noqa: B023 called at once
    turns = {name: min(max(number, 1), PER_ROUND) for name, number in fit.items()}
    times: dict[str, list[float]] = {name: [] for name in (*calls, "diffusion, 100 steps, eager")}
    ratios, rounds, start = [], 0, time.perf_counter()
    while rounds < LEAST_ROUNDS or time.perf_counter() - start < cfg.seconds:
        for name, call in calls.items():
            times[name] += [seconds_of(lambda: call(history)) for _ in range(turns[name])]  # noqa: B023 called at once
        times["diffusion, 100 steps, eager"].append(seconds_of(lambda: diffusion.act({"state": history}).cpu()))
        ratios.append(times["diffusion, 100 steps, eager"][-1] / np.median(times["eager"][-turns["eager"] :]))
        rounds += 1
    rows = {
        name: {"calls": len(t), **{f"p{q}_ms": round(1e3 * float(np.percentile(t, q)), 4) for q in (50, 95, 99)}}
        for name, t in times.items()
    }
    parameters = sum(p.numel() for p in policy.parameters())
    return {"parameters": parameters, "paths": rows, "diffusion_over_dbp": round(float(np.median(ratios)), 1)}


def seconds_of(function: Callable) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


# --- training -------------------------------------------------------------------------------------------------------------


def released_loss(folder: str) -> tuple[Callable, str]:
    """The drift loss in a clone of the authors' code, and its place in it.

    The loss: generated (B, G, S), positives (B, 1, S), temperatures -> (B,). It is looked for by name, a function of a file's top
    level with `loss` and `drift` or `dbp` in it, and must give the gradient of ours to 1e-3. Raises ImportError with the reasons
    where none does.
    """
    candidates, reasons = [], []
    for path in sorted(Path(folder).rglob("*.py")):
        try:
            functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        except (SyntaxError, UnicodeDecodeError):
            continue
        names = [node.name for node in functions if "loss" in node.name and any(word in node.name for word in ("drift", "dbp"))]
        candidates += [(path, name) for name in names if not name.startswith("test")]
    sys.path.insert(0, folder)
    for path, name in candidates:
        place = f"{path.relative_to(folder)}:{name}"
        try:
            spec = importlib.util.spec_from_file_location("released", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            function = getattr(module, name)
            temperatures = next(p for p in inspect.signature(function).parameters if p in TEMPERATURE_NAMES)
            loss = adapt(function, temperatures)
            apart = gradient_difference(loss)
        except (ImportError, AttributeError, TypeError, ValueError, RuntimeError, StopIteration) as error:
            reasons.append(f"{place}: {type(error).__name__} {error}")
            continue
        if apart < 1e-3:
            return loss, place
        reasons.append(f"{place}: its gradient differs from ours by {apart:.1e}")
    raise ImportError("; ".join(reasons) or f"no function with `loss` and `drift` or `dbp` in its name under {folder}")


def adapt(function: Callable, temperatures_name: str) -> Callable:
    def loss(generated: Tensor, positives: Tensor, temperatures: tuple[float, ...]) -> Tensor:
        value = function(generated, positives, **{temperatures_name: list(temperatures)})
        return value[0] if isinstance(value, tuple) else value

    return loss


def gradient_difference(loss: Callable) -> float:
    """Relative difference of the gradient to that of our loss, on a random minibatch."""
    generator, gradients = torch.Generator().manual_seed(0), []
    x, positives = torch.randn(32, 4, 32, generator=generator), torch.randn(32, 1, 32, generator=generator)
    for each in (loss, our_loss):
        leaf = x.clone().requires_grad_()
        each(leaf, positives, (0.05, 0.2)).mean().backward()
        gradients.append(leaf.grad)
    return ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()


def our_loss(generated: Tensor, positives: Tensor, temperatures: tuple[float, ...]) -> Tensor:
    return dbp_loss(generated, positives, temperatures=temperatures)[0]


def make_step(
    train: dbp_train.Config, device: str, loss: Callable, compiled: bool = False, as_released: bool = False
) -> Callable:
    """One training step on a random minibatch, from the draw to the averaged weights.

    as_released: as the authors arrange it (github.com/YuxuanGao0822/DBPO): the condition repeated for every hypothesis before the
    network sees it, the optimiser not fused, the average taken weight by weight, after every tenth step.
    """
    config, B, G = make_config(train), train.batch_size, train.hypotheses
    policy = Policy(config).to(device).train()
    network, ema, weights = torch.compile(policy) if compiled else policy, EMA(policy), list(policy.parameters())
    optimizer = torch.optim.AdamW(weights, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay, fused=not as_released)
    averages, count = list(ema.policy.parameters()), 0

    def step() -> None:
        nonlocal count
        obs = {"state": torch.randn(B, config.obs_steps, *config.obs_shapes["state"], device=device)}
        z = torch.randn(B, G, config.horizon, config.action_dim, device=device)
        expert = torch.randn(B, 1, config.horizon * config.action_dim, device=device)
        if as_released:
            cond = policy.encode(obs).repeat_interleave(G, 0)  #                  (B*G, C)
            generated = policy.backbone(z.flatten(0, 1).unsqueeze(1), cond).reshape(B, G, -1)
        else:
            generated = network(obs, z).flatten(2)
        optimizer.zero_grad(set_to_none=True)
        loss(generated, expert, train.temperatures).mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, train.grad_clip)
        optimizer.step()
        if not as_released:
            ema.update(count)
        elif count % 10 == 0:
            with torch.no_grad():
                for average, weight in zip(averages, weights, strict=True):
                    average.mul_(train.ema_max_decay).add_(weight, alpha=1 - train.ema_max_decay)
        count += 1
        if device != "cpu":
            torch.cuda.synchronize()

    return step


def time_training(preset: str, cfg: Config, released: Callable | None) -> dict:
    """Samples per second of each kind of step, and milliseconds of each loss, forward and backward; all in turn."""
    train, device = settings(preset), cfg.device
    steps = {"eager": make_step(train, device, our_loss)}
    steps["torch.compile"] = make_step(train, device, our_loss, compiled=True)
    losses = {"ours": our_loss}
    if released:
        losses["released"] = released
        steps["released loss in our step"] = make_step(train, device, released)
        steps["released loss, arranged as released"] = make_step(train, device, released, as_released=True)
    x = torch.randn(train.batch_size, train.hypotheses, 32, device=cfg.device, requires_grad=True)
    positives = torch.randn(train.batch_size, 1, 32, device=cfg.device)
    for step in steps.values():
        step()
    step_times: dict[str, list[float]] = {name: [] for name in steps}
    loss_times: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(cfg.rounds):
        for name, step in steps.items():
            step_times[name].append(seconds_of(step))
        for name, loss in losses.items():

            def forward_and_backward(loss: Callable = loss) -> None:
                loss(x, positives, train.temperatures).mean().backward()
                if cfg.device != "cpu":
                    torch.cuda.synchronize()

            loss_times[name].append(seconds_of(forward_and_backward))
    result = {
        "batch_size": train.batch_size,
        "hypotheses": train.hypotheses,
        "samples_per_second": {name: round(train.batch_size / float(np.median(t)), 1) for name, t in step_times.items()},
        "loss_ms": {name: round(1e3 * float(np.median(t)), 3) for name, t in loss_times.items()},
    }
    last = np.array(list(step_times.values())[-1])
    if released:  # the better of our two against theirs, round by round
        ours = np.minimum(step_times["eager"], step_times["torch.compile"])
        result["ours_over_released"] = round(float(np.median(last / ours)), 2)
    return result


# --- tables ---------------------------------------------------------------------------------------------------------------


def table(result: dict) -> str:
    lines = ["| one chunk, batch 1, milliseconds | p50 | p95 | p99 | calls |", "|---|---|---|---|---|"]
    for network, acting in result["acting"].items():
        for name, row in acting["paths"].items():
            numbers = " | ".join(f"{row[f'p{q}_ms']:.3g}" for q in (50, 95, 99))
            lines.append(f"| {network}, {acting['parameters'] / 1e6:.1f} M: {name} | {numbers} | {row['calls']:,} |")
        lines.append(f"| {network}: diffusion / DBP, both eager | {acting['diffusion_over_dbp']:.0f} times | | | |")
    lines += ["", "| training | samples per second | loss alone |", "|---|---|---|"]
    for network, training in result["training"].items():
        for name, speed in training["samples_per_second"].items():
            milliseconds = training["loss_ms"].get("released" if "released" in name else "ours")
            lines.append(f"| {network}: {name} | {speed:,.0f} | {milliseconds:.2f} ms |")
        if "ours_over_released" in training:
            lines.append(
                f"| {network}: ours, the better, against all as released | {training['ours_over_released']:.2f} times | |"
            )
    return "\n".join([*lines, "", f"Released loss: {result['released']}."])


def main() -> None:
    cfg = tyro.cli(Config, description=__doc__.split("\n")[0])
    if not cfg.print:
        torch.set_num_threads(cfg.threads)
        torch.manual_seed(0)
        loss, place = None, "not asked for (--released PATH)"
        if cfg.released:
            if not Path(cfg.released).is_dir():
                sys.exit(f"error: --released {cfg.released}: there is no such folder")
            try:
                loss, place = released_loss(cfg.released)
            except ImportError as error:
                place = f"not imported: {error}"
        device = record.device_name(cfg.device)
        result = {**record.stamp(), "torch": torch.__version__, "threads": cfg.threads, "device": device, "released": place}
        result["acting"] = {preset: time_acting(preset, cfg) for preset in cfg.networks}
        result["training"] = {preset: time_training(preset, cfg, loss) for preset in cfg.training}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    elif not RESULTS.is_file():
        sys.exit(f"error: there is no {RESULTS.relative_to(ROOT)} yet; run without --print")
    print(table(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
