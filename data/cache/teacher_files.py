"""A cache's teacher: its checkpoint and codecs, compared with the manifest before they are read."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from distilcache.data.cache.manifest import CacheManifest, known_files
from distilcache.data.cache.schema import HiddenEncoding, RelationEncoding
from distilcache.data.errors import UserError
from distilcache.data.storage.files import hash_of

if TYPE_CHECKING:  # torch is loaded only where something is decoded
    from distilcache.data.codecs.hidden import HiddenCodec, HiddenDecoder
    from distilcache.data.codecs.lm_head import LMHead
    from distilcache.data.codecs.relations import Relations

_RESTORE = "run distilcache verify --repair and teacher-cache, or restore it from a copy"


class TeacherFiles:
    """The folder ``teacher`` of a cache, and what replay makes of it.

    Args:
        path: That folder.
        manifest: Of the cache.
    """

    def __init__(self, path: Path, manifest: CacheManifest) -> None:
        self.path = path
        self.manifest = manifest

    def check(self, *names: str) -> None:
        """Compare files of the teacher (no names: all) with their hashes in the manifest.

        Raises:
            UserError: Names the first that is missing or differs.
        """
        for _, fault in self.faults(*names):
            raise UserError(fault)

    def faults(self, *names: str) -> Iterator[tuple[Path, str]]:
        """Each file of the teacher that is missing or differs from the manifest, with one line."""
        identity = self.manifest.provenance["identity"]
        known = known_files(self.manifest.encoding, identity)  # even if the manifest lists others
        for name, wanted in {**self.manifest.teacher_files, **known}.items():
            if names and name not in names:
                continue
            path = self.path / name
            found = hash_of(path)
            if found != wanted:
                yield path, damaged_teacher(path, wanted, found)

    def lm_head(self) -> "LMHead":
        """The teacher's LM head, frozen."""
        from distilcache.data.codecs.lm_head import LMHead

        if self.manifest.head is None:
            kind = "a mask-only cache" if self.manifest.encoding.mask_only else "one of an ensemble"
            raise UserError(
                f"cache: {self.path.parent} must hold a teacher for replay, got {kind}; run "
                "distilcache teacher-cache with teacher.model alone and cache.mask_only=false"
            )
        self.check("model.safetensors")
        return LMHead.load(self.path, self.manifest.head)

    def hidden_codec(self, layer: int) -> "HiddenCodec":
        """The transform codec of one layer's hidden states (-1: the last layer)."""
        return self.codec_of(self.stored(layer))

    def codec_of(self, encoding: HiddenEncoding) -> "HiddenCodec":
        """The codec of stored states, compared with the hash in the manifest."""
        from distilcache.data.codecs.hidden import HiddenCodec

        path = codec_path(self.path.parent, encoding)
        found = hash_of(path)
        if found != encoding.codec_sha256:
            raise UserError(
                f"cache: {path} must be the codec that the shards were written with, got "
                f"{found[:16]}; {_RESTORE}"
            )
        codec = HiddenCodec.load(path)
        width = len(codec.limits)
        shapes = {tuple(codec.analysis.shape), tuple(codec.synthesis.shape)}
        if (codec.packing.planes, width, shapes, codec.mean.shape) != (
            encoding.planes,
            encoding.width,
            {(width, width)},
            (width,),
        ):
            raise UserError(
                f"cache: {path} must hold {encoding.planes} planes of {encoding.width} units, got "
                f"{codec.packing.planes} of {len(codec.limits)}; {_RESTORE}"
            )
        return codec

    def hidden_decoder(self, layer: int = -1) -> "HiddenDecoder":
        """The decoder of one layer's stored hidden states (-1: the last layer).

        Raises:
            UserError: The cache does not hold that layer.
        """
        from distilcache.data.codecs.hidden import HiddenDecoder

        encoding = self.stored(layer)
        codec = self.codec_of(encoding) if encoding.dtype == "coded" else None
        return HiddenDecoder(encoding.column, codec)

    def stored(self, layer: int) -> HiddenEncoding:
        """How one layer's hidden states are stored (-1: the last layer).

        Raises:
            UserError: They are not.
        """
        encoding = self.manifest.encoding.hidden_layer(layer)
        if encoding is None:
            raise UserError(
                f"cache: hidden_layers must hold layer {layer}, got "
                f"{[h.layer for h in self.manifest.encoding.hidden]}; make a cache that stores it"
            )
        return encoding

    def relations(self) -> "Relations":
        """What gives the teacher's queries, keys and values of a batch.

        Raises:
            UserError: The cache stores no states for them, or its teacher or codec is damaged.
        """
        from distilcache.data.codecs.relations import Relations, load_tensors

        encoding = self.stored_relation()
        self.check("model.safetensors")
        tensors = load_tensors(self.path, encoding.tensors)
        codec = self.codec_of(encoding) if encoding.dtype == "coded" else None
        return Relations(encoding.column, codec, tensors)

    def stored_relation(self) -> RelationEncoding:
        """How the states that relations are replayed from are stored.

        Raises:
            UserError: They are not.
        """
        encoding = self.manifest.encoding.relation
        if encoding is None:
            raise UserError(
                f"cache: {self.path.parent} must hold what relations are replayed from, got none; "
                "make it with cache.relation_layer=-1"
            )
        return encoding


def damaged_teacher(path: Path, wanted: str, found: str) -> str:
    """The line about a file of the teacher that has another hash."""
    return f"cache: {path} must have sha256 {wanted[:16]}, got {found[:16]}; {_RESTORE}"


def codec_path(cache: Path, stored: HiddenEncoding) -> Path:
    """Parameter file of the codec of stored states."""
    return cache / "teacher" / stored.codec_name
