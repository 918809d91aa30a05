"""What every script needs and no paper explains: checkpoints, settings, the run log, seeding, the process group, errors.

Checkpoints are one dict of tensors and plain values. They are written to a temporary file, flushed to disk and renamed, so
that a crash, a full disk or Ctrl-C leaves the previous file whole; they are read with `weights_only=True`, which executes
nothing that the file contains.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import errno
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows: nothing guards the folder of a run
    fcntl = None

SHARED_MEMORY = Path("/dev/shm")  # files there are memory, where there is such a folder (Linux)
FORMAT_VERSION = 1  # of the checkpoints; raised when their layout changes


class UserError(Exception):
    """Something that the user can mend. Shown as one line, without a traceback.

    status: exit status, 1 for data (files, checkpoints, values found in them), 2 for usage (flags and settings).
    """

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


@contextlib.contextmanager
def plain_errors(status: int = 1) -> Iterator[None]:
    """Turn what our modules raise for bad input (ValueError, OSError, ImportError) into a UserError of that status.

    Put around the calls that read what the user gave, and nothing else: elsewhere such an error is a bug and keeps its trace.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise UserError(str(error), status) from error


def run_main(main: Callable[[], None]) -> None:
    """Run a script's main(): a UserError becomes one line on stderr and its exit status."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def saved_before(out: Path, *names: str) -> str:
    """Which of these files a run has left in its folder, as a sentence for the message that ends it."""
    files = [str(out / name) for name in names if (out / name).exists()]
    return f"{' and '.join(files) or 'Nothing'} was saved before."


def save_checkpoint(content: dict, path: str | Path) -> None:
    """Write `content` (tensors and plain values) to `path` in one atomic step.

    Raises UserError if the disk is full or the folder cannot be written; the file that was there before stays.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT_VERSION, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink()
        kept = "; the previous checkpoint is untouched" if path.exists() else ""
        raise UserError(f"cannot write {path}: {error}{kept}. Free space there or choose another --out.") from error


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> dict:
    """Read a checkpoint. Raises UserError for a missing, truncated, corrupt or foreign file, or a newer format."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}. Train one with dbp_train.py, or name another with --ckpt.")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # zip, pickle and I/O errors of many types: all mean that the file cannot be used
        raise UserError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as a checkpoint: truncated, corrupt, or not written by "
            f"this project ({type(error).__name__}: {' '.join(str(error).split())[:120]}). Copy it again or train a new one."
        ) from error
    if not isinstance(content, dict) or "format" not in content:
        raise UserError(f"{path} is not a checkpoint of this project: it has no format version.")
    if content["format"] != FORMAT_VERSION:
        raise UserError(
            f"{path} has checkpoint format {content['format']}; this version reads {FORMAT_VERSION}. "
            "Use the version of the project that wrote it."
        )
    return content


# --- settings and the run folder ----------------------------------------------------------------------------------------


def read_config(cls: type, description: str, defaults: Callable, folder: str, free: set[str]) -> tuple:
    """Command line -> (settings, the saved state where --resume asks for one, else None).

    Args: cls: a frozen dataclass with env, out and resume; description: its first line introduces --help; defaults: the
        settings as given -> the defaults under the flags; folder: default of out, with {env}; free: what --resume may change.
    The settings of a resumed run are its own. Raises UserError where a flag contradicts them.
    """
    description = description.split("\n")[0]
    given = tyro.cli(cls, description=description)
    out = given.out or folder.format(env=given.env)
    if not given.resume:
        return dataclasses.replace(tyro.cli(cls, default=defaults(given), description=description), out=out), None
    state = load_checkpoint(Path(out) / "state.pt")
    try:
        saved = cls(**state["config"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{out}/state.pt was written by another script or version ({error}); it cannot be resumed") from error
    cfg = dataclasses.replace(tyro.cli(cls, default=saved, description=description), out=out)
    for field in dataclasses.fields(cls):
        now, then = getattr(cfg, field.name), getattr(saved, field.name)
        if field.name not in free and now != then:
            flag = field.name.replace("_", "-")
            raise UserError(f"--{flag} is {now}, but the run in {out} has {then}; omit the flag to resume it", 2)
    return cfg, state


def keep_earlier_run(out: Path, say: Callable[[str], None]) -> None:
    """Move a run that lies in `out` aside, to the first free of <out>.1, <out>.2, ...: nothing is overwritten."""
    if not any((out / name).exists() for name in ("config.json", "state.pt", "dbp.pt", "dbpo.pt", "dfp.pt")):
        return
    number = next(n for n in range(1, 10_000) if not Path(f"{out}.{n}").exists())
    with plain_errors():
        out.rename(f"{out}.{number}")
    say(f"the earlier run in {out} is now {out}.{number}")


LOCKS: list[int] = []  # open files of this process, until it ends, however it ends


def claim_folder(out: Path, fresh: bool, say: Callable[[str], None]) -> None:
    """Make the folder of a run and lock it: two processes that train in one folder would write over each other's files.

    fresh: an earlier run that lies there moves aside. Raises UserError where another process has it.
    """
    with plain_errors():
        if (out / ".lock").exists():  # before anything moves
            os.close(_lock(out))
        if fresh:
            keep_earlier_run(out, say)
        out.mkdir(parents=True, exist_ok=True)
        LOCKS.append(_lock(out))


def _lock(out: Path) -> int:
    file = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: workers do not inherit it
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # others: file systems without locks
            os.close(file)
            raise UserError(f"another process trains in {out}; wait until it ends or choose another --out", 2) from error
    return file


def catch_signals() -> list[int]:
    """A list that Ctrl-C or SIGTERM appends to; the loop looks at it between steps. A second Ctrl-C stops at once."""
    caught: list[int] = []

    def note(number: int, _) -> None:
        caught.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return caught


# --- seeding ----------------------------------------------------------------------------------------------------------


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators (network initialisation and dropout use torch's)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# --- run log ----------------------------------------------------------------------------------------------------------


class RunLog:
    """Rows of metrics in `metrics.csv`, and in TensorBoard files where tensorboard is installed.

    Args: folder; columns: names of all metrics that will come; resume_step: rows after it are dropped, 0 starts a new file.
    """

    def __init__(self, folder: Path, columns: list[str], resume_step: int = 0):
        self.path, self.columns = folder / "metrics.csv", ["step", *columns]
        self.rows: list[dict[str, str]] = []
        with plain_errors():
            if resume_step and self.path.is_file():
                with open(self.path, newline="") as file:
                    rows = [row for row in csv.DictReader(file) if None not in row.values()]  # a kill can tear the last row
                self.rows = [row for row in rows if row["step"].isdigit() and int(row["step"]) <= resume_step]
            temporary = self.path.with_suffix(".tmp")
            with open(temporary, "w", newline="") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(self.rows)
            os.replace(temporary, self.path)
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self.tensorboard = None
            else:
                self.tensorboard = SummaryWriter(folder / "tensorboard", purge_step=resume_step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.rows.append({"step": str(step), **{name: f"{value:.6g}" for name, value in metrics.items()}})
        with plain_errors(), open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.columns, restval="").writerow(self.rows[-1])
        if self.tensorboard is not None:
            with plain_errors():
                for name, value in metrics.items():
                    self.tensorboard.add_scalar(name, value, step)

    def column(self, name: str) -> tuple[list[float], list[float]]:
        """(steps, values) of one metric, for plots."""
        rows = [row for row in self.rows if row.get(name)]
        return [float(row["step"]) for row in rows], [float(row[name]) for row in rows]

    def close(self) -> None:
        if self.tensorboard is not None:
            self.tensorboard.close()


# --- process group ----------------------------------------------------------------------------------------------------


def start_process_group(device: str) -> tuple[int, int, torch.device]:
    """(rank, number of ranks, device) under torchrun, (0, 1, device) without it."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    device = usable_device(device, local_rank)
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def usable_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of that name; auto is cuda where there is one, else cpu. Raises UserError, status 2, where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = f"cuda:{local_rank}" if name == "cuda" else name
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here ({str(error).splitlines()[0]}); try cpu", 2) from error
    return device


