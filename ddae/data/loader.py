"""The data loader: an endless stream of micro-batches that can start at any step, with any back end.

Worker processes plan crops, read the files and sample the masks, which leaves the interpreter lock of the training
process to training. With Pillow they decode, too. With DALI the training process receives the files of whole
micro-batches, and one of its threads passes them to DALI, which decodes in threads of its own. A sample that cannot be
decoded is logged, counted and replaced by the next of the data set; too many of them end the run.
"""

import atexit
import itertools
import logging
import math
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ddae.config.base import ImageSize, ShardsConfig, height_width
from ddae.data.backend import Decoding, can_decode_regions, check_installed, choose_backend
from ddae.data.cache import is_url, open_cache
from ddae.data.dali_fallback import DALI_QUEUE, FallbackDecoder
from ddae.data.file_io import raise_open_file_limit
from ddae.data.masking import Mask
from ddae.data.memory import DecodedImages, SharedBuffers, decode_all, require_shared_memory
from ddae.data.reader import Augment, MaskSampler, RankBatch, RawBatch, Reader, SyntheticReader, add_masks
from ddae.data.sampling import EpochOrder, crop_policy
from ddae.data.shards import Shards, open_shards
from ddae.distributed.comm import broadcast_from_main, gather, is_main
from ddae.distributed.cores import num_workers
from ddae.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")
SYNTHETIC_SAMPLES = 65536  # size of the synthetic data set
DALI_PREFETCH = 2  # decoded micro-batches that are kept ready, besides those in DALI's queue
PREFETCH_BATCHES = 2  # micro-batches that each worker process keeps ready
BUFFER_SPARE = 1.5  # size of a buffer for encoded files over that of an average micro-batch
MAX_BAD_FRACTION = 0.001  # of the data set; with more bad samples the run ends
MAX_NAMES_SHOWN = 20  # bad samples listed in an error


class Batch(NamedTuple):
    """One micro-batch."""

    images: Tensor  # uint8 [B, 3, S, S]
    seeds: Tensor  # int64 [B]: per sample and epoch; masks are drawn from them
    samples: Tensor  # int64 [B]: indices into the data set
    mask: Mask | None = None  # on the CPU, if the loader was given a mask sampler


def _shard_repeats(config: ShardsConfig, shards: Shards | None) -> np.ndarray | None:
    """Return how often an epoch contains each shard: int64 [S]; None: once. Raise UserError for a missing weight."""
    if not config.weights:
        return None
    if shards is None or len(config.weights) != len(config.sources):
        problem = f"data.weights has {len(config.weights)} values for {len(config.sources)} sources of data.train"
        raise UserError(f"{problem}. Pass one for each, as --data.train A B --data.weights 1 3.")
    return np.repeat(np.array(config.weights, np.int64), shards.source_shards)


