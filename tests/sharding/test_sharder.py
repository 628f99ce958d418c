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
    ROOT,
    WNIDS,
    class_folders,
    class_tars,
    contents,
    decode,
    encode,
    imagenet,
    irregular_images,
    keys_of,
    labels_of,
    photo,
    png16,
    read_samples,
    report_of,
    shard_imagenet,
    tar_of,
    unusual_plain_jpegs,
    val_files,
    write_devkit,
    write_folder,
    write_tar,
)
from PIL import Image, ImageOps

from ddae.data import shard_writer
from ddae.data.cache import Cache
from ddae.data.manifest import read_manifest
from ddae.data.shards import open_shards
from ddae.sharding import sharder
from ddae.sharding.check import check
from ddae.sharding.inspection import inspect

FORK = multiprocessing.get_context("fork")
IRREGULAR, PLAIN = irregular_images(), unusual_plain_jpegs()


def make_corpus():
    """Return 100 plain photos and all unusual and irregular ones, and file name -> expected kinds and action."""
    classes, report = imagenet(20), {}
    for i, (name, data) in enumerate(PLAIN.items()):
        classes[WNIDS[i % 5]][f"{WNIDS[i % 5]}_plain_{name}.JPEG"] = data
    for i, (kind, data) in enumerate(IRREGULAR.items()):
        wnid = WNIDS[-1] if kind == "duplicate" else WNIDS[i % 5]
        name = f"{wnid}_bad_{kind}.JPEG"
        if kind == "duplicate_key":
            name = next(iter(classes[wnid])).replace(".JPEG", ".jpg")
        classes[wnid][name] = data
        report[name] = EXPECTED[kind]
    return classes, report


