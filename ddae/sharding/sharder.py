"""Write images as shuffled shards with all cores. The output does not depend on the number of workers or on restarts.

The layout is planned before anything is read: the images of a split are permuted by the seed and divided into shards. A
worker writes one shard at a time: it reads, inspects and writes each image once. The main process renames each complete
shard and saves its record (output_dir.py), so that a restarted run writes only missing shards. The manifest is last.
"""

import bisect
import errno
import hashlib
import itertools
import os
from array import array
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
from ddae.sharding.index import UNLABELLED, Index, is_repeated
from ddae.sharding.inspection import MAX_BYTES, Inspection, inspect, make_thumbnail
from ddae.sharding.report import Content, ReportedImage, write_report

MIN_SHARDS = 16  # per split, if it has enough images: work for all workers
MAX_THUMBNAILS = 40  # per kind
CODE_BITS = 20  # of the number of a finding
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


class ShardPlan(NamedTuple):
    """One shard to be written."""

    name: str  # of its file
    split: int  # number in the list of indexes
    images: np.ndarray  # int32 or int64, numbers in the index, in order


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
    order = order.astype(np.int32 if len(index) < 1 << 31 else np.int64)
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
    """One run of the sharder; forked workers inherit it.

    Images are counted through all splits. There may be millions: what is known of each is in compact columns here, or
    in the records of the shards on disk.
    """

    def __init__(self, indexes: list[Index], out: Path, settings: Settings, num_workers: int):
        self.indexes, self.out, self.settings, self.num_workers = indexes, out, settings, num_workers
        self.plans = [plan for split, index in enumerate(indexes) for plan in plan_split(split, index, settings)]
        self.first = [0, *itertools.accumulate(map(len, indexes))]  # number of the first image of each split; their sum
        lengths = np.concatenate([index.length.clip(max=MAX_BYTES + 1).astype(np.uint32) for index in indexes])
        self.may_be_duplicate = is_repeated(lengths)  # bool: another image has the same length

    def run(self, identity: dict[str, Any], facts: dict[str, Any]) -> str:
        """Write all shards that are missing, then manifest and report. Return a summary."""
        folder = self.out / output_dir.PROGRESS
        self.indexes = [index.decompressed(folder) for index in self.indexes]
        missing = [plan for plan in self.plans if not output_dir.has_record(self.out, plan.name)]
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

    def source(self, number: int) -> str:
        """Return archive or folder and path of an image."""
        index, image = self.find(number)
        return index.source(image)

    def find(self, number: int) -> tuple[Index, int]:
        """Return the index that holds an image, and its number there."""
        split = bisect.bisect_right(self.first, number) - 1
        return self.indexes[split], number - self.first[split]

    def records(self) -> Iterator[tuple[ShardPlan, dict[str, Any]]]:
        """Yield each shard with its record."""
        return ((plan, output_dir.load_record(self.out, plan.name)) for plan in self.plans)

    def write_shards(self, tasks: list[tuple[ShardPlan, frozenset[int]]]) -> None:
        """Write shards in the workers. Each task: a plan, and which images to leave out."""
        total = sum(len(plan.images) for plan in self.plans)
        done = total - sum(len(plan.images) for plan, _ in tasks)
        import_webdataset()
        for name, record in workers.run(self.write_shard, tasks, self.num_workers, total, done):
            commit_shard(self.out / name)  # in the main process: fsync would block a worker
            output_dir.save_record(self.out, name, record)

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
            if inspected.jpeg is not None and self.may_be_duplicate[self.first[plan.split] + image]:
                record["digests"][image] = hashlib.sha256(data).hexdigest()[:32]
            left_out = inspected.jpeg is None or image in omit or (bool(kinds) and settings.on_bad == "drop_all")
            if kinds or left_out:
                action = "left_out" if left_out else "converted" if inspected.kinds else "kept"
                record["odd"].append((image, kinds, action))
            if inspected.jpeg is not None and not left_out:
                label = None if index.label[image] == UNLABELLED else int(index.label[image])
                yield Sample(index.key_of(image), inspected.jpeg, label, inspected.width, inspected.height)
            workers.count_images()

    def find_duplicates(self) -> dict[int, int]:
        """Return for each duplicate the first image with the same bytes.

        With on_bad="drop_all" an image that is left out for another reason counts as the first only if all are.
        """
        hashes = array("q")  # 64 bits of each digest, in the order of the records
        for _, record in self.records():
            hashes.extend(int(digest[:15], 16) for digest in record["digests"].values())
        repeated = iter(is_repeated(np.frombuffer(hashes, np.int64)))
        drop_all = self.settings.on_bad == "drop_all"
        same_bytes: dict[str, list[tuple[bool, int]]] = {}  # by digest: whether it is left out, image
        for plan, record in self.records():
            left_out = {image for image, kinds, _ in record["odd"] if kinds and drop_all}
            for image, digest in record["digests"].items():
                if next(repeated):
                    number = self.first[plan.split] + int(image)
                    same_bytes.setdefault(digest, []).append((int(image) in left_out, number))
        duplicates = {}
        for same in same_bytes.values():
            (_, first), *rest = sorted(same)
            duplicates |= {number: first for _, number in rest}
        return dict(sorted(duplicates.items()))

    def with_duplicates(self, duplicates: dict[int, int]) -> list[tuple[ShardPlan, frozenset[int]]]:
        """Return the shards that contain duplicates, each with the duplicates to leave out."""
        tasks = []
        for plan, record in self.records():
            planned = {image for image in plan.images.tolist() if self.first[plan.split] + image in duplicates}
            left_out = {image for image, _, action in record["odd"] if action == "left_out"}
            if planned - left_out:
                tasks.append((plan, frozenset(planned)))
        return tasks

    def finish(self, duplicates: dict[int, int], identity: dict[str, Any], facts: dict[str, Any]) -> str:
        """Write report and manifest. Return a summary. Raise UserError if no image is usable."""
        findings = self.findings(duplicates)

        def reported() -> Iterator[ReportedImage]:
            for number, (kinds, action) in findings:
                (index, image), first = self.find(number), duplicates.get(number)
                same_as = None if first is None else self.source(first)
                yield ReportedImage(index.source(image), index.key_of(image), kinds, action, same_as)

        thumbnails, num_thumbnails, left_out = [], Counter(), Reasons()
        kinds, kept, num_converted = Counter(), Counter(), 0
        for (number, _), image in zip(findings, reported(), strict=True):
            kinds.update(image.kinds)
            num_converted += image.action == "converted"
            if image.action == "left_out":
                left_out.add(image.kinds[0], image.source)
            else:
                kept.update(image.kinds)
            wanted = num_thumbnails[image.kinds[-1]] < MAX_THUMBNAILS and "bomb" not in image.kinds
            if wanted and (thumbnail := _thumbnail(*self.find(number))):
                num_thumbnails[image.kinds[-1]] += 1
                thumbnails.append((image, thumbnail))
        shards = output_dir.Entries(self.out, [plan.name for plan in self.plans])
        num_written = sum(entry["samples"] for entry in shards.values())
        if not num_written:
            for name in shards:  # they are empty
                (self.out / name).unlink()
                (self.out / name).with_suffix(".idx").unlink()
            problem = f"none of the {self.first[-1]} images is usable ({_counts(kinds.most_common(3))})"
            raise UserError(f"{problem}. Check {next(iter(reported())).source}.")
        for index in self.indexes:
            left_out += index.tally.left_out
        other_files = sum((index.tally.other_files for index in self.indexes), Reasons())
        accounting = Accounting(num_written - num_converted, num_converted, left_out)
        write_report(self.out, Content(accounting, kinds, reported, thumbnails, other_files))
        classes = max((index.classes for index in self.indexes), key=len)
        write_manifest(self.out, shards, classes=classes, accounting=accounting.to_json(), **identity, **facts)
        output_dir.clear_progress(self.out)
        others = f"; {other_files.total():,} other files ({other_files})" if other_files.counts else ""
        found = f"; among those in the shards: {_counts(kept.most_common())}" if kept else ""
        return f"{self.out}: {accounting}; {len(shards)} shards{found}{others}; see {self.out / 'report.html'}"

    def findings(self, duplicates: dict[int, int]) -> "_Findings":
        """Return what the report says of images that are irregular or duplicates."""
        found, single = _Findings(), set(duplicates)  # duplicates that are not irregular
        for plan, record in self.records():
            for image, kinds, action in record["odd"]:
                number = self.first[plan.split] + image
                found.add(number, Finding((*kinds, "duplicate") if number in duplicates else tuple(kinds), action))
                single.discard(number)
        for number in single:
            found.add(number, Finding(("duplicate",), "kept"))
        found.sort()
        return found


class Finding(NamedTuple):
    """What the report says of an image."""

    kinds: tuple[str, ...]
    action: str  # converted, kept or left_out


class _Findings:
    """Findings by image, in eight bytes each."""

    def __init__(self) -> None:
        self._packed = array("q")  # number of the image, and number of the finding in the low CODE_BITS bits
        self._codes: dict[Finding, int] = {}

    def add(self, number: int, finding: Finding) -> None:
        self._packed.append(number << CODE_BITS | self._codes.setdefault(finding, len(self._codes)))

    def sort(self) -> None:
        """Bring them into the order of the images."""
        np.frombuffer(self._packed, np.int64).sort()

    def __iter__(self) -> Iterator[tuple[int, Finding]]:
        values = list(self._codes)
        return ((packed >> CODE_BITS, values[packed & (1 << CODE_BITS) - 1]) for packed in self._packed)


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
