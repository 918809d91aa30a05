"""common.py: checkpoints that survive accidents and run nothing, the run log, errors as one line, seeding."""

import csv
import dataclasses
import errno
import os
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import common
from common import RunLog, UserError, claim_folder, load_checkpoint, plain_errors, run_main, save_checkpoint, seed_everything

# --- checkpoints ------------------------------------------------------------------------------------------------------


def content(value: float = 1.0) -> dict:
    return {"weights": {"a": torch.full((50, 50), value)}, "step": 7, "shape": (2, 3), "best": -float("inf")}


def test_a_checkpoint_comes_back(tmp_path):
    save_checkpoint(content(), tmp_path / "new folder" / "state.pt")
    back = load_checkpoint(tmp_path / "new folder" / "state.pt")
    assert torch.equal(back.pop("weights")["a"], torch.ones(50, 50))
    assert back == {"format": common.FORMAT_VERSION, "step": 7, "shape": (2, 3), "best": -float("inf")}


FULL_DISK = [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("PytorchStreamWriter failed writing file")]


@pytest.mark.parametrize("accident", FULL_DISK, ids=str)
def test_a_full_disk_leaves_the_old_checkpoint(accident, tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    save_checkpoint(content(1.0), path)

    def half(_, file):
        file.write(path.read_bytes()[:3000])
        raise accident

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(UserError, match=r"cannot write .*state\.pt.*untouched.*--out") as caught:
            save_checkpoint(content(2.0), path)
        with pytest.raises(UserError, match=r"cannot write .*first\.pt") as first:
            save_checkpoint(content(2.0), tmp_path / "first.pt")
    assert str(accident) in str(caught.value)
    assert "untouched" not in str(first.value)  # there was none before
    assert os.listdir(tmp_path) == ["state.pt"]
    assert load_checkpoint(path)["weights"]["a"].unique().item() == 1


def test_a_disk_that_fails_at_the_flush_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(content(1.0), tmp_path / "state.pt")

    def fail(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="Input/output error"):
        save_checkpoint(content(2.0), tmp_path / "state.pt")
    assert os.listdir(tmp_path) == ["state.pt"]
    assert load_checkpoint(tmp_path / "state.pt")["weights"]["a"].unique().item() == 1


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "runs").write_text("not a folder")
    with pytest.raises(UserError, match=r"cannot write .*runs"):
        save_checkpoint(content(), tmp_path / "runs" / "state.pt")


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.999])
def test_a_truncated_checkpoint_is_refused(kept, tmp_path):
    path = tmp_path / "state.pt"
    save_checkpoint(content(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(UserError, match=rf"state\.pt \({path.stat().st_size} bytes\) cannot be read"):
        load_checkpoint(path)


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint at .*nowhere\.pt"):
        load_checkpoint(tmp_path / "nowhere.pt")
    with pytest.raises(UserError, match="no checkpoint at"):
        load_checkpoint(tmp_path)
    (tmp_path / "noise.pt").write_bytes(random.Random(0).randbytes(5000))
    with pytest.raises(UserError, match=r"noise\.pt \(5000 bytes\) cannot be read"):
        load_checkpoint(tmp_path / "noise.pt")
    torch.save({"model": torch.zeros(1)}, tmp_path / "foreign.pt")
    with pytest.raises(UserError, match="no format version"):
        load_checkpoint(tmp_path / "foreign.pt")
    torch.save(torch.zeros(1), tmp_path / "tensor.pt")
    with pytest.raises(UserError, match="no format version"):
        load_checkpoint(tmp_path / "tensor.pt")
    torch.save({"format": 999}, tmp_path / "future.pt")
    with pytest.raises(UserError, match=f"format 999; this version reads {common.FORMAT_VERSION}"):
        load_checkpoint(tmp_path / "future.pt")


class Trap:
    """Unpickling it runs a shell command."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("form", ["pickle", "torch", "torch inside"])
def test_loading_a_checkpoint_runs_nothing(form, tmp_path):
    path, sprung = tmp_path / "evil.pt", tmp_path / "sprung"
    trap = Trap(f"touch {sprung}")
    if form == "pickle":
        path.write_bytes(pickle.dumps(trap, protocol=2))
    else:
        torch.save(trap if form == "torch" else {"format": common.FORMAT_VERSION, "policy": trap}, path)
    with pytest.raises(UserError, match=r"evil\.pt"):
        load_checkpoint(path)
    assert not sprung.exists()
    torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
    assert sprung.exists()  # the trap does work


# --- run log ----------------------------------------------------------------------------------------------------------


def read_rows(folder) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@dataclasses.dataclass(frozen=True)
class Settings:
    env: str = "easy"
    out: str = ""
    resume: bool = False
    steps: int = 10  # of the training


@pytest.mark.parametrize("order", [["--env", "hard", "--help"], ["-h", "--env", "hard"]])
def test_help_shows_the_defaults_of_the_task_that_is_named(order, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", *order])
    with pytest.raises(SystemExit) as ended:
        common.read_config(Settings, "A script.", lambda given: Settings(steps=300 if given.env == "hard" else 10), "runs", set())
    assert ended.value.code == 0 and "(default: 300)" in capsys.readouterr().out


def test_run_log_writes_rows_as_they_come(tmp_path):
    log = RunLog(tmp_path, ["loss", "score"])
    log.write(100, {"loss": 0.123456789})
    assert read_rows(tmp_path) == [{"step": "100", "loss": "0.123457", "score": ""}]  # on disk before the run ends
    log.write(200, {"loss": 2e-9, "score": 0.5})
    log.close()
    assert read_rows(tmp_path)[1] == {"step": "200", "loss": "2e-09", "score": "0.5"}
    assert log.column("loss") == ([100, 200], [0.123457, 2e-9])
    assert log.column("score") == ([200], [0.5])


def test_run_log_resumes_at_its_step(tmp_path):
    log = RunLog(tmp_path, ["loss", "score"])
    for step in (100, 200, 300):
        log.write(step, {"loss": step / 1000, "score": 1.0} if step == 100 else {"loss": step / 1000})
    log.close()
    again = RunLog(tmp_path, ["loss", "score"], resume_step=200)  # 300 was logged after the state was saved
    again.write(300, {"loss": 9})
    again.close()
    assert [(row["step"], row["loss"], row["score"]) for row in read_rows(tmp_path)] == [
        ("100", "0.1", "1"),
        ("200", "0.2", ""),
        ("300", "9", ""),
    ]
    assert again.column("loss") == ([100, 200, 300], [0.1, 0.2, 9])
    assert again.column("score") == ([100], [1])  # the curve keeps what was before the resume
    RunLog(tmp_path, ["loss", "score"]).close()
    assert read_rows(tmp_path) == []  # a new run starts a new file


@pytest.mark.parametrize("fresh", [True, False])
def test_two_processes_do_not_train_in_one_folder(fresh, tmp_path):
    out = tmp_path / "run"
    hold = f"import common; common.claim_folder(common.Path({str(out)!r}), True, print); print('held', flush=True); input()"
    command = [sys.executable, "-c", hold]
    first = subprocess.Popen(command, cwd=Path(common.__file__).parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    (out / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"another process trains in {out}; wait"):
        claim_folder(out, fresh, print)
    assert (out / "config.json").exists() and not Path(f"{out}.1").exists()  # nothing moved
    first.kill()
    first.wait()
    said = []
    claim_folder(out, fresh, said.append)
    assert (out / "config.json").exists() != fresh and Path(f"{out}.1").exists() == fresh == bool(said)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ValueError, OSError, ImportError, FileNotFoundError])
def test_plain_errors_become_user_errors(kind):
    with pytest.raises(UserError, match="the reason") as caught, plain_errors(2):
        raise kind("the reason")
    assert caught.value.status == 2


def test_plain_errors_let_the_rest_pass():
    with pytest.raises(KeyError), plain_errors():
        raise KeyError("a bug")
    with pytest.raises(UserError) as caught, plain_errors(1):
        raise UserError("told already", 2)
    assert caught.value.status == 2


@pytest.mark.parametrize("status", [1, 2])
def test_run_main_prints_one_line_and_exits(status, capsys):
    def main():
        raise UserError("the disk is full", status)

    with pytest.raises(SystemExit) as caught:
        run_main(main)
    assert caught.value.code == status
    assert capsys.readouterr() == ("", "error: the disk is full\n")


def test_run_main_hides_no_bug_and_no_success(capsys):
    def bug():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        run_main(bug)
    run_main(lambda: print("done"))
    assert capsys.readouterr() == ("done\n", "")


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_seeding_covers_every_generator():
    def draw() -> tuple:
        return random.random(), np.random.rand(), torch.rand(1).item()

    seed_everything(3)
    first = draw()
    seed_everything(3)
    assert draw() == first
    seed_everything(4)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_one_process_needs_no_process_group(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert common.start_process_group("cpu") == (0, 1, torch.device("cpu"))
    assert common.average_over_ranks(torch.tensor(3.0)) == 3
    with pytest.raises(UserError, match="--device warp") as caught:
        common.start_process_group("warp")
    assert caught.value.status == 2


GRADIENTS = """
import os, sys
import torch
import torch.distributed as dist
sys.path.insert(0, {root!r})
import common
def full(handle, offset, size):
    raise OSError("no space left")
rank = common.start_process_group("cpu")[0]
weights = [torch.nn.Parameter(torch.zeros(3, 2)), torch.nn.Parameter(torch.zeros(5))]
averages = [common.GradientAverage(weights)]
os.posix_fallocate = full
averages.append(common.GradientAverage(weights))
assert averages[0].board is not None and averages[1].board is None
seen = []
for average in averages:
    for call in range(5):
        for p in weights:
            p.grad = torch.full_like(p, 10.0 * call + rank) * torch.arange(1.0, p.numel() + 1).view_as(p)
        average()
        seen.append([p.grad.clone() for p in weights])
for call, gradients in enumerate(seen):
    for gradient in gradients:
        wanted = (10.0 * (call % 5) + 0.5) * torch.arange(1.0, gradient.numel() + 1).view_as(gradient)
        assert torch.equal(gradient, wanted), (call, gradient, wanted)
dist.destroy_process_group()
open(f"agrees{{rank}}", "w").close()
"""


def test_gradients_are_averaged_through_shared_memory_and_without_it(tmp_path):
    (tmp_path / "gradients.py").write_text(GRADIENTS.format(root=str(Path(__file__).parent.parent)))
    before = set(common.SHARED_MEMORY.glob("dbp-*"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "gradients.py"]
    done = subprocess.run(torchrun, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.glob("agrees*")} == {"agrees0", "agrees1"}
    assert set(common.SHARED_MEMORY.glob("dbp-*")) == before  # nothing is left behind


ALONE = """
import os, sys
import torch
sys.path.insert(0, {root!r})
import common
rank = common.start_process_group("cpu")[0]
assert common.average_over_ranks(torch.tensor(1.0 + rank)) == 1.5
if rank == 1:
    os._exit(0)
try:
    common.average_over_ranks(torch.tensor(1.0))
except RuntimeError as error:
    print(error, flush=True)
os._exit(0)
"""


def test_who_waits_for_a_process_that_has_ended_is_told(tmp_path):
    (tmp_path / "alone.py").write_text(ALONE.format(root=str(Path(__file__).parent.parent)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "alone.py"]
    done = subprocess.run(torchrun, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert re.search(r"process \d+, rank 1 of this training, has ended", done.stdout), done
