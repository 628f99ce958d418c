"""Read ImageNet's development kit: the synsets and the label of each validation image."""

import io
import re
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddae.errors import UserError, one_line

META, GROUND_TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
MAX_FILE_BYTES = 1 << 26  # of a file in the kit; meta.mat has less than 1 MB
FIX = "Pass ILSVRC2012_devkit_t12.tar.gz, or the folder unpacked from it."


@dataclass(frozen=True)
class Devkit:
    """The leaf synsets in the order of their WordNet ids, their words, and the synset of each validation image."""

    synsets: list[str]  # n01440764, ...
    words: list[str]  # "tench, Tinca tinca", ...
    ground_truth: list[str]  # synset of validation image 1, 2, ...

    def synset_of(self, name: str, source: str) -> str:
        """Return the synset of a validation image by its numbered name.

        Raise UserError if the name has no number, or if that is out of range. source: option and path, for the message.
        """
        number = re.search(r"(\d+)\.\w+$", name)
        if number is None or not 1 <= int(number[1]) <= len(self.ground_truth):
            expected = f"the devkit's {len(self.ground_truth)} validation images"
            raise UserError(f"{source} contains {name}, not one of {expected}. Pass --val ILSVRC2012_img_val.tar.")
        return self.ground_truth[int(number[1]) - 1]


def read_devkit(path: Path) -> Devkit:
    """Read meta.mat and the ground truth from the kit's archive or folder. Raise UserError if that fails."""
    from scipy.io import loadmat  # takes 0.5 s to import

    meta, ground_truth = (_read_file(path, name) for name in (META, GROUND_TRUTH))
    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
        leaves = {int(s["ILSVRC2012_ID"]): s for s in synsets if int(s["num_children"]) == 0}
        by_id = {number: (str(s["WNID"]), str(s["words"])) for number, s in leaves.items()}
    except Exception as error:  # loadmat raises many types of errors for a damaged file
        raise UserError(f"--devkit {path}: {META} cannot be read ({one_line(error)}). {FIX}") from None
    lines = ground_truth.decode(errors="replace").split()
    invalid = [line for line in lines if not line.isdecimal() or int(line) not in by_id]
    if invalid or not lines:
        problem = f"class {invalid[0] if invalid else ''!r}, outside meta.mat's {len(by_id)} classes"
        raise UserError(f"--devkit {path}: {GROUND_TRUTH} contains {problem}. {FIX}")
    words = dict(sorted(by_id.values()))
    return Devkit(list(words), list(words.values()), [by_id[int(line)][0] for line in lines])


def _read_file(path: Path, name: str) -> bytes:
    """Return the file of the kit whose path ends in `name`. Raise UserError if there is none."""
    try:
        if path.is_dir():
            for candidate in sorted(path.rglob(Path(name).name)):
                if candidate.as_posix().endswith(name):
                    return candidate.read_bytes()
        else:
            with tarfile.open(path) as archive:
                for member in archive:
                    if member.isfile() and member.name.endswith(name) and member.size <= MAX_FILE_BYTES:
                        file = archive.extractfile(member)
                        assert file is not None
                        return file.read()
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"--devkit {path} cannot be read ({one_line(error)}). {FIX}") from None
    raise UserError(f"--devkit {path} does not contain {name}. {FIX}")
