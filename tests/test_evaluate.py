"""evaluate.py: the interval, the latency, the JSON contract, and episodes that do not disturb each other."""

import dataclasses
import json

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import TINY_MLP, TINY_UNET

import envs
import evaluate
from policy import Policy, PolicyConfig

TO, TA, DA = 2, 3, 2
CONTRACT = {"env", "episodes", "seed_start", "score", "score_ci95", "success_rate", "mean_return"}
CONTRACT |= {"latency_ms_p50", "latency_ms_p99", "nfe", "parameters"}


def make_policy(**changes) -> Policy:
    torch.manual_seed(0)
    settings = {"env": "toy", "obs_shapes": {"state": (3,)}, "action_dim": DA, "obs_steps": TO, "horizon": 4, "action_steps": TA}
    return Policy(PolicyConfig(**{**settings, **TINY_MLP, **changes})).eval()


class ToyEnv:
    """Episode i moves a point by its own actions, and lasts lengths[seed] chunks. Its score is where the point got to."""

    def __init__(self, num_envs: int, obs_steps: int, lengths: dict[int, int]):
        self.num_envs, self.obs_steps, self.lengths, self.batches = num_envs, obs_steps, lengths, []
        self.chunks, self.ends = np.zeros(num_envs, int), np.zeros(num_envs, int)
        self.point = np.zeros((num_envs, 3), np.float32)

    def reset(self, seeds, which=None):
        self.batches.append(list(seeds))
        for i, seed in zip(range(self.num_envs) if which is None else which, seeds, strict=True):
            self.chunks[i], self.ends[i], self.point[i] = 0, self.lengths[seed], (seed, 0, 0)
        return self.observe()

    def observe(self):
        return {"state": np.repeat(self.point[:, None], self.obs_steps, 1)}

    def step(self, chunks):
        running = self.chunks < self.ends
        moved = np.where(running[:, None], chunks.sum(1), 0)
        self.point[:, 1:] += moved
        self.chunks += 1
        done = self.chunks >= self.ends
        info = {
            "score": self.point[:, 1].copy(),
            "success": done & (self.ends < 3),
            "length": TA * np.minimum(self.chunks, self.ends),
        }
        return self.observe(), moved[:, 0], done & (self.ends < 3), done & (self.ends >= 3), info

    def close(self):
        pass


def toy_task(lengths: dict[int, int], made: list | None = None) -> envs.Task:
    def make(num_envs: int, obs_steps: int) -> ToyEnv:
        env = ToyEnv(num_envs, obs_steps, lengths)
        if made is not None:
            made.append(env)
        return env

    return dataclasses.replace(envs.TASKS["pusht"], name="toy", make=make, obs_shapes={"state": (3,)}, action_dim=DA)


def test_interval95_by_hand():
    # Mean 0.5, standard deviation (n - 1) sqrt(1/3), over sqrt(4): half = 1.96 * 0.288675.
    low, high = evaluate.interval95(np.array([0.0, 1.0, 1.0, 0.0]))
    assert (low, high) == pytest.approx((0.5 - 0.565803, 0.5 + 0.565803), abs=1e-6)


def test_share95_is_wilsons_interval():
    # 8 of 10: (0.8 + 0.19208) / 1.38416 = 0.716737; half 1.96 / 1.38416 * sqrt(0.016 + 0.009604) = 0.226578
    assert evaluate.share95(0.8, 10) == pytest.approx((0.490159, 0.943315), abs=1e-5)
    assert evaluate.share95(1.0, 100) == pytest.approx((0.963005, 1.0), abs=1e-5)
    assert evaluate.share95(0.0, 100) == pytest.approx((0.0, 0.036995), abs=1e-5)


def test_interval95_holds_the_mean_in_95_percent_of_samples():
    samples = np.random.default_rng(0).beta(2, 1, (1000, 50))  # like scores: skewed, in [0, 1], mean 2/3
    bounds = np.array([evaluate.interval95(sample) for sample in samples])
    covered = ((bounds[:, 0] < 2 / 3) & (bounds[:, 1] > 2 / 3)).mean()
    assert 0.92 < covered < 0.975


