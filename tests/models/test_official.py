"""The drop-in surface: the calls that the official training script makes, against the official formulation."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest
import rounding
import torch
from rounding import SAME_IN_FLOAT64
from torch import Tensor

from hgad_fast import HGADModel as HGAD
from hgad_fast.bench import official
from hgad_fast.modules.flow import dense_position, sinusoidal_position
from hgad_fast.protocol import Progress

K, M, P, LAYERS, LEVELS, SMOOTHING = 4, 3, 16, 3, 2, 0.02


def official_args(**changes: object) -> argparse.Namespace:
    """Arguments as the official script has them, with a small backbone; `mystery` is one the library does not know."""
    args = argparse.Namespace(
        backbone_arch="resnet10t",
        backbone_weights=None,
        out_indices=(2,),
        flow_arch="conditional_flow_model",
        feature_levels=LEVELS,
        coupling_layers=LAYERS,
        clamp_alpha=1.9,
        pos_embed_dim=P,
        label_smoothing=SMOOTHING,
        lambda1=1.0,
        lambda2=100.0,
        n_intra_centers=M,
        img_size=64,
        msk_size=32,
        lr=2e-4,
        meta_epochs=4,
        sub_epochs=1,
        batch_size=2,
        device=torch.device("cpu"),
        mystery="ignored",
    )
    vars(args).update(changes)
    args.n_classes = K
    args.class_to_idx = {"nut": 2, "bolt": 0, "tile": 3, "cable": 1}
    return args


@pytest.fixture
def model() -> HGAD:
    return HGAD(official_args())


@pytest.fixture
def double() -> Iterator[HGAD]:
    """Yield a model in float64, and compute in it: there the official formulation must give the same."""
    with rounding.in_float64():
        yield HGAD(official_args()).double()


def batch_of(model: HGAD, level: int, images: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (N, C), labels (B, h, w), onehot (N, K), pos_embed (N, P) as the official loop makes them."""
    h, w = 8 >> level, 8 >> level
    x = torch.randn(images * h * w, model.feat_dims[level])
    labels = torch.randint(0, K, (images, 1, 1)).repeat(1, h, w)
    onehot = official.smoothed_onehot(labels.flatten(), K, SMOOTHING)
    return x, labels, onehot, official.dense_position(P, images, h, w)


def official_terms(model: HGAD, level: int, x: Tensor, labels: Tensor, onehot: Tensor, pos_embed: Tensor, epoch: int):
    """Return the terms and their gradients by FrEIA blocks and materialised distances."""
    flow = official.official_flow(model.feat_dims[level], P, LAYERS)
    flow.load_state_dict(model.nfs[level].state_dict())
    parts = (model.mus, model.mu_deltas, model.phi_inters, model.phi_intras)
    mixture = [part[level].detach().clone().requires_grad_() for part in parts]
    x = x.detach().clone().requires_grad_()
    z, log_det = flow(x, [pos_embed])
    terms = official.official_losses(z, log_det, labels.flatten(), onehot, *mixture, stage=1 if epoch < 2 else 2)
    official.official_loss(terms).backward()
    gradients = {"x": x.grad, **{f"nfs.{name}": p.grad for name, p in flow.named_parameters() if p.requires_grad}}
    names = ("mus", "mu_deltas", "phi_inters", "phi_intras")
    return terms, gradients | {name: p.grad for name, p in zip(names, mixture, strict=True)}


def our_terms(
    model: HGAD, level: int, x: Tensor, labels: Tensor, onehot: Tensor | None, pos_embed: Tensor | None, epoch: int
):
    x = x.detach().clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    terms = model(x, (labels, onehot), pos_embed, scale=level, epoch=epoch)
    official.official_loss(terms).backward()
    gradients = {"x": x.grad, **{f"nfs.{n}": grad for n, grad in official.named_gradients(model.nfs[level]).items()}}
    for name in ("mus", "mu_deltas", "phi_inters", "phi_intras"):
        gradients[name] = getattr(model, name)[level].grad
    return terms, gradients


def assert_same(ours, official):
    (terms, gradients), (wanted_terms, wanted_gradients) = ours, official
    assert terms.keys() == wanted_terms.keys()
    for name, expected in wanted_terms.items():
        assert terms[name].dim() == 0
        assert (terms[name] - expected).abs() <= SAME_IN_FLOAT64 * expected.abs(), name
    for name, expected in wanted_gradients.items():
        actual = gradients[name]
        if expected is None:
            assert actual is None, name
        else:
            assert (actual - expected).norm() <= SAME_IN_FLOAT64 * (1 + expected.norm()), name


