"""demos.py: windows against a naive loop, the readers, broken files, sources without a network."""

import io
import pickle
import sys
import types
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import h5py
import numcodecs
import numpy as np
import pytest
import torch
import zarr

import demos
import envs
import pusht

TASK = envs.TASKS["pusht"]


def load(path: Path | str) -> demos.Demos:
    return demos.load(str(path), "pusht", TASK.demo_arrays, TASK.demo_convert)


def write_zarr(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    """Diffusion Policy's layout and compression, in pieces of 10 rows, with an array that nobody asks for."""
    blosc = numcodecs.Blosc(cname="zstd", clevel=5, shuffle=2)
    root = zarr.open_group(str(path), mode="w", zarr_format=2)
    for name, array in {**arrays, "img": np.ones((len(arrays["state"]), 2, 2, 3), np.float32)}.items():
        where = "meta/episode_ends" if name == "episode_ends" else f"data/{name}"
        chunks = (10, *array.shape[1:])
        node = root.create_array(where, shape=array.shape, chunks=chunks, dtype=array.dtype, compressors=blosc)
        node[:] = array
    return path


def zip_folder(folder: Path, path: Path, inside: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for item in sorted(folder.rglob("*")):
            if item.is_file():
                file.write(item, inside + item.relative_to(folder).as_posix())
    return path


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    np.savez(path, **arrays)
    return path


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizons", [(2, 16, 8), (1, 4, 4), (3, 8, 6), (4, 4, 1), (1, 1, 1), (2, 5, 3)], ids=str)
def test_windows_equal_a_naive_loop(horizons):
    To, Tp, Ta = horizons
    lengths = [20, 9, 1, 33]  # the third is so short that padding alone has to fill its windows, if it has any
    ends = np.cumsum(lengths)
    steps = np.arange(ends[-1], dtype=np.float32)  # every step is known by its number
    data = demos.Demos({"a": steps[:, None], "b": -steps[:, None, None]}, steps[:, None] + 0.5, ends, "numbers")
    expected = []
    for start, end in zip(ends - lengths, ends, strict=True):
        padded = [start] * (To - 1) + list(range(start, end)) + [end - 1] * (Ta - 1)  # Diffusion Policy's padding
        expected += [padded[i : i + Tp] for i in range(len(padded) - Tp + 1)]
    windows = demos.Windows(data, To, Tp, Ta)
    assert len(windows) == len(expected) == sum(max(0, L - Tp + (To - 1) + (Ta - 1) + 1) for L in lengths)
    obs, chunk = windows[torch.arange(len(windows))]
    expected = torch.tensor(expected, dtype=torch.float32)
    assert torch.equal(chunk, expected.unsqueeze(-1) + 0.5)
    assert torch.equal(obs["a"], expected[:, :To, None])
    assert torch.equal(obs["b"], -expected[:, :To, None, None])


def test_windows_of_episodes_that_are_all_too_short():
    data = demos.Demos({"a": np.zeros((6, 1), np.float32)}, np.zeros((6, 1), np.float32), np.array([3, 6]), "short file")
    with pytest.raises(ValueError, match=r"short file.*8 steps"):
        demos.Windows(data, 2, 16, 8)


# --- readers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["npz", "zarr folder", "zip at its root", "zip in a folder"])
def test_every_format_gives_the_same_demonstrations(form, pusht_arrays, tmp_path):
    folder = write_zarr(tmp_path / "replay.zarr", pusht_arrays)
    path = {
        "npz": lambda: write_npz(tmp_path / "replay.npz", pusht_arrays),
        "zarr folder": lambda: folder,
        "zip at its root": lambda: zip_folder(folder, tmp_path / "root.zip"),
        "zip in a folder": lambda: zip_folder(folder, tmp_path / "nested.zip", "pusht/pusht_cchi_v7_replay.zarr/"),
    }[form]()
    data = load(path)
    assert data.episode_ends.tolist() == [40, 65, 98]
    np.testing.assert_array_equal(data.actions, pusht_arrays["action"])
    state = pusht_arrays["state"].astype(np.float64)
    np.testing.assert_array_equal(data.obs["state"], pusht.keypoint_state(state[:, :2], state[:, 2:]).astype(np.float32))
    assert str(path) in data.source


def test_demonstrations_that_come_with_the_project_end_with_the_block_on_its_goal():
    data = load("embedded")
    goal = pusht.keypoint_state(np.zeros((1, 2)), np.array([[256, 256, np.pi / 4]]))[:, :18]
    ends = data.obs["state"][data.episode_ends - 1, :18]
    miss = np.linalg.norm((ends - goal).reshape(-1, 9, 2), axis=-1).mean(1)  # pixels; at most 11 in the published data
    assert miss.max() < 25


# --- broken files -----------------------------------------------------------------------------------------------------


def broken(arrays: dict[str, np.ndarray], name: str, change) -> dict[str, np.ndarray]:
    array = arrays[name].copy()
    return arrays | {name: change(array)}


def with_nan(array: np.ndarray) -> np.ndarray:
    array[17, 1] = np.nan
    return array


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("action", with_nan, "NaN or infinity at step 17"),
        ("state", with_nan, "NaN or infinity at step 17"),
        ("state", lambda a: a[:, :4], r"state has shape \(98, 4\)"),
        ("action", lambda a: a[:, :1], r"action has shape \(98, 1\)"),
        ("action", lambda a: a[:, 0], r"action has shape \(98,\)"),
        ("state", lambda a: a[:-3], "95 steps"),
        ("action", lambda a: a[:-3], "state has 98 steps, action has 95; they must be equal"),
        ("episode_ends", lambda a: a[:-1], "episode_ends.*98.*the last 65"),
        ("episode_ends", lambda a: a[[1, 0, 2]], "episode_ends must rise"),
        ("episode_ends", lambda a: np.array([40, 40, 98]), "episode_ends must rise"),
        ("episode_ends", lambda a: np.array([0, 40, 98]), "episode_ends must rise"),
        ("episode_ends", lambda a: np.array([40, 65, 120]), "episode_ends.*98.*120"),
        ("episode_ends", lambda a: a[:0], "episode_ends.*0 values"),
        ("episode_ends", lambda a: np.array(98), "episode_ends"),
    ],
)
def test_wrong_contents_are_named(name, change, words, pusht_arrays, tmp_path):
    path = write_npz(tmp_path / "demos.npz", broken(pusht_arrays, name, change))
    with pytest.raises(ValueError, match=words) as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("missing", ["state", "action", "episode_ends"])