def test_an_episode_does_not_depend_on_when_the_others_finish():
    policy = make_policy()
    together = evaluate.rollout(policy, toy_task({0: 6, 1: 6, 2: 6, 3: 6}), [0, 1, 2, 3])
    early = evaluate.rollout(policy, toy_task({0: 1, 1: 6, 2: 3, 3: 6}), [0, 1, 2, 3])
    assert early["length"].tolist() == [3, 18, 9, 18]
    for name in ("score", "return"):
        np.testing.assert_allclose(early[name][[1, 3]], together[name][[1, 3]], rtol=1e-4, atol=1e-4)
        assert abs(early[name][0] - together[name][0]) > 1e-2


def test_latents_matter_and_are_fixed_by_the_seed():
    policy, task = make_policy(), toy_task(dict.fromkeys(range(6), 4))
    first, again = (evaluate.rollout(policy, task, list(range(6)), latent_seed=3) for _ in range(2))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    other = evaluate.rollout(policy, task, list(range(6)), latent_seed=4)
    assert (np.abs(first["score"] - other["score"]) > 1e-3).all()
    still = make_policy(latent_scale=0.0)
    centre = [evaluate.rollout(still, task, list(range(6)), latent_seed=seed)["score"] for seed in (3, 4)]
    assert np.array_equal(*centre)
    assert (np.abs(first["score"] - centre[0]) > 1e-3).all()


def test_more_episodes_than_environments_run_in_batches():
    made = []
    task = dataclasses.replace(toy_task({seed: 1 + seed % 4 for seed in range(10, 15)}, made), side_by_side=2)
    results = evaluate.rollout(make_policy(), task, list(range(10, 15)))
    assert [env.batches for env in made] == [[[10, 11], [12, 13], [14]]]  # one environment serves them all
    assert results["length"].tolist() == [9, 12, 3, 6, 9]  # in the order of the seeds


def test_push_t_evaluation_is_reproducible():
    pytest.importorskip("gym_pusht")
    policy = make_policy(obs_shapes={"state": (20,)}, horizon=16, action_steps=8)
    policy.normalize_action.fit(torch.tensor([[0.0, 0.0], [512.0, 512.0]]))
    policy.normalize_obs["state"].fit(torch.tensor([[0.0], [512.0]]).repeat(1, 20))
    first, again = (evaluate.rollout(policy, envs.TASKS["pusht"], [100_000, 100_001]) for _ in range(2))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert (first["length"] <= 300).all() and (first["score"] <= 1).all()


def test_latency_counts_the_network_passes():
    policy = make_policy()
    times, nfe = evaluate.latency(policy, calls=5)
    assert nfe == 1
    assert times.shape == (5,) and (times > 0).all() and times.max() < 1000  # milliseconds

    class TwoPasses(Policy):
        def act(self, *args, **kwargs):
            super().act(*args, **kwargs)
            return super().act(*args, **kwargs)

    assert evaluate.latency(TwoPasses(policy.config), calls=1)[1] == 2  # it is counted, not claimed


def test_report_is_the_json_contract():
    policy = make_policy()
    results = {"score": np.array([0.5, 1.0]), "success": np.array([False, True]), "return": np.array([10.0, 21.0])}
    line = evaluate.report(policy, results, 100_000)
    assert set(line) == CONTRACT
    assert json.loads(json.dumps(line)) == line
    expected = {
        "env": "toy",
        "episodes": 2,
        "seed_start": 100_000,
        "score": 0.75,
        "success_rate": 0.5,
        "mean_return": 15.5,
        "nfe": 1,
    }
    assert {name: line[name] for name in expected} == expected
    assert line["score_ci95"] == pytest.approx([0.75 - 0.49, 0.75 + 0.49])  # 1.96 * sqrt(1/8) / sqrt(2)
    assert 0 < line["latency_ms_p50"] <= line["latency_ms_p99"]
    assert line["parameters"] == sum(p.numel() for p in policy.parameters())


def test_shares_of_episodes_with_so_many_subtasks_done():
    thirds = np.array([0, 1, 1, 2, 3]) / 3
    assert evaluate.stage_shares(thirds, 3) == {"p1": 0.8, "p2": 0.4, "p3": 0.2}
    assert evaluate.stage_shares(thirds.astype(np.float32), 3) == {"p1": 0.8, "p2": 0.4, "p3": 0.2}  # rounded thirds count too
    results = {"score": np.array([0.5, 1.0]), "success": np.array([False, True]), "return": np.array([1.0, 2.0])}
    line = evaluate.report(make_policy(), results, 0, stages=2)
    assert set(line) == CONTRACT | {"p1", "p2"} and (line["p1"], line["p2"]) == (1.0, 0.5)


