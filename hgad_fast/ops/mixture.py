"""The hierarchical Gaussian mixture: losses and scores of pixels (HGAD, arXiv 2403.13349, sections 3.3 and 3.4).

Symbols: N pixels, row-major over (image, row, column); C channels; K classes; M intra-class centres.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import fused, in_float32, kernels, no_double_backward, path

SCORE_ROWS = 8192  # pixels whose densities are computed together by the definitions of scoring
CENTRES_TOGETHER = 64  # whose products with those pixels are: 2 MB


def log_weights(phi: Tensor) -> Tensor:
    """Return log softmax over the last axis; a row of -inf stays -inf where log_softmax would give NaN."""
    return phi - phi.logsumexp(-1, keepdim=True).clamp(min=torch.finfo(phi.dtype).min)


def _check_labels(labels: Tensor, classes: int) -> None:
    """Raise a ValueError for labels on the CPU that name no class; reading others would wait for their device."""
    if labels.device.type == "cpu" and labels.numel() and not torch.compiler.is_compiling():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            raise ValueError(f"labels name a class {low if low < 0 else high}; allowed are 0 to {classes - 1}")


def _check_terms(
    z: Tensor,
    labels: Tensor,
    mu: Tensor,
    delta: Tensor,
    phi_inter: Tensor,
    phi_intra: Tensor,
    **_: Any,  # the other arguments of an operation
) -> None:
    """Raise a ValueError where a shape, or the dtype or range of the labels, does not fit."""
    _check_mixture(z, None, mu, delta, phi_inter, phi_intra, labels)


def _check_terms_backward(
    glse: Tensor, gentropy: Tensor, ginformation: Tensor, gown: Tensor, z: Tensor, *parameters: Tensor, **options: Any
) -> None:
    """Raise a ValueError where a shape, or the dtype or range of the labels, does not fit."""
    _check_terms(z, *parameters, **options)
    gradients = {"glse": glse, "gentropy": gentropy, "ginformation": ginformation}
    gradients |= {"gown": gown} if options["stage"] == 2 else {}
    for name, gradient in gradients.items():
        if gradient.shape != z.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(gradient.shape)}; for {len(z)} pixels it must be ({len(z)},)")


@fused("mixture", check=_check_terms)
def mixture_terms(
    z: Tensor,
    labels: Tensor,
    mu: Tensor,
    delta: Tensor,
    phi_inter: Tensor,
    phi_intra: Tensor,
    *,
    label_smoothing: float,
    stage: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Compute the four per-pixel quantities of HGAD's training losses (equations 5 to 9 of the paper).

    With :math:`d_k = -\|z - \mu_k\|^2 / 2`, own class y, label smoothing e, and the centres of y at
    :math:`\mu_y` and :math:`\mu_y + \delta_{ym}`:

    .. math::
        A = \log \sum_k \pi_k e^{d_k}, \quad H = \mathrm{entropy}(\mathrm{softmax}(d)), \quad
        I = (1 - e) d_y + \frac{e}{K} \sum_k d_k - A, \quad B = \log \sum_m w_{ym} e^{-\|z - c_{ym}\|^2 / 2}

    The weights are constants in I, and mu is one in B. Everything is computed relative to the own class: z - mu_y
    and mu_k - mu_y are formed first, so that no large squared norms cancel.

    Args:
        z: (N, C).
        labels: own class, int64: (N,) one per pixel, or (B,) one per image; image b owns the rows b N/B .. (b+1) N/B.
        mu: main centres (K, C).
        delta: offsets of the other intra-class centres (K, M - 1, C).
        phi_inter: unnormalised log-weights of the classes (K,).
        phi_intra: unnormalised log-weights of the centres of each class (K, M).
        label_smoothing: e.
        stage: 1 (inter-class terms only) or 2.

    Returns:
        A, H, I, B, each (N,) in the dtype of z; in stage 1 B is empty, and delta and phi_intra receive no gradient.

    Raises:
        ValueError: labels on the CPU name no class. On a GPU such a label counts as the nearest class.
    """
    order, groups = _by_class(labels, z)
    log_pi, log_w = log_weights(phi_inter), log_weights(phi_intra)
    parts = []
    for y, (pixels,) in groups:
        inter = _inter_class_terms(pixels, y, mu, log_pi, label_smoothing)
        own = _own_class_lse(pixels, mu[y], delta[y], log_w[y]) if stage == 2 else z.new_empty(0)
        parts.append((*inter, own))
    if not parts:
        return z.sum(1), z.sum(1), z.sum(1), z.sum(1)
    terms = [torch.cat(part) for part in zip(*parts, strict=True)]
    if order is not None:
        inverse = torch.argsort(order)
        terms = [term[inverse] if term.numel() else term for term in terms]
    return terms[0], terms[1], terms[2], terms[3]


