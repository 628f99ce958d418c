import errno
import fcntl
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import psutil
import pytest
import webdataset
from conftest import picture
from image_archives import (
    EXPECTED,
    HERE,
    WNIDS,
    bad_corpus,
    class_tars,
    contents,
    decoded,
    encoded,
    imagenet,
    in_folders,
    keys_of,
    labels_of,
    photo,
    png16,
    report_of,
    shard_imagenet,
    tar_of,
    traps,
    val_files,
    write_devkit,
    write_folder,
    write_tar,
    written,
)
from PIL import Image, ImageOps

from ddae.data import shard_writer
from ddae.data.cache import Cache
from ddae.data.shards import open_shards, read_manifest
from ddae.sharding import sharder
from ddae.sharding.inspection import inspect

FORK = multiprocessing.get_context("fork")
BAD, PLAIN = bad_corpus(), traps()


def corpus():
    """100 good photos and the traps among the bad; and for each odd one, what is to be said of it."""
    classes, odd = imagenet(20), {}
    for i, (name, data) in enumerate(PLAIN.items()):
        classes[WNIDS[i % 5]][f"{WNIDS[i % 5]}_plain_{name}.JPEG"] = data
    for i, (kind, data) in enumerate(BAD.items()):
        wnid = WNIDS[-1] if kind == "duplicate" else WNIDS[i % 5]
        name = f"{wnid}_bad_{kind}.JPEG"
        if kind == "duplicate_key":
            name = next(iter(classes[wnid])).replace(".JPEG", ".jpg")
        classes[wnid][name] = data
        odd[name] = EXPECTED[kind]
    return classes, odd


