"""Images -> shuffled shards, on all cores: the same bytes whatever the number of workers, however often it is killed.

What goes where is planned before anything is read: the images of a split are permuted by the seed and cut into shards.
A worker makes one shard at a time: it reads each image once, decodes it, and writes it. The main process brings each
shard to its place and notes that it is whole (output_dir.py), so that a run begun again makes only what is missing. The
manifest comes last.
"""

import errno
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ddae.data.shard_writer import Sample, put_in_place, write_manifest, write_unfinished
from ddae.errors import UserError
from ddae.sharding import output_dir, workers
from ddae.sharding.inspection import MAX_BYTES, Finding, inspect, thumbnail
from ddae.sharding.report import OddImage, write_report
from ddae.sharding.sources import UNLABELLED, Index

FEWEST = 16  # shards that a split is cut into where it has images enough, so that all workers have some
SHOWN = 40  # thumbnails of a kind
PER_SAMPLE = 2048  # bytes that a tar spends on a sample besides its image


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of the shards."""

    seed: int = 0
    max_count: int = 1000  # images of a shard
    max_size: int = 1 << 30  # bytes of a shard, by the sizes of the files it is made of
    resize_shorter: int = 0  # pixels; 0: images keep their size
    quality: int = 95  # of JPEGs that are written anew
    on_bad: Literal["keep", "stop", "drop_all"] = "keep"


Place = tuple[int, int]  # of an image: number of its split, number within


class Planned(NamedTuple):
    """One shard to be made: its file's name, its split, and its images in order."""

    name: str
    split: int  # number in the list of indexes
    images: np.ndarray  # int64


def shard(indexes: list[Index], out: Path, settings: Settings, num_workers: int, **about: Any) -> str:
    """Write the shards of all splits, their manifest and report; what was done, in a sentence.

    about: more that the manifest shall say. UserError where the folder holds something else, and for a bad image with
    on_bad="stop".
    """
    identity = {"source": {i.split: _fingerprint(i) for i in indexes}, "settings": asdict(settings)}
    if output_dir.is_complete(out, identity):
        return f"{out} is complete; delete it to make it again"
    try:
        with output_dir.own(out, identity):
            return _Sharder(indexes, out, settings, num_workers).run(identity, about)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"no space left on {out}: make room; the same command goes on where it was") from None


