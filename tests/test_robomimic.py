"""RoboMimic's tasks: rotations and files everywhere, robosuite itself where it is installed."""

import importlib.util
import io
import json
import os

import h5py
import numpy as np
import pytest

import demos
import envs
import robomimic_tasks as rm

needs_robosuite = pytest.mark.skipif(importlib.util.find_spec("robosuite") is None, reason="robosuite is not installed")


def test_rotations_round_trip_also_at_half_a_turn():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((200, 3))
    vectors *= (rng.uniform(0, np.pi, 200) / np.linalg.norm(vectors, axis=1))[:, None]
    vectors = np.concatenate([vectors, [[0, 0, 0], [np.pi, 0, 0], [0, np.pi - 1e-4, 0], [1e-9, 0, 0]]])
    for vector, R in zip(vectors, rm.matrix(vectors), strict=True):
        assert np.allclose(R @ R.T, np.eye(3)) and np.isclose(np.linalg.det(R), 1)
        assert np.allclose(rm.matrix(rm.vector(R)), R, atol=1e-6), vector
        assert np.allclose(rm.from_six(3.0 * rm.six(R)), R)  # however the network scales them
    # Rodrigues against the plain series of exp([v]x)
    v = vectors[3]
    K = np.array([[0, -v[2], v[1]], [v[2], 0, -v[0]], [-v[1], v[0], 0]])
    term, total = np.eye(3), np.eye(3)
    for k in range(1, 40):
        term = term @ K / k
        total = total + term
    assert np.allclose(rm.matrix(v), total)


@pytest.mark.parametrize("task", list(rm.SCENES))
def test_a_quaternion_and_its_negative_look_alike_to_the_network(task):
    """... and the other numbers stay what they were, in their order."""
    rng = np.random.default_rng(2)
    obs = {key: rng.standard_normal((5, *shape)).astype(np.float32) for key, shape in rm.file_shapes(task, "state").items()}
    other = {key: value.copy() for key, value in obs.items()}
    other["robot0_eef_quat"] *= -1
    places = [range(at, at + 4) for at in rm.SCENES[task].quaternions]
    for place in places:
        other["object"][:, place] *= -1
    seen, same = rm.as_seen(obs, task), rm.as_seen(other, task)
    assert {key: value.shape[1:] for key, value in seen.items()} == rm.shapes(task, "state")
    assert all(np.allclose(seen[key], same[key], atol=1e-5) for key in seen)
    kept = [i for i in range(rm.SCENES[task].features) if not any(i in place for place in places)]
    assert set(obs["object"][0, kept]) <= set(seen["object"][0])


def test_quaternions_turn_as_rotation_vectors_do():
    vectors = np.array([[0, 0, 0], [0.3, -0.2, 0.5], [np.pi, 0, 0], [0, 0, -2.0]])
    angles = np.linalg.norm(vectors, axis=1, keepdims=True)
    quaternions = np.concatenate([vectors / np.maximum(angles, 1e-9) * np.sin(angles / 2), np.cos(angles / 2)], 1)
    assert np.allclose(rm.from_quaternion(-3 * quaternions), rm.matrix(vectors), atol=1e-7)


def test_absolute_actions_reach_the_controller_as_the_file_has_them():
    rng = np.random.default_rng(1)
    actions = rng.uniform(-1, 1, (20, 14))
    network = rm.to_network(actions, 2)
    assert network.shape == (20, 20)
    assert np.allclose([rm.to_controller(a, 2) for a in network], actions)


def robomimic_file(path, task="lift", controller=None, **changes):
    """Two episodes in robomimic's layout."""
    rng = np.random.default_rng(0)
    env_args = {"env_name": rm.SCENES[task].env, "env_kwargs": {"controller_configs": controller or {"control_delta": True}}}
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps(env_args)
        for k, length in enumerate((5, 7)):
            for key, shape in rm.file_shapes(task, "state").items():
                data[f"demo_{k}/obs/{key}"] = rng.standard_normal((length, *shape))
            data[f"demo_{k}/actions"] = rng.uniform(-1, 1, (length, 7))
        for name, value in changes.items():
            del data[f"demo_0/{name.replace('__', '/')}"]
            if value is not None:
                data[f"demo_0/{name.replace('__', '/')}"] = value
    return path