def _by_class(labels: Tensor, *rows: Tensor) -> tuple[Tensor | None, Iterator[tuple[int, tuple[Tensor, ...]]]]:
    """Split per-pixel tensors into groups of one class.

    Returns:
        the order that sorts rows by class, or None for labels per image, whose rows stay as they are; and an iterator
        over the groups: their class, and their part of each tensor.
    """
    n = rows[0].shape[0]
    if labels.numel() != n:
        counts, classes, order = [n // labels.numel()] * labels.numel(), labels, None
    else:
        order = torch.argsort(labels, stable=True)
        classes, sizes = torch.unique_consecutive(labels[order], return_counts=True)
        counts, rows = sizes.tolist(), tuple(t.index_select(0, order) for t in rows)
    return order, zip(classes.tolist(), zip(*(t.split(counts) for t in rows), strict=True), strict=True)


def _inter_class_terms(z: Tensor, y: int, mu: Tensor, log_pi: Tensor, label_smoothing: float) -> tuple[Tensor, ...]:
    """Return A, H and I of pixels of class y."""
    z, centres = z - mu[y], mu - mu[y]
    d_y = -0.5 * z.square().sum(1)
    d = z @ centres.T - 0.5 * centres.square().sum(1)  # d_k - d_y
    lse = d_y + (d + log_pi).logsumexp(1)
    log_p = d.log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    information = label_smoothing * d.mean(1) - (d + log_pi.detach()).logsumexp(1)
    return lse, entropy, information


def _own_class_lse(z: Tensor, mu: Tensor, delta: Tensor, log_w: Tensor) -> Tensor:
    """Return B of pixels of one class, given its main centre (C,), offsets (M - 1, C) and log-weights (M,)."""
    z = z - mu.detach()
    offsets = F.pad(delta, (0, 0, 1, 0))  # the main centre comes first
    e = z @ offsets.T - 0.5 * offsets.square().sum(1)
    return -0.5 * z.square().sum(1) + (e + log_w).logsumexp(1)


@fused("mixture", check=_check_terms_backward)
def mixture_terms_backward(
    glse: Tensor,
    gentropy: Tensor,
    ginformation: Tensor,
    gown: Tensor,
    z: Tensor,
    labels: Tensor,
    mu: Tensor,
    delta: Tensor,
    phi_inter: Tensor,
    phi_intra: Tensor,
    *,
    label_smoothing: float,
    stage: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `mixture_terms` for z, mu, delta, phi_inter and phi_intra, from z alone.

    Args:
        glse, gentropy, ginformation, gown: gradients of A, H, I and B, each (N,); in stage 1 `gown` is empty.
        z, labels, mu, delta, phi_inter, phi_intra, label_smoothing, stage: as in `mixture_terms`.

    Returns:
        gradients in the shapes of z, mu, delta, phi_inter, phi_intra; those of delta and phi_intra are zero in stage 1.
    """
    classes = mu.shape[0]
    log_pi, log_w = log_weights(phi_inter), log_weights(phi_intra)
    gmu, gdelta, glog_pi, glog_w = (t.new_zeros(t.shape) for t in (mu, delta, phi_inter, phi_intra))
    gzs = []
    gown = gown if stage == 2 else torch.zeros_like(glse)
    order, groups = _by_class(labels, z, *(gterm[:, None] for gterm in (glse, gentropy, ginformation, gown)))
    for y, (pixels, ga, gh, gi, gb) in groups:  # of A, H, I and B
        pixels, centres = pixels - mu[y], mu - mu[y]
        d = pixels @ centres.T - 0.5 * centres.square().sum(1)
        q, log_p = log_weights(d + log_pi).exp(), d.log_softmax(1)
        p_log_p = log_p.exp() * log_p
        target = torch.full_like(mu[:, 0], label_smoothing / classes)
        target[y] += 1 - label_smoothing
        gd = ga * q + gi * (target - q) - gh * (p_log_p - log_p.exp() * p_log_p.sum(1, keepdim=True))
        gmu += gd.T @ pixels - gd.sum(0)[:, None] * centres
        glog_pi += (ga * q).sum(0)
        gz = torch.addmm((ga + gb) * pixels, gd, centres, beta=-1)
        if stage == 2:
            offsets = F.pad(delta[y], (0, 0, 1, 0))
            r = log_weights(pixels @ offsets.T - 0.5 * offsets.square().sum(1) + log_w[y]).exp()
            ge = gb * r
            gdelta[y] += (ge.T @ pixels - ge.sum(0)[:, None] * offsets)[1:]
            glog_w[y] += ge.sum(0)
            gz.addmm_(ge, offsets)
        gzs.append(gz)
    gz = torch.cat(gzs) if gzs else z.new_zeros(z.shape)
    if order is not None:
        gz = gz.index_select(0, torch.argsort(order))
    gphi_inter = glog_pi - log_pi.exp() * glog_pi.sum()
    return gz, gmu, gdelta, gphi_inter, glog_w - log_w.exp() * glog_w.sum(1, keepdim=True)


@in_float32
def mixture_losses(
    z: Tensor,
    log_det: Tensor,
    labels: Tensor,
    mu: Tensor,
    delta: Tensor,
    phi_inter: Tensor,
    phi_intra: Tensor,
    *,
    label_smoothing: float = 0.02,
    stage: int = 2,
    targets: Tensor | None = None,
    backend: str | None = None,
) -> dict[str, Tensor]:
    """Return the loss terms of one level for each pixel.

    Args:
        z, labels, mu, delta, phi_inter, phi_intra, label_smoothing, stage: as in `mixture_terms`.
        log_det: log-determinant of the flow (N,).
        targets: soft class targets (N, K) for the mutual-information term in place of the smoothed label; rows sum
            to 1.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``L_g`` (negative log-likelihood of the inter-class mixture, nats per channel), ``L_mi`` (to be maximised),
        ``L_e`` (entropy), and in stage 2 ``L_g_intra`` and ``L_z``; each (N,).

    Raises:
        ValueError: a shape does not fit; the message says which.
    """
    _check_mixture(z, log_det, mu, delta, phi_inter, phi_intra, labels)
    if stage not in (1, 2):
        raise ValueError(f"stage is {stage!r}; allowed are 1 and 2")
    lse, entropy, information, own = _mixture_forward(
        z, labels, mu, delta, phi_inter, phi_intra, label_smoothing, stage, backend or ""
    )
    channels = z.shape[1]
    if targets is not None:
        information = _soft_information(z, targets, mu, log_weights(phi_inter.detach()))
    losses = {"L_g": (lse + log_det) / -channels, "L_mi": information, "L_e": entropy}
    if stage == 2:
        losses["L_g_intra"] = (own + log_det) / -channels
        losses["L_z"] = F.softplus(losses["L_g_intra"] + 0.5 * math.log(2 * math.pi))
    return losses


def _soft_information(z: Tensor, targets: Tensor, mu: Tensor, log_pi: Tensor) -> Tensor:
    """Return I for any target t, sum_k t_k (log softmax(d + log pi)_k - log pi_k), z taken from the centres' mean."""
    if targets.shape != (z.shape[0], mu.shape[0]):
        raise ValueError(f"targets have shape {tuple(targets.shape)}; expected {(z.shape[0], mu.shape[0])}")
    mean = mu.detach().mean(0)
    centres = mu - mean
    d = (z - mean) @ centres.T - 0.5 * centres.square().sum(1)
    return (targets * ((d + log_pi).log_softmax(1) - log_pi)).sum(1)


def _check_mixture(
    z: Tensor,
    log_det: Tensor | None,
    mu: Tensor,
    delta: Tensor,
    phi_inter: Tensor,
    phi_intra: Tensor,
    labels: Tensor | None = None,
    **_: Any,  # the other arguments of an operation
) -> None:
    """Raise a ValueError where a shape, or the dtype or range of the labels, does not fit."""
    (n, channels), classes, centres = z.shape, mu.shape[0], phi_intra.shape[-1]
    expected = {
        "log_det": (z[:, 0] if log_det is None else log_det, (n,)),
        "mu": (mu, (classes, channels)),
        "delta": (delta, (classes, centres - 1, channels)),
        "phi_inter": (phi_inter, (classes,)),
        "phi_intra": (phi_intra, (classes, centres)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; with z of {(n, channels)} it must be {shape}")
    if labels is None:
        return
    count = labels.numel()
    if labels.dim() != 1 or labels.dtype != torch.int64 or (n % count if count else n):
        raise ValueError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}; expected int64, one for each of the {n} pixels "
            "or one for each image"
        )
    _check_labels(labels, classes)


@torch.library.custom_op("hgad_fast::mixture_forward", mutates_args=())
def _mixture_forward(
    z: Tensor,
    labels: Tensor,
    mu: Tensor,
    delta: Tensor,
    phi_inter: Tensor,
    phi_intra: Tensor,
    label_smoothing: float,
    stage: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return mixture_terms(
        z,
        labels,
        mu,
        delta,
        phi_inter,
        phi_intra,
        label_smoothing=label_smoothing,
        stage=stage,
        backend=backend,
    )


@_mixture_forward.register_fake
def _(z, labels, mu, delta, phi_inter, phi_intra, label_smoothing, stage, backend):  # type: ignore[no-untyped-def]
    n = z.shape[0]
    return z.new_empty(n), z.new_empty(n), z.new_empty(n), z.new_empty(n if stage == 2 else 0)


@torch.library.custom_op("hgad_fast::mixture_backward", mutates_args=())
def _mixture_backward(
    gterms: list[Tensor],
    z: Tensor,
    labels: Tensor,
    mu: Tensor,
    delta: Tensor,
    phi_inter: Tensor,
    phi_intra: Tensor,
    label_smoothing: float,
    stage: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of z, mu, delta, phi_inter and phi_intra; terms are recomputed, so that z alone is kept."""
    return mixture_terms_backward(
        *gterms,
        z,
        labels,
        mu,
        delta,
        phi_inter,
        phi_intra,
        label_smoothing=label_smoothing,
        stage=stage,
        backend=backend,
    )


@_mixture_backward.register_fake
def _(gterms, z, labels, mu, delta, phi_inter, phi_intra, label_smoothing, stage, backend):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape) for t in (z, mu, delta, phi_inter, phi_intra))  # contiguous, whatever t is


def _save_mixture(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, label_smoothing, stage, backend = inputs
    ctx.options = (label_smoothing, stage, backend)
    ctx.save_for_backward(*tensors)


def _mixture_gradients(ctx: Any, *gterms: Tensor) -> tuple[Any, ...]:
    """Return the gradients of the inputs of `_mixture_forward`; None where there is none."""
    stage = ctx.options[1]
    gz, gmu, gdelta, gphi_inter, gphi_intra = _mixture_backward(
        [gterm.contiguous() for gterm in gterms], *ctx.saved_tensors, *ctx.options
    )
    if stage == 1:  # None, not zeros: Adam would count the steps
        gdelta = gphi_intra = None
    return gz, None, gmu, gdelta, gphi_inter, gphi_intra, None, None, None


_mixture_forward.register_autograd(_mixture_gradients, setup_context=_save_mixture)
mixture_terms.differentiable = lambda *arguments: _mixture_forward(*arguments, "triton")
_mixture_backward.register_autograd(no_double_backward)


class MixtureScores(NamedTuple):
    """Natural-log densities of x per pixel (with log-determinant and constants, not divided by C)."""

    log_density: Tensor  # (N,) of the full mixture over all K x M centres
    best_class: Tensor  # (N,) int64
    best_log_density: Tensor  # (N,)
    own_log_density: Tensor | None  # (N,) of the labelled class
    entropy: Tensor  # (N,) of the class posterior softmax_k(-|z - mu_k|^2 / 2)
    class_log_density: Tensor | None  # (N, K)


@fused("mixture", MixtureScores._make, _check_mixture)
def mixture_scores(
    z: Tensor,
    log_det: Tensor,
    mu: Tensor,
    delta: Tensor,
    phi_inter: Tensor,
    phi_intra: Tensor,
    labels: Tensor | None = None,
    *,
    per_class: bool = False,
) -> MixtureScores:
    r"""Return the densities of every pixel under the hierarchical mixture, some classes at a time.

    .. math:: \log p_k = \log \sum_m w_{km} e^{-\|z - c_{km}\|^2 / 2} + \log|\det| - \tfrac{C}{2} \log 2\pi

    Args:
        z: (N, C).
        log_det: (N,).
        mu, delta, phi_inter, phi_intra: as in `mixture_terms`.
        labels: own class, int64, (N,) or (B,), as in `mixture_terms`; None leaves `own_log_density` out.
        per_class: also return log p_k of every class, (N, K).

    Returns:
        `MixtureScores`; not differentiable. `best_class` maximises log p_k, the lowest index on ties; `log_density` is
        log sum_k pi_k p_k.

    Raises:
        ValueError: a shape does not fit; the message says which.
    """
    labels = None if labels is None else labels.repeat_interleave(len(z) // max(labels.numel(), 1))
    with torch.no_grad():
        prior = prior_of(mu, delta, phi_inter, phi_intra)
        parts = []
        for start in range(0, max(len(z), 1), SCORE_ROWS):
            rows = slice(start, start + SCORE_ROWS)
            row_labels = None if labels is None else labels[rows]
            parts.append(_mixture_scores(z[rows], log_det[rows], prior, row_labels, per_class))
        fields = zip(*parts, strict=True)
        return MixtureScores._make(None if field[0] is None else torch.cat(field) for field in fields)


class Prior(NamedTuple):
    """The mixture, with centres relative to their mean, so that no large squared norms cancel."""

    mean: Tensor  # (C,)
    centres: Tensor  # (K, M, C), less the mean
    half_norms: Tensor  # (K, M), half their squared norms
    log_pi: Tensor  # (K,)
    bias: Tensor  # (K, M), log-weights less half norms

    @property
    def groups(self) -> list[slice]:
        """The classes whose products are formed together: of a class alone they might round otherwise."""
        classes, centres = self.bias.shape
        together = max(1, CENTRES_TOGETHER // centres)
        return [slice(start, start + together) for start in range(0, classes, together)]

    def of_classes(self, classes: slice, z: Tensor) -> Tensor:
        """Return the rest of the log-densities of a group of classes (N, classes), for a centred z."""
        centres, bias = self.centres[classes], self.bias[classes]
        return (z @ centres.flatten(0, 1).T).view(len(z), *bias.shape).add_(bias).logsumexp(2)

    def entropy(self, z: Tensor) -> Tensor:
        """Return the entropy of the class posterior (N,), for a centred z."""
        return posterior_entropy(torch.addmm(-self.half_norms[:, 0], z, self.centres[:, 0].T))


def centred(z: Tensor, mean: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
    """Return z (..., C) less the centres' mean (C,), and the part of the log-density that all centres share (...)."""
    z = z - mean
    return z, log_det - 0.5 * z.square().sum(-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)


def posterior_entropy(exponents: Tensor) -> Tensor:
    """Return the entropy (...) of the class posterior softmax(exponents) of exponents (..., K)."""
    log_p = exponents.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def prior_of(mu: Tensor, delta: Tensor, phi_inter: Tensor, phi_intra: Tensor) -> Prior:
    """Return the mixture as scoring needs it; it is kept while no parameter changes."""

    def make() -> Prior:
        centres = torch.cat([mu[:, None], mu[:, None] + delta], 1)
        mean = centres.mean((0, 1))
        centres = centres - mean
        half_norms = 0.5 * centres.double().square().sum(-1).to(mu.dtype)
        return Prior(mean, centres, half_norms, log_weights(phi_inter), log_weights(phi_intra) - half_norms)

    return kernels("cache").PACKED.get(make, ("prior",), (mu, delta, phi_inter, phi_intra))


def _mixture_scores(z: Tensor, log_det: Tensor, prior: Prior, labels: Tensor | None, per_class: bool) -> MixtureScores:
    """Return the scores of at most `SCORE_ROWS` pixels; `labels` are one per pixel, or None."""
    z, base = centred(z, prior.mean, log_det)
    density = torch.cat([prior.of_classes(classes, z) for classes in prior.groups], 1)
    best, best_class = density.max(1)
    return MixtureScores(
        log_density=(density + prior.log_pi).logsumexp(1) + base,
        best_class=best_class,
        best_log_density=best + base,
        own_log_density=None if labels is None else density.gather(1, labels[:, None]).squeeze(1) + base,
        entropy=prior.entropy(z),
        class_log_density=density.add_(base[:, None]) if per_class else None,
    )


@torch.no_grad()
@in_float32
def own_class_scores(
    z: Tensor,
    log_det: Tensor,
    mu: Tensor,
    delta: Tensor,
    phi_inter: Tensor,
    phi_intra: Tensor,
    labels: Tensor,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return each pixel's log-density under its own class, and the entropy of its class posterior: all a map needs.

    They are those of `mixture_scores`, at K + M distances per pixel instead of K M, or in torch K + `CENTRES_TOGETHER`
    at most. On a CPU, both give the same bits where all rows are of one class.

    Args:
        z, log_det, mu, delta, phi_inter, phi_intra: as in `mixture_scores`.
        labels: own class, int64, (N,) or (B,), as in `mixture_terms`.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        log p_y and the entropy, (N,) each; not differentiable.

    Raises:
        ValueError: a shape does not fit; the message says which.
    """
    _check_mixture(z, log_det, mu, delta, phi_inter, phi_intra, labels)
    if path(z, backend) == "triton":
        parameters = (z, labels, mu, delta, phi_inter, phi_intra)
        _, entropy, _, own = mixture_terms(*parameters, label_smoothing=0.0, stage=2, backend=backend)
        return own + log_det - 0.5 * z.shape[1] * math.log(2 * math.pi), entropy
    prior = prior_of(mu, delta, phi_inter, phi_intra)
    order, groups = _by_class(labels, z, log_det)
    densities, entropies = [z.new_empty(0)], [z.new_empty(0)]
    for k, rows in groups:
        for z_rows, log_det_rows in zip(*(tensor.split(SCORE_ROWS) for tensor in rows), strict=True):
            offsets, base = centred(z_rows, prior.mean, log_det_rows)
            (group,) = (classes for classes in prior.groups if classes.start <= k < classes.stop)
            densities.append(prior.of_classes(group, offsets)[:, k - group.start] + base)
            entropies.append(prior.entropy(offsets))
    density, entropy = torch.cat(densities), torch.cat(entropies)
    if order is not None:
        inverse = torch.argsort(order)
        density, entropy = density[inverse], entropy[inverse]
    return density, entropy
