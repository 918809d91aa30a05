"""envs.py: Push-T against gym-pusht's own environment, step by step; observation, limits, history, film."""

import os
import signal

import numpy as np
import pytest

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
gym_pusht = pytest.importorskip("gym_pusht.envs.pusht")

import demos
import envs
import pusht
import vector

TO = 2
SEEDS = [100_000, 7, 50_003]


def make(num_envs: int = 1, obs_steps: int = TO):
    return envs.get_task("pusht").make(num_envs, obs_steps)


def tables(env) -> list:
    return [table.unwrapped for table in env.vector.envs]


def pushes(rng: np.random.Generator, agent: np.ndarray, block: np.ndarray, steps: int) -> np.ndarray:
    """Targets around the block, so that the agent runs into it. (steps, 2) pixels, float32."""
    path = np.linspace(agent, block + rng.normal(0, 30, 2), steps)
    return (path + rng.normal(0, 10, (steps, 2))).astype(np.float32)


def put_block_on_goal(table) -> None:
    table.block.angle = table.goal_pose[2]
    table.block.position = tuple(table.goal_pose[:2])
    table.agent.position = (50, 50)


def test_chunks_equal_gym_pusht_step_by_step():
    ours, theirs = make(3), [gym_pusht.PushTEnv(obs_type="state") for _ in SEEDS]
    obs = ours.reset(SEEDS)
    states = [table.reset(seed=seed)[0] for table, seed in zip(theirs, SEEDS, strict=True)]
    starts = np.array(states)
    np.testing.assert_array_equal(obs["state"][:, -1], pusht.keypoint_state(starts[:, :2], starts[:, 2:]).astype(np.float32))
    rng, best = np.random.default_rng(0), [0.0] * 3
    coverage = [table._get_coverage() for table in theirs]
    for _ in range(12):
        chunks = np.stack([pushes(rng, state[:2], state[2:4], 8) for state in states])
        obs, reward, done, late, info = ours.step(chunks)
        for i, table in enumerate(theirs):
            rewards, before = [], coverage[i]
            for action in chunks[i]:
                states[i], step_reward, terminated, _, step_info = table.step(action.astype(np.float64))
                rewards.append(step_reward)
            assert np.array_equal(tables(ours)[i].get_obs(), states[i])  # bit for bit, whatever the contacts
            assert abs(tables(ours)[i]._get_coverage() - step_info["coverage"]) < 1e-12  # theirs adds the T's parts in any order
            best[i] = max(best[i], *rewards)
            assert abs(info["score"][i] - best[i]) < 1e-12
            coverage[i] = step_info["coverage"]
            assert abs(reward[i] - (0.1 * (coverage[i] - before) / 0.95 + terminated)) < 1e-12  # and 1 for success
            assert done[i] == info["success"][i] == terminated and not late[i]
        now = np.array(states)
        np.testing.assert_array_equal(obs["state"][:, -1], pusht.keypoint_state(now[:, :2], now[:, 2:]).astype(np.float32))
    assert (np.abs(now - starts)[:, 2:4].max(1) > 5).all()  # every block was pushed: the parity is one of contacts too
    assert max(best) > 0


def test_success_ends_the_episode_in_the_middle_of_a_chunk():
    ours, theirs = make(2), gym_pusht.PushTEnv(obs_type="state")
    ours.reset([1, 2])
    theirs.reset(seed=1)
    put_block_on_goal(tables(ours)[0])
    put_block_on_goal(theirs)
    tables(ours)[0].coverage = before = 0.5  # as if it had come from there
    action = np.array([60, 60], np.float32)
    state, step_reward, terminated, _, step_info = theirs.step(action.astype(np.float64))
    assert terminated
    _, reward, done, _, info = ours.step(np.broadcast_to(action, (2, 8, 2)))
    assert done.tolist() == info["success"].tolist() == [True, False]
    assert info["length"].tolist() == [1, 8]
    assert info["score"][0] == step_reward == 1
    assert abs(reward[0] - (0.1 * (step_info["coverage"] - before) / 0.95 + 1)) < 1e-12
    assert np.array_equal(tables(ours)[0].get_obs(), state)  # the other seven actions were not executed


