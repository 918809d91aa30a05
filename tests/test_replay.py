"""replay.py: returns against brute force, masks at every end of an episode, the state that brings the buffer back."""

import numpy as np
import pytest
import torch

from replay import Recorder, ReplayBuffer, n_step

H, GAMMA = 3, 0.9


def episodes(seed: int = 0) -> dict[str, np.ndarray]:
    """Four episodes of 1 to 9 steps; some steps end the task, in the middle as in play, or the last as in an environment."""
    rng = np.random.default_rng(seed)
    ends = np.cumsum([7, 1, 9, 4])
    terminated = np.zeros(ends[-1], bool)
    terminated[[2, 6, 12, 13]] = True  # the first episode in its middle and at its end, the third twice
    n = len(terminated)
    return {
        "obs": rng.normal(size=(n, 2)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, 1)).astype(np.float32),
        "rewards": rng.normal(size=n),
        "terminated": terminated,
        "ends": ends,
    }


def by_hand(rewards, terminated, ends, t: int) -> tuple[float, float, bool]:
    """Return, alive and valid of the chunk that starts at t, step by step."""
    end = next(e for e in ends if e > t)
    total, alive = 0.0, True
    for i in range(H):
        if alive and t + i < end:
            total += GAMMA**i * rewards[t + i]
            alive = not terminated[t + i]
    inside = t + H <= end
    return total, float(alive), inside and (t + H < end or not alive)


def filled(capacity: int = 40) -> tuple[ReplayBuffer, dict]:
    buffer, data = ReplayBuffer(capacity, 2, 1, H, GAMMA, torch.device("cpu")), episodes()
    buffer.add(**data)
    return buffer, data


@pytest.mark.parametrize("seed", range(3))
def test_returns_and_masks_are_those_found_step_by_step(seed):
    data = episodes(seed)
    returns, alive, valid = n_step(data["rewards"], data["terminated"], data["ends"], H, GAMMA)
    for t in range(len(returns)):
        total, goes_on, fits = by_hand(data["rewards"], data["terminated"], data["ends"], t)
        assert bool(valid[t]) == fits, t
        if fits:
            assert returns[t] == pytest.approx(total) and alive[t] == goes_on, t
    assert 0 < valid.sum() < len(valid)


def test_no_chunk_of_a_sample_crosses_an_episodes_end():
    buffer, data = filled()
    generator = torch.Generator().manual_seed(0)
    obs, chunk, returns, alive, following, succeeded = buffer.sample(500, generator)
    seen = set()
    for b in range(500):
        t = int(np.flatnonzero((data["obs"] == obs[b].numpy()).all(1))[0])
        seen.add(t)
        total, goes_on, fits = by_hand(data["rewards"], data["terminated"], data["ends"], t)
        assert fits and returns[b] == pytest.approx(total) and alive[b] == goes_on
        assert np.array_equal(chunk[b].numpy(), data["actions"][t : t + H])
        episode = np.searchsorted(data["ends"], t, "right")
        assert succeeded[b] == data["terminated"][slice(([0, *data["ends"]])[episode], data["ends"][episode])].any()
        if goes_on:
            assert np.array_equal(following[b].numpy(), data["obs"][t + H])
    assert seen == {t for t in range(21) if by_hand(data["rewards"], data["terminated"], data["ends"], t)[2]}


@pytest.mark.parametrize("success", [True, False])
def test_the_last_chunk_of_an_episode_leads_to_success_or_to_the_final_observation(success):
    buffer, recorder = ReplayBuffer(20, 1, 1, H, GAMMA, torch.device("cpu")), Recorder(1)
    for t in range(5):
        recorder.note(0, np.array([t], np.float32), np.array([0.1 * t], np.float32), -1.0, success and t == 4)
    recorder.finish(0, np.array([99], np.float32), buffer)
    assert recorder.rows == [[]]
    assert buffer.starts[: buffer.chunks].tolist() == [0, 1, 2]  # 3 and 4 are too near to the end
    last = buffer.starts[: buffer.chunks] == 2
    assert buffer.alive[2] == (0.0 if success else 1.0) and last.any()
    if not success:
        assert buffer.obs[2 + H] == 99


def test_the_buffer_refuses_what_it_cannot_learn_from():
    buffer, data = filled(capacity=22)
    with pytest.raises(ValueError, match="room for 22 steps; 42 came"):
        buffer.add(**data)
    data["rewards"][4] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity, first at step 4"):
        ReplayBuffer(40, 2, 1, H, GAMMA, torch.device("cpu")).add(**data)


def test_the_online_part_of_the_buffer_comes_back_from_its_state():
    buffer, _ = filled(80)
    offline = buffer.size
    buffer.add(**episodes(1))
    buffer.add(**episodes(2))
    again, _ = filled(80)
    again.load(buffer.state(offline))
    assert (again.size, again.chunks, again.ends) == (buffer.size, buffer.chunks, buffer.ends)
    for name in ("obs", "actions", "rewards", "terminated", "returns", "alive", "starts"):
        assert torch.equal(getattr(again, name), getattr(buffer, name)), name
