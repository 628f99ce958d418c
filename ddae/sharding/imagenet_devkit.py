"""ImageNet's development kit: which synset each validation image shows."""

import io
import re
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from ddae.errors import UserError

META, TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
LARGEST = 1 << 26  # bytes of a file of the kit; meta.mat has under a million
MEND = "give ILSVRC2012_devkit_t12.tar.gz, or the folder unpacked from it"


@dataclass(frozen=True)
class Devkit:
    """The leaf synsets in the order of their WordNet ids, their words, and the synset of each validation image."""

    synsets: list[str]  # n01440764, ...
    words: list[str]  # "tench, Tinca tinca", ...
    truth: list[str]  # synset of validation image 1, 2, ...

    def synsets_of(self, names: list[str], where: str) -> list[str | int | None]:
        """The synsets of validation images by their numbered names; UserError where a name has no number in range."""
        found: list[str | int | None] = []
        for name in names:
            number = re.search(r"(\d+)\.\w+$", name)
            if number is None or not 1 <= int(number[1]) <= len(self.truth):
                raise UserError(
                    f"{where} holds {name}, which is not one of the devkit's {len(self.truth)} validation images: "
                    "give ILSVRC2012_img_val.tar"
                )
            found.append(self.truth[int(number[1]) - 1])
        return found


def read_devkit(path: Path) -> Devkit:
    """Read meta.mat and the ground truth from the kit's archive or folder; UserError where they cannot be had."""
    meta, truth = (_content(path, name) for name in (META, TRUTH))
    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
        leaves = {int(s["ILSVRC2012_ID"]): s for s in synsets if int(s["num_children"]) == 0}
        by_number = {number: (str(s["WNID"]), str(s["words"])) for number, s in leaves.items()}
    except Exception as error:  # whatever a file that is no meta.mat leads the reader to
        raise UserError(f"{path}: {META} cannot be read ({error}): {MEND}") from None
    lines = truth.decode(errors="replace").split()
    wrong = [line for line in lines if not line.isdecimal() or int(line) not in by_number]
    if wrong or not lines:
        raise UserError(
            f"{path}: {TRUTH} names class {wrong[0] if wrong else 'nothing'!r}, outside meta.mat's {len(by_number)} "
            f"classes: {MEND}"
        )
    named = dict(sorted(by_number.values()))
    return Devkit(list(named), list(named.values()), [by_number[int(line)][0] for line in lines])


def _content(path: Path, name: str) -> bytes:
    """One file of the kit, by the end of its name."""
    try:
        if path.is_dir():
            found = next((each for each in sorted(path.rglob(Path(name).name)) if each.as_posix().endswith(name)), None)
            if found is not None:
                return found.read_bytes()
        else:
            with tarfile.open(path) as archive:
                for member in archive:
                    if member.isfile() and member.name.endswith(name) and member.size <= LARGEST:
                        file = archive.extractfile(member)
                        assert file is not None
                        return file.read()
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"--devkit {path} cannot be read ({' '.join(str(error).split())}): {MEND}") from None
    raise UserError(f"--devkit {path} does not hold {name}: {MEND}")
