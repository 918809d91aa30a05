"""Demonstrations: where they come from, the file formats, and the windows (o_hist, chunk) that training draws.

A demonstration set is a dict of arrays with one row per step, the episodes one behind the other, and `episode_ends`, the index
behind the last row of each episode (the layout of Diffusion Policy's replay buffers). A reader returns arrays under the names
they have in the file; the task (envs.py) turns them into its observation and its action.

    file                             reader       arrays
    name.zarr (folder), name.zip     read_zarr    data/<name>, meta/episode_ends
    name.npz                         read_npz     <name>, episode_ends

Symbols: To obs_steps, Tp horizon, Ta action_steps, Da action dimension, N steps of all episodes together.
Errors are ValueError (the content is wrong), OSError (the file cannot be had) or ImportError; each names the remedy.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

Arrays = dict[str, np.ndarray]


DATA = Path(__file__).parent / "data"


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the demonstrations of one task come from. The published archive is verified by its contents."""

    embedded: str  # file in data/, part of the project
    official_url: str
    official_episodes: int
    official_steps: int


SOURCES = {
    "pusht": Source(
        embedded="pusht.npz",
        official_url="https://diffusion-policy.cs.columbia.edu/data/training/pusht.zip",
        official_episodes=206,
        official_steps=25_650,
    ),
}


@dataclasses.dataclass(frozen=True)
class Demos:
    """obs {key: (N, *shape)} and actions (N, Da), float32, environment units; episode_ends (episodes,)."""

    obs: dict[str, np.ndarray]
    actions: np.ndarray
    episode_ends: np.ndarray
    source: str  # one line that says which data this is

    def __post_init__(self):
        ends, n = self.episode_ends, len(self.actions)
        if ends.ndim != 1 or ends.size == 0 or ends[0] < 1 or (np.diff(ends) < 1).any() or ends[-1] != n:
            raise ValueError(
                f"{self.source}: episode_ends must rise strictly from above 0 to the number of steps, {n}; it holds "
                f"{ends.size} values, the last {ends.flat[-1] if ends.size else 'missing'}. Was the file copied whole?"
            )
        for name, array in {"action": self.actions, **self.obs}.items():
            if len(array) != n:
                raise ValueError(f"{self.source}: {name} has {len(array)} steps, action has {n}; they must be equal")
            if not np.isfinite(array).all():
                step = int(np.argwhere(~np.isfinite(array))[0, 0])
                raise ValueError(f"{self.source}: {name} has NaN or infinity at step {step}; remove or mend that episode")


# --- readers: one small function per file format ----------------------------------------------------------------------


def read_zarr(path: Path, names: Sequence[str]) -> tuple[Arrays, np.ndarray]:
    """Diffusion Policy's replay buffer, a folder or a zip (at its root or in a folder of it).

    Returns: those of `names` that the store holds, and episode_ends. Other arrays (images of 700 MB) are not read.
    """
    try:
        import zarr

        if path.is_dir():
            root = zarr.open_group(str(path), mode="r")
        else:  # the zip's own checksums guard its pieces
            with zipfile.ZipFile(path) as file:
                inside = [name for name in file.namelist() if "meta/episode_ends/" in name]
            folder = inside[0].split("meta/episode_ends/")[0].rstrip("/") if inside else ""
            root = zarr.open_group(zarr.storage.ZipStore(path, mode="r"), path=folder, mode="r")
        nodes = {name: root[f"data/{name}"] for name in names if f"data/{name}" in root}
        nodes["episode_ends"] = root["meta/episode_ends"]
        for name, node in nodes.items():
            if node.nchunks_initialized < node.nchunks:  # zarr reads a missing piece as zeros and says nothing
                raise ValueError(f"{name} has {node.nchunks_initialized} of {node.nchunks} pieces")
            if path.is_dir():
                check_pieces(path / node.path)
        arrays = {name: node[:] for name, node in nodes.items()}
    except ImportError as error:
        raise ImportError(f"replay buffers need zarr: pip install 'zarr>=3' ({error})") from error
    except Exception as error:  # a damaged store fails in many ways, from zlib's errors to zarr's; all mean the same
        raise ValueError(
            f"{path} is not a whole replay buffer (data/<name>, meta/episode_ends): {error}. Copy it again; "
            "a downloaded one, delete and fetch again."
        ) from error
    return arrays, arrays.pop("episode_ends")


def check_pieces(array: Path) -> None:
    """Raises ValueError for a piece of a zarr-2 array that was cut off. Blosc, the codec of the published data, decodes a cut
    piece to whatever lies in memory and says nothing; but its header tells the length."""
    metadata = array / ".zarray"
    compressor = json.loads(metadata.read_text())["compressor"] if metadata.is_file() else None
    if not compressor or compressor["id"] != "blosc":
        return
    for piece in array.iterdir():
        if piece.name.startswith("."):
            continue
        content = piece.read_bytes()
        expected = int.from_bytes(content[12:16], "little")
        if len(content) != expected or len(content) < 16:
            raise ValueError(f"piece {piece.name} of {array.name} has {len(content)} bytes, its header says {expected}")


