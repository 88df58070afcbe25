"""Export of the audit trail as Parquet, with Apache Arrow: the extra `parquet`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, BinaryIO, Final

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from ringfence.client.exports.columns import COLUMNS, row_of

_TYPES: Final = {"text": pa.string(), "number": pa.int64(), "truth": pa.bool_()}
_ROWS_OF_A_GROUP: Final = 20_000
EVENT: Final = "event"
"""The column with the OCSF event, byte for byte as on the topic."""
SCHEMA: Final = pa.schema(
    [
        pa.field("time", pa.timestamp("ms", tz="UTC")),
        *(pa.field(column.name, _TYPES[column.kind]) for column in COLUMNS[1:]),
        pa.field(EVENT, pa.binary()),
    ]
)


class ParquetWriter:
    """Writes one row per event; `time` is a timestamp."""

    resumable = False

    def __init__(self, file: BinaryIO) -> None:
        self._writer: Any = pq.ParquetWriter(file, SCHEMA, compression="zstd")
        self._rows: list[dict[str, Any]] = []

    def page(self, events: Sequence[str]) -> None:
        """Add rows. They are buffered until they fill a row group."""
        for event in events:
            row: dict[str, Any] = {**row_of(orjson.loads(event)), EVENT: event.encode()}
            row["time"] = row["time_ms"]
            self._rows.append(row)
        if len(self._rows) >= _ROWS_OF_A_GROUP:
            self._flush()

    def close(self) -> None:
        """Write the remaining rows and the footer."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=SCHEMA))
            self._rows = []
