"""cubes.py: an episode is a function of seed and actions, rewards of play are the environment's own, play is read and refused."""

import numpy as np
import pytest

import cubes
import demos
import envs


def random_walk(env, seed: int, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng, obs, rewards, ends = np.random.default_rng(seed), [env.reset(seed=seed)[0]], [], []
    for _ in range(steps):
        row, reward, success, _, info = env.step(rng.uniform(-1, 1, cubes.ACTIONS))
        assert info == {"score": float(success), "success": success}
        obs.append(row)
        rewards.append(reward)
        ends.append(success)
    return np.array(obs), np.array(rewards), np.array(ends)


def test_an_episode_is_a_function_of_its_seed_and_actions():
    pytest.importorskip("ogbench")
    env, other = cubes.Cubes("single", 2), cubes.Cubes("single", 2)
    first, again = random_walk(env, 3, 10), random_walk(env, 3, 10)
    fresh = random_walk(other, 3, 10)
    for a, b, c in zip(first, again, fresh, strict=True):
        assert np.array_equal(a, b) and np.array_equal(a, c)
    assert not np.array_equal(first[0], random_walk(env, 4, 10)[0])
    assert first[0].shape == (11, cubes.features("single")) and first[0].dtype == np.float32


@pytest.mark.parametrize("size", ["single", "double"])
def test_rewards_of_play_are_what_the_environment_gives_for_the_same_states(size):
    pytest.importorskip("ogbench")
    import mujoco

    env = cubes.Cubes(size, 3)
    goal = cubes.goals(size, 3)
    for placed in range(len(goal) + 1):  # so many cubes at their goals, the last one just inside or outside of 4 cm
        for off in (0.039, 0.041):
            env.reset(seed=1)
            for k in range(placed):
                shift = [off, 0, 0] if k == placed - 1 else [0, 0, 0]
                env.sim.data.joint(f"object_joint_{k}").qpos[:3] = goal[k] + shift
            mujoco.mj_forward(env.sim.model, env.sim.data)
            env.sim.post_step()
            state = env.sim.compute_observation().astype(np.float32)
            _, reward, success, _, _ = env.step(np.zeros(cubes.ACTIONS))
            found, ends = cubes.rewards({"state": state[None]}, size, 3)
            assert found[0] == reward and ends[0] == success
            in_place = placed - (placed > 0 and off > cubes.REACH)
            assert reward == in_place - len(goal) and success == (in_place == len(goal))


def test_success_ends_an_episode_and_the_time_limit_does_too():
    pytest.importorskip("ogbench")
    env = envs.get_task("cube-single-task1").make_training(1, 1)
    env.reset([0])
    for _ in range(200):
        _, reward, over, late, info = env.step(np.zeros((1, 1, cubes.ACTIONS), np.float32))
    assert (over[0], late[0], info["success"][0], info["length"][0], reward[0]) == (False, True, False, 200, -1.0)
    env.close()


def test_play_of_ogbenchs_layout_and_of_ours_is_read(tmp_path):
    task, n = envs.get_task("cube-single-task1"), cubes.features("single")
    rng = np.random.default_rng(0)
    arrays = {
        "observations": rng.normal(size=(6, n)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (6, 5)).astype(np.float32),
    }
    np.savez(tmp_path / "theirs.npz", **arrays, terminals=np.array([0, 0, 1, 0, 0, 1], bool))
    np.savez(tmp_path / "ours.npz", state=arrays["observations"], action=arrays["actions"], episode_ends=[3, 6])
    pieces = tmp_path / "pieces"
    pieces.mkdir()
    for k in range(2):
        part = {name: x[3 * k : 3 * k + 3] for name, x in arrays.items()}
        np.savez(pieces / f"{k}.npz", **part, terminals=np.array([0, 0, 1], bool))
    for source in ("theirs.npz", "ours.npz", "pieces"):
        data = demos.load(str(tmp_path / source), task.name, task.demo_arrays, task.demo_convert)
        assert data.episode_ends.tolist() == [3, 6]
        assert np.array_equal(data.obs["state"], arrays["observations"]) and np.array_equal(data.actions, arrays["actions"])


def test_play_that_does_not_fit_is_refused(tmp_path):
    task = envs.get_task("cube-double-task1")
    np.savez(tmp_path / "single.npz", state=np.zeros((4, 28)), action=np.zeros((4, 5)), episode_ends=[4])
    np.savez(tmp_path / "endless.npz", state=np.zeros((4, 37)), action=np.zeros((4, 5)))
    for name, words in (("single", "observations must have shape .steps, 37.; found .4, 28."), ("endless", "episode_ends")):
        with pytest.raises(ValueError, match=words):
            demos.load(str(tmp_path / f"{name}.npz"), task.name, task.demo_arrays, task.demo_convert)


def test_a_recorded_play_moves_the_cube_and_keeps_its_rows_together(monkeypatch):
    pytest.importorskip("ogbench")
    monkeypatch.setattr(cubes, "PLAY_STEPS", 80)
    states, actions = cubes.play(7, "single")
    assert states.shape == (81, 28) and actions.shape == (81, 5) and abs(actions).max() <= 1
    again, _ = cubes.play(7, "single")
    assert np.array_equal(states, again)
    moved = np.linalg.norm(np.diff(states[:, 19:22], axis=0), axis=1).sum() / cubes.UNIT
    assert moved > 0.05  # metres: it was lifted or carried