@pytest.mark.parametrize("form", ["npz", "zarr"])
def test_missing_arrays_are_named(form, missing, pusht_arrays, tmp_path):
    arrays = {name: array for name, array in pusht_arrays.items() if name != missing}
    if form == "npz":
        path = write_npz(tmp_path / "demos.npz", arrays)
    else:
        root = write_zarr(tmp_path / "demos.zarr", pusht_arrays)
        del zarr.open_group(str(root))[f"{'meta' if missing == 'episode_ends' else 'data'}/{missing}"]
        path = root
    with pytest.raises(ValueError, match=missing):
        load(path)


def test_paths_that_cannot_be_demonstrations(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz.*--demos"):
        load(tmp_path / "nowhere.npz")
    (tmp_path / "demos.pkl").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"unknown format '\.pkl'.*\.npz"):
        load(tmp_path / "demos.pkl")
    with pytest.raises(ValueError, match="no_such_task has no embedded"):
        demos.load("embedded", "no_such_task", TASK.demo_arrays, TASK.demo_convert)


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
@pytest.mark.parametrize("form", ["npz", "zip"])
def test_truncated_files_are_refused(form, kept, pusht_arrays, tmp_path):
    if form == "npz":
        path = write_npz(tmp_path / "demos.npz", pusht_arrays)
    else:
        path = zip_folder(write_zarr(tmp_path / "replay.zarr", pusht_arrays), tmp_path / "demos.zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=f"demos.{form} is not a whole"):
        load(path)


@pytest.mark.parametrize("lost", ["data/state/1.0", "data/action/9.0", "meta/episode_ends/0"])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_lost_piece_of_a_zarr_store_is_not_read_as_zeros(lost, zipped, pusht_arrays, tmp_path):
    path = write_zarr(tmp_path / "replay.zarr", pusht_arrays)
    (path / lost).unlink()
    if zipped:
        path = zip_folder(path, tmp_path / "replay.zip")
    with pytest.raises(ValueError, match=r"replay\.z.* is not a whole replay buffer"):
        load(path)


@pytest.mark.parametrize("bytes_lost", [1, 20, 60])
def test_a_cut_piece_of_a_zarr_store_is_refused(bytes_lost, pusht_arrays, tmp_path):
    # Blosc, the compression of the published data, decodes a cut piece to whatever lies in memory behind it.
    path = write_zarr(tmp_path / "replay.zarr", pusht_arrays)
    piece = path / "data/action/2.0"
    piece.write_bytes(piece.read_bytes()[:-bytes_lost])
    with pytest.raises(ValueError, match="is not a whole replay buffer"):
        load(path)


def test_a_lost_piece_of_an_array_that_is_not_read_does_no_harm(pusht_arrays, tmp_path):
    path = write_zarr(tmp_path / "replay.zarr", pusht_arrays)
    (path / "data/img/0.0.0.0").unlink()
    assert len(load(path).actions) == 98


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(pusht_arrays, tmp_path):
    sprung = tmp_path / "sprung"
    array = np.array([Trap(sprung)] * 98, dtype=object)
    np.savez(tmp_path / "demos.npz", **(pusht_arrays | {"action": array}))
    with pytest.raises(ValueError, match=r"demos\.npz"):
        load(tmp_path / "demos.npz")
    (tmp_path / "raw.npz").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(ValueError, match=r"raw\.npz"):
        load(tmp_path / "raw.npz")
    assert not sprung.exists()


# --- the published archive --------------------------------------------------------------------------------------------


@pytest.fixture
def data_folder(tmp_path, monkeypatch) -> Path:
    """An empty data folder in place of the project's, and no network."""

    def no_network(*args, **kwargs):
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr(demos, "DATA", tmp_path / "data")
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    return tmp_path / "data"


def files(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file()]


def test_without_a_network_the_remedy_is_named_and_nothing_stays(data_folder):
    with pytest.raises(OSError, match=r"name resolution.*--demos embedded"):
        load("official")
    assert files(data_folder) == []


class Response(io.BytesIO):
    def __init__(self, content: bytes, size: int):
        super().__init__(content)
        self.headers = {"Content-Length": str(size)}


def test_a_download_that_breaks_off_leaves_nothing(data_folder, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: Response(b"x" * 1000, 5000))
    with pytest.raises(OSError, match="1000 of 5000 bytes"):
        load("official")
    assert files(data_folder) == []


def test_a_download_is_verified_by_its_counts(data_folder, monkeypatch, pusht_arrays, tmp_path):
    archive = zip_folder(write_zarr(tmp_path / "replay.zarr", pusht_arrays), tmp_path / "other.zip", "pusht/replay.zarr/")
    content = archive.read_bytes()
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: Response(content, len(content)))
    with pytest.raises(ValueError, match=r"3 episodes and 98 steps.*206.*25,?_?650"):
        load("official")
    # With the counts of what was sent, the same archive is taken, and read from the disk the second time.
    source = demos.Source("pusht.npz", demos.SOURCES["pusht"].official_url, official_steps=98, official_episodes=3)
    monkeypatch.setitem(demos.SOURCES, "pusht", source)
    first = load("official")
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: pytest.fail("downloaded again"))
    np.testing.assert_array_equal(load("official").actions, first.actions)


