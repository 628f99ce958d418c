"""Time and memory of opening large data sets: the sample index beside manifest and text indexes.

The data sets are simulated: shards of 1,000 samples whose tars are empty files of the stated size. Each measurement is
a process of its own.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from ddae.data.cache import Cache
from ddae.data.manifest import FORMAT, INDEX_VERSION, MANIFEST
from ddae.data.sample_index import SampleIndex, ShardEntry, write_sample_index
from ddae.data.sampling import EpochOrder
from ddae.data.shards import open_shards

PER_SHARD, IMAGE_BYTES, SAMPLE_BYTES = 1000, 110_000, 112_640
BATCH = 256  # samples whose place in the epoch is computed
MAX_TEXT_ROWS = 14_000_000  # manifest and text indexes of more take too long to write and to read


def benchmark_index(rows: list[int], out: str) -> None:
    """Measure data sets of so many images. Print a table, and write it to OUT.csv."""
    lines = ["images,form,open_s,memory_mb,first_batch_s,labels_s"]
    for count in rows:
        with tempfile.TemporaryDirectory(dir=".") as folder:
            for form in ("text", "index"):
                if form == "text" and count > MAX_TEXT_ROWS:
                    continue
                simulate(Path(folder), count, form)
                command = [sys.executable, "-m", "ddae.tools.bench_index", folder]
                measured = json.loads(subprocess.check_output(command, text=True))
                lines.append(f"{count},{form}," + ",".join(f"{value:.4g}" for value in measured.values()))
                print(f"{count:12,} images, {form:5}: {json.dumps(measured)}", flush=True)
    if out:
        Path(f"{out}.csv").write_text("\n".join(lines) + "\n")


def simulate(folder: Path, count: int, form: str) -> None:
    """Write a data set without images: manifest and text indexes, or a sample index in their place."""
    shards = [f"train-{i:06d}.tar" for i in range(count // PER_SHARD)]
    generator, size = np.random.default_rng(0), PER_SHARD * SAMPLE_BYTES
    for name in shards:
        with open(folder / name, "wb") as file:
            file.truncate(size)
    offset = np.arange(PER_SHARD) * SAMPLE_BYTES + 1536
    if form == "index":
        for path in folder.glob("*.idx"):
            path.unlink()
        columns = {
            "offset": np.tile(offset, len(shards)),
            "length": np.full(count, IMAGE_BYTES),
            "width": generator.integers(300, 600, count, np.uint16),
            "height": generator.integers(300, 600, count, np.uint16),
            "label": generator.integers(0, 1000, count, np.int32),
        }
        entries = [ShardEntry(name, PER_SHARD, size, f"{i:064x}", "", 0) for i, name in enumerate(shards)]
        (folder / MANIFEST).write_text("{}")
        write_sample_index(folder, "train", SampleIndex(entries, columns, (), 0), 2)
        return
    with open(folder / MANIFEST, "w") as file:
        file.write(f'{{"format": "{FORMAT}", "shards": {{')
        for i, name in enumerate(shards):
            sizes = generator.integers(300, 600, (PER_SHARD, 2)).tolist()
            entry = {"samples": PER_SHARD, "bytes": size, "sha256": f"{i:064x}", "sizes": sizes}
            file.write(f'{"," if i else ""}"{name}":{json.dumps(entry, separators=(",", ":"))}')
        file.write("}}")
    lines = [
        f"cls {start - 1024} 3 {i:08d}.cls jpg {start} {IMAGE_BYTES} {i:08d}.jpg" for i, start in enumerate(offset)
    ]
    text = "\n".join([f"{INDEX_VERSION} {PER_SHARD}", *lines]) + "\n"
    for name in shards:
        (folder / name).with_suffix(".idx").write_text(text)


def measure(folder: Path) -> dict[str, float]:
    """Return seconds to open the shards, their memory in MB, and seconds for a first batch's samples and labels."""
    before, start = private_memory(), time.perf_counter()
    shards = open_shards(str(folder), Cache(folder, 0))
    opened = time.perf_counter()
    order = EpochOrder(shards.shard_starts, 0)
    samples = order.samples(torch.arange(len(shards) // 2, len(shards) // 2 + BATCH))[1]
    first = time.perf_counter()
    if shards.label is not None:
        shards.labels(samples.numpy())
    end = time.perf_counter()
    memory = (private_memory() - before) / 1e6
    seconds = {"open_s": opened - start, "memory_mb": memory, "first_batch_s": first - opened}
    return seconds | {"labels_s": end - first if shards.label is not None else float("nan")}


def private_memory() -> int:
    """Return the bytes of memory that this process does not share with others: anonymous pages."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no Anonymous line in /proc/{os.getpid()}/smaps_rollup")


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(Path(sys.argv[1]))))
