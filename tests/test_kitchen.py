"""kitchen.py: the row's numbers, the readers of its two kinds of data, and where gymnasium-robotics is installed, the kitchen."""

import sys
import types

import numpy as np
import pytest

import demos
import envs
import kitchen

TASK = envs.get_task("kitchen")


def load(source) -> demos.Demos:
    return demos.load(str(source), "kitchen", TASK.demo_arrays, TASK.demo_convert)


# --- demonstrations -------------------------------------------------------------------------------------------------------


def relay_arrays(lengths=(5, 9, 7), steps: int = 9) -> dict[str, np.ndarray]:
    """The relay data's layout, episodes of unequal length side by side; what lies behind an end is noise that nobody may read."""
    rng = np.random.default_rng(0)
    mask = (np.arange(steps)[:, None] < lengths).astype(np.float32)
    return {
        "observations_seq": np.where(mask[..., None] > 0, rng.normal(size=(*mask.shape, 60)), np.nan),
        "actions_seq": np.where(mask[..., None] > 0, rng.uniform(-1, 1, (*mask.shape, 9)), np.nan),
        "existence_mask": mask,
    }


def write_folder(path, arrays: dict[str, np.ndarray]):
    path.mkdir()
    for name, array in arrays.items():
        np.save(path / f"{name}.npy", array)
    return path


def test_the_relay_datas_folder_becomes_episodes_of_unequal_length(tmp_path):
    arrays, lengths = relay_arrays(), (5, 9, 7)
    data = load(write_folder(tmp_path / "kitchen", arrays))
    assert data.episode_ends.tolist() == [5, 14, 21]
    for name, found, width in (("observations_seq", data.obs["state"], 30), ("actions_seq", data.actions, 9)):
        expected = [arrays[name][t, b, :width] for b, length in enumerate(lengths) for t in range(length)]
        np.testing.assert_array_equal(found, np.array(expected, np.float32))


def holed(mask: np.ndarray) -> np.ndarray:
    mask = mask.copy()
    mask[3, 1] = 0
    return mask


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.pop("existence_mask"), r"holds no whole existence_mask\.npy"),
        (lambda a: a.pop("actions_seq"), "does not fit kitchen: it has no array actions or actions_seq"),
        (lambda a: (a.pop("actions_seq"), a.pop("observations_seq")), r"holds none of .*observations_seq\.npy"),
        (lambda a: a.update(existence_mask=holed(a["existence_mask"])), "ones and then zeros.*1 of 3, the first is episode 1"),
        (lambda a: a["existence_mask"].__setitem__((slice(None), 2), 0), "in 1 of 3, the first is episode 2"),
        (lambda a: a.update(existence_mask=a["existence_mask"].T), r"shapes do not match: existence_mask \(3, 9\)"),
        (lambda a: a.update(actions_seq=a["actions_seq"][:-1]), r"shapes do not match.*actions_seq \(8, 3, 9\)"),
        (lambda a: a.update(observations_seq=a["observations_seq"][..., :31]), r"observations_seq must have shape .*\(21, 31\)"),
        (lambda a: a.update(actions_seq=np.full((9, 3), {}, object)), r"holds no whole actions_seq\.npy.*allow_pickle"),
    ],
    ids=["no mask", "no actions", "nothing", "hole", "empty episode", "turned", "short", "narrow", "pickled"],
)
def test_a_bad_folder_is_named(change, words, tmp_path):
    arrays = relay_arrays()
    change(arrays)
    with pytest.raises(ValueError, match=words):
        load(write_folder(tmp_path / "kitchen", arrays))


def test_a_cut_file_is_named(tmp_path):
    folder = write_folder(tmp_path / "kitchen", relay_arrays())
    (folder / "actions_seq.npy").write_bytes((folder / "actions_seq.npy").read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"holds no whole actions_seq\.npy"):
        load(folder)


