"""locomotion.Locomotion against gymnasium's environments of the same name, state by state."""

import warnings

import gymnasium
import numpy as np
import pytest
from conftest import ROOT

import locomotion


def gym_env(body: str) -> gymnasium.Env:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gymnasium.make(locomotion.BODIES[body].gym_id)


@pytest.mark.parametrize("Ta", [1, 4])
@pytest.mark.parametrize("body", list(locomotion.BODIES))
def test_equals_gymnasium_step_by_step(body, Ta):
    """1,000 steps of random actions on each of three bodies; fallen ones start again. All numbers, not only the states."""
    N, rng = 3, np.random.default_rng(0)
    ours = locomotion.Locomotion(N, 2, body)
    theirs, ended, falls, limits = [gym_env(body) for _ in range(N)], np.zeros(N, bool), 0, 0
    seeds = np.arange(N) + 7
    obs = ours.reset(seeds)["state"]
    last = [env.reset(seed=int(seed))[0] for env, seed in zip(theirs, seeds, strict=True)]
    np.testing.assert_array_equal(obs, np.array(last, np.float32)[:, None].repeat(2, 1))
    total = np.zeros(N)
    for _ in range(1004 // Ta):
        chunks = rng.uniform(-1, 1, (N, Ta, ours.action_dim)) * rng.uniform(0, 1, (N, 1, 1))
        obs, reward, terminated, truncated, info = ours.step(chunks)
        for i, env in enumerate(theirs):
            seen, expected, fell, late = [last[i]], 0.0, False, False
            for action in chunks[i]:
                observation, r, fell, late, _ = env.step(action)
                seen.append(observation)
                expected += r
                if fell or late:
                    break
            total[i] += expected
            assert abs(reward[i] - expected) < 1e-9
            assert (terminated[i], truncated[i]) == (fell, late and not fell)
            assert abs(info["score"][i] - total[i]) < 1e-9
            state = np.concatenate([env.unwrapped.data.qpos, env.unwrapped.data.qvel])
            assert np.abs(ours.state[i, 1:] - state).max() < 1e-9
            np.testing.assert_array_equal(obs["state"][i], np.array(seen[-2:], np.float32))
            last[i] = seen[-1]
        ended = terminated | truncated
        falls, limits = falls + terminated.sum(), limits + truncated.sum()
        which = np.flatnonzero(ended)
        seeds[which] += 100
        if len(which):
            obs = ours.reset(seeds[which], which)
            for i in which:
                last[i], total[i] = theirs[i].reset(seed=int(seeds[i]))[0], 0.0
    assert falls > 1 or body == "halfcheetah"
    assert limits > 0 or body != "halfcheetah"


@pytest.mark.parametrize(("body", "medium"), [("hopper", 1_420), ("walker2d", 2_841), ("halfcheetah", 4_563), ("ant", 3_162)])
def test_embedded_behaviour_earns_what_its_readme_says(body, medium):
    with np.load(ROOT / "data" / f"{body}.npz") as file:
        weights = {name.removeprefix("medium_"): x for name, x in file.items() if name.startswith("medium_")}
    arrays, ends, seeds, returns = locomotion.roll_out(body, locomotion.Behaviour(weights), 1, seed_start=9_000_000, num_envs=8)
    assert len(ends) == len(seeds) == len(returns) == 8
    assert arrays["observations"].shape[1] == locomotion.OBS_DIMS[body][0]
    assert 0.6 * medium < np.mean(returns) < 1.4 * medium