def read(path, name):
    task = envs.get_task(name)
    return demos.load(str(path), name, task.demo_arrays, task.demo_convert)


def test_a_robomimic_file_is_read(tmp_path):
    data = read(robomimic_file(tmp_path / "a.hdf5"), "lift")
    assert list(data.episode_ends) == [5, 12] and data.actions.shape == (12, 7)
    assert {key: value.shape[1:] for key, value in data.obs.items()} == rm.shapes("lift", "state")
    new = {"type": "BASIC", "body_parts": {"right": {"input_type": "absolute", "input_ref_frame": "world"}}}
    assert read(robomimic_file(tmp_path / "b.hdf5", controller=new), "lift-abs").actions.shape == (12, 10)


@pytest.mark.parametrize(
    ("name", "controller", "changes", "message"),
    [
        ("can", None, {}, "it was recorded in Lift, and this task is PickPlaceCan"),
        ("lift-abs", None, {}, "its actions are displacements, the task takes absolute poses; train --env lift on it"),
        ("lift", {"control_delta": False}, {}, "its actions are absolute poses, .* train --env lift-abs on it"),
        ("lift", None, {"obs__object": np.zeros((4, 10))}, "arrays of unequal length"),
        ("lift", None, {"obs__object": None}, r"object must have shape \(steps, 10\); it has nothing"),
        (
            "lift-abs",
            {"body_parts": {"right": {"input_type": "absolute", "input_ref_frame": "base"}}},
            {},
            "relative to the robots' bases",
        ),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path, name, controller, changes, message):
    with pytest.raises(ValueError, match=message):
        read(robomimic_file(tmp_path / "a.hdf5", controller=controller, **changes), name)


@pytest.mark.parametrize(
    "env_args", ["[3]", "null", '{"env_kwargs": null}', '{"env_kwargs": {"controller_configs": [1]}}', "{", '{"env_kwargs": 7}']
)
def test_a_damaged_description_of_the_environment_is_an_error_in_words_or_none(tmp_path, env_args):
    path = robomimic_file(tmp_path / "a.hdf5")
    with h5py.File(path, "a") as file:
        file["data"].attrs["env_args"] = env_args
    if env_args == "{":
        with pytest.raises(ValueError, match="env_args is not JSON"):
            read(path, "lift")
    else:
        assert len(read(path, "lift").actions) == 12
    with h5py.File(path, "a") as file:
        del file["data/demo_0"]
        file["data/demo_0"] = np.zeros(3)
    with pytest.raises(ValueError, match="each a group of arrays"):
        read(path, "lift")


def test_recombined_episodes_have_the_arms_of_two_demonstrations_until_they_meet():
    rng, ends, met = np.random.default_rng(0), np.array([6, 14, 24]), np.array([4, 9, 20])  # the hands meet at these rows
    arrays = {
        key: rng.normal(size=(24, *shape)).astype(np.float32) for key, shape in rm.file_shapes("transport", "state").items()
    }
    arrays["actions"] = rng.normal(size=(24, 14)).astype(np.float32)
    arrays["robot1_eef_pos"] = arrays["robot0_eef_pos"] + np.float32(1)
    for begin, end in zip(met, ends, strict=True):
        arrays["robot1_eef_pos"][begin:end] = arrays["robot0_eef_pos"][begin:end] + np.float32(0.1)
        for thing in (rm.TRASH, rm.LID):
            arrays["object"][begin:end, thing] = arrays["object"][begin, thing]
        arrays["object"][begin:end, rm.TRASH_BOX] = arrays["object"][begin, rm.TRASH_BOX]
    for hand, thing, gap in rm.GAPS:
        arrays["object"][:, gap] = arrays["object"][:, thing][:, :3] - arrays[f"robot{hand}_eef_pos"]
    made, made_ends = rm.recombine({**arrays, "env_args": "not of the steps"}, ends, 3)
    assert all((made[key][:24] == arrays[key]).all() for key in arrays) and (made_ends[:3] == ends).all()
    assert len(made_ends) == 3 + 3 * 2 * 3 and made_ends[-1] == len(made["actions"])

    def row_of(key: str, columns: slice, row: np.ndarray) -> np.ndarray:
        return np.flatnonzero((arrays[key][:, columns] == row[columns]).all(-1))

    alone = {row for begin, end in zip(np.r_[0, ends[:-1]], met, strict=True) for row in range(begin, end)}
    pairs, everything = set(), slice(None)
    for row in range(24, len(made["actions"])):
        (first,), (second,) = (row_of(f"robot{i}_eef_pos", everything, made[f"robot{i}_eef_pos"][row]) for i in (0, 1))
        assert row_of("actions", slice(7), made["actions"][row]) == first
        assert row_of("actions", slice(7, 14), made["actions"][row]) == second
        thing = made["object"][row]
        assert row_of("object", rm.PAYLOAD, thing) == first
        lids = row_of("object", rm.LID, thing)
        assert first in lids if first in alone else len(lids)
        for hand, what, gap in rm.GAPS:
            assert np.allclose(thing[gap], thing[what][:3] - made[f"robot{hand}_eef_pos"][row])
        pairs.add((first, second))
    assert {a for a, b in pairs if a != b} | {b for a, b in pairs if a != b} <= alone  # never the arms of two who have met
    assert any(a != b for a, b in pairs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"robot1_eef_pos": np.zeros((7, 3))}, "robot1_eef_pos has 7 steps, action has 8"),
        ({"robot1_eef_pos": np.full((8, 3), np.nan)}, "robot1_eef_pos has NaN or infinity at step 0"),
        ({"episode_ends": np.array([9])}, "episode_ends must rise strictly"),
        ({"episode_ends": np.array([], int)}, "episode_ends must rise strictly"),
        ({"episode_ends": np.array([5, 3, 8])}, "episode_ends must rise strictly"),
    ],
)
def test_what_is_recombined_has_been_checked(tmp_path, changes, message):
    arrays = {key: np.zeros((8, *shape)) for key, shape in rm.file_shapes("transport", "state").items()}
    arrays |= {"actions": np.zeros((8, 14)), "episode_ends": np.array([3, 8]), **changes}
    np.savez(tmp_path / "demos.npz", **arrays)
    task = envs.get_task("transport")
    with pytest.raises(ValueError, match=message):
        demos.load(
            str(tmp_path / "demos.npz"),
            "transport",
            task.demo_arrays,
            task.demo_convert,
            recombine=lambda arrays, ends: task.demo_recombine(arrays, ends, 2),
        )