# --- D4RL and Minari --------------------------------------------------------------------------------------------------

HOPPER = envs.TASKS["hopper-medium-v2"]
ENDS = [20, 45]  # the first episode terminates, the second is cut by the clock, the third is unfinished


def d4rl_arrays(**changes) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(60, 11)).astype(np.float32)
    arrays = {"observations": obs, "actions": rng.uniform(-1, 1, (60, 3)).astype(np.float32), "rewards": rng.normal(size=60)}
    arrays |= {"terminals": np.arange(60) == ENDS[0] - 1, "timeouts": np.arange(60) == ENDS[1] - 1}
    following = np.roll(obs, -1, 0)
    following[[end - 1 for end in ENDS]] += 9  # behind the last step of an episode comes its final observation, not the next row
    return {**arrays, "next_observations": following, **changes}


def write_d4rl(path: Path, arrays: dict[str, np.ndarray | None]) -> Path:
    with pytest.importorskip("h5py").File(path, "w") as file:
        for name, array in arrays.items():
            if array is not None:
                file[name] = array
    return path


def load_hopper(source: Path | str) -> demos.Demos:
    return demos.load(str(source), HOPPER.name, HOPPER.demo_arrays, HOPPER.demo_convert)


@pytest.mark.parametrize("following", [True, False])
def test_d4rl_gives_its_finished_episodes(following, tmp_path, capsys):
    arrays = d4rl_arrays()
    data = load_hopper(write_d4rl(tmp_path / "a.hdf5", arrays if following else {**arrays, "next_observations": None}))
    assert data.episode_ends.tolist() == ENDS
    np.testing.assert_array_equal(data.obs["state"], arrays["observations"][: ENDS[-1]])
    np.testing.assert_array_equal(data.actions, arrays["actions"][: ENDS[-1]])
    np.testing.assert_allclose(data.returns, [arrays["rewards"][:20].sum(), arrays["rewards"][20:45].sum()])
    assert capsys.readouterr().err == ""


