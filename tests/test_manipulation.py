"""manipulation.py: pictures of Push-T, and where their simulators are installed, Meta-World and Adroit."""

import re
from functools import partial

import numpy as np
import pytest
import torch
import zarr
from conftest import ROOT

import demos
import envs
import manipulation
import pusht
import vector
from policy import Policy, PolicyConfig


def drawing() -> bool:
    try:
        manipulation.MetaWorld("reach", "points").reset(seed=0)
    except (ImportError, OSError):
        return False
    return True


needs_metaworld = pytest.mark.skipif(not drawing(), reason="metaworld is not installed, or nothing can be drawn here")


# --- Push-T from pictures -----------------------------------------------------------------------------------------------


def test_a_picture_of_push_t_shows_the_same_episode_as_the_numbers():
    seeing, knowing = pusht.make_env("image"), pusht.make_env()
    obs, _ = seeing.reset(seed=3)
    state, _ = knowing.reset(seed=3)
    for _ in range(5):
        np.testing.assert_allclose(obs["agent"], state[18:], rtol=1e-6)
        assert obs["image"].shape == (96, 96, 3)
        x, y = (state[18:] * 96 / 512).astype(int)
        red, _, blue = obs["image"][y, x].astype(int)
        assert blue > red + 50  # the agent is a blue disc
        obs, *_ = seeing.step(np.array([250.0, 300.0]))
        state, *_ = knowing.step(np.array([250.0, 300.0]))


def test_pictures_are_drawn_only_where_somebody_sees_them():
    task = envs.get_task("pusht-image")
    env, drawn = task.make(1, 1), []
    table = env.vector.envs[0].env
    draw = table._draw
    table._draw = lambda: drawn.append(1) or draw()
    env.reset([0])
    obs, *_ = env.step(np.full((1, 8, 2), 250.0, np.float32))
    assert len(drawn) == 2  # the start and the last of eight steps
    twin = task.make(1, 2)  # with To = 2 the newest picture is the same, and the one before it the last but one
    twin.reset([0])
    both, *_ = twin.step(np.full((1, 8, 2), 250.0, np.float32))
    np.testing.assert_array_equal(both["image"][:, 1], obs["image"][:, 0])
    assert np.abs(both["agent"][0, 0] - both["agent"][0, 1]).max() > 0
    env.close()
    twin.close()


def test_demonstrations_with_pictures_are_mapped_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(demos, "DATA", tmp_path / "data")
    rng = np.random.default_rng(0)
    root = zarr.open_group(str(tmp_path / "buffer.zarr"), mode="w")
    pictures = rng.integers(0, 256, (30, 96, 96, 3)).astype(np.float32)
    for name, array in {"img": pictures, "state": rng.uniform(50, 450, (30, 5)), "action": rng.uniform(50, 450, (30, 2))}.items():
        root.create_array(f"data/{name}", data=array, chunks=(7, *array.shape[1:]))
    root.create_array("meta/episode_ends", data=np.array([14, 30]))

    def load():
        task = envs.get_task("pusht-image")
        return demos.load(str(tmp_path / "buffer.zarr"), task.name, task.demo_arrays, task.demo_convert)

    data = load()
    assert isinstance(data.obs["image"], np.memmap)
    np.testing.assert_array_equal(data.obs["image"], pictures)
    windows = demos.Windows(data, 2, 16, 8)
    obs, _ = windows[torch.tensor([0, 10])]
    assert obs["image"].shape == (2, 2, 96, 96, 3)
    assert obs["image"].dtype == torch.uint8
    load()
    assert len(list((tmp_path / "data" / "cache").iterdir())) == 1  # made once

    root["data/img"][3] = 0.5
    with pytest.raises(ValueError, match=r"img: pictures must hold whole numbers from 0 to 255; rows 0 to 6"):
        load()


