"""Arrow streams and frames of any content, sound or not."""

import pyarrow as pa
import zstandard


def stream_of(schema: pa.Schema, *batches: pa.RecordBatch, **options) -> bytes:
    """An Arrow stream of these batches."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema, **options) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def compress(raw: bytes) -> bytes:
    """A frame with size and checksum, as the format wants it."""
    return zstandard.ZstdCompressor(write_checksum=True).compress(raw)
