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
import mmap
import os
import platform
import random
import signal
import sys
import tempfile
import time
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
SMALL = 64  # numbers that go through a board of their own, see Board
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
    # which task and preset; --help is answered by the second reading, which has their defaults
    flags = [flag for flag in sys.argv[1:] if flag not in ("-h", "--help")]
    given = tyro.cli(cls, args=flags, description=description)
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
    global neighbours
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    device = usable_device(device, local_rank)
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        neighbours = Board.make(SMALL, torch.float64)
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


class Graphed:
    """A function of tensors that launches hundreds of small kernels, recorded as one CUDA graph: the same numbers, one launch.

    The first calls run as they are, then one is recorded, and later ones copy their arguments to where the recording reads them.
    So shapes must not change, nothing in it may wait for the GPU, and the tensors it returns hold what the newest call gave.
    """

    WARM_UP = 3  # calls: what a library or an optimiser allocates once must be there before the recording

    def __init__(self, function: Callable, generator: torch.Generator):
        """generator: the CUDA generator that the function draws from."""
        self.function, self.calls, self.stream, self.graph = function, 0, torch.cuda.Stream(), torch.cuda.CUDAGraph()
        self.graph.register_generator_state(generator)

    def __call__(self, *arguments: Tensor):
        self.calls += 1
        if self.calls <= self.WARM_UP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                results = self.function(*arguments)
            torch.cuda.current_stream().wait_stream(self.stream)
            return results
        if self.calls == self.WARM_UP + 1:
            self.arguments = [argument.clone() for argument in arguments]
            with torch.cuda.graph(self.graph):  # records, computes nothing
                self.results = self.function(*self.arguments)
        torch._foreach_copy_(self.arguments, list(arguments))
        self.graph.replay()
        return self.results


class Board:
    """Means over the processes of one machine, through memory that all of them see: a quarter of the time of gloo's sockets.

    Everybody writes a line of the board, waits until all have, and adds up the lines, each for itself and in the same order, so
    that all have the same bits. There are two boards in turn: who has met the others on one cannot still be reading the other.
    """

    ROOM = 64  # bytes of each rank's counter: one cache line, so that nobody slows the others by counting

    def __init__(self, memory: mmap.mmap, size: int, dtype: torch.dtype):
        self.rank, self.world, self.meetings = dist.get_rank(), dist.get_world_size(), 0
        counters = np.frombuffer(memory, np.int64, self.world * self.ROOM // 8).reshape(self.world, -1)
        self.counted, self.processes = counters[:, 0], counters[:, 1]
        self.boards = torch.frombuffer(memory, dtype=dtype, offset=self.world * self.ROOM).view(2, self.world, size)
        self.processes[self.rank] = os.getpid()

    @classmethod
    def make(cls, size: int, dtype: torch.dtype) -> Board | None:
        """For `size` numbers; all ranks call it at once. None where they do not share memory, or there is not enough of it."""
        world = dist.get_world_size()
        local = dist.get_backend() == "gloo" and os.environ.get("LOCAL_WORLD_SIZE") == str(world)
        # Elsewhere than on these processors a rank's count may be seen before its line is.
        if not local or not SHARED_MEMORY.is_dir() or platform.machine() not in ("x86_64", "AMD64"):
            return None
        name, length = [""], world * (cls.ROOM + 2 * size * dtype.itemsize)
        if dist.get_rank() == 0:
            handle, name[0] = tempfile.mkstemp(dir=SHARED_MEMORY, prefix="dbp-")
            try:
                os.posix_fallocate(handle, 0, length)  # reserved now: memory that is lacking later would kill the process
            except OSError:  # a container may have 64 MB of it
                os.unlink(name[0])
                name[0] = ""
            os.close(handle)
        dist.broadcast_object_list(name)
        if not name[0]:
            return None
        with open(name[0], "r+b") as file:
            board = cls(mmap.mmap(file.fileno(), length), size, dtype)
        dist.barrier()
        if board.rank == 0:
            os.unlink(name[0])  # the memory lives as long as somebody uses it
        return board

    def line(self) -> Tensor:
        """(size,), to be written before `mean`."""
        return self.boards[self.meetings % 2, self.rank]

    def mean(self, out: Tensor) -> Tensor:
        """The mean of all lines, as far as `out` (at most size,) reaches. RuntimeError where another process has ended."""
        lines = self.boards[self.meetings % 2, :, : len(out)]
        self._meet()
        torch.add(lines[0], lines[1], out=out)
        for other in lines[2:]:
            out += other
        return out.div_(self.world)

    def _meet(self) -> None:
        self.meetings += 1
        self.counted[self.rank] = self.meetings
        began = time.perf_counter()
        while self.counted.min() < self.meetings:
            os.sched_yield()
            if time.perf_counter() - began > 0.01:  # rank 0 evaluates, or somebody is gone
                time.sleep(0.001)
                for rank, process in enumerate(self.processes):
                    try:
                        os.kill(int(process), 0)
                    except ProcessLookupError as error:
                        raise RuntimeError(f"process {process}, rank {rank} of this training, has ended") from error


neighbours: Board | None = None  # of this process group, for up to SMALL numbers; see start_process_group


def average_over_ranks(x: Tensor) -> Tensor:
    """Mean of a tensor over all ranks; the tensor itself in one process."""
    if not dist.is_initialized():
        return x
    if neighbours is not None and x.numel() <= SMALL:
        neighbours.line()[: x.numel()] = x.flatten()
        return neighbours.mean(torch.empty(x.numel(), dtype=torch.float64)).view_as(x).to(x)
    total = x.cuda() if dist.get_backend() == "nccl" else x.clone()  # nccl sums on GPUs only
    dist.all_reduce(total)
    return (total / dist.get_world_size()).to(x.device)


class GradientAverage:
    """Calling it replaces the gradients of these parameters by their means over ranks; all ranks make and call it alike.

    The means lie side by side in `flat`, until the next call.
    """

    def __init__(self, parameters: list[torch.nn.Parameter]):
        self.parameters = parameters
        if dist.is_initialized():
            size = sum(p.numel() for p in parameters)
            self.board = Board.make(size, torch.float32)
            self.flat = torch.empty(size, device=parameters[0].device)

    def split(self, flat: Tensor) -> list[Tensor]:
        sizes = [p.numel() for p in self.parameters]
        return [part.view_as(p) for part, p in zip(flat.split(sizes), self.parameters, strict=True)]

    def __call__(self) -> None:
        if not dist.is_initialized():
            return
        line = self.flat if self.board is None else self.board.line()
        torch._foreach_copy_(self.split(line), [p.grad for p in self.parameters])
        if self.board is None:
            dist.all_reduce(self.flat)
            self.flat /= dist.get_world_size()
        else:
            self.board.mean(self.flat)
        for p, mean in zip(self.parameters, self.split(self.flat), strict=True):
            p.grad = mean
