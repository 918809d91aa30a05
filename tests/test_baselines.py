"""benchmark/rivals: each objective against closed forms, and on a toy with two ways to act."""

import itertools
import sys

import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "benchmark"))

import baselines
from rivals import consistency, diffusion
from rivals.bc import BehaviourCloning
from rivals.consistency import Consistency
from rivals.dbp import DBP
from rivals.diffusion import Diffusion
from rivals.flow import Flow
from rivals.meanflow import MeanFlow

from policy import PolicyConfig

CENTRE, SPREAD = 0.3, 0.15  # of the Gaussian that stands for the expert in the closed forms


def toy(kind: type, **sizes):
    """A rival for one observation of one number and chunks of one number."""
    torch.manual_seed(0)
    shape = {"env": "toy", "obs_shapes": {"state": (1,)}, "action_dim": 1, "obs_steps": 1, "horizon": 1, "action_steps": 1}
    small = {"cond_width": 32, "cond_depth": 1, "width": 64, "depth": 1}
    return kind(PolicyConfig(**{**shape, **small, **sizes}))


# --- diffusion ----------------------------------------------------------------------------------------------------------


def exact_noise(policy: Diffusion):
    """E[eps | x_k] where the expert's chunk is one number, normal (CENTRE, SPREAD)."""

    def noise(x, cond, k):
        a = policy.alpha_bar[k].view(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * CENTRE) / (a * SPREAD**2 + 1 - a)

    return noise


def test_the_noise_schedule_goes_from_data_to_noise():
    a = toy(Diffusion).alpha_bar
    assert len(a) == 100 and (a.diff() < 0).all()
    assert a[0] > 0.99 and a[-1] < 1e-4
    assert a[49] == pytest.approx(0.5, abs=0.02)  # cos^2(pi / 4), nearly


@pytest.mark.parametrize(
    ("sampler", "steps", "tolerance"), [("ddpm-100", 100, 0.015), ("ddim-10", 100, 0.01), ("ddim-10", 10, 0.05)]
)
def test_sampling_with_the_exact_noise_gives_the_experts_distribution(sampler, steps, tolerance, monkeypatch):
    policy = toy(Diffusion)
    policy.act_with(sampler)
    monkeypatch.setattr(policy, "SAMPLERS", {sampler: steps})  # ten steps narrow a Gaussian by a third, a hundred by 4 %
    monkeypatch.setattr(policy, "noise", exact_noise(policy))
    x = policy.sample(torch.zeros(20_000, 1), torch.randn(20_000, 1, 1, 1))
    assert x.mean().item() == pytest.approx(CENTRE, abs=tolerance)
    assert x.std().item() == pytest.approx(SPREAD, abs=tolerance)


def test_the_loss_of_the_exact_noise_is_its_conditional_variance(monkeypatch):
    policy = toy(Diffusion)
    monkeypatch.setattr(policy, "noise", exact_noise(policy))
    loss = policy.loss(CENTRE + SPREAD * torch.randn(400_000, 1, 1, 1), torch.zeros(400_000, 1), 0.0)
    a = policy.alpha_bar
    assert loss.item() == pytest.approx((a * SPREAD**2 / (a * SPREAD**2 + 1 - a)).mean().item(), rel=0.01)  # var[eps | x_k]


# --- flow and mean flow -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["flow-10", "flow-1"])
def test_flow_to_a_single_chunk_is_straight(sampler, monkeypatch):
    policy = toy(Flow)
    policy.act_with(sampler)
    monkeypatch.setattr(policy, "network", lambda x, cond, t: (CENTRE - x) / (1 - t.view(-1, 1, 1, 1)))
    torch.testing.assert_close(policy.sample(torch.zeros(5, 1), torch.randn(5, 1, 1, 1)), torch.full((5, 1, 1, 1), CENTRE))
    assert policy.loss(torch.full((64, 1, 1, 1), CENTRE), torch.zeros(64, 1), 0.0).item() < 1e-8