def test_official_script_contract():
    """The calls of the official training script, in its order."""
    args = official_args()
    model = HGAD(args)
    assert model.class_names == ("bolt", "cable", "nut", "tile")
    optimizer = model.optimizer
    assert isinstance(optimizer, torch.optim.Adam) and len(optimizer.param_groups) == 3
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 0.0, 0.0]
    assert all(group["betas"] == (0.95, 0.99) for group in optimizer.param_groups)
    model = model.to(args.device)
    assert model.optimizer is optimizer
    model.train()
    assert not model.encoder.training and all(not flow.training for flow in [model.encoder.net])
    assert isinstance(model.feat_dims, list) and len(model.feat_dims) == LEVELS
    assert model.n_centers_each_class == M

    images, image_labels = torch.randn(2, 3, 64, 64), torch.tensor([2, 0])
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    for epoch in (0, 1, 2):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        with torch.no_grad():
            features = model.encoder(images)
        assert isinstance(features, list) and len(features) == LEVELS
        for level, feature in enumerate(features):
            images_, channels, h, w = feature.shape
            assert channels == model.feat_dims[level]
            x = feature.permute(0, 2, 3, 1).reshape(-1, channels)
            labels = image_labels.view(-1, 1, 1).repeat(1, h, w)
            onehot = official.smoothed_onehot(labels.flatten(), K, SMOOTHING)
            losses = model(x, (labels, onehot), official.dense_position(P, images_, h, w), scale=level, epoch=epoch)
            assert set(losses) == {"L_g", "L_mi", "L_e"} | ({"L_g_intra", "L_z"} if epoch >= 2 else set())
            losses["loss"] = official.official_loss(losses)  # the dict is the caller's to write to
            optimizer.zero_grad()
            losses["loss"].backward()
            if epoch < 2:  # None, not zeros: Adam would count the steps
                assert model.mu_deltas[level].grad is None and model.phi_intras[level].grad is None
            optimizer.step()
    # as drawn, the other centres of a class are so far from its pixels that their share rounds to nothing
    still = {n for n, p in model.named_parameters() if n in start and torch.equal(p, start[n])}
    assert still <= {f"mixture.mu_deltas.{level}" for level in range(LEVELS)}

    z, log_jac_det = model.nfs[0](x, [official.dense_position(P, images_, h, w)])
    assert z.shape == x.shape and log_jac_det.shape == (len(x),)
    assert model.nfs[0].state_dict().keys() == official.official_flow(model.feat_dims[0], P, LAYERS).state_dict().keys()


@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("level", range(LEVELS))
def test_terms_and_gradients_are_the_official_ones(double: HGAD, level: int, epoch: int):
    batch = batch_of(double, level)
    assert_same(our_terms(double, level, *batch, epoch), official_terms(double, level, *batch, epoch))


def test_without_onehot_and_pos_embed_they_are_built(double: HGAD):
    x, labels, onehot, pos_embed = batch_of(double, 0)
    assert_same(
        our_terms(double, 0, x, labels, None, None, 2), official_terms(double, 0, x, labels, onehot, pos_embed, 2)
    )
    flat = our_terms(double, 0, x, labels.flatten(), None, pos_embed, 2)
    assert_same(flat, official_terms(double, 0, x, labels, onehot, pos_embed, 2))
    with pytest.raises(ValueError, match=r"pass labels of shape \(B, h, w\)"):
        double(x, (labels.flatten(), None), None)


def test_labels_may_differ_from_pixel_to_pixel(double: HGAD):
    x, labels, _, pos_embed = batch_of(double, 0)
    labels = torch.randint(0, K, labels.shape)
    batch = (x, labels, official.smoothed_onehot(labels.flatten(), K, SMOOTHING), pos_embed)
    assert_same(our_terms(double, 0, *batch, 2), official_terms(double, 0, *batch, 2))


def other_smoothing(labels: Tensor) -> Tensor:
    return official.smoothed_onehot(labels, K, 0.3)