def average_over_ranks(x: Tensor) -> Tensor:
    """Mean of a tensor over all ranks; the tensor itself in one process."""
    if not dist.is_initialized():
        return x
    total = x.cuda() if dist.get_backend() == "nccl" else x.clone()  # nccl sums on GPUs only
    dist.all_reduce(total)
    return (total / dist.get_world_size()).to(x.device)


class GradientAverage:
    """Calling it replaces the gradients of these parameters by their means over ranks; all ranks make and call it alike.

    Processes of one machine without GPUs write their gradients side by side into memory that all of them see, meet, and add up
    what is there, each for itself and in the same order. Through gloo's sockets the same sum takes several times as long. There
    are two such boards in turn: who has met the others on the one cannot still be reading the other.
    """

    def __init__(self, parameters: list[torch.nn.Parameter]):
        self.parameters, self.boards, self.calls = parameters, None, 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.world > 1 else 0
        if self.world > 1:
            self.boards = self._shared_boards(sum(p.numel() for p in parameters))
            self.mean = torch.empty(sum(p.numel() for p in parameters), device=parameters[0].device)
            self.means = self._as_parameters(self.mean)

    def _as_parameters(self, flat: Tensor) -> list[Tensor]:
        sizes = [p.numel() for p in self.parameters]
        return [part.view_as(p) for part, p in zip(flat.split(sizes), self.parameters, strict=True)]

    def _shared_boards(self, size: int) -> Tensor | None:
        """(2, ranks, size) float32 in memory that all ranks share, or None where they cannot."""
        if dist.get_backend() != "gloo" or os.environ.get("LOCAL_WORLD_SIZE") != str(self.world) or not SHARED_MEMORY.is_dir():
            return None
        name, count = [""], 2 * self.world * size
        if self.rank == 0:
            handle, name[0] = tempfile.mkstemp(dir=SHARED_MEMORY, prefix="dbp-")
            try:
                os.posix_fallocate(handle, 0, 4 * count)  # reserved now: memory that is lacking later would kill the process
            except OSError:  # a container may have 64 MB of it
                os.unlink(name[0])
                name[0] = ""
            os.close(handle)
        dist.broadcast_object_list(name)
        if not name[0]:
            return None
        boards = torch.from_file(name[0], shared=True, size=count).view(2, self.world, size)
        dist.barrier()
        if self.rank == 0:
            os.unlink(name[0])  # it lives as long as somebody maps it, and no longer
        return boards

    def __call__(self) -> None:
        if self.world == 1:
            return
        gradients = [p.grad for p in self.parameters]
        if self.boards is None:
            torch._foreach_copy_(self.means, gradients)
            dist.all_reduce(self.mean)
            self.mean /= self.world
        else:
            board = self.boards[self.calls % 2]  #                                            (ranks, size)
            torch._foreach_copy_(self._as_parameters(board[self.rank]), gradients)
            dist.barrier()
            torch.mean(board, 0, out=self.mean)
        self.calls += 1
        for p, mean in zip(self.parameters, self.means, strict=True):
            p.grad = mean