def test_the_flows_loss_of_the_exact_velocity_is_its_conditional_variance(monkeypatch):
    def velocity(x_t, cond, t):  # E[x - z | x_t], x normal (CENTRE, SPREAD), z normal (0, 1)
        t = t.view(-1, 1, 1, 1)
        return CENTRE + (t * SPREAD**2 - (1 - t)) / (t**2 * SPREAD**2 + (1 - t) ** 2) * (x_t - t * CENTRE)

    policy = toy(Flow)
    monkeypatch.setattr(policy, "network", velocity)
    loss = policy.loss(CENTRE + SPREAD * torch.randn(400_000, 1, 1, 1), torch.zeros(400_000, 1), 0.0).item()
    t = torch.linspace(0.5e-4, 1 - 0.5e-4, 10_000)
    explained = (t * SPREAD**2 - (1 - t)) ** 2 / (t**2 * SPREAD**2 + (1 - t) ** 2)
    assert loss == pytest.approx((SPREAD**2 + 1 - explained).mean().item(), rel=0.02)


def test_the_mean_flow_identity_holds_for_the_flow_to_a_single_chunk(monkeypatch):
    policy = toy(MeanFlow)
    # All paths are lines to CENTRE: the mean velocity over any interval is (x_t - CENTRE) / t, at every point of it.
    monkeypatch.setattr(policy, "network", lambda x, cond, r, t: (x - CENTRE) / t.view(-1, 1, 1, 1))
    z, r, t = torch.randn(6, 1, 1, 1), torch.linspace(0, 0.4, 6), torch.linspace(0.5, 1, 6)
    u, target = policy.target(torch.full_like(z, CENTRE), z, torch.zeros(6, 1), r, t)
    torch.testing.assert_close(u, target)
    torch.testing.assert_close(policy.sample(torch.zeros(6, 1), z), torch.full_like(z, CENTRE))


def test_the_mean_flow_target_by_finite_differences():
    policy = toy(MeanFlow).double()
    x, z, cond = (torch.randn(shape, dtype=torch.float64) for shape in ((6, 1, 1, 1), (6, 1, 1, 1), (6, 1)))
    r, t = torch.linspace(0, 0.4, 6, dtype=torch.float64), torch.linspace(0.5, 0.9, 6, dtype=torch.float64)
    u, target = policy.target(x, z, cond, r, t)

    def along(h):  # u a moment later on the path
        later = (t + h).view(-1, 1, 1, 1)
        return policy.network((1 - later) * x + later * z, cond, r, t + h)

    slope = (along(1e-5) - along(-1e-5)) / 2e-5
    torch.testing.assert_close(u, along(0.0))
    torch.testing.assert_close(target, z - x - (t - r).view(-1, 1, 1, 1) * slope, rtol=1e-5, atol=1e-6)
    assert u.requires_grad and not target.requires_grad


def test_without_an_interval_mean_flow_is_flow_matching():
    policy, z, t = toy(MeanFlow), torch.randn(5, 1, 1, 1), torch.linspace(0.1, 0.9, 5)
    x = torch.randn_like(z)
    assert torch.equal(policy.target(x, z, torch.zeros(5, 1), t, t)[1], z - x)


# --- consistency --------------------------------------------------------------------------------------------------------


def test_at_the_smallest_noise_the_end_is_where_one_is():
    x = torch.randn(5, 1, 1, 1)
    end = toy(Consistency).end(x, torch.randn(5, 1), torch.full((5,), consistency.SIGMA_MIN))
    torch.testing.assert_close(end, x, rtol=1e-4, atol=1e-5)


def test_the_grid_doubles_and_keeps_its_ends():
    policy = toy(Consistency)
    sizes = [len(policy.grid(progress)) - 1 for progress in (0.0, 0.13, 0.26, 0.5, 0.88, 1.0)]
    assert sizes == [10, 20, 40, 160, 1280, 1280]
    for progress in (0.0, 1.0):
        grid = policy.grid(progress)
        assert (grid.diff() > 0).all()
        assert (grid[0].item(), grid[-1].item()) == pytest.approx((consistency.SIGMA_MIN, consistency.SIGMA_MAX), rel=1e-4)


