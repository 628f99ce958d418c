"""Write images as shuffled shards with all cores. The output does not depend on the number of workers or on restarts.

The layout is planned before anything is read: the images of a split are permuted by the seed and divided into shards. A
worker writes one shard at a time: it reads, inspects and writes each image once. The main process renames each complete
shard and saves its record (output_dir.py), so that a restarted run writes only missing shards. The manifest is last.
"""

import errno
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ddae.data.shard_writer import Sample, commit_shard, import_webdataset, write_manifest, write_partial_shard
from ddae.errors import UserError
from ddae.sharding import output_dir, workers
from ddae.sharding.accounting import Accounting, Reasons
from ddae.sharding.archives import DamagedMemberError
from ddae.sharding.index import UNLABELLED, Index
from ddae.sharding.inspection import MAX_BYTES, Inspection, inspect, make_thumbnail
from ddae.sharding.report import ReportedImage, write_report

MIN_SHARDS = 16  # per split, if it has enough images: work for all workers
MAX_THUMBNAILS = 40  # per kind
SAMPLE_OVERHEAD = 2048  # bytes of a tar per sample, in addition to its image


@dataclass(frozen=True)
class Settings:
    """Settings that determine the bytes of the shards."""

    seed: int = 0
    max_count: int = 1000  # images per shard
    max_size: int = 1 << 30  # bytes per shard, computed from the sizes of the source files
    resize_shorter: int = 0  # pixels; 0: never resize
    quality: int = 95  # of JPEGs that are encoded here
    on_bad: Literal["keep", "stop", "drop_all"] = "keep"


ImageId = tuple[int, int]  # number of the split, number of the image in its index


class ShardPlan(NamedTuple):
    """One shard to be written."""

    name: str  # of its file
    split: int  # number in the list of indexes
    images: np.ndarray  # int64, numbers in the index, in order


def shard(indexes: list[Index], out: Path, settings: Settings, num_workers: int, **facts: Any) -> str:
    """Write the shards of all splits, their manifest and report. Return a summary for the user.

    facts: further entries of the manifest. Raise UserError if the directory contains anything else, if the disk is
    full, and for the first image that is not a plain RGB JPEG if on_bad is "stop".
    """
    identity = {"source": {i.split: _fingerprint(i) for i in indexes}, "settings": asdict(settings)}
    if output_dir.is_complete(out, identity):
        return f"{out} is complete. Delete it to write it again."
    try:
        with output_dir.locked(out, identity):
            return _Sharder(indexes, out, settings, num_workers).run(identity, facts)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"no space left on {out}. Free space there; the same command resumes.") from None