def test_keypoints_of_a_known_pose():
    # A quarter turn takes (x, y) to (-y, x). The first keypoint in the T's frame is (9.26979, 90.04097).
    state = pusht.keypoint_state(np.array([[10.0, 20.0], [10.0, 20.0]]), np.array([[100, 200, np.pi / 2], [100, 200, 0]]))
    np.testing.assert_allclose(state[0, :2], [100 - 90.04097, 200 + 9.26979], atol=1e-9)
    np.testing.assert_allclose(state[1, :2], [100 + 9.26979, 200 + 90.04097], atol=1e-9)
    np.testing.assert_allclose(state[:, 18:], [[10, 20], [10, 20]])


def test_keypoints_lie_on_the_simulators_block():
    # Some of the published keypoints are corners of the T, and stand out by a pixel or two.
    import shapely.geometry

    env = make(len(SEEDS))
    obs = env.reset(SEEDS)["state"][:, -1]
    for table, state in zip(tables(env), obs, strict=True):
        block = gym_pusht.pymunk_to_shapely(table.block, table.block.shapes)
        distances = [block.distance(shapely.geometry.Point(*point)) for point in state[:18].reshape(9, 2)]
        assert max(distances) < 3, distances
        np.testing.assert_allclose(state[18:], np.array(table.agent.position), rtol=1e-6)


def test_reset_repeats_the_first_observation_and_follows_the_seed():
    env = make(2, obs_steps=3)
    first = env.reset([5, 6])["state"]
    assert first.shape == (2, 3, 20)
    assert (first == first[:, :1]).all()
    env.step(np.full((2, 4, 2), 250, np.float32))
    again = env.reset([5, 7])["state"]
    assert np.array_equal(again[0], first[0])
    assert not np.array_equal(again[1], first[1])


def test_history_holds_the_last_states():
    seen, steps = make(1, obs_steps=3), make(1, obs_steps=1)
    seen.reset([3])
    states = [steps.reset([3])["state"][0, 0]]
    actions = np.array([[[300, 300], [310, 280], [250, 260], [240, 200], [200, 220]]], np.float32)
    states += [steps.step(actions[:, t : t + 1])[0]["state"][0, 0] for t in range(5)]
    assert np.array_equal(seen.step(actions[:, :1])[0]["state"][0], np.array([states[0], states[0], states[1]]))
    assert np.array_equal(seen.step(actions[:, 1:])[0]["state"][0], np.array(states[3:6]))


def test_an_episode_ends_after_300_steps_and_stays_ended():
    env = make(1)
    env.reset([11])
    put_block_on_goal(tables(env)[0])
    tables(env)[0].block.position = (240, 256)  # near the goal, so that pushing it about makes the reward rise and fall
    rng, rewards, scores = np.random.default_rng(0), [], []
    for chunk in range(1, 40):
        start, block = np.array(tables(env)[0].agent.position), np.array(tables(env)[0].block.position)
        _, reward, _, done, info = env.step(pushes(rng, start, block, 8)[None])
        rewards.append(reward[0])
        scores.append(info["score"][0])
        assert info["length"][0] == min(8 * chunk, 300)
        assert done[0] == (chunk >= 38)  # 37 chunks are 296 steps
    assert rewards[38] == 0 and not info["success"][0]
    assert (np.diff(rewards) < 0).any() and (np.diff(scores) >= 0).all()
    assert 10 * sum(rewards) <= scores[-1] < 1  # the score is the largest coverage, the rewards add up to the last
    state = tables(env)[0].get_obs()
    env.step(np.full((1, 8, 2), 400, np.float32))
    assert np.array_equal(tables(env)[0].get_obs(), state)


def test_the_film_has_one_picture_per_step_of_the_chosen_episodes():
    env = make(3)
    env.record([0, 2])
    env.reset([1, 2, 3])
    put_block_on_goal(tables(env)[2])
    env.step(np.full((3, 4, 2), 60, np.float32))
    assert [len(frames) for frames in env.frames] == [5, 2]  # the reset, and every step until the end of the episode
    first, last = env.frames[0][0], env.frames[0][-1]
    assert first.dtype == np.uint8 and first.shape[-1] == 3
    assert (first != last).any()


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match=r"'pushy'.*pusht"):
        envs.get_task("pushy")


