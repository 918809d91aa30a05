"""Demonstrations: where they come from, the file formats, and the windows (o_hist, chunk) that training draws.

A demonstration set is a dict of arrays with one row per step, the episodes one behind the other, and `episode_ends`, the index
behind the last row of each episode (the layout of Diffusion Policy's replay buffers). A reader returns arrays under the names
they have in the file; the task (envs.py) turns them into its observation and its action.

    file                             reader       arrays
    name.zarr (folder), name.zip     read_zarr    data/<name>, meta/episode_ends
    name.npz                         read_npz     <name>, episode_ends; or OGBench's: episodes end where terminals is true
    name.hdf5                        read_hdf5    <name>, episode_ends; or D4RL's: <name>, and episodes end where terminals or
                                                  timeouts is true; or robomimic's: data/demo_<k>/<name> or .../obs/<name>
    folder                           read_folder  pieces of one set, *.npz as above, in the order of their names; or <name>.npy,
                                                  (T, B, ...), of which existence_mask.npy, (T, B), says what is real
    minari:<id>                      read_minari  observations, actions, rewards; of a dict, observations/<key>

Pictures, (steps, H, W, 3), of zarr and of robomimic's files are never in memory as a whole: they go, as uint8, into a plain file
in data/cache/, which is mapped.
Symbols: To obs_steps, Tp horizon, Ta action_steps, Da action dimension, N steps of all episodes together.
Errors are ValueError (the content is wrong), OSError (the file cannot be had) or ImportError; each names the remedy.
"""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import json
import os
import sys
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

Arrays = dict[str, np.ndarray]


DATA = Path(__file__).parent / "data"
RECORDED = "recorded/2"  # counted up when simulators show other things than before: older recordings would not fit them


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the demonstrations of one task come from. The published archive is verified by its contents."""

    embedded: str  # file in data/: part of the project, or recorded there on first use
    official_url: str
    official_steps: int | None  # None: not checked
    official_file: str = ""  # its name here; empty: the last part of the url
    official_episodes: int | None = None  # None: not checked
    tolerance: int = 0  # by so many steps the archive may differ: an unfinished episode at its end is left out


SOURCES = {
    "pusht": Source(
        embedded="pusht.npz",
        official_url="https://diffusion-policy.cs.columbia.edu/data/training/pusht.zip",
        official_episodes=206,
        official_steps=25_650,
    ),
}
D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/{}-v2.hdf5"
D4RL_STEPS = {
    "hopper-medium": 999_906,
    "hopper-medium-expert": 1_999_400,
    "walker2d-medium": 999_995,
    "walker2d-medium-expert": 1_999_995,
    "halfcheetah-medium": 1_000_000,
    "halfcheetah-medium-expert": 2_000_000,
    "ant-medium": 999_946,
    "ant-medium-expert": 1_999_946,
}
for _name, _steps in D4RL_STEPS.items():
    _body, _level = _name.split("-", 1)
    SOURCES[f"{_name}-v2"] = Source(
        embedded=f"recorded/{_name}.hdf5",
        official_url=D4RL_URL.format(f"{_body}_{_level.replace('-', '_')}"),
        official_steps=_steps,
        tolerance=2_000,
    )
ROBOMIMIC_URL = "https://huggingface.co/datasets/amandlek/robomimic/resolve/main/v1.5/{}/ph/low_dim_v15.hdf5"
for _name in ("lift", "can", "square", "transport", "tool-hang"):  # 200 episodes of proficient humans each
    SOURCES[_name] = Source(
        embedded=f"recorded/{_name}.npz",
        official_url=ROBOMIMIC_URL.format(_name.replace("-", "_")),
        official_file=f"{_name}-ph-low_dim_v15.hdf5",
        official_episodes=200,
        official_steps=None,
    )
OGBENCH_URL = "https://rail.eecs.berkeley.edu/datasets/ogbench/cube-{}-play-v0.npz"
OGBENCH_STEPS = {"single": 1_001_000, "double": 1_001_000, "triple": 3_003_000, "quadruple": 5_005_000}
for _name, _steps in OGBENCH_STEPS.items():
    for _task in range(1, 6):  # one play for all tasks of a size
        SOURCES[f"cube-{_name}-task{_task}"] = Source(
            embedded=f"recorded/cube-{_name}-play.npz",
            official_url=OGBENCH_URL.format(_name),
            official_steps=_steps,
            tolerance=_steps // 500,  # with or without the last observation of each episode of 1,000 steps
        )


@dataclasses.dataclass(frozen=True)
class Demos:
    """obs {key: (N, *shape)} and actions (N, Da), float32 (images uint8), environment units; episode_ends (episodes,)."""

    obs: dict[str, np.ndarray]
    actions: np.ndarray
    episode_ends: np.ndarray
    source: str  # one line that says which data this is
    returns: np.ndarray | None = None  # (episodes,) undiscounted, where the data hold rewards

    def __post_init__(self):
        ends, n = self.episode_ends, len(self.actions)
        for name, array in {"action": self.actions, **self.obs}.items():
            if len(array) != n:
                raise ValueError(f"{self.source}: {name} has {len(array)} steps, action has {n}; they must be equal")
            if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
                step = int(np.argwhere(~np.isfinite(array))[0, 0])
                raise ValueError(f"{self.source}: {name} has NaN or infinity at step {step}; remove or mend that episode")
        if ends.ndim != 1 or ends.size == 0 or ends[0] < 1 or (np.diff(ends) < 1).any() or ends[-1] != n:
            raise ValueError(
                f"{self.source}: episode_ends must rise strictly from above 0 to the number of steps, {n}; it holds "
                f"{ends.size} values, the last {ends.flat[-1] if ends.size else 'missing'}. Was the file copied whole, and does "
                "its last episode end with the file?"
            )


# --- readers: one small function per file format ----------------------------------------------------------------------


def read_zarr(path: Path, names: Sequence[str]) -> tuple[Arrays, np.ndarray]:
    """Diffusion Policy's replay buffer, a folder or a zip (at its root or in a folder of it).

    Returns: those of `names` that the store holds, and episode_ends. Other arrays are not read.
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
        arrays = {
            name: spool(path, name, node.shape, (node[i : i + node.chunks[0]] for i in range(0, node.shape[0], node.chunks[0])))
            if node.ndim == 4
            else node[:]
            for name, node in nodes.items()
        }
    except ImportError as error:
        raise ImportError(f"replay buffers need zarr: pip install 'zarr>=3' ({error})") from error
    except Exception as error:  # a damaged store fails in many ways, from zlib's errors to zarr's; all mean the same
        raise ValueError(
            f"{path} is not a whole replay buffer (data/<name>, meta/episode_ends): {error}. Copy it again; "
            "a downloaded one, delete and fetch again."
        ) from error
    return arrays, arrays.pop("episode_ends")