def test_embedded_states_are_drawn_one_by_one(tmp_path):
    pusht.record_images(tmp_path / "a.npz", episodes=1)
    with np.load(tmp_path / "a.npz") as file:
        pictures, state = file["img"], file["state"]
    assert len(pictures) == len(state)
    for row in (0, len(state) // 2, len(state) - 1):
        x, y = (state[row, :2] * 96 / 512).astype(int)
        red, _, blue = pictures[row, y, x].astype(int)
        assert blue > red + 50  # the agent is a blue disc, where the state has it
    assert len(np.unique(pictures.reshape(len(pictures), -1), axis=0)) > len(pictures) / 2


def test_pictures_of_another_type_are_refused():
    arrays = {"img": np.zeros((3, 96, 96, 3), np.float32), "state": np.zeros((3, 5)), "action": np.zeros((3, 2))}
    with pytest.raises(ValueError, match="img holds float32; pictures must be uint8"):
        pusht.image_demos(arrays)


def test_robomimics_name_of_the_actions_will_do():
    shapes = {"robot": (2,), "image": (8, 8, 3)}
    arrays = {"robot": np.zeros((4, 2)), "image": np.zeros((4, 8, 8, 3), np.uint8), "actions": np.ones((4, 3))}
    obs, actions = manipulation.plain_demos(arrays, shapes, 3)
    assert set(obs) == set(shapes)
    assert actions.shape == (4, 3)
    with pytest.raises(ValueError, match="image holds float64"):
        manipulation.plain_demos({**arrays, "image": np.zeros((4, 8, 8, 3))}, shapes, 3)


def test_a_simulator_that_cannot_begin_is_named_before_the_training():
    class Broken(manipulation.gymnasium.Env):
        observation_space = action_space = manipulation.gymnasium.spaces.Box(-1, 1, (2,))

        def reset(self, **_):
            raise ValueError("the point cloud is empty after cropping")

    task = envs.Task("broken", "score", {"state": (2,)}, 2, lambda n, to: vector.GymVector(Broken, n, to), (), None)
    with pytest.raises(ValueError, match=r"broken does not run here.*empty after cropping"):
        task.check(1)


def test_readmes_row_for_cameras_of_ones_own():
    block = re.search(r"```python\n(TASKS\[.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    names = {"TASKS": {}, "Task": envs.Task, "partial": partial, "GymVector": vector.GymVector, "my_env": None}
    exec(block, names)
    task = names["TASKS"]["my-arm"]
    policy = Policy(PolicyConfig("my-arm", task.obs_shapes, task.action_dim, cond_width=16, width=16))
    demonstrations = {
        key: np.zeros((4, *shape), np.uint8 if len(shape) == 3 else np.float32) for key, shape in task.obs_shapes.items()
    }
    obs, action = task.demo_convert({**demonstrations, "action": np.zeros((4, 7), np.float32)})
    policy.fit_normalizers(obs, action)
    assert policy.eval().act({key: value[None, :2] for key, value in obs.items()}).shape == (1, 8, 7)


# --- Meta-World and Adroit ------------------------------------------------------------------------------------------------


def test_all_50_tasks_of_meta_world_have_rows():
    names = [name for group in manipulation.METAWORLD.values() for name in group]
    assert len(names) == len(set(names)) == 50
    assert [len(group) for group in manipulation.METAWORLD.values()] == [28, 11, 6, 5]
    assert all(f"metaworld-{name}{view}" in envs.TASKS for name in names for view in ("", "-image", "-points"))


def test_a_missing_simulator_names_its_pip_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "metaworld.env_dict", None)
    with pytest.raises(ImportError, match=r"pip install -r requirements-simulators\.txt"):
        envs.get_task("metaworld-reach").make(1, 1)


@needs_metaworld
def test_the_tasks_of_meta_world_are_metaworlds():
    sims, experts = manipulation.metaworld_tasks()
    names = {f"{name}-v3" for group in manipulation.METAWORLD.values() for name in group}
    assert names == set(sims) == set(experts)


@needs_metaworld
def test_an_episode_of_meta_world_is_a_function_of_its_seed():
    first, second = manipulation.MetaWorld("push", "state"), manipulation.MetaWorld("push", "state")
    first.reset(seed=8)
    for seed in (5, 6, 5):
        a, b = first.reset(seed=seed)[0]["state"], second.reset(seed=seed)[0]["state"]
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, first.reset(seed=6)[0]["state"])


