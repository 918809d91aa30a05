"""blockpush.py: the table, its score and reward, the oracle in all four ways, and demonstrations that can be replayed."""

import numpy as np
import pytest

import blockpush
import demos
import envs

TASK = envs.get_task("blockpush")


@pytest.fixture
def table():
    env = blockpush.BlockPush()
    yield env
    env.close()


def play(env: blockpush.BlockPush, seed: int) -> dict:
    obs, _ = env.reset(seed=seed)
    oracle, total, success, late = blockpush.Oracle(seed), 0.0, False, False
    while not (success or late):
        obs, reward, success, late, info = env.step(oracle(obs))
        total += reward
    return {**info, "return": total, "first": env.first, "oracle": oracle}


def put(env: blockpush.BlockPush, block: int, place) -> None:
    env.data.qpos[3 * block : 3 * block + 2] = place


def test_the_oracle_succeeds_in_all_four_ways(table):
    ways = set()
    for seed in range(16):
        end = play(table, seed)
        assert end["success"] and end["score"] == 1 and end["return"] == 2
        assert end["first"][0] == end["oracle"].order[0]  # into which target, mostly as meant: on the way one may cross the other
        ways.add(end["first"])
    assert ways == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_an_episode_is_a_function_of_its_seed_and_actions(table):
    actions = np.random.default_rng(0).uniform(-0.03, 0.03, (30, 2))
    runs = []
    for seed in (5, 6, 5):
        first, _ = table.reset(seed=seed)
        runs.append(np.array([first] + [table.step(action)[0] for action in actions]))
    assert np.array_equal(runs[0], runs[2]) and not np.array_equal(runs[0][0], runs[1][0])


def test_starts_lie_apart_and_within_reach(table):
    for seed in range(50):
        obs, _ = table.reset(seed=seed)
        blocks, targets = obs[:6].reshape(2, 3), obs[10:].reshape(2, 3)
        assert np.linalg.norm(blocks[0, :2] - blocks[1, :2]) >= blockpush.APART["block"] - 1e-6
        assert np.linalg.norm(targets[0, :2] - targets[1, :2]) > 2 * blockpush.REACHED
        for places in (blocks[:, :2], targets[:, :2], obs[6:8], obs[8:10]):
            assert (places >= blockpush.LOW).all() and (places <= blockpush.HIGH).all()
        assert np.abs([*blocks[:, 2], *targets[:, 2]]).max() <= np.pi / 4 + 1e-6


def test_the_oracle_mends_what_has_gone_astray(table):
    for seed in range(6):
        obs, _ = table.reset(seed=seed, options={"anywhere": True})
        oracle, success, late = blockpush.Oracle(seed), False, False
        while not (success or late):
            obs, _, success, late, _ = table.step(oracle(obs))
        assert success


def test_a_block_that_goes_in_and_out_earns_once(table):
    obs, _ = table.reset(seed=0)
    targets, away = obs[10:].reshape(2, 3)[:, :2], np.array([0.25, -0.2])
    put(table, 1, [0.4, -0.2])
    rewards, scores = [], []
    for place in (targets[0], away, targets[0], targets[1], away):
        put(table, 0, place)
        _, reward, success, late, info = table.step(np.zeros(2))
        rewards.append(reward)
        scores.append(info["score"])
        assert not (success or late or info["success"])
    assert rewards == [1, 0, 0, 0, 0] and scores == [0.5] * 5
    assert table.first == (0, 0)
    put(table, 0, targets[1] + [0.03, 0])
    put(table, 1, targets[1] - [0.03, 0])  # both in one target: one is filled
    assert table.step(np.zeros(2))[4] == {"score": 0.5, "success": False}
    put(table, 1, targets[0])
    _, reward, success, late, info = table.step(np.zeros(2))
    assert (reward, success, late, info) == (1, True, False, {"score": 1.0, "success": True})


def test_a_block_counts_within_the_published_distance(table):
    obs, _ = table.reset(seed=0)
    for distance, score in ((blockpush.REACHED + 1e-3, 0), (blockpush.REACHED - 1e-3, 0.5)):
        put(table, 0, [obs[10], obs[11] - distance])
        table.data.qvel[:] = 0
        assert table.step(np.zeros(2))[4]["score"] == score


def test_the_effector_goes_where_it_is_told_and_no_farther(table):
    obs, _ = table.reset(seed=1)
    start = obs[8:10].copy()
    for _ in range(2):
        obs, *_ = table.step([-1.0, -0.01])  # cut to 0.03
    np.testing.assert_allclose(obs[8:10], [start[0] - 0.06, start[1] - 0.02], atol=1e-6)
    for _ in range(4):
        obs, *_ = table.step([0.0, 0.0])
    np.testing.assert_allclose(obs[6:8], obs[8:10], atol=1e-3)
    for _ in range(20):
        obs, *_ = table.step([-0.03, -0.03])
    np.testing.assert_allclose(obs[8:10], blockpush.LOW, atol=1e-6)


def test_the_time_limit(table):
    table.reset(seed=0)
    ends = [table.step(np.zeros(2))[2:4] for _ in range(blockpush.MAX_STEPS)]
    assert ends[-1] == (False, True) and not any(late for _, late in ends[:-1])


@pytest.mark.parametrize("bad", [np.zeros(3), np.zeros((1, 2)), [np.nan, 0], [0, np.inf]], ids=str)
def test_a_bad_action_is_named(table, bad):
    table.reset(seed=0)
    with pytest.raises(ValueError, match=r"the action is .*two finite numbers"):
        table.step(bad)


def test_recorded_actions_are_what_the_oracle_meant_and_states_what_a_trembling_hand_did(tmp_path, table):
    path = tmp_path / "recorded" / "blockpush.npz"
    blockpush.record_blockpush(path, episodes=6)
    data = demos.load(str(path), "blockpush", TASK.demo_arrays, TASK.demo_convert)
    assert len(data.episode_ends) == 6
    start = 0
    for seed, end in enumerate(data.episode_ends, 4_000_000):  # none of these six fails
        oracle, states, actions = blockpush.Oracle(seed), data.obs["state"][start:end], data.actions[start:end]
        np.testing.assert_array_equal(states[0], table.reset(seed=seed, options={"anywhere": seed % 2 == 1})[0])
        meant = np.array([oracle(state) for state in states]).clip(-blockpush.MAX_ACTION, blockpush.MAX_ACTION)
        np.testing.assert_array_equal(actions, meant.astype(np.float32))
        slips = np.diff(states[:, 8:10], axis=0) - actions[:-1]
        assert 0 < slips.std() < 0.01
        start = end


def test_pictures_show_the_blocks(table):
    table.reset(seed=3)
    try:
        picture = table.render().astype(int)
    except OSError as error:
        pytest.skip(str(error))
    red, _, blue = np.moveaxis(picture, -1, 0)
    assert picture.shape == (256, 256, 3)
    assert (red > blue + 80).sum() > 20 and (blue > red + 80).sum() > 20


def test_the_row_fits_its_environment():
    env = TASK.make(2, 3)
    assert env.reset([0, 1])["state"].shape == (2, 3, *TASK.obs_shapes["state"])
    _, reward, terminated, truncated, info = env.step(np.zeros((2, 4, TASK.action_dim), np.float32))
    assert reward.tolist() == [0, 0] and not (terminated | truncated).any() and info["length"].tolist() == [4, 4]
    assert TASK.stages == 2
    env.close()