def test_observations_that_repeat_one_buffer_are_rebuilt(tmp_path, capsys):
    """Such a file's rows lose the first step of each episode, and with it its action and its reward."""
    arrays = d4rl_arrays()
    frozen = d4rl_arrays(observations=np.repeat(arrays["observations"][-1:], 60, 0))
    data = load_hopper(write_d4rl(tmp_path / "frozen.hdf5", frozen))
    rows = [*range(1, 20), *range(21, 45)]
    assert data.episode_ends.tolist() == [19, 43]
    np.testing.assert_array_equal(data.obs["state"], arrays["observations"][rows])
    np.testing.assert_array_equal(data.actions, arrays["actions"][rows])
    np.testing.assert_allclose(data.returns, [arrays["rewards"][1:20].sum(), arrays["rewards"][21:45].sum()])
    message = capsys.readouterr().err
    assert "frozen.hdf5" in message and "1 distinct rows of 45" in message and message.count("\n") == 1


def test_one_recorded_row_that_does_not_follow_is_no_reason_to_rebuild(tmp_path, capsys):
    obs, following = (np.tile(d4rl_arrays()[name], (10, 1)) for name in ("observations", "next_observations"))
    ends = np.array([600])
    inner = np.ones(600, bool)
    inner[0] = False
    following[:-1] = obs[1:]
    following[300] += 1
    kept, keep = demos.check_observations(tmp_path, obs, following, ends)
    assert kept is obs and keep.all()
    following[300:320] += 1
    rebuilt, keep = demos.check_observations(tmp_path, obs, following, ends)
    assert (keep == inner).all()
    np.testing.assert_array_equal(rebuilt[1:], following[:-1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"actions": None}, r"does not fit hopper.*actions must have shape \(steps, 3\); it has nothing"),
        ({"terminals": None, "timeouts": None}, "it has no array terminals, timeouts"),
        ({"rewards": np.where(np.arange(60) == 7, np.nan, 1.0)}, "rewards has NaN or infinity at step 7"),
        ({"actions": np.zeros((59, 3), np.float32)}, "unequal length: .*actions 59"),
        ({"next_observations": np.zeros((59, 11), np.float32)}, "unequal length: .*next_observations 59"),
        ({"terminals": np.zeros(60, bool), "timeouts": np.zeros(60, bool)}, "no complete episode: terminals and timeouts"),
        ({"observations": np.zeros((60, 10), np.float32), "next_observations": None}, r"does not fit hopper.*\(steps, 11\)"),
        ({"actions": np.zeros((60, 4), np.float32)}, r"does not fit hopper.*actions must have shape \(steps, 3\)"),
        ({"actions": np.zeros(60, np.float32)}, r"does not fit hopper.*actions must have shape \(steps, 3\)"),
        ({"next_observations": np.zeros((60, 10), np.float32)}, "next_observations"),
        ({"observations": np.zeros(60, np.float32), "next_observations": np.ones(60, np.float32)}, "observations"),
        ({"observations": {"x": 1}}, "observations"),  # a group, which Minari's own files have
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_wrong_d4rl_contents_are_named(changes, words, tmp_path):
    arrays = d4rl_arrays(**changes)
    for name, inside in changes.items():
        if isinstance(inside, dict):
            arrays |= {name: None, f"{name}/x": np.zeros(60)}
    path = write_d4rl(tmp_path / "a.hdf5", arrays)
    with pytest.raises(ValueError, match=words) as caught:
        load_hopper(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_a_truncated_d4rl_file_is_refused(kept, tmp_path):
    path = write_d4rl(tmp_path / "a.hdf5", d4rl_arrays())
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=r"a\.hdf5 is not a whole hdf5 file.*--demos"):
        load_hopper(path)


