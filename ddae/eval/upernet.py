"""UperNet on a plain ViT: a feature pyramid from four blocks, segmentation-models-pytorch's decoder, sliding windows.

Shapes: B images, S pixels a side, C classes, D width of the encoder. Follows the ADE20K heads of BootMAE and BEiT
(mmsegmentation's UPerHead and FCNHead).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import Tensor, nn
from torch.nn import functional as F

from ddae.atomic import new_folder, write_json
from ddae.config.pretrain import EncoderShape
from ddae.config.segmentation import SceneConfig
from ddae.errors import UserError, one_line
from ddae.export.encoder import require_finite
from ddae.models.vit import Encoder

FORMAT, WEIGHTS, SETTINGS = 1, "model.safetensors", "config.json"  # of a segmenter
CLASS_CHUNK = 16  # classes that are interpolated to the image's size together
AUX_CHANNELS = 256
AUX_SCALE = 2  # index of the pyramid level at the grid's own size


class FeaturePyramid(nn.Module):
    """Rescales the feature maps of four blocks to 4, 2, 1 and 1/2 times the grid's size."""

    def __init__(self, width: int):
        super().__init__()
        upsample = [nn.ConvTranspose2d(width, width, 2, stride=2) for _ in range(2)]
        self.fpn1 = nn.Sequential(upsample[0], nn.BatchNorm2d(width), nn.GELU(), upsample[1])
        self.fpn2 = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.fpn3 = nn.Identity()
        self.fpn4 = nn.MaxPool2d(2)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """maps: four times [B, D, h, w] -> the pyramid levels, finest first."""
        levels = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        return [level(each) for level, each in zip(levels, maps, strict=True)]