@needs_metaworld
def test_the_cloud_shows_the_object_and_the_goal_where_they_are():
    env = manipulation.MetaWorld("push", "points")
    obs, _ = env.reset(seed=1)
    assert obs["points"].shape == (512, 3)
    assert (obs["points"] >= env.LOW - 1e-6).all()
    assert (obs["points"] <= env.HIGH + 1e-6).all()
    nearest = {
        name: np.linalg.norm(obs["points"] - place, axis=-1).min()
        for name, place in {"object": env.full[4:7], "goal": env.sim._target_pos, "hand": obs["robot"][:3]}.items()
    }
    assert nearest["object"] < 0.03  # metres; the puck's own size
    assert nearest["goal"] < 0.03
    assert nearest["hand"] < 0.08
    env.close()


@needs_metaworld
def test_clouds_come_without_the_robot_and_show_nothing_that_it_hides():
    env = manipulation.MetaWorld("button-press", "points")
    model, data, own = env.sim.model, env.sim.data, env.own
    assert own[model.geom_bodyid == model.body("rightclaw").id].all()  # fingers, too
    assert not own[model.geom_bodyid == model.body("button").id].any()
    env.reset(seed=2)
    eye = env._eye()

    def cells(own):
        points = eye.points(data, env.LOW, env.HIGH, 128 * 128, own=own)
        return {tuple(cell) for cell in np.round(points * 1e6).astype(int)}

    everything, without, robots = cells(None), cells(own), cells(~own)
    assert everything == without | robots  # so nothing comes to light that the robot hides
    assert 100 < len(without) < 0.6 * len(everything)
    assert len(without & robots) < 30  # sites, which are no shapes: the goal's marker, and those on the fingers

    shapes = eye._shapes()
    eye.renderer.disable_depth_rendering()
    eye.renderer.enable_segmentation_rendering()
    numbers, kinds = eye.renderer.render().reshape(-1, 2).T  # MuJoCo's own answer, drawn once more
    np.testing.assert_array_equal(shapes, np.where(kinds == 5, numbers, -1))  # 5: mjOBJ_GEOM
    env.close()


@needs_metaworld
def test_where_the_hand_hides_all_there_is_the_cloud_is_the_robots():
    env = manipulation.MetaWorld("sweep", "points")  # before it falls, the puck lies under the hand, and so does the goal
    env.reset(seed=1)
    act, alone, done = env.expert().get_action, [], False
    while not done:
        _, _, done, late, _ = env.step(act(env.full))
        assert not late
        clouds = (env._eye().points(env.sim.data, env.low, env.HIGH, env.POINTS, own=own) for own in (None, env.own))
        everything, without = ({tuple(point) for point in cloud} for cloud in clouds)
        alone.append(everything == without)
    assert 0 < sum(alone) < 10
    env.close()


@needs_metaworld
@pytest.mark.parametrize("task", ["stick-pull", "sweep", "hammer", "disassemble", *manipulation.HOLES])
def test_the_goal_of_every_task_is_in_the_cloud(task):
    env = manipulation.MetaWorld(task, "points")
    for seed in (2, 5):
        obs, _ = env.reset(seed=seed)
        if env.sim._target_site_config:
            assert np.linalg.norm(obs["points"] - env.sim._target_pos, axis=-1).min() < 0.06  # metres
    env.close()


@needs_metaworld
@pytest.mark.parametrize("task", list(manipulation.HOLES))
def test_a_table_with_a_hole_does_not_fill_the_cloud(task):
    env = manipulation.MetaWorld(task, "points")
    obs, _ = env.reset(seed=3)
    distance = np.linalg.norm(obs["points"] - env.full[4:7], axis=-1)
    assert (distance < 0.04).sum() >= 12  # of 512; once 5, and the policies for two of the tasks failed
    env.close()