def plan_split(split: int, index: Index, settings: Settings) -> list[ShardPlan]:
    """Permute the images of a split by the seed and divide them into shards."""
    order = np.random.RandomState(settings.seed).permutation(len(index))  # NumPy guarantees this stream
    count = max(1, min(settings.max_count, -(-len(index) // MIN_SHARDS)))
    total = np.cumsum(index.length[order] + SAMPLE_OVERHEAD)  # bytes of the tar
    starts = [0]
    while starts[-1] < len(order):
        before = total[starts[-1] - 1] if starts[-1] else 0
        fits = int(np.searchsorted(total, before + settings.max_size, side="right"))
        starts.append(max(starts[-1] + 1, min(starts[-1] + count, fits, len(order))))
    starts.pop()
    pieces = np.split(order, starts[1:])
    return [ShardPlan(f"{index.split}-{i:06d}.tar", split, images) for i, images in enumerate(pieces)]


def preview(indexes: list[Index], settings: Settings) -> str:
    """Return what shard() would write, from names and sizes alone, as text."""
    lines = []
    for split, index in enumerate(indexes):
        endings = Counter(os.path.splitext(name)[1].lower().decode(errors="replace") for name in index.base)
        formats = ", ".join(f"{count:,} {ending}" for ending, count in endings.most_common())
        count, size = len(plan_split(split, index, settings)), int(index.length.sum())
        lines.append(f"{index.split}: {len(index):,} images ({formats}), {size / 1e6:,.1f} MB, {count} shards")
        for what, reasons in (("left out", index.tally.left_out), ("other files", index.tally.other_files)):
            for reason, number in reasons.counts.most_common():
                names = ", ".join(reasons.names[reason][:3])
                lines.append(f"  {what}: {number:,} {reason}{f', such as {names}' if names else ''}")
    return "\n".join([*lines, "nothing was written; images that cannot be decoded are known after reading them"])


class _Sharder:
    """One run of the sharder; forked workers inherit it."""

    def __init__(self, indexes: list[Index], out: Path, settings: Settings, num_workers: int):
        self.indexes, self.out, self.settings, self.num_workers = indexes, out, settings, num_workers
        self.plans = [plan for split, index in enumerate(indexes) for plan in plan_split(split, index, settings)]
        lengths, counts = np.unique(np.concatenate([index.length for index in indexes]), return_counts=True)
        # By split, bool [N]: the images that have the length of another image of any split.
        self.may_be_duplicate = [counts[np.searchsorted(lengths, index.length)] > 1 for index in indexes]
        self.records: list[tuple[ShardPlan, dict[str, Any]]] = []

    def run(self, identity: dict[str, Any], facts: dict[str, Any]) -> str:
        """Write all shards that are missing, then manifest and report. Return a summary."""
        folder = self.out / output_dir.PROGRESS
        self.indexes = [index.decompressed(folder) for index in self.indexes]
        missing = [plan for plan in self.plans if output_dir.load_record(self.out, plan.name) is None]
        if not self.settings.resize_shorter:  # the size of resized images is unknown
            lengths = [self.indexes[plan.split].length[plan.images] for plan in missing]
            needed = sum(int(each.sum()) + SAMPLE_OVERHEAD * len(each) for each in lengths)
            output_dir.check_disk_space(self.out, needed)
        self.write_shards([(plan, frozenset()) for plan in missing])
        duplicates = self.find_duplicates()
        if duplicates and self.settings.on_bad == "stop":
            image, first = map(self.source, next(iter(duplicates.items())))
            fix = f"Remove it and delete {self.out}, or pass --on_bad keep."
            raise UserError(f"{image} has the same bytes as {first}. {fix}")
        if duplicates and self.settings.on_bad == "drop_all":  # duplicates are known only after all images were read
            self.write_shards(self.with_duplicates(duplicates))
        return self.finish(duplicates, identity, facts)

    def source(self, image: ImageId) -> str:
        """Return archive or folder and path of an image."""
        split, number = image
        return self.indexes[split].source(number)

    def write_shards(self, tasks: list[tuple[ShardPlan, frozenset[int]]]) -> None:
        """Write shards in the workers, then load all records. Each task: a plan, and which images to leave out."""
        total = sum(len(plan.images) for plan in self.plans)
        done = total - sum(len(plan.images) for plan, _ in tasks)
        import_webdataset()
        for name, record in workers.run(self.write_shard, tasks, self.num_workers, total, done):
            commit_shard(self.out / name)  # in the main process: fsync would block a worker
            output_dir.save_record(self.out, name, record)
        self.records = [(plan, output_dir.load_record(self.out, plan.name) or {}) for plan in self.plans]

    def write_shard(self, plan: ShardPlan, omit: frozenset[int]) -> tuple[str, dict[str, Any]]:
        """Write one shard. Return its name and its record; in a worker."""
        record: dict[str, Any] = {"odd": [], "digests": {}}  # (image, kinds, action) and SHA-256 by image
        entry = write_partial_shard(self.out / plan.name, self.samples(plan, omit, record))
        return plan.name, {"entry": entry, **record}

    def samples(self, plan: ShardPlan, omit: frozenset[int], record: dict[str, Any]) -> Iterator[Sample]:
        """Yield the samples of a shard in order. Record irregular images, and hashes of possible duplicates."""
        index, settings = self.indexes[plan.split], self.settings
        for image in plan.images.tolist():
            data, inspected = b"", Inspection(("bomb",), None)
            if index.length[image] <= MAX_BYTES:
                try:
                    data = index.read(image)
                    inspected = inspect(data, settings.resize_shorter, settings.quality)
                except DamagedMemberError:
                    inspected = Inspection(("unreadable",), None)
            kinds = [*inspected.kinds, *(["duplicate_key"] if index.duplicate_key[image] else [])]
            if kinds and settings.on_bad == "stop":
                problem = f"is not a plain RGB JPEG with a unique key ({', '.join(kinds)})"
                fix = "Fix or remove it, or pass --on_bad keep to convert usable images."
                raise UserError(f"{index.source(image)} {problem}. {fix}")
            if inspected.jpeg is not None and self.may_be_duplicate[plan.split][image]:
                record["digests"][image] = hashlib.sha256(data).hexdigest()[:32]
            left_out = inspected.jpeg is None or image in omit or (bool(kinds) and settings.on_bad == "drop_all")
            if kinds or left_out:
                action = "left_out" if left_out else "converted" if inspected.kinds else "kept"
                record["odd"].append((image, kinds, action))
            if inspected.jpeg is not None and not left_out:
                label = None if index.label[image] == UNLABELLED else int(index.label[image])
                yield Sample(index.key_of(image), inspected.jpeg, label, inspected.width, inspected.height)
            workers.count_images()

    def find_duplicates(self) -> dict[ImageId, ImageId]:
        """Return for each duplicate the first image with the same bytes.

        With on_bad="drop_all" an image that is left out for another reason counts as the first only if all are.
        """
        irregular = {(plan.split, i) for plan, record in self.records for i, kinds, _ in record["odd"] if kinds}
        left_out = irregular if self.settings.on_bad == "drop_all" else set()
        by_digest: dict[str, list[ImageId]] = {}
        for plan, record in self.records:
            for image, digest in record["digests"].items():
                by_digest.setdefault(digest, []).append((plan.split, int(image)))
        duplicates = {}
        for same in by_digest.values():
            first, *rest = sorted(same, key=lambda image: (image in left_out, image))
            duplicates |= dict.fromkeys(rest, first)
        return dict(sorted(duplicates.items()))

    def with_duplicates(self, duplicates: dict[ImageId, ImageId]) -> list[tuple[ShardPlan, frozenset[int]]]:
        """Return the shards that contain duplicates, each with the duplicates to leave out."""
        tasks = []
        for plan, record in self.records:
            planned = {image for split, image in duplicates if split == plan.split} & set(plan.images.tolist())
            left_out = {image for image, _, action in record["odd"] if action == "left_out"}
            if planned - left_out:
                tasks.append((plan, frozenset(planned)))
        return tasks

    def finish(self, duplicates: dict[ImageId, ImageId], identity: dict[str, Any], facts: dict[str, Any]) -> str:
        """Write report and manifest. Return a summary. Raise UserError if no image is usable."""
        irregular = {(p.split, i): (kinds, action) for p, record in self.records for i, kinds, action in record["odd"]}
        for image in duplicates:
            kinds, action = irregular.get(image, ([], "kept"))
            irregular[image] = ([*kinds, "duplicate"], action)
        reported, num_thumbnails, left_out, num_converted = [], Counter(), Reasons(), 0
        for (split, image), (kinds, action) in sorted(irregular.items()):
            index, first = self.indexes[split], duplicates.get((split, image))
            same_as = None if first is None else self.source(first)
            wanted = num_thumbnails[kinds[-1]] < MAX_THUMBNAILS and "bomb" not in kinds
            thumbnail = _thumbnail(index, image) if wanted else None
            num_thumbnails[kinds[-1]] += thumbnail is not None
            reported.append(ReportedImage(index.source(image), index.key_of(image), kinds, action, same_as, thumbnail))
            num_converted += action == "converted"
            if action == "left_out":
                left_out.add(kinds[0], index.source(image))
        shards = {plan.name: record["entry"] for plan, record in self.records}
        num_read = sum(len(index) for index in self.indexes)
        num_written = sum(entry["samples"] for entry in shards.values())
        kinds = Counter(kind for image in reported for kind in image.kinds).most_common()
        if not num_written:
            for name in shards:  # they are empty
                (self.out / name).unlink()
                (self.out / name).with_suffix(".idx").unlink()
            problem = f"none of the {num_read} images is usable ({_counts(kinds[:3])})"
            raise UserError(f"{problem}. Check {reported[0].source}.")
        for index in self.indexes:
            left_out += index.tally.left_out
        other_files = sum((index.tally.other_files for index in self.indexes), Reasons())
        accounting = Accounting(num_written - num_converted, num_converted, left_out)
        write_report(self.out, accounting, reported, other_files)
        classes = max((index.classes for index in self.indexes), key=len)
        write_manifest(self.out, shards, classes=classes, accounting=accounting.to_json(), **identity, **facts)
        output_dir.clear_progress(self.out)
        others = f"; {other_files.total():,} other files ({other_files})" if other_files.counts else ""
        kept = Counter(kind for image in reported if image.action != "left_out" for kind in image.kinds)
        found = f"; among those in the shards: {_counts(kept.most_common())}" if kept else ""
        return f"{self.out}: {accounting}; {len(shards)} shards{found}{others}; see {self.out / 'report.html'}"


def _thumbnail(index: Index, image: int) -> bytes | None:
    """Return a thumbnail of an image as a JPEG; None if it cannot be decoded."""
    try:
        return make_thumbnail(index.read(image))
    except DamagedMemberError:
        return None


def _counts(kinds: list[tuple[str, int]]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds)


def _fingerprint(index: Index) -> dict[str, Any]:
    """Return a source's identity: name, size, and a hash of its images' names, lengths, labels and keys."""
    name, size = Path(index.location).name, int(index.length.sum())
    return {"name": name, "images": len(index), "bytes": size, "sha256": index.fingerprint()}