class PixelClassifier(nn.Conv2d):
    """Convolution to class logits, in fp32 also under autocast: bf16 would make close logits equal."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))


class Segmenter(nn.Module):
    """Encoder, feature pyramid, UperNet decoder and head, with an auxiliary FCN head for the loss."""

    def __init__(self, encoder: Encoder, num_classes: int, config: SceneConfig, generator: torch.Generator):
        """config: with taps and channels resolved; generator: of the initial weights of all but the encoder."""
        super().__init__()
        assert config.channels is not None
        self.encoder, self.taps, self.aux_weight = encoder, config.taps, config.aux_weight
        encoder.norm = nn.Identity()  # type: ignore[assignment]  # the decoder takes tokens without final norm
        width, channels = encoder.shape.width, config.channels
        self.neck = FeaturePyramid(width)
        # The decoder is written for CNNs, whose two finest scales it takes but does not use.
        self.decoder = UPerNetDecoder([0, 0, *[width] * 4], decoder_channels=channels)
        self.decoder.feature_norms = nn.ModuleList([nn.Identity()] * 4)
        self.head = nn.Sequential(nn.Dropout2d(config.dropout), PixelClassifier(channels, num_classes, 1))
        self.aux = nn.Sequential(
            nn.Conv2d(width, AUX_CHANNELS, 3, padding=1, bias=False),
            nn.BatchNorm2d(AUX_CHANNELS),
            nn.ReLU(),
            nn.Dropout2d(config.dropout),
            PixelClassifier(AUX_CHANNELS, num_classes, 1),
        )
        for part in (self.neck, self.decoder, self.head, self.aux):
            init_convolutions(part, generator)
        for classifier in (self.head, self.aux):
            nn.init.normal_(classifier[-1].get_parameter("weight"), std=0.01, generator=generator)

    def forward(self, pixels: Tensor, labels: Tensor | None = None, ignored: int = -1) -> Tensor:
        """Return logits float32 [B, C, S, S], or the loss [] if labels int64 [B, S, S] are given.

        pixels: normalised [B, 3, S, S]. The loss is the cross-entropy plus aux_weight times that of the auxiliary head.
        Pixels labelled `ignored` contribute 0 to the sum but count in the mean.
        """
        tokens = self.encoder.features(pixels, self.taps)
        rows, columns = self.encoder.grid
        maps = [each[:, 1:].transpose(1, 2).unflatten(2, (rows, columns)) for each in tokens]
        levels = self.neck(maps)
        logits = self.head(self.decoder([pixels, pixels, *levels]))
        if labels is None:
            return self._upsample(logits)
        main = self._loss(logits, labels, ignored)
        return main + self.aux_weight * self._loss(self.aux(levels[AUX_SCALE]), labels, ignored)

    def _loss(self, logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
        losses = F.cross_entropy(self._upsample(logits), labels, ignore_index=ignored, reduction="none")
        return losses.mean()  # over all pixels, as in the mmsegmentation version that BootMAE used

    def _upsample(self, logits: Tensor) -> Tensor:
        return F.interpolate(logits.float(), self.encoder.shape.height_width, mode="bilinear", align_corners=False)


def init_convolutions(module: nn.Module, generator: torch.Generator) -> None:
    """Initialise as mmcv: Kaiming-normal (fan-out) convolutions, torch's default transposed ones, zero biases."""
    for each in module.modules():
        if isinstance(each, nn.ConvTranspose2d):
            nn.init.kaiming_uniform_(each.weight, a=5**0.5, generator=generator)
        elif isinstance(each, nn.Conv2d):
            nn.init.kaiming_normal_(each.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        if isinstance(each, (nn.Conv2d, nn.ConvTranspose2d)) and each.bias is not None:
            nn.init.zeros_(each.bias)


def extend_encoder(encoder: Encoder, relative_positions: bool, layer_scale: float) -> Encoder:
    """Return the encoder with relative position biases per block and with layer scale, unless it has them (BootMAE).

    New relative position biases are zero; new layer scales are `layer_scale` (0: none are added).
    """
    shape = encoder.shape
    if relative_positions and shape.relative_positions == "none":
        shape = replace(shape, relative_positions="each")
    if layer_scale and not shape.layer_scale:
        shape = replace(shape, layer_scale=layer_scale)
    extended = Encoder(shape)
    extended.normalisation = encoder.normalisation
    for name, parameter in extended.named_parameters():
        if name.endswith("relative_position_bias_table"):
            nn.init.zeros_(parameter)
    missing, unexpected = extended.load_state_dict(encoder.state_dict(), strict=False)
    assert all(name.endswith(("relative_position_bias_table", "gamma")) for name in missing)
    assert not unexpected
    return extended


@torch.no_grad()
def predict_classes(segmenter: Segmenter, pixels: Tensor, stride: float, size: tuple[int, ...]) -> Tensor:
    """Return the most likely class of each pixel at the size (H, W): int64 [H, W].

    pixels: normalised [3, h, w]; stride: distance between windows as a fraction of the window's side.
    """
    logits = sliding_window_logits(segmenter, pixels, max(1, int(stride * segmenter.encoder.shape.height_width[0])))
    best, labels = logits.new_full(size, -torch.inf), torch.zeros(size, dtype=torch.int64, device=logits.device)
    for first in range(0, len(logits), CLASS_CHUNK):  # all classes of a large photograph may exceed the memory
        chunk = logits[None, first : first + CLASS_CHUNK]
        values, classes = F.interpolate(chunk, size, mode="bilinear", align_corners=False)[0].max(0)
        labels = torch.where(values > best, classes + first, labels)
        best = torch.maximum(best, values)
    return labels


def sliding_window_logits(segmenter: Segmenter, pixels: Tensor, stride: int) -> Tensor:
    """Return logits [C, H, W] averaged over overlapping windows, for pixels [3, H, W].

    The windows have the size of a training crop, are `stride` pixels apart and form one batch.
    """
    side, _ = segmenter.encoder.shape.height_width  # equal: see segmentation.py
    height, width = pixels.shape[1:]
    padded = F.pad(pixels, (0, max(0, side - width), 0, max(0, side - height)))
    tops, lefts = (window_starts(length, side, stride) for length in padded.shape[1:])
    origins = [(top, left) for top in tops for left in lefts]
    windows = torch.stack([padded[:, top : top + side, left : left + side] for top, left in origins])
    logits = segmenter(windows)
    total, counts = logits.new_zeros(logits.shape[1], *padded.shape[1:]), logits.new_zeros(padded.shape[1:])
    for (top, left), each in zip(origins, logits, strict=True):
        total[:, top : top + side, left : left + side] += each
        counts[top : top + side, left : left + side] += 1
    return (total / counts)[:, :height, :width]


def window_starts(length: int, side: int, stride: int) -> list[int]:
    """Return the offsets of windows that cover `length` pixels; the last window ends at its end."""
    count = max(0, length - side + stride - 1) // stride + 1
    return [min(number * stride, length - side) for number in range(count)]


def write_segmenter(
    state: dict[str, Tensor], encoder: Encoder, config: SceneConfig, classes: Sequence[str], folder: Path
) -> None:
    """Write model.safetensors and config.json, which load_segmenter() reads, as an atomic folder."""
    decoder = {"taps": config.taps, "channels": config.channels, "stride": config.stride, "classes": list(classes)}
    require_finite(state, "the segmenter")
    with new_folder(folder) as partial:
        save_file(state, partial / WEIGHTS)
        settings = {"format": FORMAT, "model": asdict(encoder.shape), "normalisation": encoder.normalisation, **decoder}
        write_json(partial / SETTINGS, settings)


def load_segmenter(folder: Path) -> tuple[Segmenter, float, list[str]]:
    """Load what write_segmenter() wrote: the segmenter in eval mode, its window stride and its class names.

    Raise UserError if the folder contains no segmenter, or one of another format.
    """
    if not (folder / WEIGHTS).exists() or not (folder / SETTINGS).exists():
        raise UserError(f"{folder} contains no segmenter; expected a finished segmentation run, runs/NAME/segment.")
    try:
        settings = json.loads((folder / SETTINGS).read_text())
        if settings.get("format") != FORMAT:
            raise ValueError(f"its format is {settings.get('format')}, expected {FORMAT}")
        encoder = Encoder(EncoderShape(**settings["model"]))
        encoder.normalisation = settings["normalisation"]
        config = SceneConfig(taps=tuple(settings["taps"]), channels=settings["channels"])
        segmenter = Segmenter(encoder, len(settings["classes"]), config, torch.Generator())
        segmenter.load_state_dict(load_file(folder / WEIGHTS))
        return segmenter.eval().requires_grad_(False), settings["stride"], settings["classes"]
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = f"{folder} is not a segmenter of this version ({one_line(error)})"
        raise UserError(f"{reason}. Run launch/segment.py again.") from None