@needs_metaworld
def test_recorded_successes_train_and_shifted_scenes_keep_their_shape(tmp_path, monkeypatch):
    monkeypatch.setattr(demos, "DATA", tmp_path)
    task = envs.get_task("metaworld-reach-points")
    data = demos.load("embedded", task.name, task.demo_arrays, task.demo_convert, record=task.demo_record, origin="the expert")
    assert len(data.episode_ends) == 10
    assert data.obs["points"].shape[1:] == (512, 3)
    assert "the expert" in data.source
    obs = {key: torch.from_numpy(value[:2, None]) for key, value in data.obs.items()}
    moved = task.shift(obs, torch.tensor([[0.0, 0.0, 0.0], [0.1, -0.2, 0.3]]))
    assert torch.equal(moved["points"][0], obs["points"][0])
    torch.testing.assert_close(moved["points"][1] - obs["points"][1], torch.tensor([0.1, -0.2, 0.3]).expand(1, 512, 3))
    torch.testing.assert_close((moved["robot"] - obs["robot"])[1, 0], torch.tensor([0.1, -0.2, 0.3] * 3))


def test_a_nudged_hand_is_led_back_within_its_chunk():
    obs = {"robot": torch.rand(3, 1, 9), "points": torch.rand(3, 1, 5, 3)}
    chunk = torch.zeros(3, 4, 4)
    chunk[:, :, 3] = 0.6
    chunk[1, :, 0] = chunk[2, :, 0] = 0.9  # on their way along x; the first waits
    offset = torch.tensor([[0.01, -0.02, 0.0], [0.01, -0.02, 0.0], [0.02, 0.0, 0.0]])
    nudged, back = manipulation.beside_its_way(obs, chunk, offset)
    moved = nudged["robot"] - obs["robot"]
    torch.testing.assert_close(moved[0], torch.tensor([[0.01, -0.02, 0.0] * 3]))
    torch.testing.assert_close(moved[1], torch.tensor([[0.0, -0.02, 0.0] * 3]), atol=1e-4, rtol=0)  # nothing along x
    assert moved[2].abs().max() < 1e-4
    assert nudged["points"] is obs["points"]
    # A step of 1 is a centimetre: the hand ends where it would have ended.
    ends = moved[:, 0, :3] + 0.01 * back[..., :3].sum(1)
    torch.testing.assert_close(ends, 0.01 * chunk[..., :3].sum(1))
    assert torch.equal(back[..., 3], chunk[..., 3])
    far = manipulation.beside_its_way(obs, chunk, 100 * offset)[1]
    assert far.abs().max() == 1


@pytest.mark.parametrize("task", list(manipulation.ADROIT))
def test_adroit_shapes_and_ends(task):
    pytest.importorskip("gymnasium_robotics")
    env = manipulation.Adroit(task, "state")
    obs, _ = env.reset(seed=4)
    assert obs["state"].shape == manipulation.adroit_shapes(task, "state")["state"]
    np.testing.assert_array_equal(obs["state"], env.reset(seed=4)[0]["state"])
    for step in range(1, 201):
        _, reward, success, late, info = env.step(np.zeros(env.hand.actions))
        assert (reward, info["score"]) == (0, 0)
        assert not success
        assert late == (step == 200)
    env.close()


