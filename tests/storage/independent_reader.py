"""A reader written from docs/format.md alone: pyarrow, zlib and json, nothing of the project.

`read_store(path)` returns (run, manifest, rows); each row is a dict of plain lists.
"""

import hashlib
import json
import math
import struct
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc as ipc


def checked_json(path):
    data = Path(path).read_bytes()
    body, tail = data[:-21], data[-21:]
    assert tail == b',"crc32":"%08x"}\n' % zlib.crc32(body), f"{path}: damaged"
    return json.loads(body + b"}")


def read_store(path):
    path = Path(path)
    run, manifest = checked_json(path / "run.json"), checked_json(path / "manifest.json")
    known = "planes frequency_ids importance_weights loss_mask kept_normaliser document_scores only_rows"
    assert run["format"]["major"] == 1 and set(run["required_features"]) <= set(known.split())
    fingerprint = hashlib.sha256((path / "run.json").read_bytes()[:-21] + b"}").hexdigest()
    assert fingerprint == manifest["fingerprint"]
    assert ("document_scores" in run["required_features"]) == (run["kind"] == "scores" and "columns" in run)
    assert ("loss_mask" in run["required_features"]) == ("mask" in run.get("columns", []))
    assert ("kept_normaliser" in run["required_features"]) == (run.get("normaliser") == "kept")
    digest = hashlib.sha256((fingerprint + "".join(u[2] for u in manifest["units"])).encode()).hexdigest()
    assert digest == manifest["store_digest"]
    id_map = None
    if "frequency_ids" in run["required_features"]:
        data = (path / "id_map.u32").read_bytes()
        assert hashlib.sha256(data).hexdigest() == run["id_map_sha256"]
        id_map = struct.unpack(f"<{run['vocab_size']}I", data)
    index_file = path / manifest["index"]["file"]
    index = ipc.open_file(index_file).read_all().to_pylist()
    rows = []
    for number, line in enumerate(index):
        file = path / "units" / manifest["units"][line["unit"]][0]
        with open(file, "rb") as handle:
            schema = ipc.open_file(handle).schema
            assert schema.metadata[b"potstill.fingerprint"].decode() == fingerprint
            handle.seek(line["offset"])
            message = handle.read(line["length"])
        assert zlib.crc32(message) == line["crc32"]
        batch = ipc.read_record_batch(pa.py_buffer(message), schema)
        columns = {name: batch.column(name)[line["position"]].as_py() for name in schema.names}
        assert columns["row"] == number
        assert (columns["num_tokens"], columns["num_entries"]) == (line["num_tokens"], line["num_entries"])
        planes = schema.names[5:]
        checks = struct.unpack(f"<{len(planes)}I", columns["crc32"])
        assert [zlib.crc32(columns[name]) for name in planes] == list(checks)
        decoder = {"tokens": decode_tokens, "targets": decode_targets, "scores": decode_scores}[run["kind"]]
        row = {"token_digest": columns["token_digest"], **decoder(run, columns, id_map)}
        row["stats"] = {name: line[f"stat.{name}"] for name in run["stats"]}
        rows.append(row)
    return run, manifest, rows


def join_bytes(columns, prefix):
    planes = [columns[name] for name in sorted(columns) if name[:-1] == prefix and name[-1].isdigit()]
    return [sum(byte << (8 * i) for i, byte in enumerate(bytes_)) for bytes_ in zip(*planes, strict=True)]


def decode_tokens(run, columns, id_map):
    lengths = columns["doc_lens"]
    out = {"tokens": join_bytes(columns, "token"), "doc_lens": list(struct.unpack(f"<{len(lengths) // 4}I", lengths))}
    if "mask" in columns:  # an empty plane: every token is trained on
        out["mask"] = [
            columns["mask"][n // 8] >> n % 8 & 1 if columns["mask"] else 1 for n in range(len(out["tokens"]))
        ]
    return out


def decode_scores(run, columns, id_map):
    out = {
        "label_logprob": [-x / 256 for x in join_bytes(columns, "label")],
        "entropy": [x / 256 for x in join_bytes(columns, "entropy")],
        "label_rank": list(columns["label_rank"]),
    }
    for name in run.get("columns", ()):  # one number per document, null where nothing is known
        numbers = struct.unpack(f"<{len(columns[name]) // 4}f", columns[name])
        out[name] = [None if math.isnan(x) else x for x in numbers]
    return out


def decode_targets(run, columns, id_map):
    ids = join_bytes(columns, "id")
    ids = ids if id_map is None else [id_map[i] for i in ids]
    out = {"ids": [], "logprobs": [], "draws": []}
    if "weight" in columns:
        out["log_weights"] = []
    place = 0
    for count in columns["count"]:
        out["ids"].append(ids[place : place + count])
        if "val" in columns:
            code, logprobs = 0, []
            for gap in columns["val"][place : place + count]:
                code += gap
                logprobs.append(-code / 16)
            out["logprobs"].append(logprobs)
        if "weight" in columns:
            code, log_weights = 0, []
            for gap in columns["weight"][place : place + count]:
                code += gap
                log_weights.append(7 - code / 16)
            out["log_weights"].append(log_weights)
        if "draws" in columns:
            out["draws"].append(list(columns["draws"][place : place + count]))
        place += count
    out["log_tail"] = [-math.inf if byte == 255 else -byte / 16 for byte in columns["tail"]]
    out["entropy"] = [byte / 16 for byte in columns["entropy"]]
    out["label_logprob"] = [-byte / 16 for byte in columns["label"]]
    out["label_rank"] = list(columns["label_rank"])
    out["log_tail_at"] = {}
    for i, temperature in enumerate(run["temperatures"]):
        pairs = zip(columns[f"tail_at{i}"], columns["count"], strict=True)
        out["log_tail_at"][temperature] = [tail_at(byte) if count else 0.0 for byte, count in pairs]
    return out


def tail_at(byte):
    return -math.inf if byte == 0 else -math.log1p(math.exp(-(byte - 128) / 12))