def test_only_transport_has_parts_to_recombine():
    assert envs.get_task("transport").demo_recombine and not envs.get_task("transport-image").demo_recombine
    assert not envs.get_task("lift").demo_recombine


def test_scripted_takes_a_number_and_a_task_that_has_an_expert(tmp_path, monkeypatch):
    monkeypatch.setattr(demos, "DATA", tmp_path)
    made = []

    def record(path, episodes=100):
        made.append((path.name, episodes))
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, x=np.zeros((3, 2), np.float32), action=np.zeros((3, 2), np.float32), episode_ends=[3])

    def load(source, scripted=True):
        return demos.load(
            source,
            "lift",
            ("x", "action"),
            lambda a: ({"x": a["x"]}, a["action"]),
            record=record,
            origin="robot",
            scripted=scripted,
        )

    assert load("scripted:7").source == "scripted demonstrations (robot: lift-7.npz)"
    load("scripted"), load("scripted:7"), load("embedded")
    assert made == [("lift-7.npz", 7), ("lift.npz", 100)]
    for bad in ("scripted:", "scripted:many", "scripted:0"):
        with pytest.raises(ValueError, match=r"scripted:N takes a number of episodes"):
            load(bad)
    with pytest.raises(ValueError, match="lift has no scripted expert"):
        load("scripted", scripted=False)


def test_recordings_are_made_in_a_process_of_their_own(tmp_path, monkeypatch):
    """OpenGL that was used before a fork makes the workers wait for ever."""
    import scripted

    monkeypatch.setattr(scripted, "Robosuite", lambda *_: io.StringIO())
    monkeypatch.setattr(scripted, "record_successes", lambda path, _, n: path.write_text(f"{os.getpid()} {n}"))
    scripted.record(tmp_path / "a", "lift", False, "image", episodes=3)
    process, episodes = (tmp_path / "a").read_text().split()
    assert int(process) != os.getpid() and episodes == "3"


