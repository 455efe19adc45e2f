"""A transformer that judges images of people: a query for every keypoint of every person, no boxes and no crops."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rg.detectors.detection import Detection
from rg.detectors.hourglass import ResidualBlock
from rg.detectors.stored import StoredNetwork
from rg.points import KEYPOINTS, peaks

STRIDE = 8  # pixels of a token's side
FREQUENCIES = 8  # of the sines that say where a token is
HEADS = 4  # of attention
NOBODY = -2.0  # the logit of a person that training begins with: most queries find nobody


class PoseTransformer(StoredNetwork):
    """Sees the whole image at once, and answers with a set of people (Carion et al., 2020).

    A few convolutions make tokens of 8x8 pixels, which attend to each other. Queries, one for each keypoint of each of
    `people` people, attend to each other and to the tokens; a query's products with the features of cells of 2x2
    pixels are the logits of where its keypoint is, as the masks of Cheng et al. (2021) are.

    Args:
        widths: channels of cells of 2x2 and of 4x4 pixels, and of tokens; multiples of 8.
        encoder_layers, decoder_layers: of the transformer.
        people: how many can be found in one image.
        threshold: score from which on a person counts as present, in [0, 1].
    """

    def __init__(
        self, *, widths: Sequence[int], encoder_layers: int, decoder_layers: int, people: int, threshold: float
    ) -> None:
        super().__init__()
        if len(widths) != 3 or any(width <= 0 or width % 8 for width in widths):
            raise ValueError(f"expected three positive multiples of 8, got {list(widths)}: change `widths`")
        if min(encoder_layers, decoder_layers, people) < 1:
            found = f"encoder_layers={encoder_layers}, decoder_layers={decoder_layers}, people={people}"
            raise ValueError(f"expected at least 1 of each, got {found}")
        if not 0 <= threshold <= 1:
            raise ValueError(f"expected a threshold in [0, 1], got {threshold}: change `threshold`")
        self.widths, self.layers, self.people = tuple(widths), (encoder_layers, decoder_layers), people
        self.threshold = threshold
        fine, middle, width = widths
        self.fine = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, fine, 3, padding=1), nn.SiLU())
        self.middle, self.coarse = ResidualBlock(fine, middle, 2), ResidualBlock(middle, width, 2)
        self.places = nn.Linear(4 * FREQUENCIES, width)
        layer = {"dim_feedforward": 2 * width, "dropout": 0.0, "activation": "gelu"}
        layer |= {"batch_first": True, "norm_first": True}
        self.encoder = nn.ModuleList([nn.TransformerEncoderLayer(width, HEADS, **layer) for _ in range(encoder_layers)])
        self.decoder = nn.ModuleList([nn.TransformerDecoderLayer(width, HEADS, **layer) for _ in range(decoder_layers)])
        self.person = nn.Parameter(torch.randn(people, 1, width))
        self.keypoint = nn.Parameter(torch.randn(1, len(KEYPOINTS), width))
        self.to_middle = nn.Sequential(nn.Conv2d(width, 4 * middle, 1), nn.PixelShuffle(2))
        self.merge = ResidualBlock(middle, middle)
        self.to_fine = nn.Sequential(nn.Conv2d(middle, 4 * fine, 1), nn.PixelShuffle(2))
        self.features = nn.Sequential(nn.SiLU(), nn.Conv2d(fine, fine, 3, padding=1))
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Linear(width, fine)
        self.absent, self.present = nn.Linear(width, 1), nn.Linear(width, 1)
        nn.init.constant_(self.present.bias, NOBODY)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        layers = dict(zip(("encoder_layers", "decoder_layers"), self.layers, strict=True))
        return {"widths": list(self.widths), **layers, "people": self.people, "threshold": self.threshold}

    def _tokens(self, coarse: Tensor) -> Tensor:
        """(B, C, h, w) as tokens (B, h * w, C) that know where they are."""
        h, w = coarse.shape[-2:]
        rows, columns = (torch.linspace(-1, 1, side, device=coarse.device) for side in (h, w))
        grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).flatten(0, 1)
        angles = (grid[..., None] * torch.arange(1, FREQUENCIES + 1, device=coarse.device) * torch.pi / 2).flatten(1)
        return coarse.flatten(2).mT + self.places(torch.cat([angles.sin(), angles.cos()], -1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of every cell, of absence, and of the person, for all keypoints of all people.

        Args:
            images: (B, 3, H, W) in [-1, 1], H and W multiples of 8.

        Returns:
            Logits (B, P, 18, H / 2, W / 2), (B, P, 18) and (B, P); one softmax over a keypoint's cells and its absence
            is its distribution.

        Raises:
            ValueError: images of another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % STRIDE or images.shape[3] % STRIDE:
            expected = f"images (B, 3, H, W) with H and W multiples of {STRIDE}"
            raise ValueError(f"expected {expected}, got {tuple(images.shape)}")
        fine = self.fine(images)
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        tokens = self._tokens(coarse)
        for layer in self.encoder:
            tokens = layer(tokens)
        queries = (self.person + self.keypoint).flatten(0, 1).expand(len(images), -1, -1)
        for layer in self.decoder:
            queries = layer(queries, tokens)
        queries = self.norm(queries).unflatten(1, (-1, len(KEYPOINTS)))
        merged = self.merge(middle + self.to_middle(tokens.mT.unflatten(2, coarse.shape[-2:])))
        features = self.features(fine + self.to_fine(merged))
        cells = self.queries(queries).flatten(1, 2) @ features.flatten(2) / features.shape[1] ** 0.5
        cells = cells.unflatten(1, (-1, len(KEYPOINTS))).unflatten(3, features.shape[-2:])
        return cells, self.absent(queries)[..., 0], self.present(queries.mean(2))[..., 0]

    @torch.no_grad()
    def detect(self, images: Tensor, people: int = 1) -> Detection:
        """Finds the keypoints of up to `people` people in images (B, 3, H, W) in [-1, 1], sides multiples of 8.

        A keypoint's confidence is the largest probability mass of any window of 5x5 cells. People beyond those that
        the network can find have score 0.
        """
        cells, absent, present = (x.float() for x in self(images))
        logits = torch.cat([cells.flatten(3), absent[..., None]], -1)
        maps = logits.softmax(-1)[..., :-1].view_as(cells).flatten(0, 1)
        points = peaks(maps, (images.shape[-2], images.shape[-1]))[0].unflatten(0, present.shape)
        confidence = (F.avg_pool2d(maps, 5, stride=1, padding=2) * 25).flatten(2).amax(-1).clamp(0, 1)
        score, order = present.sigmoid().sort(dim=1, descending=True, stable=True)
        rows = torch.arange(len(images), device=images.device)[:, None]
        found = Detection(
            points[rows, order], confidence.unflatten(0, present.shape)[rows, order], score, score >= self.threshold
        )
        lacking = max(people - present.shape[1], 0)
        return Detection(*(_padded(values, lacking)[:, :people] for values in found))


def _padded(values: Tensor, count: int) -> Tensor:
    return torch.cat([values, values.new_zeros(len(values), count, *values.shape[2:])], 1)
