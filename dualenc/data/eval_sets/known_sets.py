"""Well-known evaluation sets by name: their repositories on the Hugging Face hub, which CLIP_benchmark published.

Sizes are those of the shards of the split `test`, as the pages list them. The pages state no licenses: the terms are
those of the authors of each set.
"""

import os
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from dualenc.data.shards.remote import fetch_small, remote_size
from dualenc.utils.errors import warn_once
from dualenc.utils.files import similar_paths
from dualenc.utils.text import printable

if TYPE_CHECKING:
    from dualenc.data.eval_sets.base import Kind

LICENSE = "see the page, and the authors of the set"


class KnownSet(NamedTuple):
    """An evaluation set on the hub, in the layout of CLIP_benchmark."""

    kind: "Kind"
    repository: str
    megabytes: int | None  # size of the shards of the split "test"; None where it was not seen

    @property
    def page(self) -> str:
        """The address of the set's page; HF_ENDPOINT may name another hub."""
        hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        return f"{hub.rstrip('/')}/datasets/clip-benchmark/{self.repository}"

    @property
    def url(self) -> str:
        """The address of the set's files."""
        return f"{self.page}/resolve/main"

    def size_of(self, split: str) -> str:
        """Return the size of a split for display: of the table, or else what the store says; "unknown" otherwise."""
        if split == "test" and self.megabytes is not None:
            return _in_words(self.megabytes)
        number = (fetch_small(f"{self.url}/{split}/nshards.txt") or b"").strip()
        count = int(number) if re.fullmatch(b"[0-9]{1,4}", number) else 0
        paths = [f"{self.url}/{split}/{i}.tar" for i in range(count)]
        sizes = [remote_size(path) for path in paths]
        return _in_words(sum(filter(None, sizes)) / 1e6) if sizes and None not in sizes else "unknown"


def _in_words(megabytes: float) -> str:
    return f"{megabytes:.0f} MB" if megabytes < 1000 else f"{megabytes / 1000:.1f} GB"


# fmt: off
_SETS: "tuple[tuple[str, Kind, str, int | None], ...]" = (
    ("caltech101", "classification", "wds_vtab-caltech101", 439),
    ("cars", "classification", "wds_cars", 1008),
    ("cifar10", "classification", "wds_vtab-cifar10", None),
    ("cifar100", "classification", "wds_vtab-cifar100", None),
    ("country211", "classification", "wds_country211", 3835),
    ("dtd", "classification", "wds_vtab-dtd", None),
    ("eurosat", "classification", "wds_vtab-eurosat", 47),
    ("fer2013", "classification", "wds_fer2013", None),
    ("fgvc_aircraft", "classification", "wds_fgvc_aircraft", None),
    ("flowers", "classification", "wds_vtab-flowers", None),
    ("food101", "classification", "wds_food101", 1373),
    ("gtsrb", "classification", "wds_gtsrb", 105),
    ("imagenet-a", "classification", "wds_imagenet-a", 696),
    ("imagenet-o", "classification", "wds_imagenet-o", None),
    ("imagenet-r", "classification", "wds_imagenet-r", None),
    ("imagenet1k", "classification", "wds_imagenet1k", None),
    ("imagenet_sketch", "classification", "wds_imagenet_sketch", None),
    ("imagenetv2", "classification", "wds_imagenetv2", None),
    ("mnist", "classification", "wds_mnist", 41),
    ("objectnet", "classification", "wds_objectnet", None),
    ("pcam", "classification", "wds_vtab-pcam", None),
    ("pets", "classification", "wds_vtab-pets", 889),
    ("renderedsst2", "classification", "wds_renderedsst2", 34),
    ("resisc45", "classification", "wds_vtab-resisc45", None),
    ("stl10", "classification", "wds_stl10", None),
    ("sun397", "classification", "wds_sun397", None),
    ("svhn", "classification", "wds_vtab-svhn", 131),
    ("voc2007", "classification", "wds_voc2007", 629),
    ("voc2007_multilabel", "multilabel", "wds_voc2007_multilabel", 1027),
    ("flickr30k", "retrieval", "wds_flickr30k", 146),
    ("flickr8k", "retrieval", "wds_flickr8k", None),
    ("mscoco_captions", "retrieval", "wds_mscoco_captions", 840),
    ("mscoco_captions2017", "retrieval", "wds_mscoco_captions2017", 834),
)
# fmt: on
KNOWN_SETS: "Mapping[str, KnownSet]" = MappingProxyType(
    {name: KnownSet(kind, repository, megabytes) for name, kind, repository, megabytes in _SETS}
)


def short_name(name: str) -> str:
    """Return the name of a set without the prefixes of CLIP_benchmark, such as `wds/vtab/` and `wds_vtab-`."""
    return re.sub(r"^(wds[/_])?(vtab[/-])?", "", name)


def find_known(location: str, split: str) -> tuple[str, KnownSet] | None:
    """Return the name and the facts of a known set, and say once what is about to be downloaded.

    Args:
        location: what the user calls the set. A local file or folder of this name wins, which is said.
        split: the split that will be downloaded.

    Returns:
        None if the user means something else.
    """
    name = short_name(location)
    if name not in KNOWN_SETS:
        return None
    known = KNOWN_SETS[name]
    if Path(location).exists():
        warn_once(f"{location}: taken as the local {Path(location).absolute()}, not as the known set {known.page}")
        return None
    size = known.size_of(split)
    warn_once(f"{location}: {known.page}, split {split}: {size}, downloaded once; license: {LICENSE}")
    return name, known


def near_names(location: str) -> str:
    """Return a hint that names what exists or is known under a name similar to a wrong one; "" if nothing is."""
    short = short_name(location).lower()
    close = [printable(str(path)) for path in similar_paths(Path(location))[:1]]
    close = close or get_close_matches(short, KNOWN_SETS, 3) or [name for name in KNOWN_SETS if short in name][:3]
    hint = f": did you mean {' or '.join(close)}?" if close else ";"
    if os.sep in location:
        return hint if close else ""
    return f"{hint} `dualenc sets` lists the sets that are known by name"
