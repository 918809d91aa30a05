"""The drifting field and the DBP loss (stage 1 of Drift-Based Policy).

The idea in five lines. For one observation the network has guessed G action chunks. The expert's chunk attracts
each guess, the other guesses repel it, both with a weight that falls with distance. The sum of these pulls is the drift
V. The network is then regressed onto its own guess moved by V (a constant target), so the refinement that
a diffusion policy does at run time, step after step, happens here during training, and acting needs ONE network call.

Equations covered: (2)-(5), (8)-(11), (25)-(41), (56); (24), the sampling of hypotheses, is `Policy.forward`.

Symbols (code name = paper symbol)          shape
    generated   x, hypotheses               (B, G, S)   carries the gradient
    positives   expert references           (B, P, S)
    negatives   extra negative references   (B, N, S)   optional
    references  r = [x', negatives, positives]  (B, M, S)   M = G + N + P, x' is x without its gradient
    w           reference weights           (B, M)      1 by default
    s           global distance scale       one scalar per minibatch
    u           unit of a coordinate, s / sqrt(S)
    V           drift, in units of u        (B, G, S)
    S is Tp*Da in chunk mode and Da in step-wise mode. Every function takes further leading dimensions in front of B;
    each of them is a separate problem with its own s and V (step-wise mode puts the Tp slices there).

Reading the loss: with one temperature its batch mean is exactly 1, with K temperatures it lies in [0, K^2], whatever the
policy does, as long as there is a force (Eq. 36 normalises it). It says NOTHING about progress. Watch the diagnostics instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SCALE_FLOOR = 1e-3  # Eq. (56): s and u are never smaller, so that collapsed hypotheses do not blow up the gradient
FORCE_FLOOR = 1e-4  # Eq. (36): floor of the force RMS (released: mean square floored at 1e-8)
AFFINITY_FLOOR = 1e-6  # Eq. (31): see `affinity`
SELF_DISTANCE = 100.0  # Eq. (30): see `drift_field`

Reduce = Callable[[Tensor], Tensor]  # averages a statistic over data-parallel ranks; identity in one process


def pairwise_distance(x: Tensor, references: Tensor) -> Tensor:
    """Eq. (28): d_bgm = || x_bg - r_bm ||_2.

    Args: x (..., B, G, S), references (..., B, M, S). Returns: (..., B, G, M), same unit as x.
    The differences themselves are never stored (memory B*G*M, not B*G*M*S), and the faster dot-product expansion is
    avoided because it loses half the digits for close pairs, which are the ones that matter.
    """
    return torch.cdist(x, references, compute_mode="donot_use_mm_for_euclid_dist")


def global_scale(d: Tensor, w: Tensor | None = None, reduce: Reduce | None = None) -> Tensor:
    """Eq. (29): s = mean(d * w) / mean(w), one scalar per minibatch, zero self-distances included.

    Args: d (..., B, G, M), w (..., B, M) or None for 1, reduce: see `dbp_loss`. Returns: (..., 1, 1, 1).
    It makes one temperature mean the same thing in every batch, whatever the unit of the actions.
    """
    average = reduce or (lambda statistic: statistic)  # ranks hold equal shares: the mean of means is the mean of all
    if w is None:
        return average(d.mean((-3, -2, -1), keepdim=True))
    w = w.unsqueeze(-2)  #                                                    (..., B, 1, M)
    return average((d * w).mean((-3, -2, -1), keepdim=True)) / average(w.mean((-3, -2, -1), keepdim=True)).clamp_min(1e-12)


def affinity(d_normalised: Tensor, w: Tensor | None, temperature: float) -> Tensor:
    """Eqs. (30)-(31): A = sqrt( softmax over references(l) * softmax over hypotheses(l) ) * w, l = -d / temperature.

    Args: d_normalised (..., B, G, M) in units of s, w (..., B, M) or None for 1, temperature > 0. Returns: (..., B, G, M).
    The first softmax asks whom a hypothesis attends to, the second which hypothesis a reference belongs to; a pair
    counts when both agree. DEPARTS the product is floored, as in the released code: no pair weighs less than 1e-3,
    so that a hypothesis that lost every competition still feels the expert.
    """
    logits = d_normalised / -temperature  # Eq. (30)                          (..., B, G, M)
    logits = logits.movedim((-2, -1), (0, 1)).contiguous()  # batch innermost: softmax over few entries is 4 times faster
    mutual = logits.softmax(1).mul_(logits.softmax(0))  #                     (G, M, ..., B)
    A = mutual.clamp_min_(AFFINITY_FLOOR).sqrt_().movedim((0, 1), (-2, -1))
    return A if w is None else A * w.unsqueeze(-2)  # Eq. (31)                (..., B, G, M)


def balanced_coefficients(A: Tensor, n_positives: int) -> Tensor:
    """Eqs. (9), (32)-(34): signed coefficients, negative for repulsion, positive for attraction.

    Args: A (..., B, G, M) with the n_positives positives last. Returns: (..., B, G, M), sums to 0 over M.
    Each side is weighted by the other side's mass: a stronger pull comes with a stronger push, and the field vanishes
    where both sides balance. Swapping the two sides flips every sign, V_{p,q} = -V_{q,p} of Eq. (2).
    """
    A_neg, A_pos = A[..., :-n_positives], A[..., -n_positives:]  #                 (..., B, G, G+N), (..., B, G, P)
    mass_neg = A_neg.sum(-1, keepdim=True)  # Eq. (32)  repulsion mass        (..., B, G, 1)
    mass_pos = A_pos.sum(-1, keepdim=True)  #           attraction mass       (..., B, G, 1)
    return torch.cat([A_neg * -mass_pos, A_pos * mass_neg], -1)  # Eq. (33); the sum over M is 0, Eq. (34)


def force(coefficients: Tensor, references: Tensor, x: Tensor, unit: Tensor) -> Tensor:
    """Eqs. (5), (35): F = sum_m c_m * (r_m - x) / u.

    Args: coefficients (..., B, G, M), references (..., B, M, S), x (..., B, G, S), unit (..., 1, 1, 1).
    Returns: (..., B, G, S), without unit. Written as two products instead of a (B, G, M, S) tensor of displacements;
    the second is 0 but for rounding, Eq. (34), and removes just that rounding.
    """
    c = coefficients / unit  # divided here, where the tensor is small
    return (c @ references).addcmul_(c.sum(-1, keepdim=True), x, value=-1)


def normalise_force(F: Tensor, reduce: Reduce | None = None) -> tuple[Tensor, Tensor]:
    """Eq. (36): F / max(RMS(F), 1e-4), the RMS over batch, hypotheses and coordinates.

    Args: F (..., B, G, S), reduce: see `dbp_loss`. Returns: the normalised force, and the raw RMS (..., 1, 1, 1).
    Without it one temperature would drown the others in Eq. (37). It is also why the loss value carries no information.
    """
    rms = torch.linalg.vector_norm(F, dim=(-3, -2, -1), keepdim=True) / F.shape[-3:].numel() ** 0.5
    if reduce is not None:
        rms = reduce(rms.square()).sqrt()
    return F / rms.clamp_min(FORCE_FLOOR), rms


@torch.no_grad()
def drift_field(
    x: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    *,
    w_generated: Tensor | None = None,
    w_positives: Tensor | None = None,
    w_negatives: Tensor | None = None,
    temperatures: Sequence[float] = (0.2,),
    self_references: bool = True,
    reduce: Reduce | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Eqs. (5), (8)-(9), (26)-(37): the drift V(x), and the unit u in which it is measured.

    Args: as `dbp_loss`; self_references: let x repel itself, Eq. (26). False leaves the explicit negatives alone:
        then V is exactly antisymmetric in positives and negatives and 0 where both are equal, Eq. (2).
    Returns: V (..., B, G, S) in units of u, u (..., 1, 1, 1), diagnostics (see `dbp_loss`). No gradient flows.
    """
    P = positives.shape[-2]
    sets = [(x, w_generated)] if self_references else []  # Eqs. (26)-(27): negative side first, positives last
    sets += [(negatives, w_negatives)] if negatives is not None else []
    sets += [(positives, w_positives)]
    references = torch.cat([r for r, _ in sets], -2)  # r                               (..., B, M, S)
    w = None
    if any(weights is not None for _, weights in sets):
        w = torch.cat([r.new_ones(r.shape[:-1]) if weights is None else weights.to(r) for r, weights in sets], -1)  # (..., B, M)

    d = pairwise_distance(x, references)  # Eq. (28)                                    (..., B, G, M)
    s = global_scale(d, w, reduce)  # Eq. (29)                                          (..., 1, 1, 1)
    unit = (s / x.shape[-1] ** 0.5).clamp_min(SCALE_FLOOR)  # Eq. (56)
    d_normalised = d / s.clamp_min(SCALE_FLOOR)  # Eqs. (8), (56)
    if self_references:  # DEPARTS as released: a chunk does not see its own copy, whose distance 0 would outweigh all others
        d_normalised.diagonal(dim1=-2, dim2=-1).add_(SELF_DISTANCE)

    V = None
    diagnostics = {"scale": _average(s), "distance": d[..., -P:].mean()}
    for tau in temperatures:
        A = affinity(d_normalised, w, tau)  # Eqs. (30)-(31)                            (..., B, G, M)
        F = force(balanced_coefficients(A, P), references, x, unit)  # Eqs. (32)-(35)   (..., B, G, S)
        F, rms = normalise_force(F, reduce)  # Eq. (36)
        V = F if V is None else V + F  # Eq. (37)
        diagnostics[f"force_rms_{tau:g}"] = _average(rms)
    return V, unit, diagnostics


