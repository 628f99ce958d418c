"""Export an encoder to the format of another library.

ddae export --encoder runs/demo --form timm --out exported
    timm.create_model("local-dir:exported", num_classes=0, pretrained=True)
ddae export --encoder runs/demo --form transformers --out exported
    transformers.AutoModel.from_pretrained("exported"); of an MAE run also ViTMAEForPreTraining

--encoder may also be a checkpoint (--part teacher for its EMA encoder), a published file of MAE, BEiT, BEiT-v2,
BootMAE, MoCo-v3, DeiT, DINOv2 or timm, or a snapshot folder of timm or transformers. Prints which tensors of the file
were loaded and which were left out.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from ddae.config.base import describe_size
from ddae.errors import UserError

FORMS = ("ddae", "timm", "transformers", "mae", "beit", "onnx", "torch")
FOLDER_FORMS = ("ddae", "timm", "transformers")
# Files of an exported folder.
EXPORTED = {"README.md", "config.json", "encoder.safetensors", "model.safetensors", "preprocessor_config.json"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="run folder, checkpoint, export folder or published file")
    parser.add_argument("--form", choices=FORMS, default="timm", help="output format (default: timm)")
    parser.add_argument(
        "--out", required=True, type=Path, help="output path: a folder for ddae, timm and transformers, else a file"
    )
    parts = ("student", "teacher")
    parser.add_argument("--part", choices=parts, default="student", help="encoder of a checkpoint (default: student)")
    size_help = "interpolate the positions to this image size: one number, or height and width"
    parser.add_argument("--image_size", type=int, nargs="+", help=size_help)
    parser.add_argument("--heads", type=int, help="attention heads, for a published file that does not tell")
    parser.add_argument("--key", default="", help="state dict of a published file to take, such as model_ema")
    parser.add_argument("--normalisation", choices=("half", "imagenet"), help="of pixels, for a file without metadata")
    parser.add_argument("--push", metavar="REPO", help="also upload the folder to OWNER/NAME on the Hugging Face Hub")
    parser.add_argument("--dry_run", action="store_true", help="with --push: print what would be uploaded")
    args = parser.parse_args()
    if args.push and args.form not in FOLDER_FORMS:
        raise UserError(f"--push uploads a folder, but --form {args.form} is a file. Pass --form {FOLDER_FORMS[1]}.")
    if args.dry_run and not args.push:
        raise UserError("--dry_run is for --push. Leave it out.")
    if args.image_size and len(args.image_size) > 2:
        raise UserError("--image_size has more than two numbers; expected one, or height and width.")
    size = None if args.image_size is None else (args.image_size[0], args.image_size[-1])
    _check_out(args.out, args.form)
    from ddae.export import hub
    from ddae.export.encoder import load_encoder  # takes seconds
    from ddae.export.formats import WRITERS
    from ddae.export.hugging_face import load_mae_decoder, write_transformers
    from ddae.export.model_card import write_card

    encoder = load_encoder(args.encoder, size, args.normalisation, args.part, args.heads, args.key)
    for source in encoder.report.pop("taken", ()):
        print(f"taken: {source}")
    for status, names in encoder.report.items():
        listing = "" if status == "loaded" or not names else f": {', '.join(names)}"
        print(f"{status}: {len(names)} tensors{listing}")
    mae = load_mae_decoder(Path(args.encoder)) if args.form == "transformers" and args.part == "student" else None
    if mae is not None and args.image_size is None:
        write_transformers(encoder, args.out, *mae)
    else:
        WRITERS[args.form](encoder, args.out)
    if args.out.is_dir():
        write_card(args.out, args.form, asdict(encoder.shape), encoder.normalisation, Path(args.encoder))
    if args.push:
        hub.add_metadata(args.out, args.form)
        print(hub.describe(args.out, args.push) if args.dry_run else f"pushed: {hub.push(args.out, args.push)}")
    pixels = describe_size(encoder.shape.image_size)
    print(f"{args.out}: {args.form}, images of {pixels} pixels, {encoder.normalisation}")


def _check_out(out: Path, form: str) -> None:
    """Create the folder above `out`. Raise UserError if writing there would delete what no export wrote."""
    if out.name == "encoder" and (out.parent / "environment.json").exists():
        raise UserError(f"--out {out} is the export that the run {out.parent} made. Pass a new folder.")
    if out.is_dir() and form in FOLDER_FORMS:
        readme, names = out / "README.md", {path.name for path in out.iterdir()}
        is_export = readme.is_file() and "written by ddae" in readme.read_text(errors="replace")
        if foreign := names - (EXPORTED if is_export else set()):
            raise UserError(f"--out {out} contains {min(foreign)}, which no export wrote. Pass a new folder.")
    elif out.exists():
        raise UserError(f"--out {out} exists. Pass a new path.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}). Pass another path.") from None
