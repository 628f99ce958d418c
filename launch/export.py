"""Write an encoder in the form that other people's code reads.

python launch/export.py --encoder runs/demo --form timm --out exported
    timm.create_model("local-dir:exported", num_classes=0, pretrained=True)

--encoder may also be a checkpoint (--part teacher for its momentum encoder) or a published file of MAE, BEiT, BEiT-v2,
BootMAE or timm; what became of each of its tensors is printed.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from ddae.errors import run_command

FORMS = ("ddae", "timm", "mae", "beit", "onnx", "torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="a run folder, a checkpoint, an export, or a file")
    parser.add_argument("--form", choices=FORMS, default="timm", help="whose names and files")
    parser.add_argument("--out", required=True, type=Path, help="folder for ddae and timm, a file for the others")
    parser.add_argument("--part", choices=("student", "teacher"), default="student", help="of a run's two encoders")
    parser.add_argument("--image_size", type=int, help="resample the positions to images of this size")
    parser.add_argument("--normalisation", choices=("half", "imagenet"), help="of a file that does not say its own")
    args = parser.parse_args()
    from ddae.export.encoder import WRITERS, load_encoder
    from ddae.export.model_card import write_card  # seconds to import

    encoder = load_encoder(args.encoder, args.image_size, args.normalisation, args.part)
    for what, names in encoder.report.items():
        print(f"{what}: {len(names)} tensors{'' if what == 'loaded' or not names else ': ' + ', '.join(names)}")
    WRITERS[args.form](encoder, args.out)
    if args.out.is_dir():
        write_card(args.out, args.form, asdict(encoder.shape), encoder.normalisation, Path(args.encoder))
    print(f"{args.out}: {args.form}, images of {encoder.shape.image_size} pixels, {encoder.normalisation}")


if __name__ == "__main__":
    run_command("export", main)
