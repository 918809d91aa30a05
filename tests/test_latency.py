"""benchmark/latency.py: which loss it takes from a clone, and that the paths it times compute the policy."""

import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_MLP

sys.path.append(str(ROOT / "benchmark"))

import latency

from policy import Policy, PolicyConfig

GOOD = """from drift import dbp_loss

def drift_loss(gen, fixed_pos, R_list=(0.2,)):
    return {}dbp_loss(gen, fixed_pos, temperatures=R_list)[0]
"""


def test_the_loss_of_a_clone_is_found_and_compared(tmp_path):
    (tmp_path / "other.py").write_text("import no_such_package\n\ndef drifting_loss(gen, pos, taus):\n    return 0\n")
    (tmp_path / "wrong.py").write_text(GOOD.format("2 * "))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "losses.py").write_text(GOOD.format(""))
    (tmp_path / "broken.py").write_text("def drift_loss(:\n")
    loss, place = latency.released_loss(str(tmp_path))
    assert place == "sub/losses.py:drift_loss"
    assert loss(torch.randn(3, 4, 6), torch.randn(3, 1, 6), (0.2,)).shape == (3,)


def test_a_clone_without_a_loss_that_fits_is_refused_with_reasons(tmp_path):
    (tmp_path / "other.py").write_text("import no_such_package\n\ndef drifting_loss(gen, pos, taus):\n    return 0\n")
    (tmp_path / "wrong.py").write_text(GOOD.format("2 * "))
    with pytest.raises(ImportError, match=r"no_such_package.*wrong\.py:drift_loss: its gradient differs from ours by 1\.0"):
        latency.released_loss(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImportError, match="no function with `loss` and `drift` or `dbp`"):
        latency.released_loss(str(tmp_path / "empty"))


def test_the_paths_compute_the_policy():
    torch.manual_seed(0)
    config = PolicyConfig(env="pusht", obs_shapes={"state": (20,)}, action_dim=2, latent_scale=0.0, **TINY_MLP)
    policy = Policy(config).eval()
    history = np.random.default_rng(0).normal(size=(1, 2, 20)).astype(np.float32)
    expected = policy.act({"state": history}).numpy()
    plain = latency.by_torch(latency.evaluate.Deployed(policy), policy, "cpu")(history)
    np.testing.assert_allclose(plain, expected, rtol=0, atol=1e-6)
    half = latency.by_torch(latency.HalfNetwork(policy), policy, "cpu")(history)
    assert 0 < np.abs(half - expected).max() < 0.02
    assert next(policy.backbone.parameters()).dtype == torch.float32  # the policy itself stays as it was


def test_the_arrangements_of_a_step_learn_from_the_same_chunks():
    for as_released in (False, True):
        torch.manual_seed(0)
        seen = []

        def loss(generated, positives, temperatures, seen=seen):
            seen.append(generated.shape)
            return latency.our_loss(generated, positives, temperatures)

        latency.make_step(latency.settings("fast"), "cpu", loss, as_released=as_released)()
        assert seen == [(256, 4, 32)]
