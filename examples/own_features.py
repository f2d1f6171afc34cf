"""Features in, no images: HGAD on feature maps of an encoder of your own (here: drawn at random).

Run it with `python examples/own_features.py`; it takes some seconds on a laptop.
"""

from __future__ import annotations

import torch

from hgad_fast import HGADConfig, HGADModel
from hgad_fast.evaluation.metrics import auroc

CLASSES, CHANNELS, SIDE = 2, 16, 8


def draw(images_per_class: int, generator: torch.Generator) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Draw feature maps of one level, (n, C, h, w), and the class of each: every class has its own covariance."""
    mixing = torch.randn(CLASSES, CHANNELS, 4, generator=torch.Generator().manual_seed(0))
    class_ids = torch.arange(CLASSES).repeat(images_per_class)
    causes = torch.randn(len(class_ids), 4, SIDE, SIDE, generator=generator)
    noise = 0.3 * torch.randn(len(class_ids), CHANNELS, SIDE, SIDE, generator=generator)
    return [torch.einsum("ncd,ndhw->nchw", mixing[class_ids], causes) + noise], class_ids


def main(meta_epochs: int = 6) -> float:
    """Train, break the pattern in a quarter of each test map, and return the pixel AUROC."""
    generator = torch.Generator().manual_seed(1)
    config = HGADConfig(
        n_classes=CLASSES,
        backbone_arch=None,
        feature_levels=1,
        feature_dims=(CHANNELS,),
        coupling_layers=4,
        pos_embed_dim=16,
        msk_size=4 * SIDE,  # scores are computed, and blurred, at this resolution
        lambda2=2.0,  # two classes part easily; the short training is better spent on the likelihood
        lr=5e-3,
        meta_epochs=meta_epochs,
        sub_epochs=2,
    )
    model = HGADModel(config)
    model.fit(draw(100, generator), calibration=draw(50, generator))

    (features,), class_ids = draw(20, generator)
    corner = features[:, :, :4, :4]
    corner.copy_(corner.flip(1))  # the same values in other channels
    result = model.score_features([features], map_size=SIDE)
    truth = torch.zeros(len(features), SIDE, SIDE, dtype=torch.bool)
    truth[:, :4, :4] = True
    pixel_auroc = auroc(result.anomaly_map.flatten(), truth.flatten())
    print(f"inferred class right: {(result.class_id == class_ids).float().mean():.0%}, pixel AUROC {pixel_auroc:.3f}")
    return pixel_auroc


if __name__ == "__main__":
    main()
