"""UperNet on a plain ViT: tokens of four blocks become four scales, which segmentation-models-pytorch's decoder joins.

B images, S pixels a side, C classes, D width of the encoder. After BootMAE's and BEiT's ADE20K heads (mmsegmentation's
UPerHead and FCNHead).
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import Tensor, nn
from torch.nn import functional as F

from ddae.config.pretrain import ModelConfig
from ddae.config.segmentation import SceneConfig
from ddae.errors import UserError
from ddae.export.encoder import whole_folder
from ddae.models.vit import Encoder

FORMAT, WEIGHTS, SETTINGS = 1, "model.safetensors", "config.json"  # of a segmenter
AT_ONCE = 16  # classes that are brought to an image's own size
AUX_CHANNELS = 256
AUX_SCALE = 2  # whose patches keep their size


class Pyramid(nn.Module):
    """Maps of four blocks at 4, 2, 1 and 1/2 times the grid's size, all of width D."""

    def __init__(self, width: int):
        super().__init__()
        double = nn.ConvTranspose2d(width, width, 2, stride=2)
        again = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.fpn1 = nn.Sequential(double, nn.BatchNorm2d(width), nn.GELU(), again)
        self.fpn2 = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.fpn3 = nn.Identity()
        self.fpn4 = nn.MaxPool2d(2)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        scales = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        return [scale(each) for scale, each in zip(scales, maps, strict=True)]


