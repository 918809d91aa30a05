"""How long everything took: the stages of each decision, the servo's periods; as a table, as numbers, as histograms.

capture         from the oldest picture or state in an observation until the observation is complete
encode          through the encoders
policy          through the rest of the network, and to way-points in joints
command         until the first command after they arrived has been sent
after capture   the last three together          end to end    all four
servo jitter    |time between two periods - period|          servo work    of a period, the twin's physics included
camera <name>   grabbing (in the twin: drawing) and shrinking one picture
"""

from __future__ import annotations

import array
from pathlib import Path

import numpy as np

from ur5_motion import Chunk

STAGES = ("capture", "encode", "policy", "command", "after capture", "end to end")


class Stopwatch:
    """Times of the servo's periods and of each chunk's stages."""

    def __init__(self, period: float):
        self.period, self.ticks, self.work = period, array.array("d"), array.array("d")
        self.stages: list[tuple[float, ...]] = []  # STAGES of each decision, seconds
        self.missed, self.dropped, self.waiting = 0, 0, None

    def took(self, chunk: Chunk) -> None:
        self.waiting = chunk

    def sent(self, now: float) -> None:
        if self.waiting:
            c = self.waiting
            ends = np.diff([c.captured, c.started, c.encoded, c.ready, now])
            self.stages.append((*ends, now - c.started, now - c.captured))
            self.waiting = None

    def report(self, seconds: dict[str, list[float]]) -> dict:
        """Milliseconds at p50, p95, p99 and max of each stage, rates, missed periods. seconds: per picture, by camera."""
        rows = dict(zip(STAGES, np.array(self.stages).reshape(-1, len(STAGES)).T, strict=True))
        ticks = np.array(self.ticks)
        steps = np.diff(ticks)
        steps = steps[steps < 1.0]  # between episodes nothing is due
        if len(steps):
            rows |= {"servo jitter": np.abs(steps - self.period), "servo work": np.array(self.work)}
        rows |= {f"camera {name}": np.array(values) for name, values in seconds.items() if values}
        table = {
            name: [round(float(x) * 1e3, 3) for x in (*np.percentile(values, (50, 95, 99)), values.max())]
            for name, values in rows.items()
            if len(values)
        }
        active = float(steps.sum()) if len(steps) else 0.0
        return {
            "latency_ms": table,
            "seconds": round(active, 2),
            "servo_hz": round(len(steps) / active, 1) if active else 0.0,
            "periods": len(ticks) + self.missed,
            "missed_periods": self.missed,
            "missed_share": round(self.missed / max(1, len(ticks) + self.missed), 6),
            "late_way_points": self.dropped,
            "policy_hz": round(len(self.stages) / active, 1) if active else 0.0,
        }


def table_text(report: dict) -> str:
    lines = [f"  {'milliseconds':16}{'p50':>9}{'p95':>9}{'p99':>9}{'max':>9}"]
    lines += [f"  {name:16}" + "".join(f"{x:9.2f}" for x in row) for name, row in report["latency_ms"].items()]
    return "\n".join(lines) + (
        f"\n  servo {report['servo_hz']:.1f} Hz over {report['seconds']:.1f} s; {report['missed_periods']} of "
        f"{report['periods']:,} periods missed ({report['missed_share']:.3%}); {report['policy_hz']:.1f} decisions per second, "
        f"{report['late_way_points']} way-points came too late"
    )


def plot(watch: Stopwatch, path: Path) -> None:
    """Histograms: each stage of a decision, and the servo's periods."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    for name, values in zip(STAGES, np.array(watch.stages).reshape(-1, len(STAGES)).T, strict=True):
        left.hist(
            values * 1e3,
            60,
            range=(0, max(1e-3, np.percentile(values, 99.5) * 1e3) if len(values) else 1),
            histtype="step",
            label=name,
        )
    left.set(xlabel="milliseconds", ylabel="decisions", title="from the newest observation to the command")
    left.legend()
    steps = np.diff(np.array(watch.ticks)) * 1e3
    right.hist(steps[steps < 1000], 100, range=(0, 3e3 * watch.period))
    right.set(xlabel="milliseconds", ylabel="periods", title=f"servo period, {watch.period * 1e3:g} ms wanted", yscale="log")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