def plan_split(number: int, index: Index, settings: Settings) -> list[Planned]:
    """The shards of a split: its images in an order of the seed's, cut where a shard is full."""
    order = np.random.RandomState(settings.seed).permutation(len(index))  # NumPy keeps this stream for ever
    count = max(1, min(settings.max_count, -(-len(index) // FEWEST)))
    starts, size = [0], 0
    for position, length in enumerate(index.length[order].tolist()):
        size += length + PER_SAMPLE
        if position - starts[-1] >= count or (size > settings.max_size and position > starts[-1]):
            starts.append(position)
            size = length + PER_SAMPLE
    pieces = np.split(order, starts[1:])
    return [Planned(f"{index.split}-{i:06d}.tar", number, images) for i, images in enumerate(pieces)]


class _Sharder:
    """One run of the sharder; worker processes inherit it as it is."""

    def __init__(self, indexes: list[Index], out: Path, settings: Settings, num_workers: int):
        self.indexes, self.out, self.settings, self.num_workers = indexes, out, settings, num_workers
        self.plan = [planned for number, index in enumerate(indexes) for planned in plan_split(number, index, settings)]
        self.suspects = _suspects(indexes)

    def run(self, identity: dict[str, Any], about: dict[str, Any]) -> str:
        missing = [planned for planned in self.plan if output_dir.noted(self.out, planned.name) is None]
        if not self.settings.resize_shorter:  # else their size is not known
            lengths = [self.indexes[planned.split].length[planned.images] for planned in missing]
            output_dir.check_room(self.out, sum(int(each.sum()) + PER_SAMPLE * len(each) for each in lengths))
        self.make([(planned, frozenset()) for planned in missing])
        records = self.records()
        copies = self.copies(records)
        if copies and self.settings.on_bad == "stop":
            (split, image), first = next(iter(copies.items()))
            raise UserError(
                f"{self.indexes[split].source(image)} is an exact copy of {self.indexes[first[0]].source(first[1])}: "
                f"take it out and delete {self.out}, or let --on_bad keep keep it"
            )
        if copies and self.settings.on_bad == "drop_all":  # which image is a copy is known when all have been read
            self.make(self.holders(copies, records))
            records = self.records()
        return self.finish(records, copies, identity, about)

    def make(self, tasks: list[tuple[Planned, frozenset[int]]]) -> None:
        """Make these shards, each without the images that are named beside it."""
        total = sum(len(planned.images) for planned in self.plan)
        done = total - sum(len(planned.images) for planned, _ in tasks)
        if not tasks:
            return
        for name, record in workers.run(self.write, tasks, self.num_workers, total, done):
            put_in_place(self.out / name)  # here, as it waits for the disk: the workers go on
            output_dir.note(self.out, name, record)

    def write(self, planned: Planned, without: frozenset[int]) -> tuple[str, dict[str, Any]]:
        """Write one shard; its name, and what is to be noted of it. In a worker."""
        odd: list[tuple[int, list[str], str]] = []
        digests: dict[int, str] = {}
        entry = write_unfinished(self.out / planned.name, self.samples(planned, without, odd, digests))
        return planned.name, {"entry": entry, "odd": odd, "digests": digests}

    def samples(
        self, planned: Planned, without: frozenset[int], odd: list[tuple[int, list[str], str]], digests: dict[int, str]
    ) -> Iterator[Sample]:
        """The samples of a shard, in order; adds what is odd, and the hashes by which copies are found."""
        index, settings = self.indexes[planned.split], self.settings
        for image in planned.images.tolist():
            too_long = index.length[image] > MAX_BYTES
            data = b"" if too_long else index.read(image)
            found = Finding(("bomb",), None) if too_long else inspect(data, settings.resize_shorter, settings.quality)
            kinds = [*found.kinds, *(["duplicate_key"] if index.repeated[image] else [])]
            if kinds and settings.on_bad == "stop":
                raise UserError(
                    f"{index.source(image)} is no plain RGB JPEG of its own ({', '.join(kinds)}): mend it or take it "
                    "out, or let --on_bad keep convert what is usable"
                )
            if found.jpeg is not None and self.suspects[planned.split][image]:
                digests[image] = hashlib.sha256(data).hexdigest()[:32]
            left_out = found.jpeg is None or image in without or (bool(kinds) and settings.on_bad == "drop_all")
            if kinds or left_out:
                odd.append((image, kinds, "left_out" if left_out else "converted" if found.kinds else "kept"))
            if found.jpeg is not None and not left_out:
                label = int(index.label[image])
                yield Sample(
                    index.key_of(image),
                    found.jpeg,
                    None if label == UNLABELLED else label,
                    found.width,
                    found.height,
                )
            workers.count_one()

    def records(self) -> dict[str, dict[str, Any]]:
        """What was noted of each shard."""
        return {planned.name: output_dir.noted(self.out, planned.name) or {} for planned in self.plan}

    def copies(self, records: dict[str, dict[str, Any]]) -> dict[Place, Place]:
        """Each exact copy -> the first image with its bytes, which is not one that is left out for another reason."""
        odd = {(p.split, image) for p in self.plan for image, kinds, _ in records[p.name]["odd"] if kinds}
        left_out = odd if self.settings.on_bad == "drop_all" else set()
        by_digest: dict[str, list[Place]] = {}
        for planned in self.plan:
            for image, digest in records[planned.name]["digests"].items():
                by_digest.setdefault(digest, []).append((planned.split, int(image)))
        copies = {}
        for same in by_digest.values():
            first, *rest = sorted(same, key=lambda place: (place in left_out, place))
            copies |= dict.fromkeys(rest, first)
        return dict(sorted(copies.items()))

    def holders(
        self, copies: Iterable[Place], records: dict[str, dict[str, Any]]
    ) -> list[tuple[Planned, frozenset[int]]]:
        """The shards that still hold copies, with the copies that were planned for them."""
        tasks = []
        for planned in self.plan:
            own = {image for split, image in copies if split == planned.split} & set(planned.images.tolist())
            gone = {image for image, _, action in records[planned.name]["odd"] if action == "left_out"}
            if own - gone:
                tasks.append((planned, frozenset(own)))
        return tasks

    def finish(
        self,
        records: dict[str, dict[str, Any]],
        copies: dict[Place, Place],
        identity: dict[str, Any],
        about: dict[str, Any],
    ) -> str:
        """Write report and manifest; what was done, in a sentence."""
        noted = {
            (p.split, image): (kinds, action) for p in self.plan for image, kinds, action in records[p.name]["odd"]
        }
        for place in copies:
            kinds, action = noted.get(place, ([], "kept"))
            noted[place] = ([*kinds, "duplicate"], action)
        odd, shown = [], Counter()
        for (split, image), (kinds, action) in sorted(noted.items()):
            index, first = self.indexes[split], copies.get((split, image))
            same_as = None if first is None else self.indexes[first[0]].source(first[1])
            small = thumbnail(index.read(image)) if shown.get(kinds[-1], 0) < SHOWN and "bomb" not in kinds else None
            shown[kinds[-1]] += small is not None
            odd.append(OddImage(index.source(image), index.key_of(image), kinds, action, same_as, small))
        shards = {planned.name: records[planned.name]["entry"] for planned in self.plan}
        read = sum(len(index) for index in self.indexes)
        written = sum(entry["samples"] for entry in shards.values())
        if not written:
            for name in shards:  # they are empty
                (self.out / name).unlink()
                (self.out / name).with_suffix(".idx").unlink()
            what = Counter(kind for image in odd for kind in image.kinds).most_common(3)
            raise UserError(f"none of the {read} images can be used ({dict(what)}): look at {odd[0].source}")
        write_report(
            self.out, read, written, odd, [f"{i.where}: {name}" for i in self.indexes for name in i.passed_over]
        )
        classes = max((index.classes for index in self.indexes), key=len)
        write_manifest(self.out, shards, classes=classes, **identity, **about)
        output_dir.forget(self.out)
        kinds = Counter(kind for image in odd for kind in image.kinds)
        told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        return f"{self.out}: {written} of {read} images in {len(shards)} shards, {read - written} left out" + (
            f"; {told}: see {self.out / 'report.html'}" if odd else "; all were plain RGB JPEGs"
        )


def _suspects(indexes: list[Index]) -> list[np.ndarray]:
    """For each split, which images are as long as another of any split: bool [N]. Only these can be copies."""
    lengths, counts = np.unique(np.concatenate([index.length for index in indexes]), return_counts=True)
    return [counts[np.searchsorted(lengths, index.length)] > 1 for index in indexes]


def _fingerprint(index: Index) -> dict[str, Any]:
    """What a source is known by: its name, and a hash of what lies where in it."""
    digest = hashlib.sha256()
    for column in (index.name, index.length, index.label, index.key):
        digest.update(np.ascontiguousarray(column).tobytes())
    return {
        "name": Path(index.where).name,
        "images": len(index),
        "bytes": int(index.length.sum()),
        "sha256": digest.hexdigest(),
    }
