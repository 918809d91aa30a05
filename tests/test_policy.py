"""policy.py: the backbones, acting, horizons, normaliser, averaged weights, save and load."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import TINY_MLP, TINY_UNET
from torch import nn

from common import UserError, save_checkpoint
from policy import EMA, Normalizer, Policy, PolicyConfig, check_horizons

B, G, TO, TP, TA, DA = 3, 5, 2, 8, 4, 2
BACKBONES = {"mlp": TINY_MLP, "tanh": {**TINY_MLP, "backbone": "tanh"}, "unet": TINY_UNET}
LOW, HIGH = np.array([100.0, -3.0], np.float32), np.array([300.0, 5.0], np.float32)  # of the actions, environment units


def make_policy(backbone: str = "mlp", **changes) -> Policy:
    """A small policy for two observation keys, with normalisers fitted to ranges that are not [-1, 1]."""
    torch.manual_seed(0)
    shapes = {"agent": (2,), "points": (3, 2)}
    sizes = {"obs_steps": TO, "horizon": TP, "action_steps": TA, **BACKBONES[backbone]}
    policy = Policy(PolicyConfig(env="toy", obs_shapes=shapes, action_dim=DA, **{**sizes, **changes}))
    rng = np.random.default_rng(0)
    obs = {key: rng.uniform(-50, 500, (40, *shape)).astype(np.float32) for key, shape in shapes.items()}
    actions = np.concatenate([rng.uniform(LOW, HIGH, (38, DA)), [LOW, HIGH]]).astype(np.float32)
    policy.fit_normalizers(obs, actions)
    return policy.eval()


def make_obs(batch: int = B, seed: int = 1) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {key: torch.rand(batch, TO, *shape, generator=rng) * 500 for key, shape in {"agent": (2,), "points": (3, 2)}.items()}


def make_z(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, TP, DA, generator=torch.Generator().manual_seed(2))


# --- backbones --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_a_chunk_depends_on_its_own_latent_and_observation_alone(backbone):
    policy, obs, z = make_policy(backbone), make_obs(), make_z(B, G)
    chunks = policy(obs, z)
    assert chunks.shape == (B, G, TP, DA)
    other_z = z.clone()
    other_z[1, 3] += 1
    change = (policy(obs, other_z) - chunks).abs().amax((-2, -1))
    assert change[1, 3] > 1e-3
    change[1, 3] = 0
    assert change.max() < 1e-5
    for key in obs:
        other = {k: v.clone() for k, v in obs.items()}
        other[key][2] += 100
        change = (policy(other, z) - chunks).abs().amax((-3, -2, -1))
        assert change[2] > 1e-3, key
        assert change[:2].max() < 1e-5


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_every_hypothesis_is_what_it_would_be_alone(backbone):
    policy, obs, z = make_policy(backbone), make_obs(), make_z(B, G)
    alone = torch.cat([policy(obs, z[:, g : g + 1]) for g in range(G)], 1)
    torch.testing.assert_close(policy(obs, z), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_the_condition_is_projected_once_per_observation(backbone):
    policy, obs = make_policy(backbone), make_obs()
    linears = {name: module for name, module in policy.backbone.named_modules() if isinstance(module, nn.Linear)}
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in linears}
    for name, module in linears.items():
        module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
    encoded = []
    policy.encoder.register_forward_hook(lambda _, args, out: encoded.append(len(out)))
    z = make_z(B, G)
    policy(obs, z)
    policy(obs, z + 1)
    assert encoded == [B, B]
    # The layers of the condition are those that other latents do not reach: each sees B rows, not B * G.
    rows = {name: first.numel() // first.shape[-1] for name, (first, second) in seen.items() if torch.equal(first, second)}
    assert len(rows) >= 2 and set(rows.values()) == {B}, rows


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_weight_is_trained(backbone):
    policy = make_policy(backbone).train()
    policy(make_obs(), make_z(B, G)).square().sum().backward()
    idle = [name for name, p in policy.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_unet_refuses_a_horizon_that_it_cannot_halve():
    for horizon in (6, 10):
        with pytest.raises(ValueError, match=f"horizon is {horizon}.*multiple of 4"):
            make_policy("unet", horizon=horizon)
    z = torch.randn(B, G, 12, DA)
    assert make_policy("unet", horizon=12)(make_obs(), z).shape == z.shape


def test_unknown_backbone_is_named():
    with pytest.raises(ValueError, match="'resnet'"):
        Policy(PolicyConfig(env="toy", obs_shapes={"state": (3,)}, action_dim=DA, backbone="resnet"))


# --- acting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
def test_act_returns_the_executed_prefix_in_environment_units(backbone):
    policy, obs, z = make_policy(backbone), make_obs(), make_z(B)
    with torch.no_grad():
        chunk = policy(obs, z.unsqueeze(1))[:, 0].numpy()
    expected = (chunk[:, TO - 1 : TO - 1 + TA] + 1) / 2 * (HIGH - LOW) + LOW  # Eq. (22), and the normaliser by hand
    np.testing.assert_allclose(policy.act(obs, z).numpy(), expected, rtol=1e-5, atol=1e-3)
    arrays = {key: value.numpy() for key, value in obs.items()}
    assert torch.equal(policy.act(arrays, z), policy.act(obs, z))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_act_is_one_network_call(backbone):
    policy, calls = make_policy(backbone), []
    policy.backbone.register_forward_hook(lambda *_: calls.append("backbone"))
    policy.encoder.register_forward_hook(lambda *_: calls.append("encoder"))
    policy.act(make_obs())
    assert sorted(calls) == ["backbone", "encoder"]


def test_act_is_fixed_by_its_latent_or_its_generator():
    policy, obs, z = make_policy(), make_obs(), make_z(B)
    assert torch.equal(policy.act(obs, z), policy.act(obs, z))
    first, again, other = (policy.act(obs, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 1e-3
    assert (policy.act(obs) - policy.act(obs)).abs().max() > 1e-3  # without either, every call draws anew


def test_latents_have_the_configured_scale():
    # The same draws, scaled: what act() draws by itself is what it may be given.
    policy, obs = make_policy(latent_scale=0.7), make_obs()
    z = 0.7 * torch.randn(B, TP, DA, generator=torch.Generator().manual_seed(5))
    assert torch.equal(policy.act(obs, generator=torch.Generator().manual_seed(5)), policy.act(obs, z))
    assert policy.sample_latents(500).std().item() == pytest.approx(0.7, rel=0.05)
    assert make_policy().sample_latents(500).std().item() == pytest.approx(1, rel=0.05)  # Eq. (7), unless told otherwise


def test_act_names_what_does_not_fit():
    policy, obs = make_policy(), make_obs()
    with pytest.raises(ValueError, match="lacks 'points'"):
        policy.act({"agent": obs["agent"]})
    with pytest.raises(ValueError, match=r"obs\['agent'\] has shape \(3, 1, 2\)"):
        policy.act({**obs, "agent": obs["agent"][:, :1]})
    with pytest.raises(ValueError, match=r"obs\['points'\] has shape \(3, 2, 6\)"):
        policy.act({**obs, "points": obs["points"].flatten(2)})
    for z in (make_z(B, 1), make_z(B - 1), make_z(B)[:, :-1]):
        with pytest.raises(ValueError, match="z has shape"):
            policy.act(obs, z)


# Eq. (23): 1 <= To <= Tp, Ta >= 1, To - 1 + Ta <= Tp.
@pytest.mark.parametrize(
    ("obs_steps", "horizon", "action_steps", "valid"),
    [
        (2, 16, 8, True),
        (1, 1, 1, True),
        (1, 16, 16, True),
        (2, 16, 15, True),
        (16, 16, 1, True),
        (2, 16, 16, False),
        (16, 16, 2, False),
        (17, 16, 1, False),
        (0, 16, 8, False),
        (2, 16, 0, False),
        (2, 16, -1, False),
        (1, 0, 1, False),
    ],
)
def test_horizons(obs_steps, horizon, action_steps, valid):
    if valid:
        check_horizons(obs_steps, horizon, action_steps)
        return
    with pytest.raises(ValueError, match=rf"_steps is (?:{obs_steps}|{action_steps});.*\(Eq. 23\)"):
        check_horizons(obs_steps, horizon, action_steps)
    with pytest.raises(ValueError, match=r"\(Eq\. 23\)"):
        make_policy(obs_steps=obs_steps, horizon=horizon, action_steps=action_steps)


# --- normaliser -------------------------------------------------------------------------------------------------------


def test_normalizer_maps_the_range_to_minus_one_and_one_and_back():
    data = torch.tensor([[0.0, 512.0], [100.0, -512.0], [25.0, 0.0]])
    normalizer = Normalizer((2,))
    normalizer.fit(data)
    expected = torch.tensor([[-1.0, 1.0], [1.0, -1.0], [-0.5, 0.0]])
    torch.testing.assert_close(normalizer(data), expected)
    torch.testing.assert_close(normalizer.inverse(expected), data)


def test_states_are_scaled_by_their_std_where_asked_and_clouds_never():
    rng = np.random.default_rng(0)
    obs = {"state": rng.normal(7, 3, (500, 2)).astype(np.float32), "points": rng.normal(0, 2, (500, 4, 3)).astype(np.float32)}
    obs["state"][:, 1] = 5  # constant
    config = PolicyConfig(env="toy", obs_shapes={"state": (2,), "points": (4, 3)}, action_dim=1, state_scale="std", **TINY_MLP)
    policy = Policy(config)
    policy.fit_normalizers(obs, np.zeros((500, 1), np.float32))
    scaled = policy.normalize_obs["state"](torch.from_numpy(obs["state"]))
    torch.testing.assert_close(scaled.mean(0), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(scaled.std(0), torch.tensor([1.0, 0.0]), atol=1e-4, rtol=0)
    assert policy.normalize_obs["points"](torch.from_numpy(obs["points"])).abs().max() <= 1 + 1e-5
    with pytest.raises(ValueError, match="state_scale is 'max'"):
        Policy(dataclasses.replace(config, state_scale="max"))


def test_normalizer_only_centres_a_constant_coordinate():
    normalizer = Normalizer((2,))
    normalizer.fit(torch.tensor([[7.0, 0.0], [7.0 + 1e-5, 1.0]]))
    assert normalizer(torch.tensor([7.0, 0.5])).abs().max() < 1e-4
    # Deviations keep their size; divided by the range, this one would be 50,000.
    assert normalizer(torch.tensor([7.5, 0.5]))[0].item() == pytest.approx(0.5, abs=1e-3)
    assert normalizer.inverse(torch.zeros(2))[0].item() == pytest.approx(7, abs=1e-4)


# --- averaged weights -------------------------------------------------------------------------------------------------


def test_ema_equals_a_loop_over_the_weights():
    policy = make_policy()
    ema = EMA(policy, power=0.75, max_decay=0.6)  # the cap is reached at step 3
    average = [p.detach().numpy().astype(np.float64) for p in policy.parameters()]
    decays = []
    for step in range(6):
        with torch.no_grad():
            for p in policy.parameters():
                p += torch.randn_like(p)
        ema.update(step)
        decays.append(min(0.6, 1 - 1 / (1 + step) ** 0.75))
        average = [
            decays[-1] * a + (1 - decays[-1]) * p.detach().numpy() for a, p in zip(average, policy.parameters(), strict=True)
        ]
    assert decays[0] == 0 and decays[1] < decays[2] < 0.6 == decays[-1]
    for ours, expected in zip(ema.policy.parameters(), average, strict=True):
        np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in ema.policy.parameters())
    assert not ema.policy.training


# --- save and load ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_saved_policy_comes_back_bit_for_bit(backbone, tmp_path):
    policy = make_policy(backbone, action_steps=3)
    policy.train().save(tmp_path / "dbp.pt")
    loaded = Policy.load(tmp_path / "dbp.pt")  # nothing but the path: the architecture comes from the checkpoint
    assert loaded.config == policy.config
    assert not loaded.training
    ours, theirs = policy.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(loaded.act(make_obs(), make_z(B)), policy.eval().act(make_obs(), make_z(B)))


@pytest.mark.parametrize(
    "change",
    [{"horizon": TP + 4}, {"action_dim": DA + 1}, TINY_UNET, {"no_such_setting": 1}, {"obs_steps": 0}],
    ids=str,
)
def test_weights_that_do_not_fit_the_configuration_are_refused(change, tmp_path):
    policy = make_policy()
    config = dataclasses.asdict(policy.config) | change
    save_checkpoint({"policy": {"config": config, "weights": policy.state_dict()}}, tmp_path / "dbp.pt")
    with pytest.raises(UserError, match="does not fit"):
        Policy.load(tmp_path / "dbp.pt")


def test_the_error_about_weights_is_one_line():
    policy = make_policy()
    config = dataclasses.asdict(policy.config) | {"horizon": TP + 4}
    with pytest.raises(UserError) as caught:  # torch lists every tensor on a line of its own
        Policy.from_state({"config": config, "weights": policy.state_dict()})
    assert "\n" not in str(caught.value)


def test_a_missing_or_an_extra_weight_is_refused(tmp_path):
    policy = make_policy()
    weights = policy.state_dict()
    name = next(iter(weights))
    for changed in ({k: v for k, v in weights.items() if k != name}, {**weights, "extra": torch.zeros(1)}):
        content = {"policy": {"config": dataclasses.asdict(policy.config), "weights": changed}}
        save_checkpoint(content, tmp_path / "dbp.pt")
        with pytest.raises(UserError):
            Policy.load(tmp_path / "dbp.pt")


def test_a_checkpoint_without_a_policy_says_what_it_holds(tmp_path):
    save_checkpoint({"critic": torch.zeros(1)}, tmp_path / "critic.pt")
    with pytest.raises(UserError, match="critic"):
        Policy.load(tmp_path / "critic.pt")
