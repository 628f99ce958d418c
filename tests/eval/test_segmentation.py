"""Segmentation: crops with masks, UperNet, sliding windows, mIoU, and whole runs on images of coloured rectangles."""

import io
import json
import shutil

import numpy as np
import pytest
import ranks
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassJaccardIndex

from ddae.config.pretrain import ModelConfig
from ddae.config.segmentation import SceneConfig, segment_recipe
from ddae.data.cache import Cache
from ddae.data.shard_writer import Sample, write_manifest, write_shard
from ddae.data.shards import Shards, open_shards
from ddae.errors import UserError
from ddae.eval.metrics import count_confusion, intersection_over_union, segmentation_scores
from ddae.eval.predict import segment_images
from ddae.eval.segmentation_data import (
    IGNORE_INDEX,
    SceneCrop,
    SceneDataset,
    class_names,
    distort_colours,
    read_scene,
    require_several_classes,
    resize_labels,
    resized_shape,
    split_planes,
)
from ddae.eval.upernet import Segmenter, extend_encoder, predict_classes, sliding_window_logits, window_starts
from ddae.models.vit import Encoder, initialise
from ddae.training.optimizer import layer_groups

PROGRAM = str(ranks.ROOT / "tests" / "support" / "evaluations.py")
QUIET = "--preset demo --tracker.kind jsonl --train.log_every 1 --data.workers 0 --data.batch_size 8".split()
COLOURS = np.array([[220, 40, 40], [40, 200, 60], [50, 60, 220]], np.uint8)


def png(labels):
    file = io.BytesIO()
    Image.fromarray(labels).save(file, "PNG")
    return file.getvalue()


def scene(number, shift=0):
    """Return JPEG file, labels and pixels of a rectangle on another background; the upper border is unlabelled."""
    rng = np.random.default_rng(number)
    height, width = (int(side) for side in rng.integers(40, 70, 2))
    background, rectangle = rng.permutation(3)[:2]
    labels = np.full((height, width), background, np.uint8)
    top, left = (int(offset) for offset in rng.integers(4, 16, 2))
    labels[top : top + 20, left : left + 20] = rectangle
    image = np.clip(COLOURS[labels] + rng.integers(-15, 16, (height, width, 3)), 0, 255).astype(np.uint8)
    labels[:2] = 255
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95)
    labels[labels != 255] += shift
    return file.getvalue(), labels, image


def write_scenes(folder, classes=("red", "green", "blue"), counts=(40, 7), shift=0, cut=0, wide=False):
    """Write shards. shift: added to the labels; cut: rows missing from the masks; wide: 16-bit masks."""
    folder.mkdir(exist_ok=True)
    entries = {}
    for split, first, last in (("train", 0, counts[0]), ("val", counts[0], sum(counts))):
        samples = []
        for number in range(first, last):
            data, labels, image = scene(number, shift)
            if wide:
                labels = np.where(labels == 255, IGNORE_INDEX, labels.astype(np.uint16) * 300).astype(np.uint16)
            labels = labels[cut:]
            samples.append(Sample(f"s{number:04d}", data, None, image.shape[1], image.shape[0], png(labels)))
        path = folder / f"{split}-000000.tar"
        entries[path.name] = write_shard(path, samples)
    write_manifest(folder, entries, classes=list(classes))
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"))


def test_scenes_are_read_as_written(scenes, tmp_path):
    shards = open_shards(str(scenes), None)
    locations = shards.file_locations("png")
    for number in (0, 17, 39):
        image, labels = read_scene(shards, number, locations[number], 3)
        _, expected, pixels = scene(number)
        assert np.abs(image.astype(int) - pixels.transpose(2, 0, 1)).mean() < 12  # JPEG is lossy
        assert np.array_equal(labels, np.where(expected == 255, IGNORE_INDEX, expected.astype(np.uint16)))
    wide = open_shards(str(write_scenes(tmp_path, wide=True)), None)
    _, labels = read_scene(wide, 3, wide.file_locations("png")[3], 601)
    assert set(np.unique(labels)) <= {0, 300, 600, IGNORE_INDEX}
    with pytest.raises(UserError, match=r"s0003 has class \d00; expected classes 0 to 299\. Make the shards"):
        read_scene(wide, 3, wide.file_locations("png")[3], 300)