CLASSES, ODD = corpus()
FIRST = "n01440764_0.JPEG"  # which the duplicate is a copy of
assert CLASSES["n01440764"][FIRST] == BAD["duplicate"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The corpus as a tar of class tars."""
    return write_tar(tmp_path_factory.mktemp("source") / "ILSVRC2012_img_train.tar", class_tars(CLASSES))


@pytest.fixture(scope="module")
def kept(source, tmp_path_factory):
    """The corpus in shards, made by one worker in one go."""
    out = tmp_path_factory.mktemp("kept") / "out"
    assert shard_imagenet("--train", source, "--out", out, "--workers", 1) == 0
    return out


def shas(images):
    return Counter(hashlib.sha256(data).hexdigest() for data in images)


def plain_images():
    """Those that have to be in the shards byte for byte, once for each time they are in the source."""
    names = {name for name, (_, action) in ODD.items() if action != "kept"}
    return shas(data for files in CLASSES.values() for name, data in files.items() if name not in names)


def test_the_number_of_workers_does_not_show(source, kept, tmp_path):
    assert shard_imagenet("--train", source, "--out", tmp_path / "out", "--workers", 4) == 0
    assert contents(tmp_path / "out") == contents(kept)
    assert {"manifest.json", "report.json", "report.txt", "train-000000.tar", "train-000000.idx"} <= contents(
        kept
    ).keys()


def test_another_seed_gives_another_order_of_the_same(source, kept, tmp_path):
    assert shard_imagenet("--train", source, "--out", tmp_path / "out", "--seed", 1) == 0
    mine, theirs = written(tmp_path / "out"), written(kept)
    assert [name.partition(":")[2] for name in mine] != [name.partition(":")[2] for name in theirs]
    assert sorted(mine.values()) == sorted(theirs.values())


def test_images_are_well_mixed(kept):
    labels = [label for _, label in written(kept).values()]
    runs = 1 + sum(a != b for a, b in itertools.pairwise(labels))
    assert runs > len(labels) * 0.6  # 5 classes at random: 0.8


def test_every_image_is_there_once(kept):
    found = shas(data for data, _ in written(kept).values())
    assert not plain_images() - found
    converted = sum(action == "converted" for _, action in ODD.values())
    assert found.total() == plain_images().total() + converted


def odd_in_report(folder):
    return {Path(image["source"]).name: (image["kinds"], image["action"]) for image in report_of(folder)["images"]}


@pytest.mark.parametrize("layout", ["tar of class tars", "class folders"])
def test_all_odd_images_are_found_and_no_other(layout, kept, tmp_path):
    out = kept
    if layout == "class folders":
        out = tmp_path / "out"
        assert shard_imagenet("--train", write_folder(tmp_path / "train", in_folders(CLASSES)), "--out", out) == 0
    assert odd_in_report(out) == ODD
    report = report_of(out)
    assert report["input"] == sum(map(len, CLASSES.values()))
    assert report["left_out"] == sum(action == "left_out" for _, action in ODD.values())
    assert report["written"] == len(written(out)) == report["input"] - report["left_out"]
    assert report["kinds"] == Counter(kind for kinds, _ in ODD.values() for kind in kinds)
    text = (out / "report.txt").read_text()
    for name, (kinds, action) in ODD.items():
        line = next(line for line in text.splitlines() if name in line.split(",")[0].split("  ")[0])
        assert ", ".join(kinds) in line
        assert line.endswith(action)
    (copy,) = [image for image in report["images"] if "same_as" in image]
    assert copy["source"].endswith("_bad_duplicate.JPEG")
    assert copy["same_as"].endswith(FIRST)


def test_what_is_written_are_upright_rgb_jpegs(kept):
    manifest = read_manifest(kept)
    sizes = [size for entry in manifest["shards"].values() for size in entry["sizes"]]
    for (name, (data, _)), size in zip(written(kept).items(), sizes, strict=True):
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            assert image.format in ("JPEG", "MPO"), name
            assert image.mode == "RGB"
            assert image.getexif().get(0x0112, 1) in (0, 1)
            assert list(image.size) == size
        assert inspect(data).kinds == ()
    for name in ("exif_rotated", "grey_and_rotated"):
        with Image.open(io.BytesIO(BAD[name])) as image:
            upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), np.int32)
        (made,) = (data for key, (data, _) in written(kept).items() if key.endswith(f"_bad_{name}"))
        assert np.abs(decoded(made) - upright).mean() < 3
    for name, channels in (("png_16bit", 1), ("png_16bit_rgb", 3)):
        (made,) = (data for key, (data, _) in written(kept).items() if key.endswith(f"_bad_{name}"))
        ramp = np.linspace(0, 255, 96 * 80 * channels).reshape(80, 96, channels)
        assert np.abs(decoded(made) - ramp).mean() < 2


def test_a_repeated_key_is_kept_under_another(kept):
    (twin,) = (image for image in report_of(kept)["images"] if image["kinds"] == ["duplicate_key"])
    stem = Path(twin["source"]).stem
    samples = {name.partition(":")[2]: data for name, (data, _) in written(kept).items()}
    assert twin["key"] != stem
    assert samples[twin["key"]] == BAD["duplicate_key"]
    assert samples[stem] == CLASSES[stem.partition("_")[0]][f"{stem}.JPEG"]
    assert len(samples) == len(written(kept))


def test_drop_all_leaves_out_all_that_is_odd(source, tmp_path):
    outs = [tmp_path / "one", tmp_path / "four"]
    for out, workers in zip(outs, (1, 4), strict=True):
        assert shard_imagenet("--train", source, "--out", out, "--workers", workers, "--on_bad", "drop_all") == 0
    assert contents(outs[0]) == contents(outs[1])
    stems = {Path(name).stem for files in CLASSES.values() for name in files if name not in ODD}
    assert keys_of(outs[0]) == stems
    found = shas(data for data, _ in written(outs[0]).values())
    assert found == shas(data for files in CLASSES.values() for name, data in files.items() if name not in ODD)
    assert odd_in_report(outs[0]) == {name: (kinds, "left_out") for name, (kinds, _) in ODD.items()}
    report = report_of(outs[0])
    assert report["input"] == report["written"] + report["left_out"]


def test_drop_all_keeps_one_of_equal_images(tmp_path):
    """Where the first of them is left out for another reason, the next is the first."""
    files = {"a/x.JPEG": photo(1), "a/x.jpg": photo(2), "a/y.jpg": photo(2), "a/z.jpg": photo(2), "b/w.jpg": photo(3)}
    words = ["--train", write_folder(tmp_path / "in", files), "--on_bad", "drop_all"]
    assert shard_imagenet(*words, "--out", tmp_path / "out") == 0
    assert shas(data for data, _ in written(tmp_path / "out").values()) == shas([photo(1), photo(2), photo(3)])


def test_copies_are_found_across_splits(tmp_path):
    train = write_folder(tmp_path / "train", in_folders(imagenet(2)))
    val = write_folder(tmp_path / "val", {f"{WNIDS[0]}/same.jpg": photo(9), f"{WNIDS[1]}/other.jpg": photo(99)})
    assert shard_imagenet("--train", train, "--val", val, "--out", tmp_path / "out") == 0
    (copy,) = report_of(tmp_path / "out")["images"]
    assert copy["source"].endswith("same.jpg")
    assert copy["same_as"].endswith("_9.JPEG")
    assert copy["action"] == "kept"


@pytest.mark.parametrize("then", ["keep", "drop_all"])
@pytest.mark.parametrize("odd", [["png"], ["duplicate"], list(BAD)])
def test_stop_can_be_followed_by_another_choice(odd, then, tmp_path, capsys):
    names = [name for name in ODD if name in ODD and any(f"_bad_{kind}." in name for kind in odd)]
    classes = {}
    for wnid, files in CLASSES.items():
        good = [name for name in files if name not in ODD][:7]
        classes[wnid] = {name: files[name] for name in files if name in good or name in names}
    source = write_tar(tmp_path / "in.tar", class_tars(classes))
    words = ["--train", source, "--max_count", 2]
    assert shard_imagenet(*words, "--on_bad", "stop", "--out", tmp_path / "out") == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("shard_imagenet: ")]
    assert any(name in sentence for name in names)
    assert not list(tmp_path.rglob("*.part"))
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert shard_imagenet(*words, "--on_bad", then, "--out", tmp_path / "out") == 0
    assert shard_imagenet(*words, "--on_bad", then, "--out", tmp_path / "fresh") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_stop_passes_what_is_plain(tmp_path):
    good = {wnid: {name: data for name, data in files.items() if name not in ODD} for wnid, files in CLASSES.items()}
    source = write_tar(tmp_path / "in.tar", class_tars(good))
    assert shard_imagenet("--train", source, "--on_bad", "stop", "--out", tmp_path / "out") == 0
    assert report_of(tmp_path / "out")["images"] == []


# --- broken runs


class Run:
    """The command in a process forked from here, which need not import anything."""

    def __init__(self, folder, *words, before=lambda: None):
        self.errors = folder / "errors.txt"
        self.process = FORK.Process(target=self._main, args=(words, before))
        self.process.start()
        self.pid = self.process.pid

    def _main(self, words, before):
        file = os.open(self.errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
        before()
        code = 70
        try:
            code = shard_imagenet(*words)
        finally:
            sys.stderr.flush()
            os._exit(code)

    def end(self):
        """Its exit code; negative where a signal ended it."""
        self.process.join(60)
        return self.process.exitcode

    def sentences(self):
        return [line for line in self.errors.read_text().splitlines() if line.startswith("shard_imagenet: ")]


def wait_for(what, seconds=20):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)
    return found


def alive(processes):
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def long_source(tmp_path_factory):
    """100 images that take one core two seconds or so; and their shards."""
    folder = tmp_path_factory.mktemp("long")
    images = [encoded(picture(i).resize((2000, 1500)), quality=90, progressive=True) for i in range(5)]
    classes = {
        wnid: {f"{wnid}_{i}.JPEG": images[i % 5] + bytes(i) + wnid.encode() for i in range(20)} for wnid in WNIDS
    }
    source = write_tar(folder / "in.tar", class_tars(classes))
    assert shard_imagenet("--train", source, "--max_count", 4, "--workers", 2, "--out", folder / "whole") == 0
    return source, contents(folder / "whole")


def test_killed_at_any_time_it_goes_on_to_the_same_bytes(long_source, tmp_path):
    source, whole = long_source
    words = ["--train", source, "--max_count", 4, "--workers", 2, "--out", tmp_path / "out"]
    rng, kills = random.Random(7), 0
    while kills < 6:
        run = Run(tmp_path, *words)
        wait_for((tmp_path / "out" / ".progress").exists)
        time.sleep(rng.uniform(0, 0.4))
        if run.process.exitcode is not None:
            break
        workers = psutil.Process(run.pid).children(recursive=True)
        os.kill(run.pid, signal.SIGKILL)
        assert run.end() == -signal.SIGKILL
        wait_for(lambda: not alive(workers), 2)  # noqa: B023
        assert not (tmp_path / "out" / "manifest.json").exists()
        kills += 1
    assert kills >= 3
    assert shard_imagenet(*words) == 0
    assert contents(tmp_path / "out") == whole


def test_the_command_itself_is_killed(long_source, tmp_path):
    source, whole = long_source
    words = ["--train", source, "--max_count", 4, "--workers", 2, "--out", tmp_path / "out"]
    command = [sys.executable, HERE / "data_prep" / "shard_imagenet.py", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        wait_for(lambda: list((tmp_path / "out").glob(".progress/*.tar.json")))
        workers = psutil.Process(run.pid).children(recursive=True)
        assert len(workers) == 2
        run.kill()
    wait_for(lambda: not alive(workers), 2)
    noted = (tmp_path / "out" / ".progress").glob("*.tar.json")
    tars = [tmp_path / "out" / note.name.removesuffix(".json") for note in noted]
    kept = {path: path.stat().st_ino for path in tars}
    assert kept
    assert shard_imagenet(*words) == 0
    assert contents(tmp_path / "out") == whole
    assert {path: path.stat().st_ino for path in kept} == kept  # what was done is not done again


@pytest.mark.parametrize("how", ["shard missing", "shard cut", "index missing"])
def test_a_folder_that_lost_something_is_not_complete(how, long_source, tmp_path, capsys):
    source, _ = long_source
    words = ["--train", source, "--max_count", 4, "--workers", 2, "--out", tmp_path / "out"]
    shutil.copytree(source.parent / "whole", tmp_path / "out")
    shard = tmp_path / "out" / "train-000001.tar"
    match how:
        case "shard missing":
            shard.unlink()
        case "shard cut":
            os.truncate(shard, 100)
        case "index missing":
            shard.with_suffix(".idx").unlink()
    assert shard_imagenet(*words) == 2
    assert "lacks train-000001.tar or its index" in capsys.readouterr().err


def test_a_killed_worker_is_one_sentence(long_source, tmp_path):
    source, whole = long_source
    words = ["--train", source, "--max_count", 4, "--workers", 2, "--out", tmp_path / "out"]
    run = Run(tmp_path, *words)
    wait_for(lambda: list((tmp_path / "out").glob("*.tar")))
    workers = psutil.Process(run.pid).children()
    workers[0].kill()
    assert run.end() == 2
    assert "a worker was killed" in run.sentences()[0]
    assert len(run.sentences()) == 1
    assert "Traceback" not in run.errors.read_text()
    assert not alive(workers)
    assert not list(tmp_path.rglob("*.part"))
    assert shard_imagenet(*words) == 0
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_stopped_by_a_signal_it_goes_on(number, code, long_source, tmp_path):
    source, whole = long_source
    words = ["--train", source, "--max_count", 4, "--workers", 2, "--out", tmp_path / "out"]
    run = Run(tmp_path, *words)
    wait_for(lambda: list((tmp_path / "out").glob("*.tar")))
    workers = psutil.Process(run.pid).children()
    if number == signal.SIGINT:  # Ctrl-C reaches all
        for worker in workers:
            worker.send_signal(number)
    os.kill(run.pid, number)
    assert run.end() == code
    wait_for(lambda: not alive(workers), 2)
    assert "Traceback" not in run.errors.read_text()
    assert shard_imagenet(*words) == 0
    assert contents(tmp_path / "out") == whole


FEW = {"a/1.jpg": photo(1), "a/2.jpg": photo(2), "b/3.jpg": photo(1), "b/4.jpg": BAD["png"], "b/5.jpg": photo(5)}


def test_killed_between_any_two_steps_it_goes_on_to_the_same_bytes(tmp_path):
    """Every file is written aside and then renamed: a process is killed before the first renaming, the second, ...

    and after the last. Copies are left out, so that a shard is made twice.
    """
    source = write_folder(tmp_path / "in", {name: FEW[name] for name in ("a/1.jpg", "b/3.jpg", "b/4.jpg")})
    words = ["--train", source, "--on_bad", "drop_all", "--workers", 1, "--out"]
    assert shard_imagenet(*words, tmp_path / "whole") == 0
    whole, rename, wrong, number = contents(tmp_path / "whole"), os.replace, [], 0
    while number < 40:
        number += 1
        out, count = tmp_path / f"out{number}", FORK.Value("i", 0)

        def replace(source, target, number=number, count=count):
            with count.get_lock():
                count.value += 1
                mine = count.value == number
            last = Path(target).name == "manifest.json" and number == 40
            if last:
                rename(source, target)
            if mine or last:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        run = Run(tmp_path, *words, out, before=lambda: setattr(os, "replace", replace))
        if run.end() == 0:
            assert number > 12
            number = 39  # and once after the last
            continue
        assert run.process.exitcode in (2, -signal.SIGKILL)
        assert shard_imagenet(*words, out) == 0
        if contents(out) != whole:
            wrong.append((number, sorted(contents(out).items() ^ whole.items())[0][0]))
    assert wrong == []


def test_what_was_done_is_looked_at_before_a_run_goes_on(tmp_path):
    source = write_folder(tmp_path / "in", FEW | {"a/6.jpg": photo(6), "a/7.jpg": photo(7)})
    words, out = ["--train", source, "--out"], tmp_path / "out"
    assert shard_imagenet(*words, tmp_path / "whole") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(sharder, "write_report")  # all shards are done, but no more
        with pytest.raises(NameError):
            shard_imagenet(*words, out)
    os.truncate(out / "train-000001.tar", 5120)
    (out / "train-000002.tar").unlink()
    (out / "train-000003.idx").unlink()
    (out / ".progress" / "train-000004.tar.json").write_text("{")
    (out / ".progress" / "train-000005.tar.json").unlink()
    assert shard_imagenet(*words, out) == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_two_at_once_are_one_too_many(tmp_path, capsys):
    source = write_folder(tmp_path / "in", FEW)
    (tmp_path / "out" / ".progress").mkdir(parents=True)
    with open(tmp_path / "out" / ".progress" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert shard_imagenet("--train", source, "--out", tmp_path / "out") == 2
    assert "another process" in capsys.readouterr().err
    assert shard_imagenet("--train", source, "--out", tmp_path / "out") == 0


# --- no space left


def test_want_of_room_is_seen_before(tmp_path, monkeypatch, capsys):
    source = write_folder(tmp_path / "in", FEW)
    before = contents(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 9000, 9000))
    assert shard_imagenet("--train", source, "--out", tmp_path / "out") == 2
    assert "no space left" in capsys.readouterr().err
    assert contents(tmp_path) == before
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 10**6))
    assert shard_imagenet("--train", source, "--out", tmp_path / "out") == 0


FILES = ["plan.json", "train-000002.tar", "train-000002.idx", "train-000002.tar.json", "report.json", "report.txt"]


@pytest.mark.parametrize("name", [*FILES, "manifest.json", "train-000002.tar within", "train-000002.tar by quota"])
def test_want_of_room_on_the_way_is_one_sentence(name, tmp_path, monkeypatch, capsys):
    source = write_folder(tmp_path / "in", FEW)
    words = ["--train", source, "--out"]
    assert shard_imagenet(*words, tmp_path / "whole") == 0
    number = errno.EDQUOT if "quota" in name else errno.ENOSPC
    fsync, write = os.fsync, shard_writer._HashedFile.write

    def full(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(f"/{name.split()[0]}.part"):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    def full_within(self, data):
        if Path(self.file.name).name == "train-000002.tar.part" and self.size + len(data) > 1000:
            raise OSError(number, os.strerror(number))
        write(self, data)

    with monkeypatch.context() as patch:
        if name.endswith("within"):
            patch.setattr(shard_writer._HashedFile, "write", full_within)
        else:
            patch.setattr(os, "fsync", full)
        capsys.readouterr()
        assert shard_imagenet(*words, tmp_path / "out") == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("shard_imagenet: ")]
    assert "space" in sentence or "quota" in sentence.lower()
    assert not list(tmp_path.rglob("*.part"))
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert shard_imagenet(*words, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_source_that_goes_away_is_one_sentence(tmp_path, monkeypatch, capsys):
    source, real = write_folder(tmp_path / "in", FEW), sharder.plan_split

    def plan_split(*words):
        (source / "a" / "1.jpg").unlink()
        return real(*words)

    monkeypatch.setattr(sharder, "plan_split", plan_split)
    assert shard_imagenet("--train", source, "--out", tmp_path / "out") == 2
    assert "1.jpg" in capsys.readouterr().err


# --- sizes


def test_the_shorter_side_is_resized(source, tmp_path):
    for out, workers in (("a", 1), ("b", 4)):
        words = ["--train", source, "--resize_shorter", 90, "--workers", workers]
        assert shard_imagenet(*words, "--out", tmp_path / out) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    by_stem = {Path(name).stem: data for files in CLASSES.values() for name, data in files.items() if name not in ODD}
    smaller = larger = 0
    for name, (data, _) in written(tmp_path / "a").items():
        if (before := by_stem.get(name.partition(":")[2])) is None:
            continue
        with Image.open(io.BytesIO(before)) as old, Image.open(io.BytesIO(data)) as new:
            if min(old.size) <= 90:
                smaller += 1
                assert data == before
            else:
                larger += 1
                assert min(new.size) == 90
                assert max(abs(a - b * 90 / min(old.size)) for a, b in zip(new.size, old.size, strict=True)) <= 1
    assert smaller > 20
    assert larger > 20
    assert odd_in_report(tmp_path / "a") == ODD


def test_shards_are_no_larger_than_wished(source, tmp_path):
    assert shard_imagenet("--train", source, "--max_count", 3, "--out", tmp_path / "count") == 0
    counts = [entry["samples"] for entry in read_manifest(tmp_path / "count")["shards"].values()]
    assert max(counts) == 3
    assert shard_imagenet("--train", source, "--max_size", "20K", "--out", tmp_path / "size") == 0
    entries = read_manifest(tmp_path / "size")["shards"].values()
    assert all(entry["bytes"] <= 20 << 10 or entry["samples"] == 1 for entry in entries)
    assert np.mean([entry["samples"] for entry in entries]) > 2.5  # and not much smaller


def test_a_few_images_more_than_shards_are_spread(tmp_path):
    for count in (1, 16, 17, 33):
        source = write_folder(tmp_path / f"in{count}", {f"{i}.jpg": photo(i) for i in range(count)})
        assert shard_imagenet("--train", source, "--out", tmp_path / f"out{count}") == 0
        entries = read_manifest(tmp_path / f"out{count}")["shards"]
        assert sum(entry["samples"] for entry in entries.values()) == count
        assert all(entry["samples"] for entry in entries.values())
        assert list(entries) == [f"train-{i:06d}.tar" for i in range(len(entries))]


# --- readers


def test_dali_makes_the_same_indexes(kept, tmp_path):
    wds2idx = pytest.importorskip("wds2idx")
    for shard in kept.glob("*.tar"):
        theirs = tmp_path / "theirs.idx"
        with wds2idx.IndexCreator(str(shard), str(theirs), verbose=False) as creator:
            creator.create_index()
        assert theirs.read_text() == shard.with_suffix(".idx").read_text()


def test_webdataset_and_the_loader_read_all(kept):
    samples = {name.partition(":")[2]: sample for name, sample in written(kept).items()}
    shards = sorted(map(str, kept.glob("train-*.tar")))
    read = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    assert {each["__key__"]: (each["jpg"], int(each["cls"])) for each in read} == samples
    assert len(read) == len(samples)
    decoded_too = (
        webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode("pil").to_tuple("jpg", "cls")
    )
    assert [label for _, label in decoded_too] == [int(each["cls"]) for each in read]
    opened = open_shards(str(kept), Cache(Path("nowhere"), 0))
    assert [opened.read(i) for i in range(len(opened))] == [each["jpg"] for each in read]


def test_the_manifest_says_what_it_was_made_of(tmp_path):
    train = write_tar(tmp_path / "ILSVRC2012_img_train.tar", class_tars(imagenet(2)))
    val = write_tar(tmp_path / "ILSVRC2012_img_val.tar", val_files(3))
    devkit = write_devkit(tmp_path / "kit.tar.gz", [1, 2, 3])
    words = ["--train", train, "--val", val, "--devkit", devkit, "--seed", 4]
    assert shard_imagenet(*words, "--out", tmp_path / "out") == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["settings"]["seed"] == 4
    assert manifest["source"]["train"]["name"] == "ILSVRC2012_img_train.tar"
    assert manifest["source"]["train"]["images"] == 10
    assert manifest["source"]["val"]["bytes"] == sum(map(len, val_files(3).values()))
    for name, entry in manifest["shards"].items():
        data = (tmp_path / "out" / name).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert set(labels_of(tmp_path / "out", "val").values()) <= set(range(5))


# --- memory


def pss(pid):
    """Proportional set size of a process, in bytes."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def test_eight_workers_with_large_images_stay_below_a_gibibyte(tmp_path):
    if not pss(os.getpid()):
        pytest.skip("no smaps_rollup")
    large = picture(3).resize((5200, 4000))  # 20.8 megapixels
    plain, cmyk = encoded(large, quality=85), encoded(large.convert("CMYK"), quality=85)
    files = {f"{i}.jpg": (cmyk if i == 3 else plain) + bytes(i) for i in range(9)}
    most, at_once = most_memory(files, 8, tmp_path)
    assert at_once == 8
    assert 100 << 20 < most < 1 << 30, most


def test_a_large_image_of_sixteen_bits_takes_no_gibibyte(tmp_path):
    values = np.tile(np.arange(5000, dtype=np.uint16) * 13, (4000, 1))
    most, _ = most_memory({"1.png": encoded(Image.fromarray(values), "PNG", compress_level=1)}, 1, tmp_path)
    assert most < 700 << 20, most  # it took more than a gibibyte in float64


def most_memory(files, workers, folder):
    """The largest sum of all processes' memory while a process of its own shards these files; and of workers."""
    (folder / "in.tar").write_bytes(tar_of(files))
    command = [sys.executable, HERE / "data_prep" / "shard_imagenet.py", "--train", folder / "in.tar"]
    command += ["--workers", str(workers), "--out", folder / "out"]
    most, at_once = 0, 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while run.poll() is None:
            try:
                pids = [child.pid for child in psutil.Process(run.pid).children(recursive=True)]
            except psutil.NoSuchProcess:
                break
            most, at_once = max(most, sum(map(pss, [run.pid, *pids]))), max(at_once, len(pids))
            time.sleep(0.05)
    assert run.returncode == 0
    return most, at_once


def test_the_ramp_is_what_it_should_be():
    """The helper itself."""
    assert png16(0, 1) != png16(1, 1)
    assert set(map(str, BAD)) == set(EXPECTED)
