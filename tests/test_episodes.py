"""vector.Episodes: what stands at the end of an episode and at the next start, seeds, and the exact repetition on resume."""

from collections.abc import Callable

import numpy as np
import pytest

import envs
import locomotion
import vector
from common import load_checkpoint, save_checkpoint

FIRST = 2_000_000
TO = 2


def hopper(num_envs: int) -> locomotion.Locomotion:
    return locomotion.Locomotion(num_envs, TO, "hopper", threads=1)


def pusht(num_envs: int):
    pytest.importorskip("gym_pusht")
    return envs.get_task("pusht").make(num_envs, TO)


def falls(t: int, _) -> np.ndarray:
    """Random torques of decision t: each body falls after its own few chunks. (3, 4, 3)"""
    return np.random.default_rng(t).uniform(-1, 1, (3, 4, 3)).astype(np.float32)


def pushes(t: int, obs: np.ndarray) -> np.ndarray:
    """Targets around the T, so that it is pushed about. (3, 8, 2) pixels"""
    return (obs[:, -1, None, :2] + np.random.default_rng(t).normal(0, 40, (3, 8, 2))).astype(np.float32)


def drive(episodes: vector.Episodes, draw: Callable, decisions: range) -> list[list[np.ndarray]]:
    """Of every decision: the observation acted on, what step returns, and the seeds behind it."""
    seen = []
    for t in decisions:
        acted_on = episodes.obs["state"].copy()
        final, reward, terminated, truncated, info = episodes.step(draw(t, acted_on))
        seen.append([acted_on, final["state"], reward, terminated, truncated, *info.values(), np.array(episodes.seeds)])
    return seen


# --- ends and starts --------------------------------------------------------------------------------------------------


def test_an_end_gives_its_final_observation_and_the_next_start_to_act_on():
    """Against the same environment without Episodes, where an ended one rests."""
    episodes, rests = vector.Episodes(hopper(3), FIRST, 1), hopper(3)
    rests.reset(episodes.seeds)
    checked = np.zeros(3, int)
    for t in range(30):
        chunks, before = falls(t, None), list(episodes.seeds)
        final, _, terminated, truncated, _ = episodes.step(chunks)
        expected = rests.step(chunks)[0]["state"]
        np.testing.assert_array_equal(final["state"], expected)  # of all environments, ended or not
        for i in range(3):
            if not (terminated | truncated)[i]:
                assert episodes.seeds[i] == before[i]
                np.testing.assert_array_equal(episodes.obs["state"][i], expected[i])
                continue
            start = rests.reset([episodes.seeds[i]], [i])["state"][i]
            np.testing.assert_array_equal(episodes.obs["state"][i], start)
            assert (start != final["state"][i]).any() and (start[0] == start[1]).all()
            checked[i] += 1
    assert (checked > 1).all()


def test_every_start_is_used_once_and_ranks_interleave():
    used = []
    for rank in range(3):
        env, mine = hopper(3), []
        reset = env.reset
        env.reset = lambda seeds, which=None, mine=mine, reset=reset: (mine.extend(seeds), reset(seeds, which))[1]
        drive(vector.Episodes(env, FIRST + rank, 3), falls, range(25))
        assert len(mine) > 6
        assert mine == list(range(FIRST + rank, FIRST + rank + 3 * len(mine), 3))  # none is left out either
        used += mine
    assert len(set(used)) == len(used)


# --- repetition -------------------------------------------------------------------------------------------------------

RUNS = {  # environments, chunks, N, several k. A Push-T episode has 38 chunks.
    "hopper": (hopper, falls, 30, range(25)),
    "pusht": (pusht, pushes, 42, (3, 37, 38, 40)),
}


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory) -> dict:
    """One uninterrupted run, with the state of every moment k on disk. They are written at its end: a state must not move on."""
    make, draw, N, moments = RUNS[request.param]
    folder, episodes, seen, states = tmp_path_factory.mktemp(request.param), vector.Episodes(make(3), FIRST, 2), [], {}
    for t in range(N):
        states[t] = episodes.state()
        seen += drive(episodes, draw, range(t, t + 1))
    for k in moments:
        save_checkpoint({"episodes": states[k]}, folder / f"{k}.pt")  # read back with weights_only=True
    return {"make": make, "draw": draw, "N": N, "moments": moments, "folder": folder, "seen": seen, "end": episodes.state()}


def test_n_decisions_are_k_and_a_new_process_and_the_others_bit_for_bit(run):
    lengths = []
    for k in run["moments"]:
        state = load_checkpoint(run["folder"] / f"{k}.pt")["episodes"]
        lengths.append([len(chunks) for chunks in state["chunks"]])
        episodes = vector.Episodes(run["make"](3), FIRST, 2)
        episodes.load(state)
        for ours, theirs in zip(drive(episodes, run["draw"], range(k, run["N"])), run["seen"][k:], strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert np.array_equal(a, b), k
        end = episodes.state()
        assert (end["seeds"], end["next_seed"]) == (run["end"]["seeds"], run["end"]["next_seed"])
        assert all(np.array_equal(a, b) for a, b in zip(end["chunks"], run["end"]["chunks"], strict=True))
    assert max(max(each) for each in lengths) > 5  # the moments are hard enough: episodes have begun,
    assert any(0 in each for each in lengths[1:])  # one has just ended,
    assert len(run["moments"]) < 10 or any(len(set(each)) == 3 for each in lengths)  # and bodies fall at different times