def test_reading_a_scene_does_not_read_the_index(scenes, monkeypatch):
    """Which is a download for each image if the shards are at a URL."""
    shards = open_shards(str(scenes), None)
    locations = shards.file_locations("png")
    monkeypatch.setattr(Shards, "sample_name", lambda *_: pytest.fail("a name is for messages alone"))
    read_scene(shards, 3, locations[3], 3)


def test_sizes_match_mmsegmentation():
    """Its scale (2048, 512): longer side at most 2048 pixels, shorter side at most 512."""
    assert resized_shape((512, 683), 512) == (512, 683)
    assert resized_shape((1000, 1500), 512) == (512, 768)
    assert resized_shape((300, 2000), 512) == (307, 2048)
    assert resized_shape((683, 512), 256) == (342, 256)
    labels = np.arange(6).reshape(2, 3)
    assert resize_labels(labels, 4, 3).tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]


def planes_of(image, labels):
    low_high = labels.view(np.uint8).reshape(*labels.shape, 2).transpose(2, 0, 1)
    return np.concatenate([image.transpose(2, 0, 1), low_high])


def crop_of(size=48, **changes):
    return SceneCrop(SceneConfig(**changes), size, "imagenet", 3)


def test_crops_keep_image_and_labels_aligned():
    labels = np.repeat(np.repeat(np.random.default_rng(0).integers(0, 3, (5, 6)), 24, 0), 24, 1).astype(np.uint16)
    planes = planes_of(COLOURS[labels], labels)
    crop = crop_of(distort=False)
    crops = [crop(planes, seed) for seed in range(30)]
    assert np.array_equal(crop(planes, 7), crops[7])
    assert len({each.tobytes() for each in crops}) == 30
    for each in crops:
        assert each.shape == (5, 48, 48)
        images, cropped = split_planes(torch.from_numpy(each)[None])
        valid = (cropped[0] != IGNORE_INDEX).numpy()
        distances = (images[0].permute(1, 2, 0)[:, :, None].int() - torch.from_numpy(COLOURS).int()) ** 2
        nearest = distances.sum(-1).argmin(-1)
        accuracy = (nearest == cropped[0]).numpy()[valid].mean()
        assert accuracy > 0.93  # pixels between two classes are blended


def test_pixels_outside_the_image_are_ignored():
    labels = np.zeros((30, 30), np.uint16)
    labels[5:] = 2
    crop = crop_of(scale=(0.5, 0.5), distort=False)(planes_of(COLOURS[labels], labels), 0)
    images, cropped = split_planes(torch.from_numpy(crop)[None])
    assert (cropped[0, :24, :24] != IGNORE_INDEX).all()
    assert (cropped[0, 24:] == IGNORE_INDEX).all()
    assert (cropped[0, :, 24:] == IGNORE_INDEX).all()
    assert images[0, :, -1, -1].tolist() == [124, 116, 104]


def test_crops_of_one_class_are_drawn_again():
    labels = np.zeros((200, 200), np.uint16)
    labels[:, 150:] = 1
    planes = planes_of(COLOURS[labels], labels)
    largest = {}
    for share in (0.75, 1.0):
        crop = crop_of(scale=(4.0, 4.0), max_share=share, distort=False)
        crops = [split_planes(torch.from_numpy(crop(planes, seed))[None])[1] for seed in range(60)]
        largest[share] = [float(labels.flatten().bincount().max()) / labels.numel() for labels in crops]
    assert sum(share == 1 for share in largest[1.0]) > 30
    assert sum(share == 1 for share in largest[0.75]) < 20  # ten draws may all fail
    assert sum(share < 0.75 for share in largest[0.75]) > 2 * sum(share < 0.75 for share in largest[1.0])


@pytest.mark.parametrize("shape", [(1, 1), (1, 90), (300, 3)])
def test_extreme_aspect_ratios(shape):
    labels = np.zeros(shape, np.uint16)
    for seed in range(5):
        assert crop_of()(planes_of(COLOURS[labels], labels), seed).shape == (5, 48, 48)
    pixels = torch.randn(3, *resized_shape(shape, 32))
    assert predict_classes(segmenter_of().eval(), pixels, 2 / 3, shape).shape == shape


