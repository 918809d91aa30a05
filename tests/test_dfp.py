"""dfp_finetune.py: the critics one by one, the positives, gradients, a toy to improve."""

import h5py
import numpy as np
import pytest
import torch
from conftest import TINY_MLP

import dfp_finetune
import envs
from dfp_finetune import actor_loss, critic_loss, critic_target, top_k_positives
from drift import drift_field
from policy import Policy, PolicyConfig, QEnsemble, best_of

# --- the data -----------------------------------------------------------------------------------------------------------


def test_published_rewards_of_another_kind_give_way_to_success(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "door.hdf5"
    with h5py.File(path, "w") as file:
        for name, width in (("observations", 39), ("actions", 28)):
            file[name] = rng.uniform(-1, 1, (12, width))
        file["rewards"], file["terminals"] = rng.normal(size=12), np.zeros(12, bool)
        file["timeouts"] = np.isin(np.arange(12), (4, 11))
    cfg = dfp_finetune.Config(env="adroit-door", demos=str(path))
    data, rewards, ends = dfp_finetune.offline_data(cfg, envs.get_task("adroit-door"))
    assert len(data.actions) == 12
    assert np.flatnonzero(ends).tolist() == [4, 11] and rewards.tolist() == (ends - 1.0).tolist()


def test_steps_to_a_goal_that_has_to_be_held_cost_nothing(tmp_path):
    states = np.zeros((50, 39), np.float32)
    states[6:40, 28] = 1.4  # the door's hinge: open in these steps of the first episode, held long enough from the 25th on
    states[45:48, 28] = 1.4  # and for a moment in the second one, whose end is taken for its success
    ends = np.array([40, 50])
    np.savez(tmp_path / "door.npz", state=states, action=np.zeros((50, 28), np.float32), episode_ends=ends)
    cfg = dfp_finetune.Config(env="adroit-door", demos=str(tmp_path / "door.npz"))
    _, rewards, success = dfp_finetune.offline_data(cfg, envs.get_task("adroit-door"))
    assert np.flatnonzero(success).tolist() == [*range(30, 40), 49]
    assert np.flatnonzero(rewards == 0).tolist() == [*range(5, 40), 44, 45, 46, 49]  # a step counts for what it leads to
    assert set(rewards) == {0, -1}


def test_several_environments_can_share_an_update():
    cfg = dfp_finetune.Config(num_envs=3, updates_per_step=0.25, start_after=12)
    due = [dfp_finetune.updates_due(steps, cfg) for steps in range(3, 100, 3)]
    assert due[:4] == [0] * 4 and set(due[4:]) == {0, 1}
    assert sum(due) == int(99 * 0.25) - int(12 * 0.25)
    assert dfp_finetune.updates_due(2_001, dfp_finetune.Config()) == 1


# --- the critics --------------------------------------------------------------------------------------------------------


def test_the_target_and_the_loss_are_their_formulas():
    returns, alive, value = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]), torch.tensor([10.0, 10.0])
    target = critic_target(returns, alive, value, 0.5)
    assert target.tolist() == [6.0, 2.0]
    q = torch.tensor([[6.0, 3.0], [8.0, 2.0]])
    assert critic_loss(q, target) == pytest.approx((0 + 1 + 4 + 0) / 4)


