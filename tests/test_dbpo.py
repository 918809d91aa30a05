"""dbpo_finetune.py's mathematics: every equation against loops or torch.distributions in float64, the Gaussian actor, and the
script's own loop on a toy task, watched from inside."""

import itertools
import math
import signal

import numpy as np
import pytest
import torch
from conftest import TINY_MLP, TINY_UNET
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

import dbpo_finetune
import envs
import vector
from common import UserError, load_checkpoint, run_main, save_checkpoint
from dbpo_finetune import (
    RewardScale,
    anchor_loss,
    entropy,
    gae,
    kl_estimate,
    prefix_log_prob,
    ratio,
    released_log_prob,
    surrogate,
    total_loss,
    value_loss,
)
from policy import GaussianActor, Policy, PolicyConfig

B, TO, TP, TA, DA = 5, 2, 8, 4, 3
SIGMA = (0.1, 0.03, 0.2)  # start, min, max
GAMMA, LAM = 0.9, 0.8


def make_policy(**changes) -> Policy:
    torch.manual_seed(0)
    settings = {"env": "toy", "obs_shapes": {"state": (2,)}, "action_dim": DA, "obs_steps": TO, "horizon": TP, "action_steps": TA}
    return Policy(PolicyConfig(**{**settings, **TINY_MLP, **changes})).eval()


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """mu and sigma (B, Ta, Da); sigma in (0.05, 0.55), another for every coordinate."""
    return randn(B, TA, DA, seed=seed), 0.05 + 0.5 * torch.sigmoid(randn(B, TA, DA, seed=seed + 1))


# --- likelihood -------------------------------------------------------------------------------------------------------


def test_log_prob_and_entropy_equal_torch_distributions():
    (mu, sigma), noise = gaussian(), randn(B, TA, DA, seed=2)
    oracle = Independent(Normal(mu, sigma), 2)  # summed over the prefix and the coordinates
    torch.testing.assert_close(prefix_log_prob(mu + noise, mu, sigma), oracle.log_prob(mu + noise))
    torch.testing.assert_close(entropy(sigma), oracle.entropy().mean())


def test_coloured_noise_is_a_gaussian_with_long_waves_and_as_much_power():
    policy, (mu, sigma), noise = make_policy(), gaussian(), randn(B, TA, DA, seed=2)
    actor = GaussianActor(policy, 0.1, 0.01, 1.0, noise_color=2.0).double()
    mix, unmix = actor.mix, actor.unmix
    found = prefix_log_prob(mu + mix @ (sigma * noise), mu, sigma, unmix)
    for b in range(B):
        coordinates = [
            MultivariateNormal(mu[b, :, d], mix @ torch.diag(sigma[b, :, d].square()) @ mix.T).log_prob(
                mu[b, :, d] + mix @ (sigma[b, :, d] * noise[b, :, d])
            )
            for d in range(DA)
        ]
        torch.testing.assert_close(found[b], sum(coordinates), rtol=1e-5, atol=1e-4)
    assert abs((mix @ mix.T).diag().mean() - 1) < 1e-6  # the power of white noise, spread otherwise:
    ones = torch.ones(TA, dtype=torch.float64) / TA**0.5
    assert ones @ mix @ mix.T @ ones > 1.5  # an offset of the whole prefix has more of it, the fastest wave less
    fastest = torch.tensor([(-1.0) ** t for t in range(TA)], dtype=torch.float64) / TA**0.5
    assert fastest @ mix @ mix.T @ fastest < 0.7
    white = GaussianActor(policy, 0.1, 0.01, 1.0)
    assert torch.equal(white.mix, torch.eye(TA)) and torch.equal(white.unmix, torch.eye(TA))


def test_only_the_executed_prefix_counts():
    policy, mu, sigma = make_policy(), randn(B, TP, DA).requires_grad_(), gaussian()[1]
    executed = randn(B, TA, DA, seed=2)
    prefix_log_prob(executed, policy.executed(mu), sigma).sum().backward()
    first = TO - 1
    closed_form = torch.zeros_like(mu)
    closed_form[:, first : first + TA] = (executed - mu.detach()[:, first : first + TA]) / sigma.square()
    torch.testing.assert_close(mu.grad, closed_form)  # what was not executed gets exactly nothing
    assert (mu.grad[:, :first] == 0).all() and (mu.grad[:, first + TA :] == 0).all()