@pytest.mark.parametrize("task", list(manipulation.ADROIT_REACHED))
def test_adroits_states_tell_the_goal_as_the_simulator_does(task):
    pytest.importorskip("gymnasium_robotics")
    env, rng, states, said = manipulation.Adroit(task, "state"), np.random.default_rng(0), [], []
    for seed in range(400 if task == "pen" else 60):  # of all directions one in forty is near enough
        env.reset(seed=seed)
        if task == "pen":
            quaternion = rng.normal(size=4)
            env.sim.model.body_quat[env.sim.target_obj_body_id] = quaternion / np.linalg.norm(quaternion)
        if seed % 2 and task == "door":
            env.sim.data.qpos[env.sim.door_hinge_addrs] = rng.uniform(1.2, 1.5)
        if seed % 2 and task == "relocate":
            ball = env.sim.data.xpos[env.sim.obj_body_id]
            env.sim.model.site_pos[env.sim.target_obj_site_id] = ball + rng.uniform(-0.1, 0.1, 3)
        for _ in range(3):
            before = env.held
            obs = env.step(rng.uniform(-0.2, 0.2, env.hand.actions))[0]
            states.append(obs["state"]), said.append(env.held > before)
    env.close()
    assert 0 < sum(said) < len(said)
    assert manipulation.ADROIT_REACHED[task](np.stack(states)).tolist() == said


def test_demonstrations_of_adroit_succeed_before_they_end():
    state, hold = np.zeros((70, 39), np.float32), manipulation.ADROIT["door"].hold
    state[5:40, 28] = 1.4  # the first episode opens its door in step 5, the second one never holds it long enough
    state[60:, 28] = 1.4
    success = manipulation.adroit_success({"state": state}, np.array([50, 70]), "door")
    assert np.flatnonzero(success).tolist() == list(range(5 + hold - 1, 50))  # what was held stays held


def test_an_experts_arrays_become_a_policy(tmp_path):
    rng = np.random.default_rng(0)
    p = {"w0": rng.normal(size=(5, 3)), "b0": rng.normal(size=5), "w1": rng.normal(size=(2, 5)), "b1": rng.normal(size=2)}
    p |= {"in_shift": rng.normal(size=3), "in_scale": rng.uniform(1, 2, 3), "out_shift": np.ones(2), "out_scale": np.full(2, 3.0)}
    np.savez(tmp_path / "expert.npz", **p)
    assert demos.holds_policy(tmp_path / "expert.npz")
    obs = rng.normal(size=3)
    hidden = np.tanh(p["w0"] @ ((obs - p["in_shift"]) / p["in_scale"]) + p["b0"])
    np.testing.assert_allclose(
        manipulation.expert_policy(tmp_path / "expert.npz", 3, 2)(obs), 3 * (p["w1"] @ hidden + p["b1"]) + 1, rtol=1e-6
    )


class Slow:
    """An environment whose episodes take 4 steps, or 8 where the seed is odd, or fail where it ends in 2."""

    full = np.zeros(1)

    def reset(self, seed):
        self.seed, self.steps = seed, 0
        return {"state": np.zeros(2, np.float32)}, {}

    def step(self, action):
        self.steps += 1
        last = self.steps == (8 if self.seed % 2 else 4)
        success = last and self.seed % 10 != 2
        return {"state": np.full(2, self.steps, np.float32)}, 0.0, success, last and not success, {}

    def close(self):
        pass


def test_demonstrations_go_on_after_success(tmp_path):
    path = tmp_path / "held.npz"
    manipulation.record_expert(path, Slow(), lambda full: np.array([0.5, -0.5]), episodes=3, after=3)
    with np.load(path) as file:
        assert list(file["episode_ends"]) == [7, 18, 29]  # 4 + 3, 8 + 3; the third start fails; 8 + 3


def test_second_tries_are_not_recorded(tmp_path):
    path = tmp_path / "slow.npz"
    manipulation.record_expert(path, Slow(), lambda full: np.array([2.0, -0.5]), episodes=3, slowest=1.6)
    with np.load(path) as file:
        assert list(file["episode_ends"]) == [4, 8, 12]
        assert file["action"].tolist() == [[1.0, -0.5]] * 12 and file["state"].shape == (12, 2)
    with pytest.raises(ValueError, match="succeeded at once in 0 of 10 episodes only; 1 are needed"):
        manipulation.record_expert(
            path, type("Never", (Slow,), {"reset": lambda s, seed: Slow.reset(s, 4_000_002)})(), lambda f: f, 1
        )
