"""An endless stream of micro-batches that any step can be resumed at, whichever back end decodes.

Pillow decodes in reader processes; for DALI threads of the training process read, decode and (on a CPU) resize, all of
them outside of Python's lock. A sample that cannot be decoded is named, counted, and replaced by the next of the data
set; too many end the run.
"""

import atexit
import itertools
import logging
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ddae.config.base import ShardsConfig
from ddae.data.backend import can_decode_regions, check_installed, choose
from ddae.data.cache import is_url, open_cache
from ddae.data.dali_fallback import RescuingDecoder
from ddae.data.masking import Mask
from ddae.data.reader import Augment, MaskingReader, MaskSampler, RankBatch, RawBatch, Reader, SyntheticReader
from ddae.data.sampling import EpochOrder, crop_policy
from ddae.data.shards import Shards, open_shards
from ddae.distributed.comm import broadcast_from_main, gather, is_main, rank
from ddae.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")
SYNTHETIC_SAMPLES = 65536  # size of the data set that the synthetic back end stands for
AHEAD = 2  # micro-batches that DALI decodes while earlier ones are used
MAX_BAD = 0.001  # share of the data set that may turn out to be bad
MAX_NAMES_SHOWN = 20  # bad samples that an error names


class Batch(NamedTuple):
    """One micro-batch."""

    images: Tensor  # uint8 [B, 3, S, S]
    seeds: Tensor  # int64 [B]: counters of the samples in their epochs; masks are drawn from them
    samples: Tensor  # int64 [B]: numbers of the samples in the data set
    mask: Mask | None = None  # where a reader has drawn it already; on the CPU


