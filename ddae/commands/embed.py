"""Write an embedding of each photo, near-duplicates among the photos, and a map of all of them.

ddae embed --encoder runs/mine PHOTOS --out embedded

embeddings.npz: `embeddings`, float32 [N, D], the mean patch token after the final norm, and `names`, the paths [N].
duplicates.csv: pairs of photos that show the same. map.png, duplicates.png: pictures of both.
"""

import argparse
import os
from pathlib import Path

from ddae.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+", type=Path, help="image files, and folders of them in any tree")
    parser.add_argument("--encoder", required=True, help="run folder, export folder or published file")
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--parquet", action="store_true", help="also write embeddings.parquet")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="decoding processes (default: all cores)")
    args = parser.parse_args()
    if args.workers < 0:
        raise UserError(f"--workers is {args.workers}; expected a number of at least 0. Correct it.")
    from ddae.eval import embed  # takes seconds
    from ddae.eval.embedding_figures import draw_duplicates, draw_map
    from ddae.export.encoder import load_encoder

    embed.check_out(args.out)
    if args.parquet:
        embed.require_parquet()
    photos = embed.find_photos(args.photos)
    encoder = embed.on_device(load_encoder(args.encoder))
    embeddings = embed.embed(encoder, photos, args.workers, show_progress=True)
    kept = [photos[row] for row in embeddings.rows]
    duplicates = embed.find_duplicates(embeddings)
    figures = {"map": draw_map(kept, embeddings.values)}
    if duplicates:
        figures["duplicates"] = draw_duplicates(kept, duplicates)
    unreadable = {str(photos[row]): reason for row, reason in embeddings.unreadable.items()}
    facts = {"task": "embed", "encoder": args.encoder, "photos": len(kept), "width": encoder.shape.width}
    facts |= {"duplicates": len(duplicates), "unreadable": unreadable}
    names = [os.fsencode(each).decode(errors="backslashreplace") for each in kept]
    embed.write_embeddings(args.out, names, embeddings, duplicates, facts, args.parquet, figures)
    for reason in list(unreadable.values())[:20]:
        print(f"left out: {reason}")
    left_out = f", {len(unreadable)} could not be read" if unreadable else ""
    print(
        f"{args.out}: {len(kept):,} embeddings of width {encoder.shape.width}{left_out}; "
        f"{len(duplicates):,} pairs of near-duplicates; map: {args.out / 'map.png'}"
    )