def test_released_log_prob_is_the_mean_over_coordinates_with_a_floor():
    (mu, sigma), far = gaussian(), torch.arange(B, dtype=torch.float64).view(B, 1, 1)
    expected = Normal(mu, sigma).log_prob(mu + far * sigma).mean((1, 2))
    assert (expected < -2).any() and (expected > -2).any()
    torch.testing.assert_close(released_log_prob(mu + far * sigma, mu, sigma), expected.clamp(min=-2))


def test_the_latents_density_cancels_in_the_ratio():
    (mu, sigma), (old_mu, old_sigma), z, executed = gaussian(), gaussian(5), randn(B, TP, DA, seed=2), randn(B, TA, DA, seed=3)
    density_z = Normal(0.0, 1.0).log_prob(z).sum((1, 2))
    new, old = (density_z + Independent(Normal(*pair), 2).log_prob(executed) for pair in ((mu, sigma), (old_mu, old_sigma)))
    r = ratio(prefix_log_prob(executed, mu, sigma), prefix_log_prob(executed, old_mu, old_sigma))
    torch.testing.assert_close(r, new.exp() / old.exp())


def test_kl_estimate_is_never_negative_and_zero_at_equality():
    assert kl_estimate(torch.ones(B)).item() == 0
    assert all(kl_estimate(randn(B, seed=seed).exp()) > 0 for seed in range(20))
    assert all(kl_estimate(torch.tensor([r])) > 0 for r in (0.5, 0.99, 1.01, 2.0))  # of every sample, not only on average


def test_kl_estimate_approaches_the_divergence_of_two_gaussians():
    old, new = Normal(torch.tensor(0.3, dtype=torch.float64), 0.5), Normal(torch.tensor(0.4, dtype=torch.float64), 0.6)
    torch.manual_seed(0)
    x = old.sample((200_000,))
    estimate = kl_estimate(ratio(new.log_prob(x), old.log_prob(x)))
    assert estimate.item() == pytest.approx(kl_divergence(old, new).item(), rel=0.02)


# --- losses -----------------------------------------------------------------------------------------------------------


def test_surrogate_is_clipped_on_the_side_that_would_gain():
    cases = list(itertools.product([0.5, 0.89, 0.95, 1.0, 1.05, 1.11, 2.0], [-2.0, 3.0]))
    r, advantage = torch.tensor(cases, dtype=torch.float64).unbind(1)
    r.requires_grad_()
    total, closed_form = 0.0, []
    for x, a in cases:
        clipped = x > 1.1 if a > 0 else x < 0.9  # the objective would rise by going on: no gradient from there
        total += (1.1 if a > 0 else 0.9) * a if clipped else x * a
        closed_form.append(0.0 if clipped else -a / len(cases))
    loss = surrogate(r, advantage, 0.1)
    assert loss.item() == pytest.approx(-total / len(cases))
    loss.backward()
    torch.testing.assert_close(r.grad, torch.tensor(closed_form, dtype=torch.float64))


def test_value_and_anchor_losses_are_means_of_squares():
    for loss_of, shape in ((value_loss, (B,)), (anchor_loss, (B, TP, DA))):
        a, b = randn(*shape).requires_grad_(), randn(*shape, seed=1)
        squares = [(x - y) ** 2 for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)]
        loss = loss_of(a, b)
        assert loss.item() == pytest.approx(sum(squares) / len(squares))
        loss.backward()
        torch.testing.assert_close(a.grad, 2 * (a.detach() - b) / a.numel())  # of the anchor: the whole chunk, not the prefix


def test_total_loss_weighs_its_terms():
    terms = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1.0, 2.0, 3.0, 4.0)]
    total = total_loss(*terms, (0.5, 0.01, 7.0))
    assert total.item() == pytest.approx(1 + 0.5 * 2 - 0.01 * 3 + 7 * 4)
    total.backward()
    assert [term.grad.item() for term in terms] == [1, 0.5, -0.01, 7]