class Loader:
    """The data set of a run and its stream of micro-batches."""

    READER: type[Reader] = Reader

    def __init__(
        self,
        config: ShardsConfig,
        size: int,
        seed: int,
        part: RankBatch,
        device: torch.device,
        augment: Augment | None = None,
        sample_masks: MaskSampler | None = None,
    ):
        """augment: what becomes of each image after its crop, which Pillow's reader processes see to alone. draw_mask
        makes masks while earlier micro-batches are used."""
        self.config, self.part, self.device, self.size, self.augment = config, part, device, size, augment
        self.sample_masks = sample_masks
        backend = "pillow" if augment is not None and config.backend == "auto" else config.backend
        self.backend = check_installed(backend)  # "auto" until settle() has chosen
        self.shards: Shards | None = None
        whole_batches = part.batch_size if config.remainder == "drop" else 1
        if self.backend == "synthetic":
            first, self.fingerprint = np.array([0, SYNTHETIC_SAMPLES]), "synthetic"
        else:
            self.shards = open_shards(config.train, open_cache(config))
            first, self.fingerprint = self.shards.first, self.shards.fingerprint
        self.order = EpochOrder(first, seed, whole_batches)
        self.num_samples, self.epoch_samples = self.order.num_samples, self.order.epoch_samples
        if self.num_samples < part.ranks:
            raise UserError(f"data.train holds {self.num_samples} images for {part.ranks} ranks: start fewer ranks")
        if not self.epoch_samples:
            raise UserError(
                f"data.batch_size {part.batch_size} is larger than the {self.num_samples} images of data.train, so "
                "that data.remainder drop leaves nothing: choose a smaller batch, or --data.remainder carry_over"
            )
        self.bad: dict[int, str] = {}  # samples that could not be decoded, and why
        self.told = ""  # what led to the choice of the back end
        self._region = True
        self._decoded, self._decode_seconds = 0, 0.0
        self._stream: Generator[Batch, None, None] | None = None
        atexit.register(
            self.close
        )  # before multiprocessing's own hook, which waits for workers ignore_signals to SIGTERM

    def select_backend(self, known: str | None = None) -> None:
        """Choose the back end that "auto" stands for, on the main rank for all: the one known from an earlier start of
        the run, else the faster one."""
        reader = self._reader()
        if self.backend == "auto":
            assert isinstance(reader, Reader)
            self.backend, why = broadcast_from_main(lambda: choose(reader, self.config, self.device, known))
            self.told = f" ({why})"
        if self.backend == "dali":
            assert isinstance(reader, Reader)
            self._region = can_decode_regions(reader, self.config, self.device)

    def describe(self) -> str:
        """The data set and what becomes of an epoch's last batch, in words."""
        words = f"{self.num_samples} images from {self.backend}{self.told}"
        if self.shards is not None and self.shards.num_bad:
            words += f", {self.shards.num_bad} more are listed as bad"
        left = self.num_samples % self.part.batch_size
        if left:
            rotated = "go into the next one's first batch" if self.config.remainder == "carry_over" else "are left out"
            words += f", the last {left} of an epoch {rotated}"
        return words

    def batches(self, step: int) -> Iterator[Batch]:
        """Micro-batches without end from the first of `step` on; `part.accumulation` of them make a step."""
        self.close()
        if self.backend == "auto":
            self.select_backend()
        self._stream = self._batches(step)
        return self._stream

    def close(self) -> None:
        """End the stream and its reader processes."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def sample_name(self, sample: int) -> str:
        """A sample as a person may look it up."""
        return str(sample) if self.shards is None else self.shards.sample_name(sample)

    def read_stats(self) -> dict[str, float]:
        """Bad samples so far over all ranks, and images/s that this rank's decoders manage (0: none since the last
        call). All ranks call it; UserError on all where too many samples are bad."""
        bad: dict[int, str] = {}
        for each in gather(self.bad):
            bad |= each
        if self.shards is not None and len(bad) > MAX_BAD * self.num_samples:
            listed = [
                f"{self.shards.sample_name(sample)} ({why})" for sample, why in sorted(bad.items())[:MAX_NAMES_SHOWN]
            ]
            more = f" and {len(bad) - MAX_NAMES_SHOWN} more" if len(bad) > MAX_NAMES_SHOWN else ""
            raise UserError(
                f"{len(bad)} of {self.num_samples} images cannot be decoded, more than {MAX_BAD:.1%}: "
                f"{', '.join(listed)}{more}: check_shards.py --full --mark_bad lists them, to be left out"
            )
        rate = self._decoded / self._decode_seconds if self._decode_seconds else 0.0
        self._decoded, self._decode_seconds = 0, 0.0
        return {"data/decode_errors": len(bad), "throughput/decode_images_per_s": rate}

    def _batches(self, step: int) -> Generator[Batch, None, None]:
        over, position = threading.Event(), [step * self.part.batch_size]
        if self.shards is not None and is_url(self.shards.places[0]):
            threading.Thread(target=self._fetch_ahead, args=(self.shards, position, over), daemon=True).start()
        first = step * self.part.accumulation
        stream = self._dali(self.read_files(first)) if self.backend == "dali" else self._processes(first)
        try:
            for micro in stream:
                if micro.mistake:
                    raise UserError(micro.mistake)
                self._note(micro)
                position[0] += self.part.micro_batch * self.part.ranks
                images = micro.images.to(self.device, non_blocking=True)
                if micro.images.is_cuda:  # of the decoder's stream: not to be given away before this one has used it
                    images.record_stream(torch.cuda.current_stream(self.device))
                yield Batch(images, micro.drawn.seeds, micro.drawn.samples, micro.mask)
        except UserError as error:
            if not is_main():  # which is the one that speaks, and may know nothing of it
                print(f"ddae: rank {rank()}: {error}", file=sys.stderr, flush=True)
            raise
        finally:
            over.set()
            stream.close()

    def _reader(self) -> Dataset:
        if self.shards is None:
            return SyntheticReader(self.order, self.part, self.size)
        decodes = self.backend == "pillow"
        crop = crop_policy(self.config.crop, self.config.crop_scale)
        return self.READER(self.shards, self.order, self.part, self.size, crop, decodes, self.augment)

    def read_files(self, first: int) -> Generator[RawBatch, None, None]:
        """Micro-batches from this number on, read by threads and not decoded."""
        reader, threads = self._reader(), max(1, self.config.workers)
        return in_order(
            (partial(reader.__getitem__, number) for number in itertools.count(first)), threads, 2 * threads
        )

    def _processes(self, first: int) -> Generator[RawBatch, None, None]:
        """Micro-batches from this number on, read and decoded by processes."""
        workers = 0 if self.shards is None else self.config.workers
        reader = self._reader()
        loader = DataLoader(
            reader if self.sample_masks is None else MaskingReader(reader, self.sample_masks),
            batch_size=None,
            sampler=itertools.count(first),  # type: ignore[arg-type]
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=ignore_signals,
        )
        stream = iter(loader)
        try:
            yield from stream
        finally:
            if workers:  # an error's traceback may keep the stream, whose end would end them: exit would wait for ever
                stream._shutdown_workers()  # type: ignore[attr-defined]

    def _note(self, micro: RawBatch) -> None:
        """Name bad samples that are new; count what was decoded."""
        for sample, why in micro.bad:
            if sample not in self.bad:
                self.bad[sample] = why
                assert self.shards is not None
                logger.warning("skipping %s: %s", self.shards.sample_name(sample), why)
        self._decoded += len(micro.lengths)
        self._decode_seconds += micro.seconds / (max(1, self.config.workers) if self.backend == "pillow" else 1)

    def _dali(self, files: Generator[RawBatch, None, None]) -> Generator[RawBatch, None, None]:
        """Micro-batches decoded by DALI, AHEAD of the user."""
        from ddae.data.dali import DaliDecoder

        def new_decoder(batch: int) -> DaliDecoder:
            threads, load = max(1, self.config.workers), self.config.hw_decoder_load
            return DaliDecoder(self.size, batch, threads, self.device, self._region, load)

        reader = self._reader()
        assert isinstance(reader, Reader)
        decoder = RescuingDecoder(reader, new_decoder)

        def decode() -> RawBatch:
            micro = decoder.decode(next(files))
            return micro if self.sample_masks is None else micro._replace(mask=self.sample_masks(micro.drawn.seeds))

        try:
            yield from in_order(itertools.repeat(decode), 1, AHEAD)
        finally:
            files.close()

    def _fetch_ahead(self, shards: Shards, position: list[int], over: threading.Event) -> None:
        """Download the shards of the windows that are read now and next, before a reader waits for them."""
        fetched: list[int] = []
        while not over.wait(0.2):
            near = self.order.shards_near(position[0])
            for shard in [each for each in near if each not in fetched]:
                with suppress(UserError):  # the reader that needs it will say so
                    shards.fetch(shard)
                if over.is_set():
                    return
            fetched = near


def in_order(tasks: Iterator[Callable[[], T]], num_threads: int, ahead: int) -> Generator[T, None, None]:
    """What the tasks return, in order, done by threads up to so many tasks ahead of the user."""
    with ThreadPoolExecutor(num_threads) as threads:
        waiting = deque(threads.submit(task) for task in itertools.islice(tasks, ahead))
        try:
            while True:
                done = waiting.popleft().result()
                waiting.append(threads.submit(next(tasks)))
                yield done
        finally:
            threads.shutdown(cancel_futures=True)


def ignore_signals(worker: int) -> None:
    """Begin a reader process: signals are its parent's to hear."""
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