class Classes(nn.Conv2d):
    """A class a place, in fp32 whatever surrounds it: two classes may lie closer than bf16 can tell."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))


class Segmenter(nn.Module):
    """Images -> a class a pixel."""

    def __init__(self, encoder: Encoder, num_classes: int, config: SceneConfig, generator: torch.Generator):
        """config.taps and config.channels are settled."""
        super().__init__()
        assert config.channels is not None
        self.encoder, self.taps, self.aux_weight = encoder, config.taps, config.aux_weight
        encoder.norm = nn.Identity()  # type: ignore[assignment]  # the blocks' tokens are taken before any norm
        width, channels = encoder.shape.width, config.channels
        self.neck = Pyramid(width)
        # The decoder's form for CNNs has two finer scales before ours, which it never looks at.
        self.decoder = UPerNetDecoder([0, 0, *[width] * 4], decoder_channels=channels)
        self.decoder.feature_norms = nn.ModuleList([nn.Identity()] * 4)
        self.head = nn.Sequential(nn.Dropout2d(config.dropout), Classes(channels, num_classes, 1))
        self.aux = nn.Sequential(
            nn.Conv2d(width, AUX_CHANNELS, 3, padding=1, bias=False),
            nn.BatchNorm2d(AUX_CHANNELS),
            nn.ReLU(),
            nn.Dropout2d(config.dropout),
            Classes(AUX_CHANNELS, num_classes, 1),
        )
        for part in (self.neck, self.decoder, self.head, self.aux):
            initialise(part, generator)
        for classifier in (self.head, self.aux):
            nn.init.normal_(classifier[-1].get_parameter("weight"), std=0.01, generator=generator)

    def forward(self, pixels: Tensor, labels: Tensor | None = None, ignored: int = -1) -> Tensor:
        """[B, 3, S, S] -> logits [B, C, S, S]; with labels int64 [B, S, S] the loss: cross-entropy, which `ignored`
        pixels add nothing to, over all pixels, and aux_weight times that of the auxiliary head."""
        tokens = self.encoder.features(pixels, self.taps)
        rows, columns = self.encoder.grid
        maps = [each[:, 1:].transpose(1, 2).unflatten(2, (rows, columns)) for each in tokens]
        scales = self.neck(maps)
        logits = self.head(self.decoder([pixels, pixels, *scales]))
        if labels is None:
            return self._enlarged(logits)
        main = self._loss(logits, labels, ignored)
        return main + self.aux_weight * self._loss(self.aux(scales[AUX_SCALE]), labels, ignored)

    def _loss(self, logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
        losses = F.cross_entropy(self._enlarged(logits), labels, ignore_index=ignored, reduction="none")
        return losses.mean()  # over ignored pixels, too: mmsegmentation's of BootMAE's time

    def _enlarged(self, logits: Tensor) -> Tensor:
        side = self.encoder.shape.image_size
        return F.interpolate(logits.float(), (side, side), mode="bilinear", align_corners=False)


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """He-normal convolutions by their outputs, transposed ones as torch has them, zero biases (mmcv)."""
    for each in module.modules():
        if isinstance(each, nn.ConvTranspose2d):
            nn.init.kaiming_uniform_(each.weight, a=5**0.5, generator=generator)
        elif isinstance(each, nn.Conv2d):
            nn.init.kaiming_normal_(each.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        if isinstance(each, (nn.Conv2d, nn.ConvTranspose2d)) and each.bias is not None:
            nn.init.zeros_(each.bias)


def prepared(encoder: Encoder, relative_positions: bool, layer_scale: float) -> Encoder:
    """The encoder with what segmentation adds to it where it has none: relative positions of each block, which begin at
    zero, and factors of what a block adds (BootMAE)."""
    shape = encoder.shape
    if relative_positions and shape.relative_positions == "none":
        shape = replace(shape, relative_positions="each")
    if layer_scale and not shape.layer_scale:
        shape = replace(shape, layer_scale=layer_scale)
    wider = Encoder(shape)
    wider.normalisation = encoder.normalisation
    for name, parameter in wider.named_parameters():
        if name.endswith("relative_position_bias_table"):
            nn.init.zeros_(parameter)
    left, unexpected = wider.load_state_dict(encoder.state_dict(), strict=False)
    added = {name for name in left if name.endswith(("relative_position_bias_table", "gamma"))}
    assert set(left) == added
    assert not unexpected
    return wider


@torch.no_grad()
def classify(segmenter: Segmenter, pixels: Tensor, stride: float, size: tuple[int, ...]) -> Tensor:
    """Normalised [3, h, w] -> the likeliest class of each pixel of the image in another size: int64 [H, W].

    stride: from a window to the next, over the window.
    """
    logits = slide(segmenter, pixels, max(1, int(stride * segmenter.encoder.shape.image_size)))
    best, labels = logits.new_full(size, -torch.inf), torch.zeros(size, dtype=torch.int64, device=logits.device)
    for first in range(0, len(logits), AT_ONCE):  # all classes of a large photograph would fill the memory
        some = F.interpolate(logits[None, first : first + AT_ONCE], size, mode="bilinear", align_corners=False)
        values, numbers = some[0].max(0)
        labels = torch.where(values > best, numbers + first, labels)
        best = torch.maximum(best, values)
    return labels


def slide(segmenter: Segmenter, pixels: Tensor, stride: int) -> Tensor:
    """[3, H, W] -> logits [C, H, W]: the mean over windows as large as the crops, `stride` pixels apart, all of them in
    one pass."""
    side = segmenter.encoder.shape.image_size
    height, width = pixels.shape[1:]
    padded = F.pad(pixels, (0, max(0, side - width), 0, max(0, side - height)))
    tops, lefts = (starts(length, side, stride) for length in padded.shape[1:])
    places = [(top, left) for top in tops for left in lefts]
    windows = torch.stack([padded[:, top : top + side, left : left + side] for top, left in places])
    scores = segmenter(windows)
    total, counts = scores.new_zeros(scores.shape[1], *padded.shape[1:]), scores.new_zeros(padded.shape[1:])
    for (top, left), each in zip(places, scores, strict=True):
        total[:, top : top + side, left : left + side] += each
        counts[top : top + side, left : left + side] += 1
    return (total / counts)[:, :height, :width]


def starts(length: int, side: int, stride: int) -> list[int]:
    """Where windows begin that cover a length, the last of them at its end."""
    count = max(0, length - side + stride - 1) // stride + 1
    return [min(number * stride, length - side) for number in range(count)]


def write_segmenter(
    state: dict[str, Tensor], encoder: Encoder, config: SceneConfig, classes: Sequence[str], folder: Path
) -> None:
    """A folder that load_segmenter() reads, whole or not at all: model.safetensors and config.json."""
    shape = {name: getattr(encoder.shape, name) for name in ModelConfig.__dataclass_fields__}
    about = {"taps": config.taps, "channels": config.channels, "stride": config.stride, "classes": list(classes)}
    settings = {"format": FORMAT, "model": shape, "normalisation": encoder.normalisation, **about}
    with whole_folder(folder) as unfinished:
        save_file(state, unfinished / WEIGHTS)
        (unfinished / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


def load_segmenter(folder: Path) -> tuple[Segmenter, float, list[str]]:
    """What write_segmenter() left, in eval mode: the segmenter, its stride and its classes' names.

    UserError where there is none, or another version's.
    """
    if not (folder / WEIGHTS).exists() or not (folder / SETTINGS).exists():
        raise UserError(f"{folder} holds no segmenter: name the folder of a finished segmentation, runs/NAME/segment")
    try:
        settings = json.loads((folder / SETTINGS).read_text())
        if settings.get("format") != FORMAT:
            raise ValueError(f"its format is {settings.get('format')}, not {FORMAT}")
        encoder = Encoder(ModelConfig(**settings["model"]))
        encoder.normalisation = settings["normalisation"]
        config = SceneConfig(taps=tuple(settings["taps"]), channels=settings["channels"])
        segmenter = Segmenter(encoder, len(settings["classes"]), config, torch.Generator())
        segmenter.load_state_dict(load_file(folder / WEIGHTS))
        return segmenter.eval().requires_grad_(False), settings["stride"], settings["classes"]
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} is no segmenter of this version ({reason}): run launch/segment.py again") from None