def test_the_exact_ends_of_the_paths_to_a_single_chunk_have_no_loss(monkeypatch):
    policy = toy(Consistency)

    def end(x, cond, sigma):  # x = CENTRE + sigma z all along a path
        return CENTRE + consistency.SIGMA_MIN * (x - CENTRE) / sigma.view(-1, 1, 1, 1)

    monkeypatch.setattr(policy, "end", end)
    assert policy.loss(torch.full((256, 1, 1, 1), CENTRE), torch.zeros(256, 1), 0.5).item() == pytest.approx(0, abs=1e-3)


# --- all: two ways to act -----------------------------------------------------------------------------------------------

WAYS = torch.tensor([[-0.7, 0.0], [0.7, 0.0]])
LEARNS = {  # objective: (steps, share of the samples that must lie at the expert's two ways)
    DBP: (300, 0.9),
    Diffusion: (300, 0.9),
    Flow: (300, 0.8),
    MeanFlow: (800, 0.6),
    Consistency: (400, 0.6),
    BehaviourCloning: (100, None),
}


@pytest.mark.parametrize("kind", LEARNS)
def test_both_ways_of_the_expert_are_learned_by_all_but_regression(kind):
    steps, share = LEARNS[kind]
    policy, generator = toy(kind, action_dim=2), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for step in range(steps):
        x = WAYS[torch.randint(2, (128,), generator=generator)].view(-1, 1, 1, 2)
        x = x + 0.03 * torch.randn(x.shape, generator=generator)
        optimizer.zero_grad()
        policy.loss(x, torch.zeros(128, 1), step / steps).backward()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        optimizer.step()
    with torch.no_grad():
        samples = policy({"state": torch.zeros(500, 1, 1)}, torch.randn(500, 1, 1, 2)).view(500, 2)
    if share is None:
        assert samples.norm(dim=-1).max() < 0.2  # the mean of both, which is neither
        return
    near = (torch.cdist(samples, WAYS) < 0.3).float().mean(0)
    assert near.sum() > share, near
    assert near.min() > share / 6, near  # and none of the two is lost


def test_every_sampler_makes_the_network_calls_that_it_claims():
    from evaluate import latency

    for kind in baselines.OBJECTIVES.values():
        policy = toy(kind).eval()
        for sampler, calls in kind.SAMPLERS.items():
            policy.act_with(sampler)
            assert latency(policy, calls=1)[1] == calls
    assert Diffusion.SAMPLERS["ddpm-100"] == diffusion.LEVELS


def test_a_rival_acts_the_same_as_the_policy_that_fine_tuning_loads(tmp_path):
    import ppo_flow
    import ppo_rivals

    from policy import Policy

    for kind, name, cls in ((BehaviourCloning, "gaussian", Policy), (Flow, "flow", ppo_flow.OneStepFlow)):
        rival = toy(kind, action_dim=2).eval()
        rival.normalize_action.fit(torch.tensor([[0.0, 0.0], [5.0, 9.0]]))
        rival.act_with(list(kind.SAMPLERS)[-1])
        ppo_rivals.as_policy(rival, name).save(tmp_path / "policy.pt")
        loaded = cls.load(tmp_path / "policy.pt")
        obs, z = {"state": torch.randn(6, 1, 1)}, torch.randn(6, 1, 2)
        torch.testing.assert_close(loaded.act(obs, z * loaded.config.latent_scale), rival.act(obs, z))


def test_marks_and_seconds_to_a_score():
    marks = baselines.marks(160.0)
    assert marks[0] == 10 and marks[-1] == 160 and all(1.1 < b / a < 1.7 for a, b in itertools.pairwise(marks))
    curve = [[10.0, 1, 0.5], [20.0, 2, 0.91], [30.0, 3, 0.89]]
    assert baselines.seconds_to(curve, 0.9) == 20
    assert baselines.seconds_to(curve, 0.95) == float("inf")