def test_a_missing_or_other_robosuite_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "robosuite", None)
    with pytest.raises(ImportError, match=r"pip install robosuite==1\.5\.1"):
        rm.import_robosuite()


# --- with robosuite -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lift():
    env = rm.Robosuite("lift", False, "state")
    yield env
    env.close()


@needs_robosuite
def test_the_step_is_robosuites_own(lift):
    """Our controller loop against robosuite's, 10 actions of 25 simulation steps. The last bits differ by the order of sums."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (10, 7))
    states = []
    for step in (lift.step, lift.sim_env.step):
        lift.reset(seed=7)
        for action in actions:
            step(action)
        states.append(lift.sim_env.sim.data.qpos.copy())
    assert np.abs(states[0] - states[1]).max() < 1e-6
    assert np.abs(states[0][:7] - lift.sim_env.robots[0].init_qpos).max() > 0.1  # it has moved


@needs_robosuite
def test_an_episode_is_a_function_of_its_seed(lift):
    starts = []
    for seed in (3, 4, 3):
        before = np.random.get_state()[1].copy()
        obs, _ = lift.reset(seed=seed)
        assert (np.random.get_state()[1] == before).all()  # robosuite's use of the global generator does not leak
        for _ in range(3):
            obs = lift.step(np.full(7, 0.3))[0]
        starts.append(obs)
    assert all((starts[0][key] == starts[2][key]).all() for key in starts[0])
    assert (starts[0]["object"] != starts[1]["object"]).any()
    with pytest.raises(ValueError, match="NaN"):
        lift.step(np.full(7, np.nan))


@needs_robosuite
@pytest.mark.parametrize("absolute", [False, True])
def test_the_expert_lifts_and_its_recording_trains(absolute, tmp_path, monkeypatch):
    """Two recorded episodes read back as demonstrations, and replayed: the same actions lift again."""
    import scripted

    monkeypatch.setattr(scripted.episode, "__defaults__", (0.0,))  # no shaking: what is kept is what was done
    path = tmp_path / "lift.npz"
    scripted.record(path, "lift", absolute, "state", episodes=2)
    data = read(path, "lift-abs" if absolute else "lift")
    assert len(data.episode_ends) == 2 and np.load(path)["attempts"] >= 2
    env = rm.Robosuite("lift", absolute, "state")
    env.reset(seed=4_000_000)
    for action in data.actions[: data.episode_ends[0]]:
        _, reward, success, _, info = env.step(action)
    env.close()
    assert success and reward == 1 and info == {"score": 1.0, "success": True}


@needs_robosuite
@pytest.mark.parametrize("task", ["lift", "can", "square", "transport"])
def test_the_experts_succeed_and_do_not_always_act_alike(task):
    """Four episodes: three succeed at least, and the hand was turned in two ways, or the wrist set off to two sides."""
    import scripted

    env = rm.Robosuite(task, False, "state")
    done, ways = [], []
    for seed in range(4):
        rows, success = scripted.episode(env, 5_000_000 + seed, shake=0.0)
        done.append(success)
        ways.append(np.concatenate([row["actions"][:6] for row in rows[:25]]))
    env.close()
    assert sum(done) >= 3
    assert max(np.abs(ways[0] - way[: len(ways[0])]).max() for way in ways[1:]) > 0.5  # of commands in [-1, 1]


@needs_robosuite
def test_pictures_are_upright_and_of_the_scene():
    env = rm.Robosuite("lift", False, "image")
    try:
        obs, _ = env.reset(seed=0)
    except OSError as error:
        pytest.skip(f"nothing can be drawn here: {error}")
    picture = obs["agentview_image"]
    assert picture.shape == (84, 84, 3) and picture.dtype == np.uint8 and "object" not in obs
    red = (picture[..., 0] > 120) & (picture[..., 1] < 70)  # the cube, on the table in the lower half
    assert red.any() and np.argwhere(red)[:, 0].mean() > 42
    env.close()
