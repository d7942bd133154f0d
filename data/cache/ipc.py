"""Reading Arrow streams that may be hostile.

Arrow's own readers accept nested, dictionary and extension types, and compressed buffers that
declare any size. A cache needs none of these, so they are refused before anything is decoded.
"""

import struct
from typing import Any

import pyarrow as pa

FLAT_TYPES = frozenset(
    [pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64(), pa.int8(), pa.int16(), pa.int32()]
    + [pa.int64(), pa.float16(), pa.float32(), pa.float64()]
)
READ_ERRORS = (
    pa.ArrowException,
    struct.error,
    MemoryError,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    OverflowError,
    RecursionError,
    StopIteration,
)
"""Errors that damaged or hostile bytes may cause in pyarrow and json."""


def read_only_batch(stream: Any, *, lists: bool) -> Any:
    """The one record batch of an Arrow stream, its buffers views of the stream.

    Args:
        stream: A buffer that begins with the schema's message.
        lists: Columns must be ``large_list`` of plain numbers; else plain numbers.

    Raises:
        ValueError: Or another of ``READ_ERRORS``: it is not such a stream.
    """
    messages = pa.ipc.MessageReader.open_stream(stream)
    schema = pa.ipc.read_schema(messages.read_next_message())
    if len(set(schema.names)) != len(schema.names):
        raise ValueError("two columns of one name")
    for field in schema:
        if lists and not pa.types.is_large_list(field.type):
            raise ValueError(f"column {field.name[:40]!r} of type {str(field.type)[:40]}")
        if (field.type.value_type if lists else field.type) not in FLAT_TYPES:
            raise ValueError(f"column {field.name[:40]!r} of type {str(field.type)[:40]}")
    message = messages.read_next_message()
    if message.type != "record batch":
        raise ValueError(f"a message of type {message.type}")
    if _is_compressed(memoryview(message.metadata)):
        raise ValueError("compressed buffers")
    batch = pa.ipc.read_record_batch(message, schema)
    try:
        messages.read_next_message()
    except StopIteration:
        return batch
    raise ValueError("more than one record batch")


def _is_compressed(message: memoryview) -> bool:
    """Whether a record batch's flatbuffer has the field ``compression``.

    Message: version, header_type, header (field 2), ...; RecordBatch: length, nodes, buffers,
    compression (field 3), ... (Arrow's ``format/Message.fbs``).
    """
    (root,) = struct.unpack_from("<I", message, 0)
    slot = _field(message, root, 2)
    if not slot:
        raise ValueError("a message without a header")
    (offset,) = struct.unpack_from("<I", message, slot)
    return _field(message, slot + offset, 3) != 0


def _field(message: memoryview, table: int, number: int) -> int:
    """Offset of field ``number`` of a flatbuffer table; 0: absent."""
    (back,) = struct.unpack_from("<i", message, table)
    vtable = table - back
    if vtable < 0:
        raise ValueError("a table outside of its message")
    (size,) = struct.unpack_from("<H", message, vtable)
    entry = 4 + 2 * number
    if entry + 2 > size:
        return 0
    (offset,) = struct.unpack_from("<H", message, vtable + entry)
    return table + offset if offset else 0
