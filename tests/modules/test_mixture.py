"""The centres of a class that joins a trained mixture."""

import torch

from hgad_fast.modules.mixture import fitted_centres


def test_centres_are_found_and_the_first_is_the_mean():
    """Latents of three clouds of unit variance: each centre lies in its cloud, up to the rounding of a mean."""
    generator = torch.Generator().manual_seed(0)
    clouds = torch.tensor([[0.0, 0.0], [30.0, 0.0], [0.0, 30.0]], dtype=torch.float64)
    counts = (500, 300, 200)
    noise = torch.randn(1000, 2, generator=generator, dtype=torch.float64)
    z = clouds.repeat_interleave(torch.tensor(counts), 0) + noise
    mu, delta, phi = fitted_centres(z, 4, seed=0)
    assert torch.equal(mu, z.mean(0))
    free, weights = mu + delta, phi.softmax(0)
    expected = torch.stack([cloud.mean(0) for cloud in z.split(counts)])
    nearest = torch.cdist(free, expected).argmin(1)
    assert sorted(nearest.tolist()) == [0, 1, 2]
    assert torch.allclose(free, expected[nearest], atol=1e-3)  # the main centre, far from all, takes next to nothing
    assert torch.allclose(weights[1:], torch.tensor(counts, dtype=torch.float64)[nearest] / 1000, atol=2e-3)
    one = fitted_centres(z, 1, seed=0)
    assert one[1].shape == (0, 2) and one[2].tolist() == [0.0]
    same = fitted_centres(torch.ones(5, 2), 3, seed=0)
    assert all(tensor.isfinite().all() for tensor in same)