class Loader:
    """The training data of a run and its stream of micro-batches."""

    READER: type[Reader] = Reader
    PLANES = 3  # bytes of a pixel that Pillow's worker processes send

    def __init__(
        self,
        config: ShardsConfig,
        size: ImageSize,
        seed: int,
        rank_batch: RankBatch,
        device: torch.device,
        augment: Augment | None = None,
        sample_masks: MaskSampler | None = None,
    ):
        """Open the shards. Raise UserError if there are fewer images than ranks, or less than a batch to drop from.

        augment: applied to each cropped image in Pillow's worker processes; rules DALI out.
        sample_masks: draws the masks of a micro-batch from its seeds, in the worker processes.
        """
        self.config, self.rank_batch, self.device, self.size = config, rank_batch, device, size
        self.augment, self.sample_masks = augment, sample_masks
        self.workers = num_workers(config.workers)
        if config.in_memory and config.backend not in ("auto", "pillow"):
            problem = f"data.in_memory is set, but data.backend is {config.backend}; expected pillow"
            raise UserError(f"{problem}. Leave out --data.backend or --data.in_memory.")
        needs_pillow = augment is not None or config.in_memory
        backend = "pillow" if needs_pillow and config.backend == "auto" else config.backend
        self.backend = check_installed(backend)  # select_backend() replaces "auto"
        self.shards: Shards | None = None
        if self.backend == "synthetic":
            shard_starts, self.fingerprint = np.array([0, SYNTHETIC_SAMPLES]), "synthetic"
        else:
            raise_open_file_limit()
            self.shards = open_shards(config.sources, open_cache(config))
            shard_starts, self.fingerprint = self.shards.shard_starts, self.shards.fingerprint
        drop = rank_batch.batch_size if config.remainder == "drop" else 1
        self.order = EpochOrder(shard_starts, seed, drop, _shard_repeats(config, self.shards))
        self.num_samples, self.epoch_samples = self.order.num_samples, self.order.epoch_samples
        if self.num_samples < rank_batch.world_size:
            problem = f"data.train holds {self.num_samples} images for {rank_batch.world_size} ranks"
            raise UserError(f"{problem}; expected at least one per rank. Start fewer ranks.")
        if not self.epoch_samples:  # data.remainder is drop
            problem = f"data.batch_size is {rank_batch.batch_size}, larger than the {self.num_samples} images"
            raise UserError(f"{problem} of data.train. Lower --data.batch_size, or pass --data.remainder carry_over.")
        self.bad: dict[int, str] = {}  # reason by sample, for those that could not be decoded
        self.backend_reason = ""  # why select_backend() chose the back end
        self._decode_regions = True
        self._decoded: DecodedImages | None = None
        self._selected = False  # whether select_backend() was called
        self._num_decoded, self._decode_seconds = 0, 0.0
        self._stream: Generator[Batch, None, None] | None = None
        # Runs before multiprocessing's exit handler, which would wait for the workers: they ignore its SIGTERM.
        atexit.register(self.close)

    def select_backend(self, previous: Decoding | None = None) -> None:
        """Replace back end "auto" by that of `previous`, an earlier start of the run, or else by the faster one.

        With DALI also choose whether it decodes regions: if all ranks can, and unless the earlier start did not. With
        data.in_memory also decode all images. All ranks call it, and all get the same result.
        """
        reader = self._reader()
        if self.backend == "auto":
            before = None if previous is None else previous.backend
            choice = broadcast_from_main(lambda: choose_backend(reader, self.config, self.device, before))
            self.backend, self.backend_reason = choice
        if self.shards is not None and self.backend != "dali":  # whose files are sent in SharedBuffers
            batch = self.rank_batch.micro_batch * self.PLANES * math.prod(height_width(self.size))
            require_shared_memory(self.workers * PREFETCH_BATCHES * batch, self.workers)
        if self.backend == "dali":
            works = all(gather(can_decode_regions(reader, self.config, self.device)))
            was_whole = previous is not None and previous.backend == "dali" and not previous.regions
            self._decode_regions = works and not was_whole
        if self.config.in_memory and self.shards is not None and not self._selected:
            self._decoded = decode_all(self.shards, max(1, self.workers))
        self._selected = True

    @property
    def decoding(self) -> Decoding:
        """How images are decoded, once select_backend() was called."""
        return Decoding(self.backend, self._decode_regions)

    def describe(self) -> str:
        """Return the number of images, the back end, the workers and the handling of a last batch, for the log."""
        text = f"{self.num_samples} images from {self.backend}"
        text += f" ({self.backend_reason})" if self.backend_reason else ""
        if self.shards is not None:
            text += f", {self.workers} worker{'' if self.workers == 1 else 's'}"
        if self.shards is not None and self.shards.num_bad:
            text += f", {self.shards.num_bad} more are listed as bad"
        if self.config.weights:
            text += f", {self.order.epoch_total} in an epoch"
        if remainder := self.order.epoch_total % self.rank_batch.batch_size:
            handling = "carried over to the next" if self.config.remainder == "carry_over" else "dropped"
            text += f", the last {remainder} of an epoch are {handling}"
        return text

    def batches(self, step: int) -> Iterator[Batch]:
        """Return the endless stream of micro-batches from the first one of `step` on.

        A step has rank_batch.grad_accum_steps of them. Raise UserError if samples cannot be read.
        """
        self.close()
        if self.backend == "auto" or (self.config.in_memory and not self._selected):
            self.select_backend()
        self._stream = self._batches(step)
        return self._stream

    def close(self) -> None:
        """End the stream and its worker processes."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def sample_name(self, sample: int) -> str:
        """Return the name of a sample for messages: SHARD:KEY, or its number for synthetic images."""
        return str(sample) if self.shards is None else self.shards.sample_name(sample)

    def read_stats(self) -> dict[str, float]:
        """Return data/decode_errors, over all ranks, and throughput/decode_images_per_s since the last call (or 0).

        All ranks call it. Raise UserError on all of them if too many samples are bad.
        """
        bad = {sample: reason for of_rank in gather(self.bad) for sample, reason in of_rank.items()}
        if len(bad) > MAX_BAD_FRACTION * self.num_samples:
            shown = sorted(bad.items())[:MAX_NAMES_SHOWN]
            names = ", ".join(f"{self.sample_name(sample)} ({reason})" for sample, reason in shown)
            names += f" and {len(bad) - len(shown)} more" if len(bad) > len(shown) else ""
            problem = f"{len(bad)} of {self.num_samples} images cannot be decoded"
            fix = "Exclude them with data_prep/check_shards.py --full --mark_bad."
            raise UserError(f"{problem}; expected at most {MAX_BAD_FRACTION:.1%}: {names}. {fix}")
        rate = self._num_decoded / self._decode_seconds if self._decode_seconds else 0.0
        self._num_decoded, self._decode_seconds = 0, 0.0
        return {"data/decode_errors": len(bad), "throughput/decode_images_per_s": rate}

    def _batches(self, step: int) -> Generator[Batch, None, None]:
        closed, position = threading.Event(), [step * self.rank_batch.batch_size]
        files = self.raw_batches(step * self.rank_batch.grad_accum_steps)  # starts processes, so before any thread
        if self.shards is not None and is_url(self.shards.paths[0]):
            threading.Thread(target=self._prefetch_shards, args=(self.shards, position, closed), daemon=True).start()
        stream = self._dali_batches(files) if self.backend == "dali" else files
        try:
            for raw in stream:
                if raw.error:
                    raise UserError(raw.error)
                self._record(raw)
                position[0] += self.rank_batch.micro_batch * self.rank_batch.world_size
                images = raw.images.to(self.device, non_blocking=True)
                if raw.images.is_cuda:  # allocated on the decoder's stream; not to be reused before this stream is done
                    images.record_stream(torch.cuda.current_stream(self.device))
                yield Batch(images, raw.plan.seeds, raw.plan.samples, raw.mask)
        except UserError as error:
            if not is_main():  # the command prints errors of rank 0 only, which may not have this one
                logger.error("%s", error)
            raise
        finally:
            closed.set()
            stream.close()
            files.close()

    def _reader(self) -> Reader:
        if self.shards is None:
            return SyntheticReader(self.order, self.rank_batch, self.size)
        crop = crop_policy(self.config.crop, self.config.crop_scale, self.size)
        options = crop, self.backend == "pillow", self.augment, self._decoded
        return self.READER(self.shards, self.order, self.rank_batch, self.size, *options)

    def raw_batches(self, first: int) -> "RawBatches":
        """Return the stream of micro-batches with masks from number `first` on, decoded only with Pillow.

        Its worker processes are started here, not at the first batch.
        """
        workers = 0 if self.shards is None else self.workers
        reads = _TaskReader(self._reader(), self.sample_masks)
        if workers and self.shards is not None and self.backend == "dali":
            count = workers * PREFETCH_BATCHES + DALI_QUEUE + 1  # ready, in DALI's queue, and the last one of it
            size = BUFFER_SPARE * self.rank_batch.micro_batch * self.shards.length.mean()
            reads.buffers = SharedBuffers(count, math.ceil(size))
        return RawBatches(reads, first, workers, self.device.type == "cuda" and self.backend == "pillow")

    def _record(self, batch: RawBatch) -> None:
        """Log bad samples that are new, and count decoded images and the time they took."""
        for sample, reason in batch.bad:
            if sample not in self.bad:
                self.bad[sample] = reason
                logger.warning("skipping %s: %s", self.sample_name(sample), reason)
        self._num_decoded += len(batch.lengths)
        self._decode_seconds += batch.seconds / (max(1, self.workers) if self.backend == "pillow" else 1)

    def _dali_batches(self, files: "RawBatches") -> Generator[RawBatch, None, None]:
        """Yield the micro-batches decoded by DALI, DALI_PREFETCH ahead of their use."""
        from ddae.data.dali import DaliDecoder

        def new_decoder(batch_size: int, queue: int) -> DaliDecoder:
            threads, load = max(1, self.workers), self.config.hw_decoder_load
            return DaliDecoder(self.size, batch_size, threads, self.device, self._decode_regions, load, queue=queue)

        queue = 1 if self.device.type == "cuda" else DALI_QUEUE
        decoder = FallbackDecoder(self._reader(), new_decoder, self.sample_masks, queue)
        return run_ahead(partial(decoder.decode_next, files), DALI_PREFETCH)

    def _prefetch_shards(self, shards: Shards, position: list[int], closed: threading.Event) -> None:
        """Download the shards of the current and the next shuffle window before a reader needs them."""
        fetched: list[int] = []
        while not closed.wait(0.2):
            near = self.order.shards_near(position[0])
            for shard in [shard for shard in near if shard not in fetched]:
                with suppress(UserError):  # raised again in the reader that needs the shard
                    shards.fetch(shard)
                if closed.is_set():
                    return
            fetched = near


class Task(NamedTuple):
    """What a worker process is asked for."""

    number: int  # of the micro-batch
    buffer: int | None  # number of the buffer for its encoded files, if one is free


class _TaskReader(Dataset):
    """Reads micro-batches in a worker process. `buffers`, if set, take the encoded files to the training process."""

    def __init__(self, reader: Reader, sample_masks: MaskSampler | None):
        self.reader, self.sample_masks = reader, sample_masks
        self.buffers: SharedBuffers | None = None

    def __getitem__(self, task: Task) -> tuple[RawBatch, int | None]:
        """Return the micro-batch and the task's buffer. `images` is empty if the buffer has them."""
        batch = add_masks(self.sample_masks, self.reader[task.number])
        if self.buffers is not None:
            files = batch.images.numpy()
            is_written = task.buffer is not None and self.buffers.write(task.buffer, files)
            # Arrays are sent by value: /dev/shm may be small.
            batch = batch._replace(images=files[:0] if is_written else files)  # type: ignore[arg-type]
        return batch, task.buffer