def test_minaris_episodes_give_the_same_columns(monkeypatch):
    rng = np.random.default_rng(0)
    episodes = []
    for steps in (4, 6):
        full = {"observation": rng.normal(size=(steps + 1, 59)), "achieved_goal": {"kettle": rng.normal(size=(steps + 1, 7))}}
        actions = rng.uniform(-1, 1, (steps, 9))
        episodes.append(types.SimpleNamespace(observations=full, actions=actions, rewards=np.ones(steps)))
    fake = types.SimpleNamespace(load_dataset=lambda name, download: types.SimpleNamespace(iterate_episodes=lambda: episodes))
    monkeypatch.setitem(sys.modules, "minari", fake)
    data = load("minari:D4RL/kitchen/complete-v2")
    assert data.episode_ends.tolist() == [4, 10] and data.returns.tolist() == [4, 6]
    full = np.concatenate([episode.observations["observation"][:-1] for episode in episodes]).astype(np.float32)
    np.testing.assert_array_equal(data.obs["state"], np.concatenate([full[:, :9], full[:, 18:39]], 1))
    episodes[0].observations = {"pixels": full}
    with pytest.raises(ValueError, match="it has no array observations/observation"):
        load("minari:D4RL/kitchen/complete-v2")


# --- the simulator ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cook():
    pytest.importorskip("gymnasium_robotics", reason="gymnasium-robotics is not installed")
    env = kitchen.Kitchen()
    yield env
    env.close()


def test_a_missing_simulator_names_its_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    with pytest.raises(ImportError, match=r"pip install -r requirements-simulators\.txt"):
        kitchen.Kitchen()


def test_the_observation_is_the_joints_of_the_robot_and_of_the_things(cook):
    obs, _ = cook.reset(seed=1)
    np.testing.assert_allclose(obs, cook.sim.data.qpos, atol=0.02)  # but for the noise of the sensors
    assert obs.shape == TASK.obs_shapes["state"] and obs.dtype == np.float32
    assert cook.reset(seed=1)[0].tolist() == obs.tolist() != cook.reset(seed=2)[0].tolist()


def test_an_episode_is_a_function_of_its_seed_and_actions(cook):
    actions = np.random.default_rng(0).uniform(-1, 1, (6, 9))
    runs = []
    for seed in (3, 4, 3):
        cook.reset(seed=seed)
        runs.append(np.array([cook.step(action)[0] for action in actions]))
    assert np.array_equal(runs[0], runs[2]) and not np.array_equal(runs[0], runs[1])


def put(env: kitchen.Kitchen, task: str, to_goal: bool) -> None:
    """The joints of one thing where its goal is, or as they were."""
    from gymnasium_robotics.envs.franka_kitchen.kitchen_env import OBS_ELEMENT_INDICES

    where = OBS_ELEMENT_INDICES[task]
    env.sim.data.qpos[where] = env.sim.goal[task] if to_goal else env.sim.robot_env.init_qpos[where]
    env.sim.data.qvel[:] = 0


def test_each_subtask_counts_once_and_four_end_the_episode(cook):
    cook.reset(seed=0)
    scores, rewards, ends = [], [], []
    plan = [("microwave", True), ("microwave", False), ("microwave", True), ("slide cabinet", True), ("hinge cabinet", True)]
    for task, to_goal in [*plan, ("kettle", True)]:
        put(cook, task, to_goal)
        _, reward, success, late, info = cook.step(np.zeros(9))
        scores.append(info["score"])
        rewards.append(reward)
        ends.append((success, info["success"], late))
    assert scores == [0.25, 0.25, 0.25, 0.5, 0.75, 1.0]
    assert rewards == [1, 0, 0, 1, 1, 1]
    assert ends == [(False, False, False)] * 5 + [(True, True, False)]


def test_the_time_limit_and_a_bad_action(cook):
    cook.reset(seed=0)
    cook.steps = kitchen.MAX_STEPS - 2
    assert [cook.step(np.zeros(9))[3] for _ in range(2)] == [False, True]
    for bad in (np.zeros(8), np.full(9, np.nan)):
        with pytest.raises(ValueError, match=r"the action is .*9 finite numbers in \[-1, 1\]"):
            cook.step(bad)
