"""How the spread of the latents changes the score of one trained policy.

    python benchmark/latent_scale.py --ckpt runs/benchmark/human-fast-0/dbp.pt        about three minutes

200 starts from seed 300,000 on, which neither training nor the Push-T table uses; the same starts and draws for every scale.
Prints a table and writes benchmark/results/latent_scale.json.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import record
import tyro

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results" / "latent_scale.json"
SCALES = (0.0, 0.4, 0.6, 0.8, 1.0)


@dataclasses.dataclass(frozen=True)
class Config:
    ckpt: str = "runs/benchmark/human-fast-0/dbp.pt"  # a policy, trained with latents of std 1


def table(rows: list[dict]) -> str:
    lines = ["| std of the latents | score, 200 episodes | 95 % interval | success |", "|---|---|---|---|"]
    for row in rows:
        low, high = record.interval(row)
        lines.append(f"| {row['latent_scale']} | {row['score']:.3f} | {low:.3f} to {high:.3f} | {row['success_rate']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    cfg = tyro.cli(Config, description=__doc__.split("\n")[0])
    rows = []
    for scale in SCALES:
        flags = ["--ckpt", cfg.ckpt, "--episodes", "200", "--seed-start", "300000", "--latent-scale", str(scale), "--json"]
        command = [sys.executable, "evaluate.py", *flags]
        row = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
        rows.append({"latent_scale": scale, **record.stamp(), "ckpt": Path(cfg.ckpt).parent.name, **row})
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