def test_interpolating_classes_in_chunks_equals_all_together():
    generator = torch.Generator().manual_seed(0)
    segmenter, pixels = segmenter_of(classes=40).eval(), torch.randn(3, 32, 40, generator=generator)
    with torch.no_grad():
        logits = sliding_window_logits(segmenter, pixels, 21)[None]
        expected = F.interpolate(logits, (50, 61), mode="bilinear")[0].argmax(0)
    assert torch.equal(predict_classes(segmenter, pixels, 0.67, (50, 61)), expected)
    assert len(expected.unique()) > 2


def test_photometric_distortion():
    image = np.random.default_rng(0).integers(0, 256, (3, 20, 20), dtype=np.uint8)
    changed = [distort_colours(image, np.random.default_rng(seed)) for seed in range(200)]
    assert all(each.shape == image.shape and each.dtype == np.uint8 for each in changed)
    assert np.array_equal(distort_colours(image, np.random.default_rng(5)), changed[5])
    assert 3 <= sum(np.array_equal(each, image) for each in changed) <= 25  # expected: 1 of 16
    means = np.array([each.mean() - image.mean() for each in changed])
    assert abs(means.mean()) < 8
    assert np.abs(means).max() > 20
    grey = np.full((3, 8, 8), 100, np.uint8)  # without hue and saturation
    for seed in range(50):
        distorted = distort_colours(grey, np.random.default_rng(seed))
        assert distorted.min() >= distorted.max() - 1


def encoder_of(width=64, depth=4, size=32):
    encoder = Encoder(ModelConfig(width=width, depth=depth, heads=2, image_size=size, patch_size=8))
    initialise(encoder, torch.Generator().manual_seed(0))
    return encoder


def segmenter_of(classes=3, **changes):
    config = SceneConfig(**{"taps": (1, 2, 3, 4), "channels": 32, "dropout": 0.0} | changes)
    return Segmenter(encoder_of(), classes, config, torch.Generator().manual_seed(1))


def test_extended_encoder_gives_the_same_output():
    encoder, images = encoder_of(), torch.randn(2, 3, 32, 32)
    extended = extend_encoder(encoder, True, 1.0)
    assert extended.shape.relative_positions == "each"
    assert extended.blocks[2].attn.rel_pos_bias.relative_position_bias_table.abs().max() == 0
    assert extended.blocks[2].ls1.gamma.tolist() == [1.0] * 64
    with torch.no_grad():
        torch.testing.assert_close(extended(images), encoder(images), rtol=1e-5, atol=1e-5)
    assert extend_encoder(extended, True, 0.1).blocks[0].ls1.gamma.tolist() == [1.0] * 64  # existing values are kept


def test_upernet_equals_mmsegmentations_equations():
    """Compare with UPerHead and FCNHead written out, with the module's weights."""
    segmenter = segmenter_of().eval()
    images = torch.randn(2, 3, 32, 32)

    def conv_norm_relu(x, block):
        conv, norm = (next(m for m in block.modules() if isinstance(m, kind)) for kind in (nn.Conv2d, nn.BatchNorm2d))
        x = F.conv2d(x, conv.weight, None, padding=conv.weight.shape[-1] // 2)
        x = (x - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + norm.eps).sqrt()
        return (x * norm.weight[:, None, None] + norm.bias[:, None, None]).relu()

    def upsample(x, like):
        return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)

    with torch.no_grad():
        for norm in segmenter.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
        tokens = segmenter.encoder.features(images, (1, 2, 3, 4))
        maps = [each[:, 1:].reshape(2, 4, 4, 64).permute(0, 3, 1, 2) for each in tokens]
        c1, c2, c3, c4 = segmenter.neck(maps)
        assert [each.shape[-1] for each in (c1, c2, c3, c4)] == [16, 8, 4, 2]
        decoder = segmenter.decoder
        pooled = [c4]
        for size, block in zip((1, 2, 3, 6), decoder.psp.blocks, strict=True):
            pooled.append(upsample(conv_norm_relu(F.adaptive_avg_pool2d(c4, size), block[1]), c4))
        laterals = [conv_norm_relu(torch.cat(pooled, 1), decoder.psp.out_conv)]
        for each, block in zip((c3, c2, c1), decoder.fpn_lateral_blocks, strict=True):
            lateral = conv_norm_relu(each, block.conv_norm_relu)
            laterals.append(lateral + upsample(laterals[-1], lateral))
        outputs = [laterals[0]]
        outputs += [conv_norm_relu(x, block) for x, block in zip(laterals[1:], decoder.fpn_conv_blocks, strict=True)]
        joined = conv_norm_relu(torch.cat([upsample(x, c1) for x in reversed(outputs)], 1), decoder.fusion_block)
        head = segmenter.head[1]
        expected = F.interpolate(F.conv2d(joined, head.weight, head.bias), (32, 32), mode="bilinear")
        logits = segmenter(images)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        labels = torch.randint(0, 3, (2, 32, 32))
        labels[0, :10] = IGNORE_INDEX
        aux = F.conv2d(conv_norm_relu(c3, segmenter.aux), segmenter.aux[4].weight, segmenter.aux[4].bias)
        losses = []
        for each in (expected, F.interpolate(aux, (32, 32), mode="bilinear")):
            cross_entropy = -each.log_softmax(1).gather(1, labels.where(labels < 3, 0)[:, None])[:, 0]
            losses.append((cross_entropy * (labels != IGNORE_INDEX)).sum() / labels.numel())
        torch.testing.assert_close(
            segmenter(images, labels, IGNORE_INDEX), losses[0] + 0.4 * losses[1], rtol=1e-4, atol=1e-5
        )