def hard_onehot(labels: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(labels, K)


def soft_target(labels: Tensor) -> Tensor:
    """Uneven, with more than one half on the label."""
    rest = torch.rand(len(labels), K).scatter(1, labels[:, None], 0.0)
    return 0.4 * rest / rest.sum(1, keepdim=True) + 0.6 * hard_onehot(labels)


@pytest.mark.parametrize("target", [other_smoothing, hard_onehot, soft_target])
@pytest.mark.parametrize("epoch", [0, 2])
def test_the_onehot_is_honoured_as_given(double: HGAD, target, epoch: int):
    x, labels, _, pos_embed = batch_of(double, 0)
    batch = (x, labels, target(labels.flatten()), pos_embed)
    assert_same(our_terms(double, 0, *batch, epoch), official_terms(double, 0, *batch, epoch))


def permuted(code: Tensor) -> Tensor:
    return code[torch.randperm(len(code))]


def perturbed(code: Tensor) -> Tensor:
    return code + 1e-3 * torch.randn_like(code)


def shifted(code: Tensor) -> Tensor:
    return code.roll(1, 0)


@pytest.mark.parametrize("change", [permuted, perturbed, shifted, torch.zeros_like, torch.randn_like])
def test_any_pos_embed_is_honoured_as_given(double: HGAD, change):
    x, labels, onehot, pos_embed = batch_of(double, 0)
    batch = (x, labels, onehot, change(pos_embed))
    assert_same(our_terms(double, 0, *batch, 2), official_terms(double, 0, *batch, 2))


@pytest.mark.parametrize(("h", "w", "images"), [(8, 8, 3), (1, 6, 4), (6, 1, 4), (1, 1, 5), (3, 7, 1), (7, 3, 2)])
def test_the_grid_is_recognised_and_nothing_else(model: HGAD, h: int, w: int, images: int):
    flow = model.nfs[0]
    grid = dense_position(sinusoidal_position(h, w, P), images)
    actual = flow.position([grid])
    assert torch.allclose(dense_position(actual, images), grid, rtol=0, atol=1e-6)
    swapped = grid.roll(P // 2, 1)  # rows first, columns second
    for other in (grid + 2e-6, swapped if h * w > 1 and h != w else -grid, grid.clone().requires_grad_()):
        position = flow.position([other])
        assert position is other or torch.allclose(dense_position(position, len(other) // (h * w)), other, atol=1e-6)


def test_a_dense_pos_embed_may_be_trained(double: HGAD):
    x, labels, onehot, pos_embed = batch_of(double, 0)
    pos_embed.requires_grad_()
    official.official_loss(double(x, (labels, onehot), pos_embed, scale=0, epoch=0)).backward()
    actual, pos_embed.grad = pos_embed.grad, None
    flow = official.official_flow(double.feat_dims[0], P, LAYERS)
    flow.load_state_dict(double.nfs[0].state_dict())
    z, log_det = flow(x, [pos_embed])
    mixture = (double.mus[0], double.mu_deltas[0], double.phi_inters[0], double.phi_intras[0])
    official.official_loss(official.official_losses(z, log_det, labels.flatten(), onehot, *mixture, stage=1)).backward()
    assert (actual - pos_embed.grad).norm() < SAME_IN_FLOAT64 * pos_embed.grad.norm()


def test_trajectory_across_the_stage_switch(double: HGAD):
    """Three steps of stage 1 and three of stage 2, driven as the official loop does, against plain autograd."""
    torch.manual_seed(1)
    peers = [official.OfficialLevel.of(double, level) for level in range(LEVELS)]
    optimizers = [peer.optimizer() for peer in peers]
    batches = [batch_of(double, level) for level in range(LEVELS)]
    for step in range(6):
        epoch = step // 3 + 1
        rate = 10 * double.schedule(Progress(epoch, 0, step % 3, batches=3))[1]
        for level, (peer, optimizer) in enumerate(zip(peers, optimizers, strict=True)):
            x, labels, onehot, pos_embed = batches[level]
            for group in (*double.optimizer.param_groups, *optimizer.param_groups):
                group["lr"] = rate
            ours = official.official_loss(double(x, (labels, onehot), pos_embed, scale=level, epoch=epoch))
            double.optimizer.zero_grad()
            ours.backward()
            double.optimizer.step()
            z, log_det = peer.flow(x, [pos_embed])
            mixture = (peer.mu, peer.delta, peer.phi_inter, peer.phi_intra)
            terms = official.official_losses(
                z, log_det, labels.flatten(), onehot, *mixture, stage=1 if epoch < 2 else 2
            )
            theirs = official.official_loss(terms)
            optimizer.zero_grad()
            theirs.backward()
            optimizer.step()
            assert abs(float(ours.detach() / theirs.detach()) - 1) < SAME_IN_FLOAT64
    for level, peer in enumerate(peers):
        for ours, theirs in zip(double.nfs[level].parameters(), peer.flow.parameters(), strict=False):
            if theirs.requires_grad and ours.shape == theirs.shape:
                assert (ours - theirs).norm() < SAME_IN_FLOAT64 * theirs.norm()
        assert (double.mus[level] - peer.mu).norm() < SAME_IN_FLOAT64 * peer.mu.norm()
        assert (double.mu_deltas[level] - peer.delta).norm() < SAME_IN_FLOAT64 * peer.delta.norm()


def test_helpers_of_the_class(model: HGAD):
    z, mu = torch.randn(7, 5), torch.randn(4, 3, 5)
    distances = (z[:, None, None] - mu).square().sum(-1)
    torch.testing.assert_close(model.calculate_distances_to_intra_class_centers(z, mu), distances)
    torch.testing.assert_close(model.calculate_distances_to_inter_class_centers(z, mu=mu[:, 0]), distances[:, :, 0])
    assert model.calculate_distances_to_inter_class_centers(torch.zeros(1, model.feat_dims[0])).shape == (1, K)
    log_py, log_det = torch.randn(3).log_softmax(0), torch.randn(7)
    expected = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=log_py),
        torch.distributions.Independent(torch.distributions.Normal(mu[1], 1.0), 1),
    ).log_prob(z)
    torch.testing.assert_close(model.get_logps(z, mu[1], log_py, log_det, 5), expected + log_det)
    shared = mu[1].expand(7, 3, 5)
    for own in (shared, shared.contiguous()):
        torch.testing.assert_close(model.get_logps(z, own, log_py.expand(7, 3), log_det, 5), expected + log_det)
    assert model.get_logps(z[:0], shared[:0], log_py.expand(0, 3), log_det[:0], 5).shape == (0,)