class RawBatches(Iterator[RawBatch]):
    """Endless stream of micro-batches as the worker processes send them; without workers this process reads them."""

    def __init__(self, reads: _TaskReader, first: int, workers: int, pin_memory: bool):
        """first: number of the first micro-batch."""
        self._buffers = reads.buffers
        loader = DataLoader(
            reads,
            batch_size=None,
            collate_fn=_unchanged,
            sampler=map(self._task, itertools.count(first)),  # type: ignore[arg-type]
            num_workers=workers,
            prefetch_factor=PREFETCH_BATCHES if workers else None,
            pin_memory=pin_memory,
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # it draws a seed that nothing uses; not from the global generator
        )
        self._stream: Any = iter(loader)  # starts the worker processes

    def _task(self, number: int) -> Task:
        return Task(number, None if self._buffers is None else self._buffers.take())

    def __next__(self) -> RawBatch:
        batch, buffer = next(self._stream)
        if buffer is None or self._buffers is None:
            return batch
        if len(batch.images):  # too large for it, or an error
            self._buffers.release(buffer)
            return batch
        return batch._replace(images=torch.from_numpy(self._buffers.read(buffer, int(batch.lengths.sum()))))

    def close(self) -> None:
        """End the worker processes."""
        # Explicitly: a traceback may keep the stream alive, and exit would wait for the workers.
        if hasattr(self._stream, "_shutdown_workers"):
            self._stream._shutdown_workers()


def _unchanged(batch: T) -> T:
    return batch


def run_ahead(task: Callable[[], T], ahead: int) -> Generator[T, None, None]:
    """Yield the results of one call of the task after the other; a thread calls it up to `ahead` times in advance."""
    with ThreadPoolExecutor(1) as thread:
        futures = deque(thread.submit(task) for _ in range(ahead))
        try:
            while True:
                result = futures.popleft().result()
                futures.append(thread.submit(task))
                yield result
        finally:
            thread.shutdown(cancel_futures=True)


def ignore_signals(worker: int) -> None:
    """Initialise a worker process: one thread, and no reaction to signals, which the parent process handles."""
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