def spool(path: Path, name: str, shape: tuple[int, ...], blocks: Iterable[np.ndarray]) -> np.ndarray:
    """Pictures that come block by block -> (steps, H, W, 3) uint8, mapped from a file in data/cache/, which is made once.

    Raises: ValueError for pictures that are not whole numbers from 0 to 255.
    """
    files = sorted((path, *path.rglob("*")))  # of a folder, all that is in it
    changed = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = f"{path.resolve()} {changed} {name} {shape}"
    cache = DATA / "cache" / f"{path.stem}-{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.npy"
    if not cache.is_file():
        cache.parent.mkdir(parents=True, exist_ok=True)
        part, row = cache.with_name(f"{cache.name}.{os.getpid()}.part"), 0  # processes of one training do not meet
        try:
            with open(part, "wb") as file:  # written, not mapped: a full disk then is an error and not a signal
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for block in blocks:
                    if block.shape[1:] != shape[1:]:
                        raise ValueError(
                            f"{name}: pictures from row {row} on have shape {block.shape[1:]}, those before {shape[1:]}"
                        )
                    if block.dtype != np.uint8 and not ((block >= 0) & (block <= 255) & (block == np.round(block))).all():
                        raise ValueError(
                            f"{name}: pictures must hold whole numbers from 0 to 255; rows {row} to {row + len(block) - 1} reach "
                            f"from {block.min():g} to {block.max():g}"
                        )
                    file.write(np.ascontiguousarray(block, np.uint8).tobytes())
                    row += len(block)
            part.replace(cache)
        finally:
            part.unlink(missing_ok=True)
    return np.load(cache, mmap_mode="c")