CLASSES, REPORTED = make_corpus()
FIRST = "n01440764_0.JPEG"  # the duplicate has the same bytes
assert CLASSES["n01440764"][FIRST] == IRREGULAR["duplicate"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return the corpus as a tar of class tars."""
    return write_tar(tmp_path_factory.mktemp("source") / "ILSVRC2012_img_train.tar", class_tars(CLASSES))


@pytest.fixture(scope="module")
def sharded(source, tmp_path_factory):
    """Return shards of the corpus, written by one worker without interruption."""
    out = tmp_path_factory.mktemp("sharded") / "out"
    assert shard_imagenet("--train", source, "--out", out, "--workers", 1) == 0
    return out


def count_hashes(images):
    return Counter(hashlib.sha256(data).hexdigest() for data in images)


def hashes_of_unchanged_images():
    """Count the images whose bytes must be in the shards as often as in the source."""
    names = {name for name, (_, action) in REPORTED.items() if action != "kept"}
    return count_hashes(data for files in CLASSES.values() for name, data in files.items() if name not in names)


def test_output_does_not_depend_on_the_number_of_workers(source, sharded, tmp_path):
    assert shard_imagenet("--train", source, "--out", tmp_path / "out", "--workers", 4) == 0
    assert contents(tmp_path / "out") == contents(sharded)
    assert {"manifest.json", "report.json", "report.txt", "train-000000.tar", "train-000000.idx"} <= contents(
        sharded
    ).keys()


def test_seed_changes_the_order_only(source, sharded, tmp_path):
    assert shard_imagenet("--train", source, "--out", tmp_path / "out", "--seed", 1) == 0
    other, default = read_samples(tmp_path / "out"), read_samples(sharded)
    assert [name.partition(":")[2] for name in other] != [name.partition(":")[2] for name in default]
    assert sorted(other.values()) == sorted(default.values())


def test_images_are_shuffled(sharded):
    labels = [label for _, label in read_samples(sharded).values()]
    runs = 1 + sum(a != b for a, b in itertools.pairwise(labels))
    assert runs > len(labels) * 0.6  # expected for 5 classes in random order: 0.8


def test_every_image_is_written_once(sharded):
    found = count_hashes(data for data, _ in read_samples(sharded).values())
    assert not hashes_of_unchanged_images() - found
    converted = sum(action == "converted" for _, action in REPORTED.values())
    assert found.total() == hashes_of_unchanged_images().total() + converted


def reported_images(folder):
    return {Path(image["source"]).name: (image["kinds"], image["action"]) for image in report_of(folder)["images"]}


@pytest.mark.parametrize("layout", ["tar of class tars", "class folders"])
def test_report_lists_exactly_the_irregular_images(layout, sharded, tmp_path):
    out = sharded
    if layout == "class folders":
        out = tmp_path / "out"
        assert shard_imagenet("--train", write_folder(tmp_path / "train", class_folders(CLASSES)), "--out", out) == 0
    assert reported_images(out) == REPORTED
    report = report_of(out)
    actions = Counter(action for _, action in REPORTED.values())
    assert report["found"] == sum(map(len, CLASSES.values()))
    assert report["converted"] == actions["converted"]
    assert sum(reason["count"] for reason in report["left_out"].values()) == actions["left_out"]
    assert report["written"] + report["converted"] == len(read_samples(out)) == report["found"] - actions["left_out"]
    assert check(out, False, 1)[0] == []  # the manifest accounts for all images
    assert report["kinds"] == Counter(kind for kinds, _ in REPORTED.values() for kind in kinds)
    text = (out / "report.txt").read_text()
    for name, (kinds, action) in REPORTED.items():
        line = next(line for line in text.splitlines() if name in line.split(",")[0].split("  ")[0])
        assert ", ".join(kinds) in line
        assert line.endswith(action)
    (copy,) = [image for image in report["images"] if "same_as" in image]
    assert copy["source"].endswith("_bad_duplicate.JPEG")
    assert copy["same_as"].endswith(FIRST)


def test_shards_contain_upright_rgb_jpegs_only(sharded):
    manifest = read_manifest(sharded)
    sizes = [size for entry in manifest["shards"].values() for size in entry["sizes"]]
    for (name, (data, _)), size in zip(read_samples(sharded).items(), sizes, strict=True):
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            assert image.format in ("JPEG", "MPO"), name
            assert image.mode == "RGB"
            assert image.getexif().get(0x0112, 1) in (0, 1)
            assert list(image.size) == size
        assert inspect(data).kinds == ()
    for name in ("exif_rotated", "grey_and_rotated"):
        with Image.open(io.BytesIO(IRREGULAR[name])) as image:
            upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), np.int32)
        (converted,) = (data for key, (data, _) in read_samples(sharded).items() if key.endswith(f"_bad_{name}"))
        assert np.abs(decode(converted) - upright).mean() < 3
    for name, channels in (("png_16bit", 1), ("png_16bit_rgb", 3)):
        (converted,) = (data for key, (data, _) in read_samples(sharded).items() if key.endswith(f"_bad_{name}"))
        ramp = np.linspace(0, 255, 96 * 80 * channels).reshape(80, 96, channels)
        assert np.abs(decode(converted) - ramp).mean() < 2


def test_duplicate_key_gets_a_suffix(sharded):
    (renamed,) = (image for image in report_of(sharded)["images"] if image["kinds"] == ["duplicate_key"])
    stem = Path(renamed["source"]).stem
    samples = {name.partition(":")[2]: data for name, (data, _) in read_samples(sharded).items()}
    assert renamed["key"] != stem
    assert samples[renamed["key"]] == IRREGULAR["duplicate_key"]
    assert samples[stem] == CLASSES[stem.partition("_")[0]][f"{stem}.JPEG"]
    assert len(samples) == len(read_samples(sharded))


def test_drop_all_leaves_out_all_irregular_images(source, tmp_path):
    outs = [tmp_path / "one", tmp_path / "four"]
    for out, workers in zip(outs, (1, 4), strict=True):
        assert shard_imagenet("--train", source, "--out", out, "--workers", workers, "--on_bad", "drop_all") == 0
    assert contents(outs[0]) == contents(outs[1])
    stems = {Path(name).stem for files in CLASSES.values() for name in files if name not in REPORTED}
    assert keys_of(outs[0]) == stems
    found = count_hashes(data for data, _ in read_samples(outs[0]).values())
    assert found == count_hashes(
        data for files in CLASSES.values() for name, data in files.items() if name not in REPORTED
    )
    assert reported_images(outs[0]) == {name: (kinds, "left_out") for name, (kinds, _) in REPORTED.items()}
    report = report_of(outs[0])
    assert (report["found"], report["converted"]) == (report["written"] + len(REPORTED), 0)


def test_drop_all_keeps_one_of_equal_images(tmp_path):
    """If the first of them is left out for another reason, the next one is kept."""
    files = {"a/x.JPEG": photo(1), "a/x.jpg": photo(2), "a/y.jpg": photo(2), "a/z.jpg": photo(2), "b/w.jpg": photo(3)}
    args = ["--train", write_folder(tmp_path / "in", files), "--on_bad", "drop_all"]
    assert shard_imagenet(*args, "--out", tmp_path / "out") == 0
    assert count_hashes(data for data, _ in read_samples(tmp_path / "out").values()) == count_hashes(
        [photo(1), photo(2), photo(3)]
    )


def test_duplicates_are_found_across_splits(tmp_path):
    train = write_folder(tmp_path / "train", class_folders(imagenet(2)))
    val = write_folder(tmp_path / "val", {f"{WNIDS[0]}/same.jpg": photo(9), f"{WNIDS[1]}/other.jpg": photo(99)})
    assert shard_imagenet("--train", train, "--val", val, "--out", tmp_path / "out") == 0
    (copy,) = report_of(tmp_path / "out")["images"]
    assert copy["source"].endswith("same.jpg")
    assert copy["same_as"].endswith("_9.JPEG")
    assert copy["action"] == "kept"


@pytest.mark.parametrize("then", ["keep", "drop_all"])
@pytest.mark.parametrize("kinds", [["png"], ["duplicate"], list(IRREGULAR)])
def test_run_stopped_by_on_bad_resumes_with_another_choice(kinds, then, tmp_path, capsys):
    names = [name for name in REPORTED if any(f"_bad_{kind}." in name for kind in kinds)]
    classes = {}
    for wnid, files in CLASSES.items():
        good = [name for name in files if name not in REPORTED][:7]
        classes[wnid] = {name: files[name] for name in files if name in good or name in names}
    source = write_tar(tmp_path / "in.tar", class_tars(classes))
    args = ["--train", source, "--max_count", 2]
    assert shard_imagenet(*args, "--on_bad", "stop", "--out", tmp_path / "out") == 2
    (error_line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("shard_imagenet: ")]
    assert any(name in error_line for name in names)
    assert not list(tmp_path.rglob("*.part"))
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert shard_imagenet(*args, "--on_bad", then, "--out", tmp_path / "out") == 0
    assert shard_imagenet(*args, "--on_bad", then, "--out", tmp_path / "fresh") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_on_bad_stop_accepts_plain_images(tmp_path):
    good = {
        wnid: {name: data for name, data in files.items() if name not in REPORTED} for wnid, files in CLASSES.items()
    }
    source = write_tar(tmp_path / "in.tar", class_tars(good))
    assert shard_imagenet("--train", source, "--on_bad", "stop", "--out", tmp_path / "out") == 0
    assert report_of(tmp_path / "out")["images"] == []


# --- interrupted runs


class ForkedRun:
    """The script in a forked process, which starts without imports."""

    def __init__(self, folder, *args, before=lambda: None):
        self.errors = folder / "errors.txt"
        self.process = FORK.Process(target=self._main, args=(args, before))
        self.process.start()
        self.pid = self.process.pid

    def _main(self, args, before):
        file = os.open(self.errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
        before()
        code = 70
        try:
            code = shard_imagenet(*args)
        finally:
            sys.stderr.flush()
            os._exit(code)

    def wait(self):
        """Wait for the process. Return its exit code, or minus the signal that ended it."""
        self.process.join(60)
        return self.process.exitcode

    def error_lines(self):
        return [line for line in self.errors.read_text().splitlines() if line.startswith("shard_imagenet: ")]


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "timeout"
        time.sleep(0.002)
    return value


def running(processes):
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def long_source(tmp_path_factory):
    """Return 100 images that take one core about two seconds, and the content of their shards."""
    folder = tmp_path_factory.mktemp("long")
    images = [encode(picture(i).resize((2000, 1500)), quality=90, progressive=True) for i in range(5)]
    classes = {
        wnid: {f"{wnid}_{i}.JPEG": images[i % 5] + bytes(i) + wnid.encode() for i in range(20)} for wnid in WNIDS
    }
    source = write_tar(folder / "in.tar", class_tars(classes))
    assert shard_imagenet("--train", source, "--max_count", 4, "--workers", 2, "--out", folder / "complete") == 0
    return source, contents(folder / "complete")


def test_killed_run_resumes_to_the_same_bytes(long_source, tmp_path):
    source, complete = long_source
    args = ["--train", source, "--max_count", 4, "--workers", 2, "--out", tmp_path / "out"]
    rng, kills = random.Random(7), 0
    while kills < 6:
        run = ForkedRun(tmp_path, *args)
        wait_for((tmp_path / "out" / ".progress").exists)
        time.sleep(rng.uniform(0, 0.4))
        if run.process.exitcode is not None:
            break
        workers = psutil.Process(run.pid).children(recursive=True)
        os.kill(run.pid, signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        wait_for(lambda: not running(workers), 2)  # noqa: B023
        assert not (tmp_path / "out" / "manifest.json").exists()
        kills += 1
    assert kills >= 3
    assert shard_imagenet(*args) == 0
    assert contents(tmp_path / "out") == complete


def test_killed_script_keeps_complete_shards(long_source, tmp_path):
    source, complete = long_source
    args = ["--train", source, "--max_count", 4, "--workers", 2, "--out", tmp_path / "out"]
    command = [sys.executable, ROOT / "data_prep" / "shard_imagenet.py", *map(str, args)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        wait_for(lambda: list((tmp_path / "out").glob(".progress/*.tar.json")))
        workers = psutil.Process(run.pid).children(recursive=True)
        assert len(workers) == 2
        run.kill()
    wait_for(lambda: not running(workers), 2)
    records = (tmp_path / "out" / ".progress").glob("*.tar.json")
    tars = [tmp_path / "out" / record.name.removesuffix(".json") for record in records]
    inodes = {path: path.stat().st_ino for path in tars}
    assert inodes
    assert shard_imagenet(*args) == 0
    assert contents(tmp_path / "out") == complete
    assert {path: path.stat().st_ino for path in tars} == inodes  # complete shards are not written again


@pytest.mark.parametrize("case", ["shard missing", "shard cut", "index missing"])
def test_missing_or_truncated_shard_is_reported(case, long_source, tmp_path, capsys):
    source, _ = long_source
    args = ["--train", source, "--max_count", 4, "--workers", 2, "--out", tmp_path / "out"]
    shutil.copytree(source.parent / "complete", tmp_path / "out")
    shard = tmp_path / "out" / "train-000001.tar"
    match case:
        case "shard missing":
            shard.unlink()
        case "shard cut":
            os.truncate(shard, 100)
        case "index missing":
            shard.with_suffix(".idx").unlink()
    assert shard_imagenet(*args) == 2
    assert "lacks train-000001.tar or its index" in capsys.readouterr().err


def test_killed_worker_is_one_error_line(long_source, tmp_path):
    source, complete = long_source
    args = ["--train", source, "--max_count", 4, "--workers", 2, "--out", tmp_path / "out"]
    run = ForkedRun(tmp_path, *args)
    wait_for(lambda: list((tmp_path / "out").glob("*.tar")))
    workers = psutil.Process(run.pid).children()
    workers[0].kill()
    assert run.wait() == 2
    assert "a worker was killed" in run.error_lines()[0]
    assert len(run.error_lines()) == 1
    assert "Traceback" not in run.errors.read_text()
    assert not running(workers)
    assert not list(tmp_path.rglob("*.part"))
    assert shard_imagenet(*args) == 0
    assert contents(tmp_path / "out") == complete


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_interrupted_run_resumes(number, code, long_source, tmp_path):
    source, complete = long_source
    args = ["--train", source, "--max_count", 4, "--workers", 2, "--out", tmp_path / "out"]
    run = ForkedRun(tmp_path, *args)
    wait_for(lambda: list((tmp_path / "out").glob("*.tar")))
    workers = psutil.Process(run.pid).children()
    if number == signal.SIGINT:  # Ctrl-C signals all processes of the terminal
        for worker in workers:
            worker.send_signal(number)
    os.kill(run.pid, number)
    assert run.wait() == code
    wait_for(lambda: not running(workers), 2)
    assert "Traceback" not in run.errors.read_text()
    assert shard_imagenet(*args) == 0
    assert contents(tmp_path / "out") == complete


FEW = {"a/1.jpg": photo(1), "a/2.jpg": photo(2), "b/3.jpg": photo(1), "b/4.jpg": IRREGULAR["png"], "b/5.jpg": photo(5)}


def test_kill_before_any_rename_resumes_to_the_same_bytes(tmp_path):
    """Kill a process before its first rename, its second, ..., and after the last one.

    Duplicates are left out, so that a shard is written twice.
    """
    source = write_folder(tmp_path / "in", {name: FEW[name] for name in ("a/1.jpg", "b/3.jpg", "b/4.jpg")})
    args = ["--train", source, "--on_bad", "drop_all", "--workers", 1, "--out"]
    assert shard_imagenet(*args, tmp_path / "complete") == 0
    complete, rename, different, number = contents(tmp_path / "complete"), os.replace, [], 0
    while number < 40:
        number += 1
        out, count = tmp_path / f"out{number}", FORK.Value("i", 0)

        def replace(source, target, number=number, count=count):
            with count.get_lock():
                count.value += 1
                kill = count.value == number
            last = Path(target).name == "manifest.json" and number == 40
            if last:
                rename(source, target)
            if kill or last:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        run = ForkedRun(tmp_path, *args, out, before=lambda: setattr(os, "replace", replace))
        if run.wait() == 0:
            assert number > 12
            number = 39  # once more, after the last rename
            continue
        assert run.process.exitcode in (2, -signal.SIGKILL)
        assert shard_imagenet(*args, out) == 0
        if contents(out) != complete:
            different.append((number, sorted(contents(out).items() ^ complete.items())[0][0]))
    assert different == []


def test_resumed_run_verifies_earlier_shards(tmp_path):
    source = write_folder(tmp_path / "in", FEW | {"a/6.jpg": photo(6), "a/7.jpg": photo(7)})
    args, out = ["--train", source, "--out"], tmp_path / "out"
    assert shard_imagenet(*args, tmp_path / "complete") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(sharder, "write_report")  # all shards are written, but no report
        with pytest.raises(NameError):
            shard_imagenet(*args, out)
    os.truncate(out / "train-000001.tar", 5120)
    (out / "train-000002.tar").unlink()
    (out / "train-000003.idx").unlink()
    (out / ".progress" / "train-000004.tar.json").write_text("{")
    (out / ".progress" / "train-000005.tar.json").unlink()
    assert shard_imagenet(*args, out) == 0
    assert contents(out) == contents(tmp_path / "complete")


def test_second_process_is_rejected(tmp_path, capsys):
    source = write_folder(tmp_path / "in", FEW)
    (tmp_path / "out" / ".progress").mkdir(parents=True)
    with open(tmp_path / "out" / ".progress" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert shard_imagenet("--train", source, "--out", tmp_path / "out") == 2
    assert "another process" in capsys.readouterr().err
    assert shard_imagenet("--train", source, "--out", tmp_path / "out") == 0


# --- full disk


def test_a_lock_that_is_released_at_once_is_waited_for(tmp_path):
    """The workers of a killed run hold its lock for a moment."""
    source = write_folder(tmp_path / "in", {"a/1.jpg": photo(1)})
    (tmp_path / "out" / ".progress").mkdir(parents=True)
    holder = 'import fcntl, sys, time; file = open(sys.argv[1], "w"); fcntl.flock(file, fcntl.LOCK_EX)'
    holder += '; print("locked", flush=True); time.sleep(0.5)'
    command = [sys.executable, "-c", holder, str(tmp_path / "out" / ".progress" / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        assert shard_imagenet("--train", source, "--out", tmp_path / "out") == 0


def test_disk_space_is_checked_first(tmp_path, monkeypatch, capsys):
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


@pytest.mark.parametrize(
    "name", [*FILES, "manifest.json", "train-000002.tar while writing", "train-000002.tar by quota"]
)
def test_full_disk_is_one_error_line(name, tmp_path, monkeypatch, capsys):
    source = write_folder(tmp_path / "in", FEW)
    args = ["--train", source, "--out"]
    assert shard_imagenet(*args, tmp_path / "complete") == 0
    error_number = errno.EDQUOT if "quota" in name else errno.ENOSPC
    fsync, write = os.fsync, shard_writer._HashingFile.write

    def failing_fsync(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(f"/{name.split()[0]}.part"):
            raise OSError(error_number, os.strerror(error_number))
        fsync(descriptor)

    def failing_write(self, data):
        if Path(self.file.name).name == "train-000002.tar.part" and self.size + len(data) > 1000:
            raise OSError(error_number, os.strerror(error_number))
        write(self, data)

    with monkeypatch.context() as patch:
        if name.endswith("while writing"):
            patch.setattr(shard_writer._HashingFile, "write", failing_write)
        else:
            patch.setattr(os, "fsync", failing_fsync)
        capsys.readouterr()
        assert shard_imagenet(*args, tmp_path / "out") == 2
    (error_line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("shard_imagenet: ")]
    assert "space" in error_line or "quota" in error_line.lower()
    assert not list(tmp_path.rglob("*.part"))
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert shard_imagenet(*args, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "complete")


def test_removed_source_is_one_error_line(tmp_path, monkeypatch, capsys):
    source, original = write_folder(tmp_path / "in", FEW), sharder.plan_split

    def plan_split(*args):
        (source / "a" / "1.jpg").unlink()
        return original(*args)

    monkeypatch.setattr(sharder, "plan_split", plan_split)
    assert shard_imagenet("--train", source, "--out", tmp_path / "out") == 2
    assert "1.jpg" in capsys.readouterr().err


# --- sizes


def test_shorter_side_is_resized(source, tmp_path):
    for out, workers in (("a", 1), ("b", 4)):
        args = ["--train", source, "--resize_shorter", 90, "--workers", workers]
        assert shard_imagenet(*args, "--out", tmp_path / out) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    by_stem = {
        Path(name).stem: data for files in CLASSES.values() for name, data in files.items() if name not in REPORTED
    }
    num_kept = num_resized = 0
    for name, (data, _) in read_samples(tmp_path / "a").items():
        if (before := by_stem.get(name.partition(":")[2])) is None:
            continue
        with Image.open(io.BytesIO(before)) as old, Image.open(io.BytesIO(data)) as new:
            if min(old.size) <= 90:
                num_kept += 1
                assert data == before
            else:
                num_resized += 1
                assert min(new.size) == 90
                assert max(abs(a - b * 90 / min(old.size)) for a, b in zip(new.size, old.size, strict=True)) <= 1
    assert num_kept > 20
    assert num_resized > 20
    assert reported_images(tmp_path / "a") == REPORTED


def test_max_count_and_max_size(source, tmp_path):
    assert shard_imagenet("--train", source, "--max_count", 3, "--out", tmp_path / "count") == 0
    counts = [entry["samples"] for entry in read_manifest(tmp_path / "count")["shards"].values()]
    assert max(counts) == 3
    assert shard_imagenet("--train", source, "--max_size", "20K", "--out", tmp_path / "size") == 0
    entries = read_manifest(tmp_path / "size")["shards"].values()
    assert all(entry["bytes"] <= 20 << 10 or entry["samples"] == 1 for entry in entries)
    assert np.mean([entry["samples"] for entry in entries]) > 2.5  # not much smaller than allowed


def test_few_images_are_spread_over_shards(tmp_path):
    for count in (1, 16, 17, 33):
        source = write_folder(tmp_path / f"in{count}", {f"{i}.jpg": photo(i) for i in range(count)})
        assert shard_imagenet("--train", source, "--out", tmp_path / f"out{count}") == 0
        entries = read_manifest(tmp_path / f"out{count}")["shards"]
        assert sum(entry["samples"] for entry in entries.values()) == count
        assert all(entry["samples"] for entry in entries.values())
        assert list(entries) == [f"train-{i:06d}.tar" for i in range(len(entries))]


# --- readers


def test_indexes_equal_those_of_dali(sharded, tmp_path):
    wds2idx = pytest.importorskip("wds2idx")
    for shard in sharded.glob("*.tar"):
        by_dali = tmp_path / "dali.idx"
        with wds2idx.IndexCreator(str(shard), str(by_dali), verbose=False) as creator:
            creator.create_index()
        assert by_dali.read_text() == shard.with_suffix(".idx").read_text()


def test_webdataset_and_loader_read_all_samples(sharded):
    samples = {name.partition(":")[2]: sample for name, sample in read_samples(sharded).items()}
    shards = sorted(map(str, sharded.glob("train-*.tar")))
    read = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    assert {each["__key__"]: (each["jpg"], int(each["cls"])) for each in read} == samples
    assert len(read) == len(samples)
    pairs = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode("pil").to_tuple("jpg", "cls")
    assert [label for _, label in pairs] == [int(each["cls"]) for each in read]
    opened = open_shards(str(sharded), Cache(Path("nowhere"), 0))
    assert [opened.read(i) for i in range(len(opened))] == [each["jpg"] for each in read]


def test_manifest_records_settings_and_sources(tmp_path):
    train = write_tar(tmp_path / "ILSVRC2012_img_train.tar", class_tars(imagenet(2)))
    val = write_tar(tmp_path / "ILSVRC2012_img_val.tar", val_files(3))
    devkit = write_devkit(tmp_path / "kit.tar.gz", [1, 2, 3])
    args = ["--train", train, "--val", val, "--devkit", devkit, "--seed", 4]
    assert shard_imagenet(*args, "--out", tmp_path / "out") == 0
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
    """Return the proportional set size of a process in bytes, 0 if it is unknown."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def test_eight_workers_with_large_images_use_less_than_1_gib(tmp_path):
    if not pss(os.getpid()):
        pytest.skip("no smaps_rollup")
    large = picture(3).resize((5200, 4000))  # 20.8 megapixels
    plain, cmyk = encode(large, quality=85), encode(large.convert("CMYK"), quality=85)
    files = {f"{i}.jpg": (cmyk if i == 3 else plain) + bytes(i) for i in range(9)}
    peak, num_workers = peak_memory(files, 8, tmp_path)
    assert num_workers == 8
    assert 100 << 20 < peak < 1 << 30, peak


def test_large_16_bit_image_uses_less_than_700_mib(tmp_path):
    values = np.tile(np.arange(5000, dtype=np.uint16) * 13, (4000, 1))
    peak, _ = peak_memory({"1.png": encode(Image.fromarray(values), "PNG", compress_level=1)}, 1, tmp_path)
    assert peak < 700 << 20, peak  # with float64 it was more than 1 GiB


def peak_memory(files, workers, folder):
    """Shard these files in a subprocess. Return the peak memory of all processes in bytes, and the most workers."""
    (folder / "in.tar").write_bytes(tar_of(files))
    command = [sys.executable, ROOT / "data_prep" / "shard_imagenet.py", "--train", folder / "in.tar"]
    command += ["--workers", str(workers), "--out", folder / "out"]
    peak, num_workers = 0, 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while run.poll() is None:
            try:
                pids = [child.pid for child in psutil.Process(run.pid).children(recursive=True)]
            except psutil.NoSuchProcess:
                break
            peak, num_workers = max(peak, sum(map(pss, [run.pid, *pids]))), max(num_workers, len(pids))
            time.sleep(0.05)
    assert run.returncode == 0
    return peak, num_workers


def test_inputs_are_complete():
    assert png16(0, 1) != png16(1, 1)
    assert set(map(str, IRREGULAR)) == set(EXPECTED)


def test_a_number_of_training_images_per_class(tmp_path):
    """A subset of each class, another one with another seed; a smaller class and the validation split are whole."""
    classes = imagenet(8)
    small = sorted(classes)[0]
    classes[small] = dict(list(classes[small].items())[:2])
    train = write_folder(tmp_path / "in" / "train", class_folders(classes))
    val = write_folder(tmp_path / "in" / "val", class_folders(imagenet(4, start=200)))
    keys = []
    for seed in (0, 0, 1):
        out = tmp_path / f"out{len(keys)}"
        assert shard_imagenet("--train", train, "--val", val, "--per_class", 3, "--seed", seed, "--out", out) == 0
        counts = Counter(label for _, label in read_samples(out, "train").values())
        assert [counts[label] for label in range(5)] == [2 if name == small else 3 for name in sorted(classes)]
        assert len(read_samples(out, "val")) == 20
        keys.append(keys_of(out, "train"))
    assert keys[0] == keys[1] != keys[2]


def test_images_per_class_of_images_without_classes(tmp_path, capsys):
    source = write_folder(tmp_path / "in", {f"{number}.jpg": photo(number) for number in range(4)})
    assert shard_imagenet("--train", source, "--per_class", 1, "--out", tmp_path / "out") == 2
    assert "has images without a class. Leave out --per_class." in capsys.readouterr().err