@pytest.mark.parametrize("trunk", [0, 7])
def test_all_critics_at_once_are_each_critic_for_each_candidate(trunk):
    torch.manual_seed(0)
    critic = QEnsemble(5, 6, trunk, 8, 3).double()
    for parameter in critic.parameters():
        torch.nn.init.normal_(parameter)
    cond, chunks = torch.randn(4, 5).double(), torch.randn(4, 3, 2, 3).double()
    q = critic(cond, chunks)
    gelu, norm = torch.nn.functional.gelu, torch.nn.functional.layer_norm
    for e in range(2):
        for b in range(4):
            for n in range(3):
                c = cond[b]
                for layer in critic.cond_layers[:-1]:
                    c = norm(gelu(c @ layer.weight[e] + layer.bias[e, 0]), (7,))
                last = critic.cond_layers[-1]
                h = c @ last.weight[e] + last.bias[e, 0]
                h = h + chunks[b, n].flatten() @ critic.embed_chunk.weight[e] + critic.embed_chunk.bias[e, 0]
                for k in range(3):
                    h = h @ critic.layers[k - 1].weight[e] + critic.layers[k - 1].bias[e, 0] if k else h
                    h = norm(gelu(h), (8,)) * critic.gains[k, e, 0] + critic.shifts[k, e, 0]
                assert torch.allclose(q[e, b, n], h @ critic.head.weight[e, :, 0] + critic.head.bias[e, 0, 0])


def policy_with_critic(**changes) -> Policy:
    torch.manual_seed(0)
    sizes = {"obs_steps": 1, "horizon": 2, "action_steps": 2, **TINY_MLP, "critic_width": 8, "critic_depth": 2}
    config = PolicyConfig(env="pusht", obs_shapes={"state": (3,)}, action_dim=1, **{**sizes, "candidates": 4, **changes})
    return Policy(config).eval()


def test_acting_executes_the_candidate_that_the_critics_like_best(tmp_path):
    policy = policy_with_critic()
    obs, z = torch.randn(5, 1, 3), policy.sample_latents(5, torch.Generator().manual_seed(1))
    assert z.shape == (5, 4, 2, 1)
    acted = policy.act({"state": obs}, z)
    cond = policy.encode({"state": obs})
    for b in range(5):
        chunks = [policy.backbone(z[b : b + 1, n : n + 1], cond[b : b + 1])[0, 0].clamp(-1, 1) for n in range(4)]
        values = [policy.critic(cond[b : b + 1], chunk[None, None]).mean().item() for chunk in chunks]
        assert torch.allclose(acted[b], chunks[int(np.argmax(values))])
    policy.save(tmp_path / "dfp.pt")
    assert torch.equal(Policy.load(tmp_path / "dfp.pt").act({"state": obs}, z), acted)
    with pytest.raises(ValueError, match="z has shape"):
        policy.act({"state": obs}, z[:, 0])


# --- the actor ----------------------------------------------------------------------------------------------------------


def test_the_positives_are_the_k_best_and_k_has_its_limits():
    chunks, q = torch.randn(6, 5, 4), torch.randn(6, 5)
    positives = top_k_positives(chunks, q, 2)
    for b in range(6):
        best = sorted(range(5), key=lambda n: -q[b, n])[:2]
        found = {tuple(row.tolist()) for row in positives[b]}
        assert found == {tuple(chunks[b, n].tolist()) for n in best}
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"K is {k}"):
            top_k_positives(chunks, q, k)
    assert torch.equal(best_of(chunks.unsqueeze(-1), q)[..., 0], torch.stack([chunks[b, q[b].argmax()] for b in range(6)]))


def test_the_actor_follows_both_drifts_and_nothing_reaches_the_positives():
    generator = torch.Generator().manual_seed(0)
    x, expert, positives = (torch.randn(3, n, 4, generator=generator, dtype=torch.float64) for n in (5, 1, 2))
    x.requires_grad_()
    positives.requires_grad_()
    loss, diagnostics = actor_loss(x, expert, positives, 0.5, (0.3,))
    loss.backward()
    wanted = torch.zeros_like(x)
    for refs, weight in ((expert, 1.0), (positives.detach(), 0.5)):
        V, unit, _ = drift_field(x.detach(), refs, temperatures=(0.3,))
        wanted += -2 * weight * V / (unit * x.numel())
    assert torch.allclose(x.grad, wanted) and positives.grad is None
    alone, same = actor_loss(x, expert, None, 0.5, (0.3,))
    assert alone < loss and same["distance"] == diagnostics["distance"]