class Minari:
    """Stands in for the package: load_dataset gives these episodes, or fails with this error."""

    def __init__(self, content):
        self.content = content

    def load_dataset(self, dataset_id: str, download: bool):
        assert dataset_id == "mujoco/hopper/medium-v0" and download
        if isinstance(self.content, Exception):
            raise self.content
        return types.SimpleNamespace(iterate_episodes=lambda: iter(self.content))


def minari_episode(steps: int, seed: int) -> types.SimpleNamespace:
    rng = np.random.default_rng(seed)
    obs, actions = rng.normal(size=(steps + 1, 11)), rng.uniform(-1, 1, (steps, 3))
    return types.SimpleNamespace(observations=obs, actions=actions, rewards=rng.normal(size=steps))


def test_minari_episodes_lose_their_final_observation(monkeypatch):
    episodes = [minari_episode(7, 0), minari_episode(4, 1)]
    monkeypatch.setitem(sys.modules, "minari", Minari(episodes))
    data = load_hopper("minari:mujoco/hopper/medium-v0")
    assert data.episode_ends.tolist() == [7, 11] and "mujoco/hopper/medium-v0" in data.source
    expected = np.concatenate([episode.observations[:-1] for episode in episodes]).astype(np.float32)
    np.testing.assert_array_equal(data.obs["state"], expected)
    np.testing.assert_array_equal(data.actions, np.concatenate([e.actions for e in episodes]).astype(np.float32))
    np.testing.assert_allclose(data.returns, [e.rewards.sum() for e in episodes])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (KeyError("no such dataset"), "cannot load the Minari dataset 'mujoco/hopper/medium-v0'.*no such dataset"),
        ([], "'mujoco/hopper/medium-v0' holds no episodes"),
    ],
    ids=["not there", "empty"],
)
def test_a_minari_dataset_that_cannot_be_used_is_named(content, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", Minari(content))
    with pytest.raises(ValueError, match=words):
        load_hopper("minari:mujoco/hopper/medium-v0")


def test_a_minari_dataset_of_another_kind_of_task_is_named(monkeypatch):
    """Push-T asks for arrays that Minari's episodes do not have; and some datasets have observations under several keys."""
    monkeypatch.setitem(sys.modules, "minari", Minari([minari_episode(7, 0)]))
    with pytest.raises(ValueError, match="mujoco/hopper/medium-v0"):
        load("minari:mujoco/hopper/medium-v0")
    keyed = minari_episode(7, 0)
    keyed.observations = {"observation": keyed.observations}
    monkeypatch.setitem(sys.modules, "minari", Minari([keyed]))
    with pytest.raises(ValueError, match="mujoco/hopper/medium-v0"):
        load_hopper("minari:mujoco/hopper/medium-v0")


@pytest.mark.parametrize(
    ("package", "source", "remedy"), [("minari", "minari:x", "pip install 'minari"), ("h5py", "a.hdf5", "pip install h5py")]
)
def test_a_missing_package_is_named_with_its_remedy(package, source, remedy, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)  # import fails
    monkeypatch.chdir(tmp_path)
    Path("a.hdf5").touch()
    with pytest.raises(ImportError, match=remedy):
        load_hopper(source)


# --- robomimic's layout ---------------------------------------------------------------------------------------------------


def write_robomimic(path: Path, lengths: list[int], **changes) -> Path:
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for k, length in enumerate(lengths):
            demo = file.create_group(f"data/demo_{k}")
            demo["actions"] = rng.normal(size=(length, 2))
            demo["obs/state"] = rng.normal(size=(length + changes.get(f"extra_{k}", 0), 3))
            demo["obs/front"] = rng.integers(0, 256, (length, 8, 8, 3), dtype=np.uint8)
    return path


def test_robomimics_layout_in_the_order_of_its_episodes_with_pictures_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(demos, "DATA", tmp_path)
    lengths = [3, 2, 4, 1, 1, 1, 1, 1, 1, 1, 5]  # demo_10 comes last, not behind demo_1
    path = write_robomimic(tmp_path / "a.hdf5", lengths)
    arrays, ends = demos.read_hdf5(path, ["actions", "state", "front", "absent"])
    assert ends.tolist() == np.cumsum(lengths).tolist()
    assert set(arrays) == {"actions", "state", "front"}
    assert isinstance(arrays["front"], np.memmap)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(arrays["front"][-5:], file["data/demo_10/obs/front"][:])
        np.testing.assert_array_equal(arrays["state"][3:5], file["data/demo_1/obs/state"][:])


def test_robomimic_episodes_whose_arrays_differ_in_length_are_refused(tmp_path):
    path = write_robomimic(tmp_path / "a.hdf5", [3, 4], extra_1=1)
    with pytest.raises(ValueError, match=r"/data/demo_1 has arrays of unequal length: .*'state': 5"):
        demos.read_hdf5(path, ["actions", "state"])
    with h5py.File(tmp_path / "b.hdf5", "w") as file:
        file.create_group("data")
    with pytest.raises(ValueError, match="no episodes"):
        demos.read_hdf5(tmp_path / "b.hdf5", ["actions"])


def test_an_hdf5_with_episode_ends(tmp_path):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["actions"], file["episode_ends"] = np.zeros((5, 2)), [2, 5]
    arrays, ends = demos.read_hdf5(tmp_path / "a.hdf5", ["actions", "absent"])
    assert list(arrays) == ["actions"]
    assert ends.tolist() == [2, 5]


def test_pictures_of_another_size_in_a_later_episode_are_refused_and_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(demos, "DATA", tmp_path)
    path = write_robomimic(tmp_path / "a.hdf5", [3, 4])
    with h5py.File(path, "a") as file:
        del file["data/demo_1/obs/front"]
        file["data/demo_1/obs/front"] = np.zeros((4, 8, 8, 1), np.uint8)
    with pytest.raises(ValueError, match=r"front: pictures from row 3 on have shape \(8, 8, 1\)"):
        demos.read_hdf5(path, ["actions", "front"])
    assert list((tmp_path / "cache").iterdir()) == []