def test_new_layers_have_the_full_learning_rate():
    module = segmenter_of()
    scales = {id(p): group["lr_scale"] for group in layer_groups(module, 4, 0.65, 0.05) for p in group["params"]}
    for name, parameter in module.named_parameters():
        if not name.startswith("encoder."):
            assert scales[id(parameter)] == 1, name
        elif name.startswith("encoder.blocks.0."):
            assert scales[id(parameter)] == pytest.approx(0.65**4), name


def test_sliding_windows():
    assert window_starts(512, 512, 341) == [0]
    assert window_starts(683, 512, 341) == [0, 171]
    assert window_starts(1200, 512, 341) == [0, 341, 682, 688]
    segmenter = segmenter_of().eval()
    image = torch.randn(3, 32, 45)
    with torch.no_grad():
        left, middle = (segmenter(image[None, :, :, at : at + 32])[0] for at in (0, 13))
        logits = sliding_window_logits(segmenter, image, 21)
        torch.testing.assert_close(logits[..., :13], left[..., :13], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits[..., 13:32], (left[..., 13:] + middle[..., :19]) / 2, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits[..., 32:], middle[..., 19:], rtol=1e-4, atol=1e-5)
        small = sliding_window_logits(segmenter, image[:, :20, :25], 21)  # the image is smaller than a window
        padded = F.pad(image[:, :20, :25], (0, 7, 0, 12))
        torch.testing.assert_close(small, segmenter(padded[None])[0, :, :20, :25], rtol=1e-4, atol=1e-5)


