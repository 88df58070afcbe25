"""The contract between all parts of Ringfence: every message and every Kafka topic, declared once.

Enters: parsed JSON or claims, from readers of records, replies and API calls.
Leaves: immutable, strictly typed models; unknown fields are kept and written out again. `Topic` says of each
topic which messages it carries, its key, its encoding, its writers and readers, and its retention.
Imports: nothing of Ringfence, as it is the ground of all layers; pydantic only. `runner.sandbox`,
`runner.init` and `scan` may import only `codes.py` of it, which imports nothing.
Read first:
- `base.py`: `Message`, `Claims` (a signed message), field types and `Topic`.
- `topics.py`: the catalogue of topics.
- `codes.py`: the error codes.
- `credential.py`: the request, policy's decision and the sealed reply, the main flow.
"""
