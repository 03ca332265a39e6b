"""The command `cigpose shards inspect DIR`. What it needs is imported when it runs: other commands start without it."""

from __future__ import annotations

import argparse
from pathlib import Path

from cigpose.config import load_params, load_preset
from cigpose.files.atomic import write_bytes
from cigpose.progress import progress


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `shards inspect` to the `cigpose` command."""
    shards = subparsers.add_parser("shards", help="look at the shards of a dataset")
    commands = shards.add_subparsers(title="commands", required=True, metavar="COMMAND")
    text = "Print what a dataset's shards hold, and draw a contact sheet: persons before and after augmentation."
    parser = commands.add_parser("inspect", help="counts and a contact sheet", description=text)
    parser.add_argument("shards", metavar="DIR", help="folder with index.json, or its s3:// or http(s):// address")
    parser.add_argument("--verify", action="store_true", help="read every shard through and decode every picture")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--params", type=Path, default=Path("params.yaml"), help="default: %(default)s")
    source.add_argument("--preset", help="take crop size and augmentation from this preset")
    parser.add_argument("--sheet", type=Path, help="picture to write (default: <dataset>-contact-sheet.jpg)")
    parser.add_argument("--persons", type=int, default=12, help="persons on the sheet; 0: none (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed shows other persons (default: %(default)s)")
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> None:
    """Run `cigpose shards inspect`.

    Raises:
        DataError: shards that cannot be used, are damaged, or of another keypoint set than the parameters'.
        ConfigError: a transform in `augmentation` that cannot be used.
        FileNotFoundError: no index, shard or params.yaml.
        ValueError: the sheet's suffix is that of no picture format.
    """
    import cv2

    from cigpose.loader.pixels import check_extra
    from cigpose.loader.shards import open_address
    from cigpose.loader.sheet import contact_sheet, describe, describe_order
    from cigpose.loader.stream import stream_pictures

    shards = open_address(options.shards)
    print(describe(shards.index))
    if options.verify:
        for _ in progress(stream_pictures(options.shards), total=shards.index.images, desc="verify", unit="image"):
            pass
        print("  every shard is the one that the index lists, and every picture decodes")
    if options.persons <= 0:
        return
    config = load_preset(options.preset) if options.preset else load_params(options.params)
    shards.check_keypoints(config.keypoint_set.name, len(config.keypoint_set))
    check_extra(config)
    path = options.sheet or Path(f"{shards.index.dataset}-contact-sheet.jpg")
    if not cv2.haveImageWriter(path.name):
        raise ValueError(
            f"{path}: not a kind of picture that can be written. Give --sheet a suffix such as .jpg or .png."
        )
    if (order := describe_order(shards)) is not None:
        print(order)
    sheet = contact_sheet(shards, config, num_persons=options.persons, seed=options.seed)
    write_bytes(path, cv2.imencode(path.suffix, sheet)[1].tobytes())
    print(f"\n{path}: each person as cut out for evaluation, then as augmented by stage 1 and stage 2.")
    for stage in ("stage1", "stage2"):
        added = [
            f"{name} {arguments or ''}".strip()
            for entry in getattr(config.augmentation, stage).extra
            for name, arguments in entry.items()
        ]
        if added:
            print(f"  augmentation.{stage}.extra: {', '.join(added)}")
