"""Export an encoder to the format of another library.

python launch/export.py --encoder runs/demo --form timm --out exported
    timm.create_model("local-dir:exported", num_classes=0, pretrained=True)

--encoder may also be a checkpoint (--part teacher for its EMA encoder) or a published file of MAE, BEiT, BEiT-v2,
BootMAE or timm. Prints which tensors of the file were loaded and which were left out.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from ddae.errors import run_command

FORMS = ("ddae", "timm", "mae", "beit", "onnx", "torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="run folder, checkpoint, export folder or published file")
    parser.add_argument("--form", choices=FORMS, default="timm", help="output format (default: timm)")
    parser.add_argument("--out", required=True, type=Path, help="output path: a folder for ddae and timm, else a file")
    parts = ("student", "teacher")
    parser.add_argument("--part", choices=parts, default="student", help="encoder of a checkpoint (default: student)")
    parser.add_argument("--image_size", type=int, help="interpolate the positions to this image size")
    parser.add_argument("--normalisation", choices=("half", "imagenet"), help="of pixels, for a file without metadata")
    args = parser.parse_args()
    from ddae.export.encoder import load_encoder  # takes seconds
    from ddae.export.formats import WRITERS
    from ddae.export.model_card import write_card

    encoder = load_encoder(args.encoder, args.image_size, args.normalisation, args.part)
    for status, names in encoder.report.items():
        listing = "" if status == "loaded" or not names else f": {', '.join(names)}"
        print(f"{status}: {len(names)} tensors{listing}")
    WRITERS[args.form](encoder, args.out)
    if args.out.is_dir():
        write_card(args.out, args.form, asdict(encoder.shape), encoder.normalisation, Path(args.encoder))
    print(f"{args.out}: {args.form}, images of {encoder.shape.image_size} pixels, {encoder.normalisation}")


if __name__ == "__main__":
    run_command("export", main)
