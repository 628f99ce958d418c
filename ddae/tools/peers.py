"""MAE of other libraries, with their own masks, loss and initial weights, and its evaluation; for bench_peers.py.

B: images, D: encoder width, H and W: pixels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ddae.config.base import ShardsConfig
from ddae.config.pretrain import PretrainConfig
from ddae.data.cache import open_cache
from ddae.data.loader import Batch
from ddae.distributed.comm import device
from ddae.eval import baselines
from ddae.eval.dataset import ExampleReader, val_location
from ddae.eval.features import map_images, pooled_features
from ddae.eval.knn import Settings, accuracy, raw_pixel_accuracy, vote
from ddae.models.patches import normalise
from ddae.training.optimizer import build_optimizer

MAX_BANK = 20_000  # training images in the bank of the k-NN evaluation


class TransformersMAE(nn.Module):
    """ViTMAEForPreTraining of transformers."""

    PACKAGE = "transformers"

    def __init__(self, config: PretrainConfig):
        super().__init__()
        from transformers import ViTMAEConfig, ViTMAEForPreTraining  # type: ignore[import]

        model, decoder = config.model, config.pixel
        shape = ViTMAEConfig(
            hidden_size=model.width,
            num_hidden_layers=model.depth,
            num_attention_heads=model.heads,
            intermediate_size=4 * model.width,
            layer_norm_eps=1e-6,
            image_size=model.image_size,  # a square's side: the scales are squares
            patch_size=model.patch_size,
            decoder_hidden_size=decoder.decoder_width,
            decoder_num_hidden_layers=decoder.decoder_depth,
            decoder_num_attention_heads=decoder.decoder_heads,
            decoder_intermediate_size=4 * decoder.decoder_width,
            mask_ratio=config.mask.ratio,
            norm_pix_loss=decoder.norm != "none",
        )
        self.model: Any = ViTMAEForPreTraining(shape)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the loss of a batch; pixels float32 [B, 3, H, W]."""
        return self.model(pixel_values=pixels).loss

    def features(self, pixels: Tensor) -> Tensor:
        """Return the mean of the patch tokens after the last norm, [B, D]; pixels float32 [B, 3, H, W]."""
        config = self.model.vit.embeddings.config
        ratio, config.mask_ratio = config.mask_ratio, 0.0
        tokens = self.model.vit(pixel_values=pixels).last_hidden_state
        config.mask_ratio = ratio
        return tokens[:, 1:].mean(1)


class LightlyMAE(nn.Module):
    """MAE of lightly's modules."""

    PACKAGE = "lightly"

    def __init__(self, config: PretrainConfig):
        super().__init__()
        from lightly.models import utils  # type: ignore[import]
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM  # type: ignore[import]
        from timm.models.vision_transformer import VisionTransformer

        model, decoder = config.model, config.pixel
        vit = VisionTransformer(
            img_size=model.image_size,
            patch_size=model.patch_size,
            embed_dim=model.width,
            depth=model.depth,
            num_heads=model.heads,
            num_classes=0,
        )
        self.utils, self.patch_size, self.ratio = utils, model.patch_size, config.mask.ratio
        self.normalise_targets = decoder.norm != "none"
        self.encoder: Any = MaskedVisionTransformerTIMM(vit=vit)
        self.decoder: Any = MAEDecoderTIMM(
            num_patches=vit.patch_embed.num_patches,
            patch_size=model.patch_size,
            embed_dim=model.width,
            decoder_embed_dim=decoder.decoder_width,
            decoder_depth=decoder.decoder_depth,
            decoder_num_heads=decoder.decoder_heads,
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the loss of a batch; pixels float32 [B, 3, H, W]."""
        size = (len(pixels), self.encoder.sequence_length)
        visible, masked = self.utils.random_token_mask(size, self.ratio, device=pixels.device)
        encoded = self.decoder.embed(self.encoder.encode(pixels, idx_keep=visible))
        tokens = self.utils.repeat_token(self.decoder.mask_token, size)
        tokens = self.utils.set_at_index(tokens, visible, encoded.type_as(tokens))
        predicted = self.decoder.predict(self.utils.get_at_index(self.decoder.decode(tokens), masked))
        targets = self.utils.get_at_index(self.utils.patchify(pixels, self.patch_size), masked - 1)  # without cls token
        targets = self.utils.normalize_mean_var(targets) if self.normalise_targets else targets
        return nn.functional.mse_loss(predicted, targets)

    def features(self, pixels: Tensor) -> Tensor:
        """Return the mean of the patch tokens after the last norm, [B, D]; pixels float32 [B, 3, H, W]."""
        return self.encoder.encode(pixels)[:, 1:].mean(1)


PEERS: dict[str, Any] = {peer.PACKAGE: peer for peer in (TransformersMAE, LightlyMAE)}


class PeerStep:
    """The training step of another library's MAE: a plain loop with this project's optimizer settings."""

    def __init__(self, name: str, config: PretrainConfig, lr: Callable[[int], float]):
        self.normalisation, self.lr, self.number = config.data.normalisation, lr, 0
        self.model = PEERS[name](config).to(device())
        self.optimizer = build_optimizer(self.model, config.optim)

    def __call__(self, batch: Batch) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(self.number)
        self.number += 1
        loss = self.model(normalise(batch.images, self.normalisation, torch.float32))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def measure_knn(step: Any, config: PretrainConfig) -> dict[str, float]:
    """Return the k-NN accuracy in per cent of a step's encoder by its mean patch, and those of raw pixels and chance.

    step: a PeerStep, or what pretraining runs. Raise UserError if there is no labelled split val.
    """

    def features(images: Tensor) -> dict[str, Tensor]:
        pixels = normalise(images, config.data.normalisation, torch.float32)
        if isinstance(step, PeerStep):
            return {"mean": step.model.features(pixels)}
        encoder, depth = step.engine.module.encoder, config.model.depth
        return {"mean": pooled_features(encoder, pixels, [depth])[f"block {depth} mean"]}

    splits, source = [], val_location(config.data.train)
    for split, max_images in (("train", MAX_BANK), ("val", 0)):
        reader = ExampleReader(source, split, config.model.image_size, open_cache(config.data), max_images=max_images)
        splits.append((map_images(reader, 0, features, lambda: None)["mean"], reader.labels))
    (bank, labels), (queries, val_labels) = splits
    protocol = Settings()
    top1 = accuracy(vote(bank, labels, queries, min(protocol.k, len(bank)), protocol.temperature).votes, val_labels)
    shards = ShardsConfig(train=config.data.train, workers=0)
    raw = raw_pixel_accuracy(shards, source, config.model.image_size, lambda: None)
    return {"knn": top1, "raw_pixels": raw, "chance": baselines.chance(labels, val_labels)}
