"""One source with something of every kind: each file is accounted for by name."""

import os

from conftest import picture
from image_archives import encode, keys_of, photo, report_of, shard_imagenet, write_folder

from ddae.sharding.check import check

PLAIN = {f"{name}/{name}_{i}.jpg": photo(10 * n + i) for n, name in enumerate(("ape", "bee", "cat")) for i in range(5)}
HALF = photo(40)[: len(photo(40)) // 2].rstrip(b"\xff") + b"\xff\xd9"
CONVERTED = {
    "bee/a.png": encode(picture(50), "PNG"),
    "bee/b.webp": encode(picture(51), "WEBP"),
    "bee/c.gif": encode(picture(52).convert("P"), "GIF", comment=b"x" * 70_000),
    "bee/d.jpg": encode(picture(53).convert("CMYK")),
    "bee/e.jpg": photo(54)[:20] + b"stray" + photo(54)[20:],
}
KEPT = {
    "bee/f.jfif": photo(60),
    "bee/g.JPE": photo(61),
    "bee/h.jpg": encode(picture(62), exif=b"Exif\0\0MM\0*\0"),
    "bee/i.jpg": photo(63, progressive=True),
}
LEFT_OUT = {
    "bee/half.jpg": HALF,
    "bee/cut.jpg": photo(41)[:-900],
    "bee/empty.jpg": b"",
    "bee/noise.png": bytes(range(256)) * 4,
    "bee/phone.heic": b"\0\0\0\x18ftypheic",
    "bee/photo.jp2": b"\0\0\0\x0cjP  ",
}
OTHER = {
    "bee/no_ending": photo(70),
    "bee/notes.txt": b"x",
    "bee/.hidden.jpg": photo(71),
    "bee/Thumbs.db": b"x",
    "@eaDir/bee/1.jpg": photo(72),
    "bee/1.json": b"{}",
}


def test_every_file_is_accounted_for_by_name(tmp_path):
    source = write_folder(tmp_path / "in", {**PLAIN, **CONVERTED, **KEPT, **LEFT_OUT, **OTHER})
    os.rename(source / "ape", tmp_path / "elsewhere")
    (source / "ape").symlink_to(tmp_path / "elsewhere")
    (source / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(source / "cat" / "pipe")
    out = tmp_path / "out"
    assert shard_imagenet("--train", source, "--out", out) == 0
    report = report_of(out)
    by_action = {"converted": set(), "left_out": set()}
    for image in report["images"]:
        by_action[image["action"]].add(image["source"].removeprefix("in/"))
    assert by_action["converted"] == CONVERTED.keys()
    left_out = {name.removeprefix("in/") for reason in report["left_out"].values() for name in reason["first"]}
    assert left_out == {*LEFT_OUT, "cat/gone.jpg"}
    assert by_action["left_out"] <= left_out
    other = {name for reason in report["other_files"].values() for name in reason["first"]}
    assert other == {*OTHER, "cat/pipe"}
    written = {name.partition(".")[0] for name in (*PLAIN, *KEPT, *CONVERTED)}
    assert keys_of(out) == {key.partition("/")[2] if "_" in key else key.replace("/", "_") for key in written}
    assert report["found"] == len(PLAIN) + len(KEPT) + len(CONVERTED) + len(left_out)
    assert (report["written"], report["converted"]) == (len(PLAIN) + len(KEPT), len(CONVERTED))
    assert check(out, True, 1) == ([], report["written"] + report["converted"])
