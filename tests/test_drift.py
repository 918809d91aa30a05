"""drift.py: against nested loops in float64, against the released numbers, its symmetries, its gradient, a toy it must learn."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from drift import balanced_coefficients, dbp_loss, dbp_loss_stepwise, drift_field, pairwise_distance

RELEASED = Path(__file__).parent / "data" / "drift_released_values.npz"


def batch(B=3, G=4, S=6, P=1, N=0, weights=False, seed=0) -> dict[str, torch.Tensor]:
    """Random arguments of dbp_loss in float64; N = 0: no negatives; weights: positive, and other for every reference."""
    rng = torch.Generator().manual_seed(seed)
    sets = {"generated": G, "positives": P, **({"negatives": N} if N else {})}
    args = {name: torch.randn(B, n, S, generator=rng, dtype=torch.float64) for name, n in sets.items()}
    if weights:
        args |= {f"w_{name}": 0.2 + torch.rand(B, n, generator=rng, dtype=torch.float64) for name, n in sets.items()}
    return args


def gradient(args: dict, loss_of=dbp_loss, **kwargs) -> torch.Tensor:
    x = args["generated"].clone().requires_grad_()
    loss, _ = loss_of(**{**args, "generated": x}, **kwargs)
    loss.mean().backward()
    return x.grad


def drift_of(args: dict, **kwargs) -> torch.Tensor:
    return drift_field(**{"x" if name == "generated" else name: value for name, value in args.items()}, **kwargs)[0]


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    powers = [math.exp(logit - top) for logit in logits]
    return [power / sum(powers) for power in powers]


def oracle(args: dict, temperatures) -> tuple[list[float], np.ndarray, float, float]:
    """Eqs. (28)-(40) one number at a time. Returns: loss of every b, V (B, G, S), s, u."""
    x = args["generated"].numpy()
    B, G, S = x.shape
    P = args["positives"].shape[1]
    names = [name for name in ("generated", "negatives", "positives") if name in args]
    r = np.concatenate([args[name].numpy() for name in names], 1)
    w = np.concatenate([args[f"w_{n}"].numpy() if f"w_{n}" in args else np.ones(args[n].shape[:2]) for n in names], 1)
    M = r.shape[1]
    triples = [(b, g, m) for b in range(B) for g in range(G) for m in range(M)]

    d = {(b, g, m): math.dist(x[b, g], r[b, m]) for b, g, m in triples}  # Eq. (28)
    mean_dw = sum(d[b, g, m] * w[b, m] for b, g, m in triples) / len(triples)
    mean_w = sum(w[b, m] for b, g, m in triples) / len(triples)
    s = mean_dw / mean_w  # Eq. (29)
    unit = max(s / math.sqrt(S), 1e-3)  # Eq. (56)

    V = np.zeros_like(x)
    for tau in temperatures:
        F = np.zeros_like(x)
        for b in range(B):
            # The references behind the G-th are never a hypothesis' own copy.
            logit = [[-(d[b, g, m] / max(s, 1e-3) + 100 * (m == g)) / tau for m in range(M)] for g in range(G)]  # Eq. (30)
            attends = [softmax(logit[g]) for g in range(G)]
            belongs = [softmax([logit[g][m] for g in range(G)]) for m in range(M)]
            for g in range(G):
                A = [math.sqrt(max(attends[g][m] * belongs[m][g], 1e-6)) * w[b, m] for m in range(M)]  # Eq. (31)
                mass_negative, mass_positive = sum(A[: M - P]), sum(A[M - P :])  # Eq. (32)
                for m in range(M):
                    c = -A[m] * mass_positive if m < M - P else A[m] * mass_negative  # Eq. (33)
                    for k in range(S):
                        F[b, g, k] += c * (r[b, m, k] - x[b, g, k]) / unit  # Eq. (35)
        rms = math.sqrt(sum(f * f for f in F.flat) / F.size)
        V += F / max(rms, 1e-4)  # Eqs. (36)-(37)

    loss = []
    for b in range(B):
        target = [[x[b, g, k] / unit + V[b, g, k] for k in range(S)] for g in range(G)]  # Eq. (38)
        squares = [(x[b, g, k] / unit - target[g][k]) ** 2 for g in range(G) for k in range(S)]
        loss.append(sum(squares) / len(squares))  # Eqs. (39)-(40)
    return loss, V, s, unit


@pytest.mark.parametrize("temperatures", [(0.2,), (0.02, 0.05, 0.2)])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"G": 1},
        {"B": 1, "P": 3},
        {"N": 2},
        {"N": 2, "P": 3, "weights": True},
        {"G": 2, "S": 1, "weights": True},
    ],
    ids=str,
)
def test_loss_and_gradient_equal_the_loops(shape, temperatures):
    args = batch(**shape)
    loss, diagnostics = dbp_loss(**args, temperatures=temperatures)
    expected, V, s, unit = oracle(args, temperatures)
    B, G, S = V.shape
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert diagnostics["scale"].item() == pytest.approx(s, rel=1e-9)
    closed_form = torch.from_numpy(-2 * V / (unit * B * G * S))
    torch.testing.assert_close(gradient(args, temperatures=temperatures), closed_form, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", ["0", "1", "2"])
def test_equals_the_released_loss(case):
    file = np.load(RELEASED)
    ours = {"generated": "generated", "positives": "positives", "negatives": "negatives"}
    ours |= {"w_pred": "w_generated", "w_pos": "w_positives", "w_neg": "w_negatives"}
    args = {name: torch.from_numpy(file[f"{case}/{key}"]) for key, name in ours.items() if f"{case}/{key}" in file}
    temperatures = tuple(file[f"{case}/temperatures"].tolist())
    loss, diagnostics = dbp_loss(**args, temperatures=temperatures)
    # Their distances are a dot-product expansion in float32: 4e-5 of this is their rounding.
    np.testing.assert_allclose(loss.numpy(), file[f"{case}/loss"], rtol=1e-4)
    np.testing.assert_allclose(diagnostics["scale"].item(), file[f"{case}/scale"], rtol=1e-4)
    released = torch.from_numpy(file[f"{case}/grad"])
    assert (gradient(args, temperatures=temperatures) - released).norm() < 1e-4 * released.norm()


def test_translation_moves_nothing():
    args = batch(P=2, N=2)
    offset = torch.randn(6, dtype=torch.float64)
    moved = {name: value + offset for name, value in args.items()}
    torch.testing.assert_close(drift_of(moved), drift_of(args), rtol=1e-9, atol=1e-9)


def test_rotation_turns_the_drift():
    args = batch(P=2, N=2)
    Q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    turned = {name: value @ Q for name, value in args.items()}
    torch.testing.assert_close(drift_of(turned), drift_of(args) @ Q, rtol=1e-9, atol=1e-9)


def test_permutations_of_hypotheses_references_and_observations():
    args = batch(P=3, N=2, weights=True)
    V = drift_of(args)
    order = {"generated": [2, 0, 3, 1], "positives": [1, 2, 0], "negatives": [1, 0]}
    for name, permutation in order.items():
        changed = args | {key: args[key][:, permutation] for key in (name, f"w_{name}")}
        expected = V[:, permutation] if name == "generated" else V
        torch.testing.assert_close(drift_of(changed), expected, rtol=1e-9, atol=1e-9)
    swapped = {key: value[[2, 0, 1]] for key, value in args.items()}
    torch.testing.assert_close(drift_of(swapped), V[[2, 0, 1]], rtol=1e-9, atol=1e-9)


def test_unit_of_the_actions_does_not_matter():
    args = batch(N=2)
    scaled = {name: 512 * value for name, value in args.items()}
    torch.testing.assert_close(drift_of(scaled), drift_of(args), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dbp_loss(**scaled)[0], dbp_loss(**args)[0], rtol=1e-9, atol=1e-9)


def test_coefficients_sum_to_zero_and_have_their_signs():
    A = torch.rand(3, 4, 7, dtype=torch.float64) + 0.1
    c = balanced_coefficients(A, 2)
    assert c.sum(-1).abs().max() < 1e-12  # Eq. (34)
    assert (c[..., :5] < 0).all() and (c[..., 5:] > 0).all()  # repulsion, attraction


def test_swapping_positives_and_negatives_flips_the_drift():
    args = batch(P=3, N=3)
    x, p, n = args["generated"], args["positives"], args["negatives"]
    for temperatures in [(0.2,), (0.02, 0.05, 0.2)]:
        V = drift_field(x, p, n, temperatures=temperatures, self_references=False)[0]
        swapped = drift_field(x, n, p, temperatures=temperatures, self_references=False)[0]
        torch.testing.assert_close(swapped, -V, rtol=1e-9, atol=1e-9)
        assert V.abs().mean() > 0.1  # Eq. (36) sets the size, so that -V = V = 0 cannot pass
        at_rest = drift_field(x, p, p, temperatures=temperatures, self_references=False)[0]
        assert at_rest.abs().max() < 1e-9  # Eq. (2) at p = q


@pytest.mark.parametrize("size", [0.05, 1.0, 300.0])
def test_batch_mean_of_the_loss_is_one_whatever_the_policy_does(size):
    args = {name: size * value for name, value in batch(B=5, seed=int(size)).items()}
    assert dbp_loss(**args)[0].mean().item() == pytest.approx(1, abs=1e-9)


def test_batch_mean_of_the_loss_with_several_temperatures():
    for seed in range(5):
        value = dbp_loss(**batch(seed=seed), temperatures=(0.02, 0.05, 0.2))[0].mean().item()
        assert 0 <= value <= 9
    # Equal temperatures give parallel forces of RMS 1: the bound K^2 itself.
    assert dbp_loss(**batch(), temperatures=(0.1, 0.1, 0.1))[0].mean().item() == pytest.approx(9, abs=1e-9)


def test_no_gradient_reaches_references_or_weights():
    args = {name: value.requires_grad_() for name, value in batch(P=2, N=2, weights=True).items()}
    dbp_loss(**args)[0].mean().backward()
    assert args["generated"].grad.abs().max() > 0
    assert [name for name, value in args.items() if value.grad is not None] == ["generated"]


def test_one_hypothesis_is_drawn_straight_to_its_positive():
    args = batch(B=5, G=1)
    V = drift_of(args)
    to_expert = args["positives"] - args["generated"]
    torch.testing.assert_close(torch.cosine_similarity(V, to_expert, dim=-1), torch.ones(5, 1, dtype=torch.float64))
    assert V.square().mean().item() == pytest.approx(1, abs=1e-9)


def test_close_distances_keep_their_digits():
    # The dot-product expansion would return 0 or noise here: float32 resolves 1e-7 of 100^2 only.
    x = torch.full((1, 1, 4), 100.0)
    near = x + torch.tensor([1e-3, 0, 0, 0])
    assert pairwise_distance(x, near).item() == pytest.approx((near - x)[0, 0, 0].item(), rel=1e-5)


# --- step-wise mode ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [False, True])
def test_stepwise_equals_a_loop_over_slices(weights):
    flat = batch(G=3, S=10, P=2, N=2, weights=weights)
    chunks = {name: value if name.startswith("w_") else value.unflatten(-1, (5, 2)) for name, value in flat.items()}
    slices = [{n: v if n.startswith("w_") else v[:, :, t] for n, v in chunks.items()} for t in range(5)]
    kwargs = {"temperatures": (0.05, 0.2)}
    expected = torch.stack([dbp_loss(**one, **kwargs)[0] for one in slices]).mean(0)
    torch.testing.assert_close(dbp_loss_stepwise(**chunks, **kwargs)[0], expected, rtol=1e-9, atol=1e-9)
    together = gradient(chunks, dbp_loss_stepwise, **kwargs)
    one_by_one = torch.stack([gradient(one, **kwargs) for one in slices], 2) / 5
    torch.testing.assert_close(together, one_by_one, rtol=1e-9, atol=1e-12)


# --- data-parallel ----------------------------------------------------------------------------------------------------


def test_two_ranks_give_the_gradient_of_one_process():
    # Very unlike halves with unlike weights: a scale or an RMS that is taken per rank shows at once.
    whole = batch(B=6, P=2, weights=True)
    whole["generated"][3:] *= 5
    whole["w_positives"][3:] *= 4
    box, barrier = [None, None], threading.Barrier(2, timeout=30)

    def run(rank: int, alone: bool) -> torch.Tensor:
        def average(x: torch.Tensor) -> torch.Tensor:
            box[rank] = x
            barrier.wait()
            mean = (box[0] + box[1]) / 2
            barrier.wait()  # nobody puts the next statistic in before both have read this one
            return mean

        half = {name: value[3 * rank : 3 * rank + 3] for name, value in whole.items()}
        return gradient(half, temperatures=(0.05, 0.2), reduce=None if alone else average)

    with ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(run, (0, 1), (False, False)))
    expected = gradient(whole, temperatures=(0.05, 0.2))
    # Each rank averages over its own B/2 samples, and the gradients of the ranks are averaged.
    torch.testing.assert_close(torch.cat(halves) / 2, expected, rtol=1e-6, atol=1e-9)
    without = torch.cat([run(rank, alone=True) for rank in (0, 1)]) / 2
    assert (without - expected).norm() > 0.1 * expected.norm()


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"generated": torch.zeros(3, 6)}, "generated"),
        ({"generated": torch.zeros(3, 0, 6)}, "generated holds 0"),
        ({"positives": torch.zeros(3, 0, 6)}, "positives holds 0"),
        ({"positives": torch.zeros(3, 1, 7)}, r"positives has shape \(3, 1, 7\)"),
        ({"positives": torch.zeros(2, 1, 6)}, r"positives has shape \(2, 1, 6\)"),
        ({"positives": torch.zeros(3, 6)}, r"positives has shape \(3, 6\)"),
        ({"negatives": torch.zeros(3, 2, 5)}, r"negatives has shape \(3, 2, 5\)"),
        ({"w_positives": torch.ones(3)}, r"w_positives has shape \(3,\)"),
        ({"w_generated": torch.ones(3, 1)}, r"w_generated has shape \(3, 1\)"),
        ({"w_negatives": torch.ones(3, 2)}, "w_negatives was given without negatives"),
        ({"temperatures": ()}, r"temperatures is \(\)"),
        ({"temperatures": (0.2, 0.0)}, r"temperatures is \(0.2, 0.0\)"),
        ({"temperatures": (-0.1,)}, r"temperatures is \(-0.1,\)"),
        ({"temperatures": (float("nan"),)}, r"temperatures is \(nan,\)"),
    ],
    ids=str,
)
def test_bad_input_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        dbp_loss(**{**batch(), **change})


# --- floors and precision ---------------------------------------------------------------------------------------------


def test_everything_in_one_point_gives_zero_not_nan():
    args = {"generated": torch.ones(2, 4, 6), "positives": torch.ones(2, 1, 6)}
    loss, _ = dbp_loss(**args)
    # Not exactly 0: the rounding of Eq. (35), 1e-8, in units of the floor. Without floors it would be NaN, or blown up to 1.
    assert (loss < 1e-2).all()
    assert torch.isfinite(gradient(args)).all()


def test_collapsed_hypotheses_still_go_to_the_expert():
    args = {"generated": torch.zeros(2, 4, 6), "positives": torch.ones(2, 1, 6)}
    step = -gradient(args)
    assert torch.isfinite(step).all()
    assert (step > 0).all()


def test_bfloat16_input_is_computed_in_float32():
    args = {name: value.bfloat16() for name, value in batch().items()}
    exact = {name: value.float() for name, value in args.items()}
    expected = dbp_loss(**exact)[0]
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = dbp_loss(**args)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    torch.testing.assert_close(gradient(args).float(), gradient(exact), rtol=1e-2, atol=0)


# --- learning ---------------------------------------------------------------------------------------------------------


def test_both_modes_are_learned_where_regression_falls_between():
    """One observation, two right answers: the expert shows (-1, 0) or (1, 0), a coin decides. Eq. (1): z has to choose."""
    modes = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])

    def train(loss_of) -> torch.Tensor:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for step in range(800):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * (1 - step / 800)  # the drift's gradient does not fade by itself, Eq. (36)
            expert = modes[torch.randint(2, (64,))].unsqueeze(1)
            loss = loss_of(net(torch.randn(64, 4, 2)), expert)
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
        with torch.no_grad():
            return net(torch.randn(2000, 2))

    drifted = train(lambda x, expert: dbp_loss(x, expert)[0])
    near = (torch.cdist(drifted, modes) < 0.3).float().mean(0)  # share of the samples at each mode
    assert (near > 0.3).all(), near
    regressed = train(lambda x, expert: (x - expert).square())
    assert regressed.norm(dim=-1).max() < 0.3