# --- advantages -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def histories() -> dict[str, torch.Tensor]:
    """Four chunks, each of which terminates, is truncated, both or neither: all 256 histories, one per environment."""
    flags = torch.tensor(list(itertools.product([0, 1, 2, 3], repeat=4))).T
    floats = {name: randn(4, 256, seed=seed) for seed, name in enumerate(("reward", "value", "next_value"))}
    return {**floats, "terminated": (flags & 1).bool(), "truncated": (flags & 2).bool()}


def brute_force(h: dict, gamma: float, lam: float) -> torch.Tensor:
    """Sum over k of (gamma lambda)^k delta_{t+k}, up to the end of the episode that chunk t belongs to."""
    advantage = torch.zeros_like(h["reward"])
    for t, n in itertools.product(range(4), range(256)):
        for k in range(4 - t):
            future = 0.0 if h["terminated"][t + k, n] else h["next_value"][t + k, n].item()
            delta = h["reward"][t + k, n].item() + gamma * future - h["value"][t + k, n].item()
            advantage[t, n] += (gamma * lam) ** k * delta
            if h["terminated"][t + k, n] or h["truncated"][t + k, n]:
                break
    return advantage


@pytest.mark.parametrize(("gamma", "lam"), [(GAMMA, LAM), (0.99, 0.95), (1.0, 1.0), (GAMMA, 0.0), (0.0, LAM)])
def test_gae_equals_brute_force_for_every_way_to_end(histories, gamma, lam):
    torch.testing.assert_close(gae(**histories, gamma=gamma, lam=lam), brute_force(histories, gamma, lam), rtol=1e-12, atol=1e-12)


def test_gae_with_lambda_1_is_the_discounted_return_minus_the_value(histories):
    """Consecutive values agree, as in a rollout; then everything between the chunk and its episode's end telescopes away."""
    h = {name: x.clone() for name, x in histories.items()}
    ended = h["terminated"] | h["truncated"]
    h["next_value"][:-1] = torch.where(ended[:-1], h["next_value"][:-1], h["value"][1:])
    advantage = gae(**h, gamma=GAMMA, lam=1.0)
    for t, n in itertools.product(range(4), range(256)):
        end = next((k for k in range(t, 4) if ended[k, n]), 3)
        bootstrap = 0.0 if h["terminated"][end, n] else h["next_value"][end, n]
        returns = sum(GAMMA ** (k - t) * h["reward"][k, n] for k in range(t, end + 1)) + GAMMA ** (end + 1 - t) * bootstrap
        assert advantage[t, n].item() == pytest.approx((returns - h["value"][t, n]).item(), abs=1e-12)


# --- reward scale -----------------------------------------------------------------------------------------------------


