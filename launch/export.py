"""Write an encoder in the form that other people's code reads.

python launch/export.py --encoder runs/demo --form timm --out exported
    timm.create_model("local-dir:exported", num_classes=0, pretrained=True)

--encoder may also be a published file of MAE, BootMAE or timm; what became of each of its tensors is printed.
"""

import argparse
from pathlib import Path

from ddae.errors import command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="a run folder, an export folder, or a published file")
    parser.add_argument("--form", choices=("timm", "mae", "beit"), default="timm", help="whose names and files")
    parser.add_argument("--out", required=True, type=Path, help="folder for timm, file for mae and beit")
    parser.add_argument("--image_size", type=int, help="resample the positions to images of this size")
    parser.add_argument("--normalisation", choices=("half", "imagenet"), help="of a file that does not say its own")
    words = parser.parse_args()
    from ddae.weights import load_encoder, write_foreign, write_timm  # seconds to import

    encoder = load_encoder(words.encoder, words.image_size, words.normalisation)
    for what, names in encoder.report.items():
        print(f"{what}: {len(names)} tensors{'' if what == 'loaded' or not names else ': ' + ', '.join(names)}")
    if words.form == "timm":
        write_timm(encoder, words.out)
    else:
        write_foreign(encoder, words.out, words.form)
    print(
        f"{words.out}: {words.form}, images of {encoder.grid[0] * encoder.patch_size} pixels, {encoder.normalisation}"
    )


if __name__ == "__main__":
    command("export", main)