def test_a_dead_worker_is_an_error_in_words_and_nobody_waits_for_it():
    for call in (lambda env: env.step(np.full((2, 8, 2), 250.0)), lambda env: env.record([0])):
        env = vector.GymVector(pusht.make_env, 2, 1, processes=True)
        env.reset([0, 1])
        worker = env.vector.processes[1]
        worker.kill()
        worker.join()
        with pytest.raises(vector.SimulationError, match="worker process of the environments died"):
            call(env)
        env.close()
        for process in env.vector.processes:
            process.join(5)
            assert not process.is_alive()


def test_a_worker_ends_at_the_first_sigterm_whatever_its_parent_does_with_signals():
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # as the scripts have, which save and leave
    try:
        env = vector.GymVector(pusht.make_env, 1, 1, processes=True)
        env.reset([0])
        (worker,) = env.vector.processes
        os.kill(worker.pid, signal.SIGINT)  # Ctrl-C reaches all processes of a terminal
        env.step(np.full((1, 8, 2), 250.0))
        worker.terminate()
        worker.join(5)
        assert not worker.is_alive()
        env.close()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_mirror_is_a_symmetry_of_the_physics():
    # The walls are one pixel off the mirror's axis, so the episode stays away from them; everything else is symmetric.
    from gym_pusht.envs.pusht import PushTEnv

    rng = np.random.default_rng(0)
    state = np.array([[200.0, 330.0, 250.0, 240.0, 0.4]])
    walk = np.cumsum(rng.normal(0, 12, (40, 2)), 0)
    actions = np.clip(walk + np.array([230.0, 280.0]), 100, 400)
    twin = pusht.mirror({"state": state, "action": actions})
    end = []
    for start, pushes in ((state, actions), (twin["state"], twin["action"])):
        table = PushTEnv(obs_type="state")
        table.reset(seed=0)
        table.agent.position, table.block.angle = tuple(start[0, :2]), start[0, 4]
        table.block.position = tuple(start[0, 2:4])
        for push in pushes:
            last, *_ = table.step(push)
        end.append((last, table._get_coverage()))
    assert np.abs(end[0][0][2:4] - state[0, 2:4]).max() > 5, "the block was never touched"
    mirrored = pusht.mirror({"state": end[0][0][None], "action": actions})["state"][0]
    difference = mirrored - end[1][0]
    difference[4] = (difference[4] + np.pi) % (2 * np.pi) - np.pi
    assert np.abs(difference).max() < 0.5
    assert abs(end[0][1] - end[1][1]) < 0.01


def test_mirrored_pictures_show_the_mirrored_state(tmp_path, monkeypatch):
    state = np.array([[200.0, 330.0, 250.0, 240.0, 0.4], [60.0, 400.0, 140.0, 200.0, -2.5]])
    pictures = []
    for rows in (state, pusht.mirror({"state": state, "action": state[:, :2]})["state"]):
        table = pusht.make_env("image")
        table.reset(seed=0)
        for row in rows:
            table.agent.position, table.block.angle, table.block.position = row[:2].tolist(), float(row[4]), row[2:4].tolist()
            for body in (table.agent, table.block):
                table.space.reindex_shapes_for_body(body)
            pictures.append(table._see(row[:2], row[2:])["image"])
    pictures = np.stack(pictures)
    arrays = {"img": pictures[:2], "state": state, "action": state[:, :2]}
    mirrored = pusht.mirror(arrays)["img"]
    apart = np.abs(mirrored.astype(int) - pictures[2:]).mean((1, 2, 3))
    unlike = np.abs(pictures[:2].astype(int) - pictures[2:]).mean((1, 2, 3))
    assert (apart < 0.2 * unlike).all(), "edges of one pixel may differ, places not"

    monkeypatch.setattr(demos, "DATA", tmp_path)
    path = tmp_path / "pusht-image.npz"
    np.savez(path, **arrays, episode_ends=np.array([2]))
    data = demos.load(str(path), "pusht-image", ("img", "state", "action"), pusht.image_demos, pusht.mirror)
    assert (data.obs["image"] == np.concatenate([pictures[:2], mirrored])).all()
    assert data.episode_ends.tolist() == [2, 4]