def test_report_of_one_episode_is_valid_json():
    results = {"score": np.array([0.5]), "success": np.array([False]), "return": np.array([10.0])}
    text = json.dumps(evaluate.report(make_policy(), results, 0))
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON: {text}"))


def test_gif_holds_the_last_frame_of_the_shorter_episode(tmp_path):
    shades = [[np.full((8, 8, 3), value, np.uint8) for value in values] for values in ([0, 50, 100, 150, 200], [255])]
    evaluate.write_gif(shades, tmp_path / "new" / "film.gif", every=1)
    film = iio.imread(tmp_path / "new" / "film.gif", mode="RGB")
    assert film.shape[1:] == (8, 16, 3)  # side by side
    assert np.abs(film[0, :, :8].astype(int)).max() < 10 and np.abs(film[-1, :, :8].astype(int) - 200).max() < 10
    assert (film[:, :, 8:] > 245).all()


# --- export -------------------------------------------------------------------------------------------------------------

EXPORTED = {
    "mlp": {"obs_shapes": {"state": (3,)}},
    "tanh": {"obs_shapes": {"state": (3,)}, "backbone": "tanh"},
    "unet": {"obs_shapes": {"state": (3,)}, **TINY_UNET},
    "camera": {"obs_shapes": {"robot": (4,), "image": (24, 24, 3)}},
    "cloud from the hand": {"obs_shapes": {"robot": (4,), "points": (30, 3)}, "cloud_origin": "robot"},
    "dfp": {"obs_shapes": {"state": (3,)}, "candidates": 4, "critic_width": 8, "critic_depth": 2},
}


def fitted(**changes) -> Policy:
    """A policy whose normalisers are not the identity: raw units matter."""
    policy = make_policy(**changes)
    policy.normalize_action.fit(torch.tensor([[-50.0, 3.0], [450.0, 3.2]]))
    for normalizer in policy.normalize_obs.values():
        normalizer.fit(torch.stack([torch.full(normalizer.center.shape, value) for value in (-2.0, 5.0)]))
    return policy


@pytest.mark.parametrize("name", EXPORTED)
def test_the_exported_graph_acts_as_the_policy(name, tmp_path):
    pytest.importorskip("onnxscript", reason="the exporter: pip install -r requirements-export.txt")
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install -r requirements-export.txt")
    policy = fitted(**EXPORTED[name])
    assert evaluate.export_onnx(policy, tmp_path / "policy.onnx") < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "policy.onnx", providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == [*policy.config.obs_shapes, "z"]
    assert [list(o.shape) for o in session.get_outputs()] == [[1, TA, DA]]
    obs, z = evaluate.typical_inputs(policy, torch.Generator().manual_seed(5))
    actions = session.run(None, {key: x.numpy() for key, x in {**obs, "z": z}.items()})[0]
    np.testing.assert_allclose(actions, policy.act(obs, z), rtol=0, atol=1e-5 * 250)  # half range of the first action: 250
    other = session.run(None, {key: x.numpy() for key, x in {**obs, "z": z + 1}.items()})[0]
    assert np.abs(other - actions)[..., 0].max() > 0.1  # the latent is an input, not a constant of the graph


def test_a_graph_that_differs_is_refused_and_removed(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript", reason="the exporter: pip install -r requirements-export.txt")
    pytest.importorskip("onnxruntime", reason="pip install -r requirements-export.txt")
    honest = evaluate.Deployed.forward
    monkeypatch.setattr(evaluate.Deployed, "forward", lambda self, obs, z: honest(self, obs, z) * 1.001)
    with pytest.raises(ValueError, match="differs from the policy"):
        evaluate.export_onnx(fitted(), tmp_path / "policy.onnx")
    assert not (tmp_path / "policy.onnx").exists()


def test_export_without_its_packages_names_the_pip_command(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install -r requirements-export\.txt"):
        evaluate.export_onnx(make_policy(), tmp_path / "policy.onnx")