def read_npz(path: Path, names: Sequence[str]) -> tuple[Arrays, np.ndarray]:
    """One compressed file with arrays <name> and episode_ends. Nothing in it is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in names if name in file}
            return arrays, file["episode_ends"]
    except Exception as error:  # a damaged file fails in many ways, in zip, zlib or numpy; all mean the same
        raise ValueError(
            f"{path} is not a whole .npz with episode_ends and {', '.join(names)}: {error}. Copy it again."
        ) from error


READERS: dict[str, Callable[[Path, Sequence[str]], tuple[Arrays, np.ndarray]]] = {
    ".zarr": read_zarr,
    ".zip": read_zarr,
    ".npz": read_npz,
}


# --- sources ----------------------------------------------------------------------------------------------------------


def load(
    source: str,
    task: str,
    names: Sequence[str],
    convert: Callable[[Arrays], tuple[dict[str, np.ndarray], np.ndarray]],
    mirror: Callable[[Arrays], Arrays] | None = None,
) -> Demos:
    """Load the demonstrations of a task.

    Args: source: "embedded", "official" or a path; task: a key of SOURCES for the first two; names: arrays to read;
        convert: arrays -> (obs, actions), raising ValueError where they do not fit the task; mirror: arrays -> the same
        episodes in a symmetry of the task, which are then added to them.
    """
    if source in ("embedded", "official") and task not in SOURCES:
        raise ValueError(f"{task} has no {source} demonstrations; give --demos PATH")
    if source == "embedded":
        path = DATA / SOURCES[task].embedded
    elif source == "official":
        path = DATA / "official" / SOURCES[task].official_url.rsplit("/", 1)[-1]
        if not path.is_file():
            download(SOURCES[task].official_url, path)
    else:
        path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no demonstrations at {path}; --demos takes embedded, official or an existing path")
    if path.suffix not in READERS:
        raise ValueError(f"{path}: unknown format {path.suffix!r}; readable are {', '.join(READERS)}")
    arrays, ends = READERS[path.suffix](path, names)
    if source == "official":
        expected = (SOURCES[task].official_episodes, SOURCES[task].official_steps)
        found = (ends.size, int(ends.max(initial=0)))
        if found != expected:
            raise ValueError(
                f"{path} holds {found[0]} episodes and {found[1]} steps; the published archive has {expected[0]} and "
                f"{expected[1]}. Delete it and run again."
            )
    try:
        obs, actions = convert(arrays)
    except ValueError as error:
        raise ValueError(f"{path} does not fit {task}: {error}") from error
    label = f"{source} demonstrations ({path.name})" if source in ("embedded", "official") else str(path)
    if mirror is not None:
        mirrored_obs, mirrored_actions = convert(mirror(arrays))
        obs = {key: np.concatenate([value, mirrored_obs[key]]) for key, value in obs.items()}
        actions, ends = np.concatenate([actions, mirrored_actions]), np.concatenate([ends, len(actions) + ends])
        label += ", and their mirror images"
    obs = {key: np.ascontiguousarray(value, np.float32) for key, value in obs.items()}
    return Demos(obs, np.ascontiguousarray(actions, np.float32), np.asarray(ends, np.int64), label)


def download(url: str, path: Path, timeout_s: float = 30.0) -> None:
    """Fetch url to path, with a progress bar; the file appears only when whole. timeout_s: longest silence, seconds."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # processes of one training do not meet
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as response, open(part, "wb") as file:
            size = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=path.name) as bar:
                while block := response.read(1 << 16):
                    file.write(block)
                    bar.update(len(block))
        if size and part.stat().st_size != size:
            raise OSError(f"{part.stat().st_size} of {size} bytes arrived")
        part.replace(path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        part.unlink(missing_ok=True)
        raise OSError(
            f"cannot fetch {url}: {error}. Without a network, fetch that file on another machine and give its path with "
            "--demos, or train on the demonstrations that come with the project: --demos embedded"
        ) from error


# --- windows ----------------------------------------------------------------------------------------------------------


class Windows:
    """All windows (o_hist, chunk) of a demonstration set, in the memory of the training device: Eqs. (6), (18)-(19).

    A window is Tp consecutive steps of one episode; its observation history is its first To steps, so that action To-1 belongs to
    the newest observation. Windows reach To-1 steps before an episode and Ta-1 behind it; there the first or last
    step is repeated (Diffusion Policy's padding), so that the policy learns to start from rest and to hold the end. Episodes
    shorter than Tp - (To-1) - (Ta-1) steps give no window.
    """

    def __init__(self, demos: Demos, obs_steps: int, horizon: int, action_steps: int, device: torch.device | str = "cpu"):
        starts = np.concatenate([[0], demos.episode_ends[:-1]])
        index = []
        for start, end in zip(starts, demos.episode_ends, strict=True):
            first = np.arange(start - (obs_steps - 1), end - horizon + (action_steps - 1) + 1)
            index.append((first[:, None] + np.arange(horizon)).clip(start, end - 1))
        index = np.concatenate(index)
        if len(index) == 0:
            shortest = horizon - obs_steps - action_steps + 2
            raise ValueError(f"{demos.source}: every episode is shorter than {shortest} steps, too short for a window")
        self.index = torch.from_numpy(index).to(device)  #                             (windows, Tp)
        self.obs = {key: torch.from_numpy(value).to(device) for key, value in demos.obs.items()}
        self.actions = torch.from_numpy(demos.actions).to(device)
        self.obs_steps = obs_steps

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, which: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """which (B,) -> obs {key: (B, To, *shape)}, chunk (B, Tp, Da); environment units."""
        rows = self.index[which]
        return {k: v[rows[:, : self.obs_steps]] for k, v in self.obs.items()}, self.actions[rows]