def test_what_shall_not_be_cloned_pulls_nothing():
    x, expert = torch.randn(3, 5, 4, requires_grad=True), torch.randn(3, 1, 4)
    actor_loss(x, expert, None, 0.5, (0.3,), cloned=torch.tensor([1.0, 0.0, 1.0]))[0].backward()
    assert [bool(g.abs().sum() > 0) for g in x.grad] == [True, False, True]


def test_top_k_moves_a_policy_to_the_better_of_two_ways():
    """Data with two ways to act, -0.6 and 0.6; the second earns more. Cloning keeps both, top-K goes to the second."""
    share = {}
    for improving in (False, True):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        policy = policy_with_critic(width=32, depth=2)
        old = policy_with_critic(width=32, depth=2).backbone
        optimizer = torch.optim.Adam(policy.backbone.parameters(), lr=2e-3)
        cond = torch.zeros(64, 3)
        for step in range(500):
            sign = torch.randint(2, (64, 1, 1), generator=generator) * 2 - 1
            expert = 0.6 * sign.expand(-1, -1, 2)
            generated = policy.backbone(torch.randn(64, 8, 2, 1, generator=generator), cond).flatten(2)
            positives = None
            if improving and step >= 250:
                if step == 250:
                    old.load_state_dict(policy.backbone.state_dict())
                with torch.no_grad():
                    proposals = old(torch.randn(64, 16, 2, 1, generator=generator), cond).flatten(2)
                positives = top_k_positives(proposals, proposals.mean(-1), 4)  # Q: the further right the better
            loss, _ = actor_loss(generated, expert, positives, 3.0, (0.2,))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            final = policy.backbone(torch.randn(1, 1000, 2, 1, generator=generator), cond[:1]).mean((-2, -1))
        share[improving] = (final > 0).float().mean().item()
    assert 0.3 < share[False] < 0.7
    assert share[True] > share[False] + 0.15


# --- one update ---------------------------------------------------------------------------------------------------------


def test_slow_copies_follow_and_keep_no_graph_of_the_steps_behind_them():
    cfg = dfp_finetune.Config(batch_size=4, horizon=2, hypotheses=2, proposals=4, positives=2, candidates=4)
    learner = dfp_finetune.Learner(policy_with_critic(), cfg, torch.Generator().manual_seed(0))
    batch = torch.randn(4, 3), torch.rand(4, 2, 1) - 0.5, torch.randn(4), torch.ones(4), torch.randn(4, 3), torch.ones(4)
    before = [p.clone() for p in learner.acting.parameters()]
    for _ in range(2):
        learner.step[True](*batch)
    slow = [*learner.acting.parameters(), *learner.old.parameters(), *learner.target_critic.parameters()]
    assert all(p.grad_fn is None for p in slow)  # once they grew with every step: 54 KB of the preset fast
    assert any(not torch.equal(a, b) for a, b in zip(before, learner.acting.parameters(), strict=True))


def test_exploring_moves_each_chunk_as_a_whole_and_stays_in_the_data_s_range():
    cfg = dfp_finetune.Config(batch_size=4, horizon=2, hypotheses=2, proposals=64, positives=2, candidates=4, explore=0.2)
    generator = torch.Generator().manual_seed(0)
    learner = dfp_finetune.Learner(policy_with_critic(), cfg, generator)
    moved = learner.explored(torch.zeros(1000, 2, 3), generator)
    assert torch.equal(moved[:, 0], moved[:, 1])  # one draw for the chunk, one for each number of the action
    assert moved[:, 0].std() == pytest.approx(0.2, rel=0.05) and moved.abs().mean() > 0
    assert learner.explored(torch.ones(9, 2, 3), generator).max() == 1
    cond = torch.randn(4, 3)
    explored, value = learner.proposals(cond)
    assert torch.equal(value, learner.critic(cond, explored).mean(0))  # ranked as they are, noise included
    learner.cfg = dfp_finetune.Config(**{**cfg.__dict__, "explore": 0.0})
    plain, _ = learner.proposals(cond)
    assert explored.std(1).mean() > plain.std(1).mean()