def both(path: Path, name: str, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """One after the other; pictures, which may be more than memory holds, in a file as above."""
    if first.dtype != np.uint8:
        return np.concatenate([first, second])
    blocks = (part[i : i + 500] for part in (first, second) for i in range(0, len(part), 500))
    return spool(path, name, (len(first) + len(second), *first.shape[1:]), blocks)


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
            if "episode_ends" in file:
                return arrays, file["episode_ends"]
            ends = np.flatnonzero(file["terminals"]) + 1 if "terminals" in file else None
    except Exception as error:  # a damaged file fails in many ways, in zip, zlib or numpy; all mean the same
        raise ValueError(
            f"{path} is not a whole .npz with episode_ends and {', '.join(names)}: {error}. Copy it again."
        ) from error
    if ends is None:
        raise ValueError(
            f"{path} does not say where its episodes end: it needs episode_ends, the number of the row behind each last step, or "
            "terminals, true at each last step"
        )
    return arrays, ends


def read_hdf5(path: Path, names: Sequence[str]) -> tuple[Arrays, np.ndarray]:
    """An hdf5 file in one of three layouts: robomimic's, with episode_ends, or D4RL's."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"hdf5 files need h5py: pip install h5py ({error})") from error
    try:
        with h5py.File(path) as file:
            if isinstance(file.get("data"), h5py.Group):
                return read_robomimic(path, file["data"], names)
            if "episode_ends" in file:
                arrays = {name: np.asarray(file[name][:]) for name in names if name in file}
                return arrays, np.asarray(file["episode_ends"][:])
    except (OSError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a whole hdf5 file: {error}. Copy it again, or give another with --demos.") from error
    return read_d4rl(path, names)


def read_robomimic(path: Path, group, names: Sequence[str]) -> tuple[Arrays, np.ndarray]:
    """robomimic's layout: data/demo_<k>/actions, rewards, ... and data/demo_<k>/obs/<key>. Episodes in the order of k.

    Raises ValueError where an episode lacks an array that the first one has, or its arrays differ in length.
    """
    numbers = sorted(int(name.removeprefix("demo_")) for name in group if name.removeprefix("demo_").isdecimal())
    episodes = [group[f"demo_{k}"] for k in numbers]
    if not episodes or not all(hasattr(episode, "keys") for episode in episodes):
        raise ValueError(f"{path} holds no episodes data/demo_0, data/demo_1, ..., each a group of arrays")

    def find(episode, name: str):
        return episode["obs"][name] if "obs" in episode and name in episode["obs"] else episode.get(name)

    present = [name for name in names if find(episodes[0], name) is not None]
    for episode in episodes:
        lengths = {name: None if find(episode, name) is None else len(find(episode, name)) for name in present}
        if len(set(lengths.values())) > 1 or None in lengths.values():
            raise ValueError(f"{path}: {episode.name} has arrays of unequal length: {lengths}")
    ends = np.cumsum([len(find(episode, present[0])) for episode in episodes]) if present else np.zeros(0, int)
    arrays = {}
    for name in present:
        parts = (find(episode, name)[:] for episode in episodes)
        shape = (int(ends[-1]), *find(episodes[0], name).shape[1:])
        arrays[name] = spool(path, name, shape, parts) if len(shape) == 4 else np.concatenate(list(parts))
    if "env_args" in names and "env_args" in group.attrs:  # the recording's environment, JSON
        arrays["env_args"] = np.array(group.attrs["env_args"])
    return arrays, ends


def read_d4rl(path: Path, names: Sequence[str]) -> tuple[Arrays, np.ndarray]:
    """D4RL's hdf5: one row per step, flags `terminals` and `timeouts`. An unfinished episode at the end is left out."""
    import h5py

    try:
        with h5py.File(path) as file:
            present = [name for name in names if name in file]
            wanted = [*present, "terminals", "timeouts"]
            missing = [name for name in wanted if not isinstance(file.get(name), h5py.Dataset)]
            wanted += ["next_observations"] if "observations" in present and "next_observations" in file else []
            if missing:
                raise ValueError(f"it has no array {', '.join(missing)} (it has {', '.join(file)})")
            arrays = {name: np.asarray(file[name][:]) for name in wanted}
    except (OSError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{path} is not a whole D4RL file: {error}. Copy it again, or give another with --demos.") from error
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{path}: arrays of unequal length: {', '.join(f'{k} {n}' for k, n in lengths.items())}")
    ends = np.flatnonzero(arrays.pop("terminals").astype(bool) | arrays.pop("timeouts").astype(bool)) + 1
    if len(ends) == 0:
        raise ValueError(f"{path} holds no complete episode: terminals and timeouts are all false")
    arrays = {name: array[: ends[-1]] for name, array in arrays.items()}
    following = arrays.pop("next_observations", None)
    if following is not None:
        if following.shape != arrays["observations"].shape or following.ndim != 2:
            shapes = f"{following.shape}, observations {arrays['observations'].shape}"
            raise ValueError(f"{path}: next_observations has shape {shapes}; both must be (steps, features)")
        arrays["observations"], keep = check_observations(path, arrays["observations"], following, ends)
        arrays, ends = {name: array[keep] for name, array in arrays.items()}, np.unique(np.cumsum(keep)[ends - 1])
        ends = ends[ends > 0]
    return arrays, ends


def check_observations(
    path: Path, observations: np.ndarray, following: np.ndarray, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Within an episode, row i + 1 of `observations` is row i of `next_observations`. Returns observations, rows to keep.

    A recorder that keeps a reference to the simulator's buffer, instead of a copy, writes one row over and over, and a policy
    trained on that is noise. Such a file is mended from next_observations, but for the first step of each episode, which is lost.
    """
    inner = np.ones(len(observations), bool)
    inner[np.concatenate([[0], ends[:-1]])] = False  # all rows but the first of each episode
    previous = np.roll(following, 1, 0)
    if not inner.any() or np.isclose(observations, previous, atol=1e-5).all(-1)[inner].mean() > 0.99:
        return observations, np.ones(len(observations), bool)
    print(
        f"{path}: observations do not follow from next_observations ({len(np.unique(observations, axis=0)):,} distinct rows of "
        f"{len(observations):,}). They are rebuilt from next_observations, without the first step of each episode.",
        file=sys.stderr,
    )
    return previous, inner


def read_minari(dataset_id: str, names: Sequence[str]) -> tuple[Arrays, np.ndarray]:
    """A Minari dataset, by id; fetched where it is not on this machine. Its observations hold one row more per episode."""
    try:
        import minari
    except ImportError as error:
        raise ImportError(f"Minari datasets need minari: pip install 'minari[hdf5,hf]' ({error})") from error
    try:
        episodes = list(minari.load_dataset(dataset_id, download=True).iterate_episodes())
    except Exception as error:  # no such id, no network, a damaged file: its own errors are many
        raise ValueError(f"cannot load the Minari dataset {dataset_id!r} ({type(error).__name__}: {error})") from error
    if not episodes:
        raise ValueError(f"the Minari dataset {dataset_id!r} holds no episodes")

    def find(episode, name: str):
        name, *keys = name.split("/")
        value = getattr(episode, name, None)
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    names = [name for name in names if find(episodes[0], name) is not None]
    for name in names:
        if not isinstance(find(episodes[0], name), np.ndarray):
            raise ValueError(f"the Minari dataset {dataset_id!r} has no plain array {name!r} per episode, which this task reads")
    rows = {name: [find(episode, name)[: len(episode.actions)] for episode in episodes] for name in names}
    return {name: np.concatenate(parts) for name, parts in rows.items()}, np.cumsum([len(e.actions) for e in episodes])


def read_padded(path: Path, names: Sequence[str]) -> tuple[Arrays, np.ndarray]:
    """The relay data's layout (Franka Kitchen): B episodes side by side, padded to T steps; existence_mask is 1 on real ones.

    Raises: ValueError for a missing or damaged file, unequal shapes, or a mask that is not ones and then zeros in each episode.
    """

    def read(name: str) -> np.ndarray:
        try:
            return np.load(path / f"{name}.npy", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} holds no whole {name}.npy: {error}. Copy it again.") from error

    mask = read("existence_mask")
    padded = {name: read(name) for name in names if (path / f"{name}.npy").exists()}
    if not padded:
        raise ValueError(f"{path} holds none of {', '.join(f'{name}.npy' for name in names)}, which this task reads")
    shapes = {name: array.shape for name, array in {"existence_mask": mask, **padded}.items()}
    if mask.ndim != 2 or any(shape[:2] != mask.shape for shape in shapes.values()):
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{path}: shapes do not match: {found}; all must begin with (steps, episodes)")
    lengths = (mask != 0).sum(0)
    bad = np.flatnonzero(((np.arange(len(mask))[:, None] < lengths) != mask).any(0) | (lengths == 0))
    if len(bad):
        raise ValueError(
            f"{path}: existence_mask must be ones and then zeros in each episode; it is not in {len(bad)} of {len(lengths)}, the "
            f"first is episode {bad[0]}. Is it (steps, episodes)?"
        )
    real = mask.T.astype(bool)  # rows in the order of episodes                    (B, T)
    return {name: np.swapaxes(array, 0, 1)[real] for name, array in padded.items()}, np.cumsum(lengths)


def read_folder(path: Path, names: Sequence[str]) -> tuple[Arrays, np.ndarray]:
    """A set in several .npz files, as OGBench's largest ones are, of which one at a time is unpacked; or a padded set."""
    files = sorted(path.glob("*.npz"))
    if not files:
        return read_padded(path, names)
    pieces = [read_npz(file, names) for file in files]
    if len({tuple(sorted(arrays)) for arrays, _ in pieces}) > 1:
        raise ValueError(f"{path}: the pieces hold different arrays; they must be of one set")
    before = np.cumsum([0, *(len(next(iter(arrays.values()))) if arrays else 0 for arrays, _ in pieces[:-1])])
    ends = np.concatenate([start + ends for start, (_, ends) in zip(before, pieces, strict=True)])
    return {name: np.concatenate([arrays[name] for arrays, _ in pieces]) for name in pieces[0][0]}, ends


READERS: dict[str, Callable[[Path, Sequence[str]], tuple[Arrays, np.ndarray]]] = {
    ".zarr": read_zarr,
    ".zip": read_zarr,
    ".npz": read_npz,
    ".hdf5": read_hdf5,
    ".h5": read_hdf5,
    "folder": read_folder,
}


# --- sources ----------------------------------------------------------------------------------------------------------


def embedded(task: str, count: str = "") -> Path:
    """The file of a task's own demonstrations, there or not yet; count: episodes, where somebody asked for so many."""
    path = DATA / (SOURCES[task].embedded if task in SOURCES else f"{RECORDED}/{task}.npz")
    return path.with_stem(f"{path.stem}-{count}") if count else path


def load(
    source: str,
    task: str,
    names: Sequence[str],
    convert: Callable[[Arrays], tuple[dict[str, np.ndarray], np.ndarray]],
    mirror: Callable[[Arrays], Arrays] | None = None,
    record: Callable[[Path], None] | None = None,
    origin: str = "",
    record_expert: Callable[[Path, Path], None] | None = None,
    scripted: bool = False,
    recombine: Callable[[Arrays, np.ndarray], tuple[Arrays, np.ndarray]] | None = None,
) -> Demos:
    """Load the demonstrations of a task.

    Args: source: "embedded", "official", "scripted", "scripted:N" or a path; names: arrays to read;
        task: a key of SOURCES for the first two, unless record makes the embedded ones; scripted: record takes episodes=N;
        record: makes the embedded file where it is recorded on first use; origin: who acted there, for the run's first line;
        record_expert: the same with an expert policy, an .npz of weights w0, b0, ... that `source` names;
        convert: arrays -> (obs, actions), raising ValueError where they do not fit the task; mirror: arrays -> the same
        episodes in a symmetry of the task, which are then added to them; recombine: (arrays, episode ends) -> the same with
        more episodes, put together from these.
    """
    count = ""
    if source.split(":")[0] == "scripted":
        count = source.partition(":")[2]
        if not scripted:
            raise ValueError(f"{task} has no scripted expert; give --demos PATH")
        if source != "scripted" and (not count.isdecimal() or int(count) < 1):
            raise ValueError(f"--demos {source}: scripted:N takes a number of episodes, as in scripted:200")
        source = "scripted"
    if (source == "official" and task not in SOURCES) or (source == "embedded" and task not in SOURCES and record is None):
        raise ValueError(f"{task} has no {source} demonstrations; give --demos PATH")
    if source in ("embedded", "scripted"):
        path = embedded(task, count)
        if record is not None and not path.exists():
            print(f"recording demonstrations -> {path}", flush=True)
            record(path, episodes=int(count)) if count else record(path)
    elif source == "official":
        path = DATA / "official" / (SOURCES[task].official_file or SOURCES[task].official_url.rsplit("/", 1)[-1])
        if not path.is_file():
            download(SOURCES[task].official_url, path)
    else:
        path = Path(source).expanduser()
    if record_expert is not None and holds_policy(path):
        policy, digest = path, hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        path = DATA / RECORDED / f"{task}-{policy.stem}-{digest}.npz"
        if not path.exists():
            print(f"recording demonstrations with the policy {policy} -> {path}", flush=True)
            record_expert(path, policy)
    if source.startswith("minari:"):
        arrays, ends = read_minari(source.removeprefix("minari:"), names)
    elif not path.exists():
        takes = "embedded, official, scripted:N, minari:ID or an existing path"
        raise FileNotFoundError(f"no demonstrations at {path}; --demos takes {takes}")
    else:
        kind = "folder" if path.is_dir() and path.suffix != ".zarr" else path.suffix
        if kind not in READERS:
            raise ValueError(f"{path}: unknown format {kind!r}; readable are {', '.join(READERS)}")
        arrays, ends = READERS[kind](path, names)
    if source == "official":
        published, found = SOURCES[task], (ends.size, int(ends.max(initial=0)))
        wanted = published.official_episodes or found[0], published.official_steps or found[1]
        if found[0] != wanted[0] or abs(found[1] - wanted[1]) > published.tolerance:
            raise ValueError(
                f"{path} holds {found[0]} episodes and {found[1]} steps; the published archive has {wanted[0]} and "
                f"{wanted[1]}. Delete it and run again."
            )
    try:
        obs, actions = convert(arrays)
    except ValueError as error:
        raise ValueError(f"{path} does not fit {task}: {error}") from error
    origin = f"{origin}: " if source in ("embedded", "scripted") and origin else ""
    label = f"{source} demonstrations ({origin}{path.name})" if source in ("embedded", "official", "scripted") else str(path)

    def checked(obs: Arrays, actions: np.ndarray, ends: np.ndarray) -> Demos:
        obs = {key: value if value.dtype == np.uint8 else np.ascontiguousarray(value, np.float32) for key, value in obs.items()}
        return Demos(obs, np.ascontiguousarray(actions, np.float32), np.asarray(ends, np.int64), label)

    data = checked(obs, actions, ends)
    if recombine is not None:  # what has been checked
        arrays, ends = recombine(arrays, data.episode_ends)
        label += ", parts of them recombined"
        data = checked(*convert(arrays), ends)
    if "rewards" in arrays:
        rewards = arrays["rewards"]
        if len(rewards) < len(data.actions):
            raise ValueError(f"{label}: rewards has {len(rewards)} steps, action has {len(data.actions)}; they must be equal")
        if not np.isfinite(rewards).all():
            raise ValueError(f"{label}: rewards has NaN or infinity at step {int(np.argmin(np.isfinite(rewards)))}")
        data = dataclasses.replace(data, returns=np.add.reduceat(rewards, [0, *data.episode_ends[:-1]]))
    if mirror is None:
        return data
    mirrored, mirrored_actions = convert(mirror(arrays))
    return Demos(
        {
            key: both(path, f"{key}-mirror", value, mirrored[key].astype(value.dtype, copy=False))
            for key, value in data.obs.items()
        },
        np.concatenate([data.actions, mirrored_actions.astype(np.float32)]),
        np.concatenate([data.episode_ends, len(data.actions) + data.episode_ends]),
        f"{label}, and their mirror images",
        None if data.returns is None else np.tile(data.returns, 2),
    )


def holds_policy(path: Path) -> bool:
    """Whether path is an .npz of a network's weights, w0, b0, ..., instead of steps."""
    if path.suffix != ".npz" or not zipfile.is_zipfile(path):
        return False  # read_npz says what is wrong with it
    with zipfile.ZipFile(path) as file:
        return "w0.npy" in file.namelist()


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
        self.obs = {
            key: torch.from_numpy(v) if v.dtype == np.uint8 else torch.from_numpy(v).to(device) for key, v in demos.obs.items()
        }
        self.actions = torch.from_numpy(demos.actions).to(device)
        self.obs_steps, self.device = obs_steps, device

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, which: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """which (B,) -> obs {key: (B, To, *shape)}, chunk (B, Tp, Da); environment units."""
        rows = self.index[which]
        history = rows[:, : self.obs_steps]
        obs = {k: v[history.to(v.device)].to(self.device) for k, v in self.obs.items()}
        return obs, self.actions[rows]
