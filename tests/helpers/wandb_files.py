"""What W&B's file of an offline run holds."""

import json
import struct
import time


def read_finished_wandb(path):
    """Records of an offline run that was ended; W&B writes the file a moment after it says so."""
    for _ in range(200):
        records = _read_wandb(path) if path.exists() else []
        if any(r.WhichOneof("record_type") == "exit" for r in records):
            break
        time.sleep(0.1)
    return records


def _read_wandb(path):
    """W&B's transaction log: a header of 7 bytes, then LevelDB's log format in 32 KiB blocks."""
    from wandb.proto import wandb_internal_pb2

    content, position, whole, records = path.read_bytes(), 7, b"", []
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            records.append(record)
            whole = b""
    return records


def history_rows(records):
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return rows
