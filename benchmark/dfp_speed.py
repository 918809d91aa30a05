"""What an off-policy update costs: with one call per network for all candidates, and written straightforwardly, a call for each.

    python benchmark/dfp_speed.py                                               a minute, one thread; preset fast
    python benchmark/dfp_speed.py --preset paper --device cuda                  the published sizes, beside the published 13.6 ms
    python benchmark/dfp_speed.py --preset paper --device cuda --matmul high    with TF32

Both learners get the same batches and latents and take the same steps to within rounding (checked here); updates alternate in one
run. Then a profile of ours: share of an update per part. Writes benchmark/results/dfp_speed.json.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import record
import torch
import tyro
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import dfp_finetune as dfp
from policy import Policy, PolicyConfig, best_of

RESULTS = ROOT / "benchmark" / "results" / "dfp_speed.json"
FEATURES, ACTIONS = 28, 5  # of cube-single
WARM_UP = 8  # rounds; on a GPU the fourth is recorded
PUBLISHED_MS = 13.6  # per online step, its authors' figure


@dataclasses.dataclass(frozen=True)
class Config:
    preset: Literal["fast", "paper"] = "fast"
    rounds: int = 60  # updates of each
    threads: int = 1
    device: str = "cpu"
    matmul: Literal["highest", "high"] = "highest"  # precision of matrix products; high: TF32, on GPUs that have it


class Straightforward(dfp.Learner):
    """The same update with a call of a network for each candidate and each critic."""

    def each(self, critic, cond: Tensor, chunks: Tensor) -> Tensor:
        """Mean of the critics for every candidate: (B, N)."""
        parts = [single(critic, e) for e in range(critic.members)]
        columns = [sum(part(cond, chunks[:, n : n + 1])[0, :, 0] for part in parts) / len(parts) for n in range(chunks.shape[1])]
        return torch.stack(columns, 1)

    def next_value(self, cond: Tensor) -> Tensor:
        z = self.latents(self.cfg.candidates)
        chunks = torch.cat([self.policy.backbone(z[:, n : n + 1], cond).clamp(-1, 1) for n in range(z.shape[1])], 1)
        chosen = best_of(chunks, self.each(self.critic, cond, chunks))
        return self.each(self.target_critic, cond, chosen.unsqueeze(1))[:, 0]

    def proposals(self, cond: Tensor) -> tuple[Tensor, Tensor]:
        z = self.latents(self.cfg.proposals, self.cfg.latent_scale)
        chunks = torch.cat([self.old(z[:, n : n + 1], cond).clamp(-1, 1) for n in range(z.shape[1])], 1)
        return chunks, self.each(self.critic, cond, chunks)


def single(critic, member: int):
    """One critic of the ensemble, its weights views of the ensemble's."""
    weights = {
        name: (x[:, member : member + 1] if name in ("gains", "shifts") else x[member : member + 1]) for name, x in named(critic)
    }

    def call(cond: Tensor, chunks: Tensor) -> Tensor:
        members, critic.members = critic.members, 1
        try:
            return torch.func.functional_call(critic, weights, (cond, chunks))
        finally:
            critic.members = members

    return call


def named(module) -> list[tuple[str, Tensor]]:
    return list(module.named_parameters())


def found() -> list[dict]:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else []


def table(rows: list[dict]) -> str:
    lines = [
        "| preset | device | one update | without a CUDA graph | a call for each candidate and critic | faster | published |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours, other = row["ms"]["ours"], row["ms"]["straightforward"]
        published = f"{PUBLISHED_MS} ms per online step, on a GPU" if row["preset"] == "paper" else "-"
        device = f"{row['device']}, {row['threads']} thread(s)" if row["device"] == "cpu" else row["device"]
        device += ", TF32" if row.get("matmul") == "high" else ""
        eager = f"{row['ms']['unrecorded']:.1f} ms" if "unrecorded" in row["ms"] else "-"
        faster = row["times_faster"]
        ms = f"{ours:.1f} ms | {eager} | {other:.1f} ms"
        lines.append(f"| {row['preset']} | {device} | {ms} | {faster:.1f} times | {published} |")
    return "\n".join(lines)


def make(cfg: Config, cls) -> dfp.Learner:
    settings = dfp.Config(**dfp.PRESETS[cfg.preset])
    torch.manual_seed(0)
    policy = Policy(
        PolicyConfig(
            env="cube-single-task2",
            obs_shapes={"state": (FEATURES,)},
            action_dim=ACTIONS,
            obs_steps=1,
            horizon=settings.horizon,
            action_steps=settings.horizon,
            backbone=settings.backbone,
            cond_width=settings.cond_width,
            cond_depth=settings.depth,
            width=settings.width,
            depth=settings.depth,
            candidates=settings.candidates,
            critic_trunk=settings.critic_trunk,
            critic_width=settings.critic_width,
            critic_depth=settings.critic_depth,
        )
    ).to(cfg.device)
    return cls(policy, settings, torch.Generator(cfg.device).manual_seed(0))


def main() -> None:
    cfg = tyro.cli(Config, description=__doc__.split("\n")[0])
    torch.set_num_threads(cfg.threads)
    torch.set_float32_matmul_precision(cfg.matmul)
    learner, other = make(cfg, dfp.Learner), make(cfg, Straightforward)
    updates = {"ours": learner.step[True], "straightforward": partial(other.update, True)}
    if cfg.device != "cpu":
        updates["unrecorded"] = partial(make(cfg, dfp.Learner).update, True)
    B, h = learner.cfg.batch_size, learner.cfg.horizon
    draw = torch.Generator().manual_seed(0)
    shapes = ((B, FEATURES), (B, h, ACTIONS), (B,), (B,), (B, FEATURES), (B,))
    times: dict[str, list[float]] = {name: [] for name in updates}
    for k in range(cfg.rounds + WARM_UP):
        batch = tuple(torch.randn(shape, generator=draw).clamp(-1, 1).to(cfg.device) for shape in shapes)
        rows = {}
        for name, update in updates.items():
            began = time.perf_counter()
            row = update(*batch)
            rows[name] = {key: value.item() for key, value in row.items()}  # .item() waits for the device
            if k >= WARM_UP:
                times[name].append((time.perf_counter() - began) * 1e3)
        for name in rows:
            if k == 0 or (name == "unrecorded" and k < WARM_UP):  # the same steps; the recording's first ones, too
                for key, value in rows["ours"].items():
                    assert np.isclose(value, rows[name][key], rtol=1e-3, atol=1e-5), (k, name, key, value, rows[name][key])
    median = {name: round(float(np.median(values)), 2) for name, values in times.items()}
    device = record.device_name(cfg.device)
    result = {"preset": cfg.preset, "device": device, "matmul": cfg.matmul, "threads": cfg.threads, "ms": median}
    result["times_faster"] = round(median["straightforward"] / median["ours"], 2)
    others = [row for row in found() if (row["preset"], row["device"], row.get("matmul")) != (cfg.preset, device, cfg.matmul)]
    RESULTS.write_text(json.dumps([*others, {**record.stamp(), **result}], indent=1) + "\n")
    print(table(found()) + "\n")
    with torch.profiler.profile() as profile:
        for _ in range(10):
            learner.update(True, *batch)
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=12))


if __name__ == "__main__":
    main()