def rewards(T: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rewards far from zero (a mean of 50, a spread of 1) and ends, both (T, 3)."""
    rng = np.random.default_rng(seed)
    return 50 + rng.normal(size=(T, 3)), rng.random((T, 3)) < 0.2


def test_reward_scale_is_the_std_of_all_discounted_returns():
    scale, pieces = RewardScale(3, GAMMA), [rewards(T, seed) for seed, T in enumerate((7, 20, 1, 13))]
    for piece in pieces:  # iterations of unequal length: each return weighs the same
        scale.update(*piece)
    reward, ended = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    returns = []
    for n in range(3):
        begin = 0
        for t in range(len(reward)):
            returns.append(sum(GAMMA ** (t - k) * reward[k, n] for k in range(begin, t + 1)))
            begin = t + 1 if ended[t, n] else begin
    assert scale.std == pytest.approx(np.std(returns), rel=1e-9)


def test_reward_scale_goes_on_from_its_saved_state(tmp_path):
    scale, later = RewardScale(3, GAMMA), RewardScale(3, GAMMA)
    scale.update(*rewards(7, 0))
    save_checkpoint({"scale": scale.state()}, tmp_path / "state.pt")
    scale.update(*rewards(9, 1))  # the saved one must not follow
    later.load(load_checkpoint(tmp_path / "state.pt")["scale"])
    later.update(*rewards(9, 1))
    assert later.std == scale.std
    assert np.array_equal(later.running, scale.running)


def test_rewards_that_are_always_zero_can_be_divided():
    scale = RewardScale(3, GAMMA)
    scale.update(np.zeros((4, 3)), np.zeros((4, 3), bool))
    assert np.isfinite(1 / scale.std)


# --- actor ------------------------------------------------------------------------------------------------------------


def make_actor(sigma: tuple = SIGMA, **changes) -> tuple[GaussianActor, torch.Tensor, torch.Tensor]:
    """An actor in float64, conditions far apart and latents."""
    actor = GaussianActor(make_policy(**changes), *sigma).double()
    return actor, 100 * randn(B, TO * 2), randn(B, TP, DA, seed=1)


def test_sigma_starts_at_sigma_start_for_every_observation():
    actor, cond, z = make_actor()
    sigma = actor(cond, z)[1]
    assert sigma.shape == (B, TA, DA)
    torch.testing.assert_close(sigma, torch.full_like(sigma, SIGMA[0]))


def test_sigma_depends_on_the_observation_and_stays_within_its_bounds():
    actor, cond, z = make_actor()
    torch.nn.init.normal_(actor.log_std.weight)
    sigma = actor(cond, z)[1]
    assert sigma.min().item() == pytest.approx(SIGMA[1]) and sigma.max().item() == pytest.approx(SIGMA[2])
    assert (sigma[0] != sigma[1]).any()


@pytest.mark.parametrize("sigma", [SIGMA, (0.1, 0.03, 0.1)], ids=["fast", "paper"])  # the paper's preset starts at the bound
def test_log_std_has_the_gaussians_gradient(sigma):
    actor, cond, z = make_actor(sigma)
    executed = randn(B, TA, DA, seed=2)
    mu, std = actor(cond, z)
    mu = actor.policy.executed(mu).detach()
    prefix_log_prob(executed, mu, std).sum().backward()
    score = ((executed - mu) / sigma[0]).square() - 1  # d log N / d log sigma                 (B, Ta, Da)
    torch.testing.assert_close(actor.log_std.bias.grad, score.sum(0).flatten(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actor.log_std.weight.grad, score.flatten(1).T @ cond, rtol=1e-5, atol=1e-3)


def test_log_std_outside_its_bounds_has_no_gradient():
    actor, cond, z = make_actor()
    with torch.no_grad():
        actor.log_std.bias[0], actor.log_std.bias[1] = -9.0, 9.0
    actor(cond, z)[1].sum().backward()
    assert actor.log_std.bias.grad[:2].tolist() == [0, 0] and (actor.log_std.bias.grad[2:] > 0).all()


@pytest.mark.parametrize("sizes", [{}, TINY_UNET], ids=["mlp", "unet"])
def test_mu_is_the_policys_own_chunk_and_deployment_executes_it(sizes):
    policy = make_policy(**sizes)
    policy.normalize_action.fit(torch.tensor([[-2.0, 0.0, 5.0], [4.0, 1.0, 9.0]]))
    actor, obs, z = GaussianActor(policy, *SIGMA), {"state": randn(B, TO, 2).float()}, randn(B, TP, DA, seed=1).float()
    mu, _ = actor(policy.encode(obs), z)
    assert torch.equal(mu, policy(obs, z.unsqueeze(1))[:, 0])
    assert torch.equal(policy.act(obs, z), policy.normalize_action.inverse(mu[:, TO - 1 : TO - 1 + TA]))


# --- the script, watched from inside ----------------------------------------------------------------------------------


class Clock:
    """Its state is (a number of the episode, chunks so far / 10). Episodes of even seeds terminate, others are truncated."""

    made = ()  # all clocks of a test; the first looks whether it can be built, the second is the training's
    fail_at = math.inf  # chunk at which the training's simulation fails
    bad_reward_at = math.inf  # chunk of which the training's reward is not a number

    def __init__(self, num_envs: int, obs_steps: int):
        self.num_envs, self.obs_steps, self.frames, self.seen, self.steps = num_envs, obs_steps, [], [], 0
        self.history = np.zeros((num_envs, obs_steps, 2), np.float32)
        self.seeds, self.count = np.zeros(num_envs, int), np.zeros(num_envs, int)
        self.made.append(self)

    def reset(self, seeds, which=None):
        for i, seed in zip(range(self.num_envs) if which is None else which, seeds, strict=True):
            self.seeds[i], self.count[i] = seed, 0
            self.history[i] = math.sin(seed), 0
        return {"state": self.history.copy()}

    def step(self, chunks):
        self.steps += 1
        training = self.seeds[0] >= dbpo_finetune.TRAIN_SEED
        if training and self.steps == self.fail_at:
            raise vector.SimulationError("the clock stopped")
        over = self.count > self.seeds % 5
        self.count += ~over
        self.history = np.concatenate([self.history[:, 1:], self.history[:, -1:]], 1)
        self.history[:, -1, 1] = self.count / 10
        ended = self.count > self.seeds % 5
        reward = chunks[:, 0, 0].astype(float)  # forward is good
        if np.isnan(reward).any():  # as MuJoCo does
            raise vector.SimulationError("the chunk is not a number")
        if training and self.steps == self.bad_reward_at:
            reward[:] = np.nan
        info = {"score": self.count.astype(float), "success": ended.copy(), "length": TA * self.count}
        self.seen.append((self.history.copy(), reward, ended & (self.seeds % 2 == 0), ended & (self.seeds % 2 == 1)))
        return {"state": self.history.copy()}, *self.seen[-1][1:], info

    def record(self, which):
        raise OSError("a clock has no pictures")

    def close(self):
        pass


N, T = 4, 6


@pytest.fixture
def finetune(tmp_path, monkeypatch):
    """A function that runs the script's main() on the toy task, in this process. It returns the final state."""
    task = envs.Task("toy", "chunks", {"state": (2,)}, DA, Clock, (), None)
    monkeypatch.setitem(envs.TASKS, "toy", task)
    monkeypatch.setattr(Clock, "made", [])
    monkeypatch.setattr(dbpo_finetune, "catch_signals", list)
    monkeypatch.setattr(dbpo_finetune, "plot_curves", lambda *_: None)

    def run(*words: str, iterations: int = 3, ckpt: Policy | None = None) -> dict:
        (ckpt or make_policy()).save(tmp_path / "dbp.pt")
        files = f"--ckpt {tmp_path}/dbp.pt --out {tmp_path}/out --device cpu"
        sizes = f"--num-envs {N} --decisions {T} --env-steps {iterations * N * T * TA} --minibatch 7 --epochs 2 --critic-only 0"
        saves = "--eval-episodes 2 --report-episodes 2 --save-every 1"
        monkeypatch.setattr("sys.argv", f"dbpo_finetune.py --env toy {files} {sizes} {saves}".split() + list(words))
        dbpo_finetune.main()
        return load_checkpoint(tmp_path / "out" / "state.pt")

    return run


def spy(monkeypatch, name: str, seen: list) -> list:
    """Let every call of dbpo_finetune.<name> leave (name, arguments, result) in `seen`, which is returned."""
    original = getattr(dbpo_finetune, name)

    def watched(*args):
        seen.append((name, args, original(*args)))
        return seen[-1][-1]

    monkeypatch.setattr(dbpo_finetune, name, watched)
    return seen


def steps(optimizer: dict) -> int:
    return int(optimizer["state"][0]["step"])


@pytest.mark.parametrize("words", [[], ["--mean-log-prob"], ["--noise-color", "1"]], ids=["Eq. 13", "released", "coloured noise"])
@pytest.mark.parametrize(
    "sizes",
    [TINY_MLP, {"cond_width": 512, "cond_depth": 2, "width": 128, "depth": 2}, TINY_UNET],
    ids=["tiny", "default", "unet with dropout"],
)
def test_before_the_first_update_the_ratio_is_1_and_the_kl_0_exactly(finetune, monkeypatch, sizes, words):
    seen = []
    for name in ("gae", "ratio", "kl_estimate"):
        spy(monkeypatch, name, seen)
    finetune("--target-kl", "1e9", "--actor-lr", "1e-5", *words, iterations=2, ckpt=make_policy(**sizes))
    starts = [i for i, (name, *_) in enumerate(seen) if name == "gae"]  # once per iteration
    assert len(starts) == 2
    for i in starts:
        (_, _, r), (_, _, kl) = seen[i + 1 : i + 3]
        assert len(r) == 7 and (r == 1).all() and kl == 0
    later = [kl.item() for i, (name, _, kl) in enumerate(seen) if name == "kl_estimate" and i - 2 not in starts]
    assert len(later) == 2 * (2 * 4 - 1) and max(later) > 0  # the updates do move the policy


def test_the_likelihood_is_of_what_was_executed(finetune, monkeypatch):
    """The clock pays the first executed number of each chunk, in order; the noise around it is clipped."""
    seen = spy(monkeypatch, "prefix_log_prob", [])
    finetune("--noise-clip", "0.5", "--epochs", "1", iterations=1)
    executed, mu, sigma = (
        torch.cat(x).detach() for x in zip(*(args[:3] for _, args, _ in seen[:4]), strict=True)
    )  # of all 24 rows
    paid = np.concatenate([reward for _, reward, *_ in Clock.made[1].seen])
    np.testing.assert_array_equal(np.sort(executed[:, 0, 0].numpy()), np.sort(paid.astype(np.float32)))
    noise = ((executed - mu) / sigma).abs()
    assert noise.max().item() == pytest.approx(0.5, abs=1e-4) and noise.min() < 0.4


def test_every_chunk_is_judged_by_the_observation_that_it_led_to(finetune, monkeypatch):
    """At a truncation that is the final one, not the first of the next episode, which stands in the next row."""
    critics, scales, seen, original = spy(monkeypatch, "Critic", []), spy(monkeypatch, "RewardScale", []), [], gae

    def watched(reward, value, next_value, terminated, truncated, gamma, lam):
        led_to, raw, died, late = (torch.from_numpy(np.stack(x)) for x in zip(*Clock.made[1].seen[-T:], strict=True))
        assert torch.equal(terminated, died) and torch.equal(truncated, late)
        with torch.no_grad():
            judged = critics[0][-1](led_to.flatten(2))  # no normaliser was fitted: the condition is the observation itself
        seen.append((reward * scales[0][-1].std, raw.float(), next_value, judged, terminated, truncated))
        return original(reward, value, next_value, terminated, truncated, gamma, lam)

    monkeypatch.setattr(dbpo_finetune, "gae", watched)
    finetune()
    reward, raw, next_value, judged, terminated, truncated = (torch.cat(x) for x in zip(*seen, strict=True))
    assert len(reward) == 3 * T and truncated[:-1].any() and terminated[:-1].any()
    torch.testing.assert_close(reward, raw)
    torch.testing.assert_close(next_value[~terminated], judged[~terminated], rtol=1e-5, atol=1e-6)


def test_nothing_reaches_the_pretrained_policy(finetune):
    pretrained, state = make_policy(), finetune()
    assert all(torch.equal(value, state["pretrained"]["weights"][name]) for name, value in pretrained.state_dict().items())
    moved = [name for name, p in pretrained.named_parameters() if not torch.equal(p, state["actor"][f"policy.{name}"])]
    assert len(moved) == len(list(pretrained.parameters()))
    assert all(torch.equal(value, state["actor"][f"policy.{name}"]) for name, value in state["policy"]["weights"].items())


def test_the_anchor_pulls_towards_the_pretrained_policy(finetune, monkeypatch):
    """A weight that drowns the reward: what comes to the loss is the distance of both policies' means for the same (o, z)."""
    seen = spy(monkeypatch, "anchor_loss", [])
    free = ("--target-kl", "9", "--actor-lr", "1e-3", "--actor-lr-end", "1e-3")
    finetune("--anchor", "100", "--anchor-end", "100", *free, iterations=8)
    strong = seen[-1][2].item()
    assert seen[0][2].item() == 0  # both are the same network at first
    finetune("--anchor", "0", *free, iterations=8)
    assert 0 < strong < 0.2 * seen[-1][2].item()


def test_the_first_iterations_train_the_critic_alone(finetune):
    policy, state = make_policy(), finetune("--critic-only", "3")
    assert all(torch.equal(value, state["actor"][f"policy.{name}"]) for name, value in policy.state_dict().items())
    assert (state["actor"]["log_std.weight"] == 0).all() and state["actor_optimizer"]["state"] == {}
    assert steps(state["critic_optimizer"]) == 3 * 2 * 4  # iterations, epochs, minibatches


def test_above_the_kl_limit_the_actor_rests_and_the_critic_goes_on(finetune):
    state = finetune("--target-kl", "1e-12", "--actor-lr", "0.01")
    assert steps(state["actor_optimizer"]) == 3  # the first of each iteration, whose KL is exactly 0
    assert steps(state["critic_optimizer"]) == 3 * 2 * 4


def row_of(score: float, error: float = 0.5) -> dict[str, float]:
    """An evaluation with that standard error."""
    return {"score": score, "score_high": score + 1.96 * error}


@pytest.mark.parametrize(("last", "newest"), [(7.1, 3), (6.6, 3), (6.4, 1)])
def test_of_evaluations_as_good_as_the_best_the_newest_is_kept(finetune, monkeypatch, tmp_path, last, newest):
    scores, judged = iter([5.0, 7.0, 6.0, last]), []  # of the pretrained policy and after each iteration

    def select(policy, task, episodes):
        judged.append({name: value.clone() for name, value in policy.state_dict().items()})
        return row_of(next(scores))

    monkeypatch.setattr(dbpo_finetune.evaluate, "select", select)
    assert finetune("--eval-every", "1")["best"] == max(7, last)
    kept = Policy.load(tmp_path / "out" / "dbpo.pt").state_dict()
    same = [all(torch.equal(value, weights[name]) for name, value in kept.items()) for weights in judged]
    assert same == [i == newest for i in range(4)]


def test_a_resumed_run_still_knows_its_best(finetune, monkeypatch, tmp_path):
    scores = iter([5.0, 9.0, 6.0, 7.0])
    monkeypatch.setattr(dbpo_finetune.evaluate, "select", lambda *_: row_of(next(scores)))
    with monkeypatch.context() as stopped, pytest.raises(SystemExit):
        stopped.setattr(dbpo_finetune, "catch_signals", lambda: [signal.SIGTERM])  # leaves after the first iteration
        finetune("--eval-every", "1")
    kept = (tmp_path / "out" / "dbpo.pt").read_bytes()
    assert finetune("--eval-every", "1", "--resume")["best"] == 9
    assert (tmp_path / "out" / "dbpo.pt").read_bytes() == kept


def test_what_is_learnt_earns_more(finetune):
    """The clock pays for the first executed number of every chunk. Mean reward of an iteration, first against last."""
    words = f"--decisions 50 --minibatch 50 --actor-lr 2e-3 --anchor 0 --env-steps {12 * N * 50 * TA} --target-kl 0.1"
    finetune(*words.split())
    reward = np.array([reward for _, reward, *_ in Clock.made[1].seen]).reshape(12, -1).mean(1)
    assert reward[-1] > reward[0] + 0.2


# --- a training that goes wrong ---------------------------------------------------------------------------------------


def test_a_simulation_that_fails_is_one_message_and_the_last_save_stays(finetune, monkeypatch, tmp_path):
    monkeypatch.setattr(Clock, "fail_at", 2 * T + 3)  # in the third iteration
    with pytest.raises(UserError, match=r"iteration 2: the clock stopped.*dbpo.pt and .*state.pt was saved before"):
        finetune()
    assert load_checkpoint(tmp_path / "out" / "state.pt")["iteration"] == 2
    assert Policy.load(tmp_path / "out" / "dbpo.pt").config.env == "toy"


def test_a_reward_that_is_not_a_number_stops_before_the_update(finetune, monkeypatch, tmp_path):
    monkeypatch.setattr(Clock, "bad_reward_at", 2 * T + 3)
    with pytest.raises(UserError, match=r"iteration 2: .*reward that is not finite"):
        finetune()
    state = load_checkpoint(tmp_path / "out" / "state.pt")
    assert state["iteration"] == 2
    assert all(torch.isfinite(value).all() for weights in ("actor", "critic") for value in state[weights].values())


def test_a_loss_that_is_not_finite_stops_before_the_update(finetune, tmp_path):
    with pytest.raises(UserError, match=r"iteration 0: .*gradient is not finite.*--critic-lr"):
        finetune("--critic-lr", "1e30")
    assert Policy.load(tmp_path / "out" / "dbpo.pt").state_dict().keys() == make_policy().state_dict().keys()


@pytest.mark.parametrize("eval_every", ["1", "10"])
def test_weights_beyond_all_numbers_are_one_message(finetune, capsys, eval_every):
    """One update of 1e30. Then the chunks are not numbers, in an evaluation or in the next rollout."""
    with pytest.raises(SystemExit) as caught:
        run_main(lambda: finetune("--actor-lr", "1e30", "--eval-every", eval_every))
    assert caught.value.code == 1
    assert "error: " in capsys.readouterr().err.splitlines()[-1]