def test_miou_equals_torchmetrics():
    labels = torch.tensor([[0, 0, 1, 1], [0, 2, 2, 1], [IGNORE_INDEX, 2, 2, 4]])
    predicted = torch.tensor([[0, 1, 1, 1], [0, 2, 0, 1], [3, 2, 2, 4]])
    confusion = count_confusion(labels, predicted, 6)
    assert confusion.sum() == 11
    ious = intersection_over_union(confusion.double())
    assert ious[:3].tolist() == pytest.approx([2 / 4, 3 / 4, 3 / 4])
    assert ious[[3, 5]].isnan().all()  # 3 was predicted only for an ignored pixel, 5 never
    metric = MulticlassJaccardIndex(6, average="none", ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(ious.nan_to_num().float(), metric(predicted, labels))
    scores = segmentation_scores(confusion)
    assert scores["miou"] == pytest.approx(100 * (2 / 4 + 3 / 4 + 3 / 4 + 1) / 4)
    assert scores["pixel_accuracy"] == pytest.approx(100 * 9 / 11)
    assert scores["class_accuracy"] == pytest.approx(100 * (2 / 3 + 1 + 3 / 4 + 1) / 4)
    rng = torch.Generator().manual_seed(0)
    labels, predicted = (torch.randint(0, 20, (80, 90), generator=rng) for _ in range(2))
    metric = MulticlassJaccardIndex(20, average="macro")
    assert segmentation_scores(count_confusion(labels, predicted, 20))["miou"] == pytest.approx(
        100 * float(metric(predicted, labels)), rel=1e-5
    )


@pytest.mark.parametrize(
    "values, classes, message",
    [
        ((0, 255), ("sky", "sea"), r"masks contain the class 'sky' alone.*masks of 0 and 255 need 1"),
        ((255, 255), ("sky",), "masks contain no class"),
        ((0, 1), ("sky", "sea"), ""),
        ((0, 255), ("sky",), ""),
    ],
)
def test_masks_with_one_class_are_refused(values, classes, message, tmp_path):
    """values: of the left and right half of each mask."""
    samples = []
    for number in range(4):
        mask = np.full((20, 20), values[0], np.uint8)
        mask[:, 10:] = values[1] if number else values[0]  # the second class is not in the first mask
        file = io.BytesIO()
        Image.new("RGB", (20, 20), "red").save(file, "JPEG")
        samples.append(Sample(f"s{number}", file.getvalue(), None, 20, 20, png(mask)))
    entry = write_shard(tmp_path / "val-000000.tar", samples)
    write_manifest(tmp_path, {"val-000000.tar": entry}, classes=list(classes))
    scenes = SceneDataset(str(tmp_path), "val", 32, Cache(tmp_path, 1))
    if not message:
        require_several_classes(scenes)
        return
    with pytest.raises(UserError, match=message):
        require_several_classes(scenes)


def test_recipe_matches_the_paper():
    config = segment_recipe("paper").resolved_for(768, 12)
    assert (config.peak_lr, config.optim.weight_decay, config.optim.clip_grad) == (4e-4, 0.05, 3.0)
    assert (config.data.batch_size, config.num_steps(20208), config.image_size) == (16, 160_000, 512)
    # an epoch has 20,208 of the 20,210 images, those in full batches
    assert config.optim.warmup_epochs * 20208 / 16 == pytest.approx(1500)
    assert config.seg == SceneConfig(taps=(4, 6, 8, 12), channels=768)
    assert (config.seg.layer_decay, config.seg.drop_path, config.seg.aux_weight) == (0.65, 0.1, 0.4)
    assert int(config.seg.stride * 512) == 341
    assert round(config.seg.evaluate_every * 20208 / 16) == 16000
    assert segment_recipe("paper").resolved_for(384, 12).seg.channels == 512
    assert segment_recipe("paper").resolved_for(1024, 24).seg.taps == (8, 12, 16, 24)
    assert segment_recipe("demo").resolved_for(64, 2).seg.taps == (1, 1, 1, 2)
    with pytest.raises(UserError, match="expected four blocks from 1 to 2"):
        config.resolved_for(64, 2)


def test_class_names():
    assert class_names(["wall", "", "door", "wall"], 0) == ["wall 0", "1", "door", "wall 3"]
    assert class_names((), 2) == ["0", "1"]
    with pytest.raises(UserError, match=r"Pass their number, e\.g\. --seg\.classes 150"):
        class_names((), 0)
    with pytest.raises(UserError, match=r"seg\.classes is 3, but the shards name 1 classes"):
        class_names(("wall",), 3)


def command(scenes, encoder, run_dir, *more):
    """Return a line for PROGRAM: a segmentation run."""
    zero = str(ranks.ROOT / "ds_configs" / "zero1.json")
    paths = ["--ds_config", zero, "--encoder", str(encoder), "--data.train", str(scenes), "--run_dir", str(run_dir)]
    return ["segment", *QUIET, "--image_size", "32", "--seg.channels", "16", *paths, *more]


@pytest.fixture(scope="module")
def runs(scenes, encoder_folder, tmp_path_factory):
    """Run: on one rank a whole run, a resumed one, one at ZeRO-3 in bf16 autocast, user errors; then two ranks."""
    folder = tmp_path_factory.mktemp("segment")
    run = folder / "pretrained" / "segment"
    shutil.copytree(encoder_folder, folder / "pretrained" / "encoder")
    plain = ("--train.epochs", "8", "--train.save_every", "20", "--seg.evaluate_every", "4")
    zero3, micro_batch4 = (folder / name for name in ("three.json", "four.json"))
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    zero3.write_text(json.dumps({"zero_optimization": zero}))
    micro_batch4.write_text(json.dumps({"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 1}}))
    deterministic = "--train.steps 4 --train.no_report --train.save_every 2 --seg.dropout 0 --seg.drop_path 0".split()
    deterministic += ["--ds_config", str(micro_batch4)]
    unnamed, bad = folder / "bare", folder / "none"
    labelled = write_scenes(folder / "high", shift=3)
    smaller = write_scenes(folder / "cut", cut=3)
    nameless = write_scenes(folder / "nameless", classes=())
    other = write_scenes(folder / "other", classes=("red", "green", "yellow"))
    without = folder / "without"
    without.mkdir()
    entries = {}
    for split in ("train", "val"):
        path = without / f"{split}-000000.tar"
        entries[path.name] = write_shard(path, [Sample("a", scene(0)[0], 0, 50, 50)])
    write_manifest(without, entries, classes=["a"])
    few = ("--train.steps", "2", "--train.no_report")
    late = (*few, "--seg.evaluate_every", "0.2", "--ds_config", str(zero3), "--engine.precision", "autocast")
    lines = [
        command(scenes, encoder_folder, run, *plain),
        ["copy_before", str(run), str(folder / "resumed"), "40"],
        command(scenes, encoder_folder, folder / "resumed", *plain, "--train.no_report"),
        command(scenes, encoder_folder, folder / "zero3", *late),
        command(nameless, encoder_folder, unnamed, *few, "--seg.classes", "3"),
        command(scenes, encoder_folder, folder / "one", *deterministic),
        command(without, encoder_folder, bad, "--data.batch_size", "2"),
        command(smaller, encoder_folder, bad),
        command(labelled, encoder_folder, bad),
        command(nameless, encoder_folder, bad),
        command(nameless, encoder_folder, bad, "--seg.classes", "2"),
        command(scenes, encoder_folder, bad, "--val", str(other)),
        command(scenes, encoder_folder, bad, "--data.batch_size", "1"),
        command(scenes, encoder_folder, bad, "--image_size", "8"),
    ]
    output = ranks.run_program(1, [PROGRAM], lines)
    two = command(scenes, encoder_folder, folder / "two", *deterministic)
    again = [str(folder / "again") if arg == str(folder / "two") else arg for arg in two]
    ranks.run_program(2, [PROGRAM], [two, ["copy_before", str(folder / "two"), str(folder / "again"), "4"], again])
    return folder, output


def test_loss_falls_and_miou_rises(runs, scenes):
    folder, _ = runs
    run = folder / "pretrained" / "segment"
    rows = ranks.metrics(run)
    losses = [row["loss/total"] for row in rows if "loss/total" in row]
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    assert [row["step"] for row in rows if "val/miou" in row] == [20, 40]
    results = json.loads((run / "results.json").read_text())
    assert (results["classes"], results["images"]) == (3, {"train": 40, "val": 7})
    assert results["pixels"] == sum((scene(number)[1] != 255).sum() for number in range(40, 47))
    assert results["last"]["miou"] > 50
    assert results["best"]["miou"] >= results["last"]["miou"]
    assert results["chance"]["pixel_accuracy"] < 60  # share of the most frequent class
    assert results["chance"]["miou"] == pytest.approx(
        results["chance"]["pixel_accuracy"] / results["classes"], rel=0.01
    )
    assert list(results["iou"]) == ["red", "green", "blue"]
    assert sum(results["iou"].values()) / 3 == pytest.approx(results["last"]["miou"])
    page = (run / "report.html").read_text()
    for name in ("curves", "overlays", "classes", "confusion"):
        assert (run / "figures" / f"{name}.png").stat().st_size > 5000
        assert f'<img alt="{name}"' in page
    card = (folder / "pretrained" / "encoder" / "README.md").read_text()
    values = results["last"]["miou"], results["chance"]["miou"]
    assert "| segment | last epoch, mIoU | {:.2f} % | not measured |  | {:.2f} % |".format(*values) in card
    assert (run / "finished.json").exists()


@pytest.mark.parametrize("whole, resumed", [("pretrained/segment", "resumed"), ("two", "again")])
def test_resumed_run_equals_uninterrupted_run(whole, resumed, runs):
    folder, _ = runs
    one, other = (ranks.metrics(folder / name) for name in (whole, resumed))
    assert [row["step"] for row in one] == [row["step"] for row in other]
    for name in ("loss/total", "lr", "val/miou", "val/pixel_accuracy"):
        values = [[row[name] for row in rows if name in row] for rows in (one, other)]
        assert values[0] == pytest.approx(values[1], rel=1e-4), name


def test_two_ranks_equal_one(runs):
    """The micro-batches and so their batch statistics are the same; running statistics are averaged over ranks."""
    folder, _ = runs
    rows = [[row for row in ranks.metrics(folder / name) if "loss/total" in row] for name in ("one", "two")]
    one, two = ([row["loss/total"] for row in each] for each in rows)
    assert len(one) == 4
    assert one == pytest.approx(two, rel=1e-4)
    pixels = [json.loads((folder / name / "results.json").read_text())["pixels"] for name in ("one", "two")]
    assert pixels[0] == pixels[1]  # padding is not counted: two ranks share seven images


def test_zero3_and_unnamed_classes(runs):
    """At ZeRO-3 parameters are gathered per layer; training continues after an evaluation."""
    folder, _ = runs
    rows = ranks.metrics(folder / "zero3")
    assert [row["step"] for row in rows if "val/miou" in row] == [1, 2]
    names = json.loads((folder / "bare" / "results.json").read_text())["iou"]
    assert names.keys() <= {"0", "1", "2"}


def test_segment_images(runs, scenes, tmp_path):
    folder, _ = runs
    data, labels, image = scene(41)
    (tmp_path / "photo.jpg").write_bytes(data)
    photos, out = [tmp_path / "photo.jpg"], tmp_path / "out"
    (predictions,) = segment_images(folder / "pretrained" / "segment", photos, out).values()
    truth = np.bincount(labels[labels < 3], minlength=3).argmax()
    assert predictions[0].name == ("red", "green", "blue")[truth]
    assert sum(each.share for each in predictions) == pytest.approx(1)
    with Image.open(out / "photo_classes.png") as output:
        assert output.width == image.shape[1]
        assert output.height == image.shape[0] + 14 * len(predictions)  # a line per class
    with pytest.raises(UserError, match="contains no segmenter"):
        segment_images(tmp_path, photos, out)
    with pytest.raises(UserError, match="two images have the same output file"):
        segment_images(folder / "zero3", photos * 2, out)
    config = folder / "zero3" / "segmenter" / "config.json"
    for text in (config.read_text().replace('"format": 1', '"format": 2'), "no JSON", "{}"):
        config.write_text(text)
        with pytest.raises(UserError, match=r"is not a segmenter of this version \(.*\)\. Run launch/segment\.py"):
            segment_images(folder / "zero3", photos, out)


def test_user_errors(runs):
    _, output = runs
    errors = [line.removeprefix("ERROR ") for line in output.splitlines() if line.startswith("ERROR")]
    expected = [
        "These shards have no masks",
        "prepare_ade20k.py, which leaves out such pairs.",
        "s0040 has class 5; expected classes 0 to 2. Make the shards with data_prep/prepare_ade20k.py.",
        "the shards do not name their classes. Pass their number, e.g. --seg.classes 150.",
        "has class 2; expected classes 0 to 1. Pass --seg.classes 3 or more.",
        "class 2 is 'blue' in the training shards and 'yellow' in the validation shards",
        "the micro-batch is 1 image; batch norm needs 2 or more.",
        "image_size is 8, a single patch; expected 16 or more.",
    ]
    assert len(errors) == len(expected), output
    for error, part in zip(errors, expected, strict=True):
        assert part in error


def test_validation_images_are_whole(scenes):
    image, labels = SceneDataset(str(scenes), "val", 32, None)[3]
    _, expected, _ = scene(43)
    assert labels.tolist() == np.where(expected == 255, IGNORE_INDEX, expected.astype(np.int64)).tolist()
    assert min(image.shape[1:]) == 32


def test_error_in_a_worker_process_is_one_line(scenes, encoder_folder, tmp_path):
    """The mask of the last validation image is too small; a data loader worker raises the error."""
    bad = write_scenes(tmp_path / "bad", counts=(8, 7))
    entries = {"val-000000.tar": None}
    samples = []
    for number in range(7):
        data, labels, image = scene(number)
        labels = labels[:-1] if number == 6 else labels
        samples.append(Sample(f"s{number}", data, None, image.shape[1], image.shape[0], png(labels)))
    entries["val-000000.tar"] = write_shard(bad / "val-000000.tar", samples)
    write_manifest(bad, entries, classes=["red", "green", "blue"])
    more = ("--train.steps", "1", "--val", str(bad), "--data.workers", "2")
    args = command(scenes, encoder_folder, tmp_path / "run", *more)
    code, output = ranks.run_command("launch/segment.py", *args[1:], timeout=240)
    assert code == 2, output
    (line,) = [line for line in output.splitlines() if "the mask of" in line]
    assert line.startswith("ddae: the mask of ")
    assert "Traceback" not in output
