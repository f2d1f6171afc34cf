"""Scoring of one image as a graph of plain torch operations of fixed size, for other runtimes to run.

It computes what `HGADModel.score` does of a float image that has the model's size already: calibrated, the class
inferred, the map on the grid of the scores. Constants are what the library keeps of the parameters, too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hgad_fast import HGADModel
from hgad_fast.features.backbone import Backbone
from hgad_fast.modules.flow import ConditionalFlow
from hgad_fast.ops import mixture, subnet
from hgad_fast.scoring.calibration import Calibration
from hgad_fast.scoring.maps import blurred_axis


class BackboneGraph(nn.Module):
    """An image (1, 3, H, W) in [0, 1] -> features (1, C, h, w) of each level; onnxruntime folds batch norms itself."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Backbone, size: tuple[int, int]) -> None:
        super().__init__()
        self.net = copy.deepcopy(backbone.net)
        self.sizes = backbone.pass_sizes(*size)
        self.register_buffer("mean", backbone.mean.clone())
        self.register_buffer("std", backbone.std.clone())

    def forward(self, image: Tensor) -> list[Tensor]:
        image = (image - self.mean) / self.std
        features = []
        for size in self.sizes:
            whole = size == tuple(image.shape[2:])
            resized = image if whole else F.interpolate(image, size, mode="bilinear", align_corners=True)
            features += self.net(resized)
        return features


class LevelGraph(nn.Module):
    """Features (1, C, h, w) of a level -> log-density of each class, over C (h, w, K), and entropy (h, w)."""

    def __init__(self, flow: ConditionalFlow, centres: Sequence[Tensor], size: tuple[int, int]) -> None:
        super().__init__()
        self.clamp, self.transformed = flow.clamp, flow.channels // 2
        parameters = [tensor.detach() for tensor in flow.blocks]
        self.blocks = [block._replace(w1x=block.w1x.contiguous()) for block in subnet.weights_of(parameters, "fp32")]
        self.tables = []
        position = flow.grid(*size)
        for block in self.blocks:
            table = block.b1.expand(size[0] * size[1], -1)
            if position is not None:
                column, row = subnet.position_tables(block.w1p.T, [position.column, position.row])
                table = table + (row[:, None] + column).flatten(0, 1)
            self.tables.append(table.contiguous())
        self.log_gain = float(torch.cat([block.gain for block in self.blocks]).log().sum())
        self.prior = mixture.prior_of(*(tensor.detach() for tensor in centres))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        h, w = features.shape[2:]
        x = features[0].flatten(1).T
        channels = x.shape[1]
        log_det = x.new_full((h * w,), self.log_gain)
        for block, table in zip(self.blocks, self.tables, strict=True):
            x1, x2 = x[:, : channels - self.transformed], x[:, channels - self.transformed :]
            scale, shift = (torch.relu(x1 @ block.w1x + table) @ block.w2 + block.b2).chunk(2, 1)
            log_scale = self.clamp * torch.tanh(0.1 * scale)
            log_det = log_det + log_scale.sum(1)
            x = torch.cat([x1, x2 * log_scale.exp() + 0.1 * shift], 1) @ block.rotation + block.offset
        prior = self.prior
        z = x - prior.mean
        base = log_det - 0.5 * (z * z).sum(1) - 0.5 * channels * math.log(2 * math.pi)
        products = (z @ prior.centres.flatten(0, 1).T).view(h * w, *prior.bias.shape)
        density = (products + prior.bias).logsumexp(2) + base[:, None]
        log_p = (products[:, :, 0] - prior.half_norms[:, 0]).log_softmax(1)
        entropy = -(log_p.exp() * log_p).sum(1)
        return density.view(h, w, -1) / channels, entropy.view(h, w)


class ScoringGraph(nn.Module):
    """An image (1, 3, H, W) in [0, 1] -> anomaly map (h, w), score and class.

    Args:
        model: a calibrated model of several classes, of the default `map_levels` and score, with a backbone.
        size: (H, W) of the image, those at which the model sees it.
    """

    level_max: Tensor

    def __init__(self, model: HGADModel, size: tuple[int, int]) -> None:
        super().__init__()
        assert isinstance(model.encoder, Backbone) and isinstance(model.calibration, Calibration)
        self.backbone = BackboneGraph(model.encoder, size)
        with torch.no_grad():
            sizes = [(x.shape[2], x.shape[3]) for x in self.backbone(torch.zeros(1, 3, *size))]
        flows: list[ConditionalFlow] = list(model.nfs)  # type: ignore[arg-type]
        centres = map(model.mixture.level, range(len(sizes)))
        self.levels = nn.ModuleList(map(LevelGraph, flows, centres, sizes))
        scale = model.config.msk_size / min(sizes[0])
        grid = [round(side * scale) for side in sizes[0]]
        cpu = torch.device("cpu")
        self.axes = [
            [blurred_axis(n, m, torch.float32, cpu) for n, m in zip(level, grid, strict=True)] for level in sizes
        ]
        self.register_buffer("level_max", model.calibration.level_max)
        self.weights = model.calibration.weights

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        levels = [level(x) for level, x in zip(self.levels, self.backbone(image), strict=True)]
        class_id = torch.stack([density.mean((0, 1)) for density, _ in levels]).sum(0).argmax()
        maps = [image.new_zeros(()), image.new_zeros(())]
        for i, ((density, entropy), (rows, columns)) in enumerate(zip(levels, self.axes, strict=True)):
            above = density.index_select(2, class_id[None])[:, :, 0] - self.level_max[:, i][class_id]
            for part, x in enumerate((above.clamp(max=0), -entropy)):
                maps[part] = maps[part] + rows @ -torch.expm1(x) @ columns.T
        weights = None if self.weights is None else self.weights[class_id]
        anomaly_map = maps[0] * maps[1] if weights is None else weights[0] * maps[0] + weights[1] * maps[1]
        return anomaly_map, anomaly_map.max(), class_id