def dbp_loss(
    generated: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    *,
    w_generated: Tensor | None = None,
    w_positives: Tensor | None = None,
    w_negatives: Tensor | None = None,
    temperatures: Sequence[float] = (0.2,),
    reduce: Reduce | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The DBP loss in chunk mode, Eqs. (3)-(4), (10)-(11), (38)-(41).

        loss_b = mean over g and coordinates of ( x/u - stopgrad(x/u + V) )^2

    Its value is the mean square of V, Eq. (41); its gradient, in closed form, is d mean_b(loss_b) / dx = -2 V / (u B G S).

    Args:
        generated: (B, G, S) hypotheses, normalised action units; G >= 1. With G = 1 there is nothing to repel: the force
            points at the positives alone, and a multimodal expert is averaged (the paper studies this case).
        positives: (B, P, S), P >= 1. negatives: (B, N, S) or None.
        w_generated, w_positives, w_negatives: (B, G), (B, P), (B, N) reference weights >= 0; None means 1.
        temperatures: the set T, each > 0, in units of the mean distance s.
        reduce: averages a scalar over data-parallel ranks (s and the RMS of Eq. 36 couple all samples of a minibatch);
            with it, R ranks of B/R samples give the gradient of one process with B samples.
    Returns:
        loss (B,), to be averaged over b, Eqs. (11), (40); and a dict of detached scalars: `scale` (s), `distance` (mean distance
        to the positives), `force_rms_<tau>` (force before Eq. 36). These three tell whether training moves.
    Raises: ValueError for shapes that do not fit, G or P = 0, temperatures <= 0.
    """
    _check(generated, positives, negatives, w_generated, w_positives, w_negatives, temperatures)
    # Float32 whatever autocast says: distances between close chunks vanish in bfloat16.
    generated, positives, negatives = _full_precision(generated), _full_precision(positives), _full_precision(negatives)
    with _no_autocast(generated.device.type):
        x = generated.detach()  # x', Eq. (25)
        weights = {"w_generated": w_generated, "w_positives": w_positives, "w_negatives": w_negatives}
        V, unit, diagnostics = drift_field(x, positives, negatives, **weights, temperatures=temperatures, reduce=reduce)
        scaled = generated / unit  #                                                    (..., B, G, S)
        target = V.add_(scaled.detach())  # Eqs. (2)-(3), (38): x'/u + V, a constant
        error = torch.nn.functional.mse_loss(scaled, target, reduction="none")  # Eqs. (4), (10)
        loss = error.mean((-2, -1))  # Eq. (39)                                         (..., B)
    return loss, diagnostics


def dbp_loss_stepwise(
    generated: Tensor, positives: Tensor, negatives: Tensor | None = None, **kwargs
) -> tuple[Tensor, dict[str, Tensor]]:
    """The DBP loss in step-wise mode: Eq. (11), second form. Each of the Tp slices is a problem of its own with S = Da.

    Args: generated (B, G, Tp, Da), positives (B, P, Tp, Da), negatives (B, N, Tp, Da); the rest as `dbp_loss`,
        the weights (B, .) shared by all slices. Returns: loss (B,), the mean over slices; diagnostics averaged over slices.
    One batched computation: the slices are a leading dimension, not a Python loop.
    """

    def slices_first(r: Tensor | None) -> Tensor | None:
        return None if r is None else r.movedim(-2, 0).contiguous()  # (B, G, Tp, Da) -> (Tp, B, G, Da)

    if generated.ndim != 4:
        raise ValueError(f"generated has shape {tuple(generated.shape)}; step-wise mode takes (B, G, Tp, Da)")
    slices = slices_first(generated)
    for name in ("w_generated", "w_positives", "w_negatives"):
        if kwargs.get(name) is not None:
            kwargs[name] = kwargs[name].expand(slices.shape[0], *kwargs[name].shape)
    loss, diagnostics = dbp_loss(slices, slices_first(positives), slices_first(negatives), **kwargs)
    return loss.mean(0), diagnostics


def _average(statistic: Tensor) -> Tensor:
    """Over the separate problems, of which there is one in chunk mode."""
    return statistic.mean() if statistic.numel() > 1 else statistic.reshape(())


def _no_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Leaving autocast where it is on; where it is off, nothing: entering its context costs 0.04 ms."""
    on = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else contextlib.nullcontext()


def _full_precision(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dtype in (torch.float32, torch.float64) else x.float()


def _check(generated, positives, negatives, w_generated, w_positives, w_negatives, temperatures) -> None:
    sets = {
        "generated": (generated, w_generated),
        "positives": (positives, w_positives),
        "negatives": (negatives, w_negatives),
    }
    for name, (r, w) in sets.items():
        if r is None and w is None:
            continue
        if r is None:
            raise ValueError(f"w_{name} was given without {name}")
        if r.ndim < 3 or r.shape[:-2] != generated.shape[:-2] or r.shape[-1] != generated.shape[-1]:
            raise ValueError(
                f"{name} has shape {tuple(r.shape)}; it must be (B, number, S) with the B and S of "
                f"generated {tuple(generated.shape)}"
            )
        if r.shape[-2] < 1:
            raise ValueError(f"{name} holds 0 chunks per observation; at least 1 is needed")
        if w is not None and w.shape != r.shape[:-1]:
            raise ValueError(f"w_{name} has shape {tuple(w.shape)}; it must be {tuple(r.shape[:-1])}")
    if len(temperatures) == 0 or any(not tau > 0 for tau in temperatures):
        raise ValueError(f"temperatures is {tuple(temperatures)}; each must be above 0, for example (0.2,)")
