"""A reader in numpy, written from the text of docs/format.md, that shares no decoder.

``tarfile``, ``zstandard`` and ``pyarrow`` open the container; from the flat columns on it is numpy
alone.
"""

import io
import json
import math
import tarfile

import numpy as np
import pyarrow as pa
import zstandard
from safetensors.numpy import load_file


def blocks_of(path):
    """Flat columns and metadata of every block of the cache, shard after shard."""
    for tar in sorted(path.glob("shards/*/*.tar")):
        with tarfile.open(tar) as archive:
            for member in archive:
                frame = archive.extractfile(member).read()
                raw = zstandard.ZstdDecompressor().decompress(frame)
                batch = pa.ipc.open_stream(io.BytesIO(raw)).read_next_batch()
                columns = {
                    name: column[0].values.to_numpy()
                    for name, column in zip(batch.schema.names, batch.columns, strict=True)
                }
                yield columns, json.loads(batch.schema.metadata[b"distilcache"])


class Reader:
    """One block, decoded with numpy alone."""

    def __init__(self, path, columns, metadata):
        self.columns = columns
        self.encoding = metadata["encoding"]
        self.path = path
        manifest = json.loads((path / "manifest.json").read_text())
        assert manifest["encoding"] == self.encoding
        self.head_spec = manifest["head"]
        self.temperatures = [1.0, *self.encoding["temperatures"]]
        self.sample_temperature = [*self.encoding["temperatures"], 1.0][0]

    def positions(self, signal):
        """Token of the block of each position of a signal, and the weight of each."""
        policy = self.encoding[f"{signal}_positions"]
        lengths = self.columns["lengths"].astype(int)
        if policy == "all":
            return np.arange(lengths.sum()), np.ones(lengths.sum())
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        masked = np.repeat(starts, self.columns["masked_counts"]) + self.columns["masked_positions"]
        if policy == "masked":
            return masked, np.ones(len(masked))
        counts = self.columns[f"{signal}_position_counts"]
        rows = np.repeat(starts, counts) + self.columns[f"{signal}_positions"]
        share = float(policy[len("masked+") :])
        return rows, np.where(np.isin(rows, masked), 1.0, 1 / share)

    def codec(self, layer):
        return load_file(self.path / "teacher" / f"hidden_codec_{layer}.safetensors")

    def hidden(self, layer):
        """Hidden states of a layer, [H, D]."""
        stored = next(h for h in self.encoding["hidden"] if h["layer"] == layer)
        flat = self.columns[f"hidden_{layer}"]
        if stored["dtype"] != "coded":
            return flat.reshape(-1, stored["width"]).astype(np.float64)
        codec = self.codec(layer)
        planes = flat.reshape(stored["planes"], -1).astype(int)
        codes = unpack_codes(codec["limits"].tolist(), planes)
        return float(codec["step"][0]) * codes.T @ codec["synthesis"].astype(float) + codec["mean"]

    def relations(self, heads):
        """Relations [A, L, L] of queries, keys and values of each sequence."""
        stored = self.encoding["relation"]
        weights = load_file(self.path / "teacher" / "model.safetensors")
        maps = {k: weights[v].astype(float) for k, v in stored["tensors"].items()}
        flat = self.columns[f"relation_{stored['layer']}"]
        if stored["dtype"] != "coded":
            read = flat.reshape(-1, stored["width"]).astype(float)
        else:
            name = f"relation_codec_{stored['layer']}.safetensors"
            codec = load_file(self.path / "teacher" / name)
            planes = flat.reshape(stored["planes"], -1).astype(int)
            codes = unpack_codes(codec["limits"].tolist(), planes).T
            values = codes + np.sign(codes) * codec["offsets"].astype(float)
            values *= codec["gains"]
            read = float(codec["step"][0]) * values @ codec["synthesis"].astype(float)
            embedded = maps["tokens.weight"][self.columns["input_ids"].astype(int)]
            read = read + codec["mean"] + embedded @ codec["prediction"].astype(float)
        ends = np.cumsum(self.columns["lengths"].astype(int))
        for kind in ("query", "key", "value"):
            x = read @ maps[f"{kind}.weight"].T + maps[f"{kind}.bias"]
            for own in np.split(x, ends[:-1]):
                split = np.split(own, heads, axis=1)
                yield np.stack([softmax(h @ h.T / math.sqrt(h.shape[1])) for h in split])

    def replayed_logits(self, temperature):
        """Logits of the LM head at the hidden-state positions, with the bias of T, [H, V]."""
        weights = load_file(self.path / "teacher" / "model.safetensors")
        head = {k: weights[v].astype(float) for k, v in self.head_spec["tensors"].items()}
        last = self.encoding["num_layers"]
        x = self.hidden(last) @ head["dense.weight"].T + head["dense.bias"]
        assert self.head_spec["activation"] == "gelu"
        x = x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.head_spec["eps"])
        x = x * head["norm.weight"] + head["norm.bias"]
        logits = x @ head["decoder.weight"].T + head["decoder.bias"]
        if self.encoding["hidden"][-1]["dtype"] == "coded":
            codec = self.codec(last)
            for t, bias in zip(codec["temperatures"], codec["replay_bias"], strict=True):
                if t == temperature:
                    logits = logits + bias
        return logits

    def stored_logits(self):
        """Per logit position: ids and logits."""
        columns, top_k = self.columns, self.encoding["top_k"]
        count = len(self.positions("logit")[0])
        lengths = np.full(count, top_k)
        if self.encoding["top_p"] < 1:
            lengths = columns["logit_lengths"].astype(int)
        ends = np.cumsum(lengths)
        for n in range(count):
            own = slice(ends[n] - lengths[n], ends[n])
            if not top_k:
                yield np.zeros(0, int), np.zeros(0)
                continue
            values = columns["logit_values"][own].astype(float)
            if self.encoding["logits_dtype"] == "uint8":
                values = float(columns["logit_base"][n]) - float(columns["logit_scale"][n]) * values
            yield columns["logit_ids"][own].astype(int), values

    def head_and_tail(self, temperature):
        """Per logit position: ids, log p of each, and the log of the mass outside them."""
        odds = self.columns["log_odds"].astype(float).reshape(-1, len(self.temperatures))
        column = self.temperatures.index(temperature)
        with np.errstate(over="ignore", divide="ignore"):
            for (ids, values), o in zip(self.stored_logits(), odds[:, column], strict=True):
                log_head, log_tail = -np.log1p(np.exp(-o)), -np.log1p(np.exp(o))
                scaled = values / temperature
                total = log_sum(scaled) if len(ids) else 0.0
                yield ids, scaled - total + log_head, log_tail

    def sparse_target(self):
        """Stored tokens and tail draws as a distribution at the sample temperature, [N, V]."""
        rows = []
        drawn = self.columns["tail_ids"].reshape(-1, self.encoding["tail_samples"]).astype(int)
        for (ids, log_p, log_tail), tail in zip(
            self.head_and_tail(self.sample_temperature), drawn, strict=True
        ):
            row = np.zeros(self.encoding["vocab_size"])
            row[ids] = np.exp(log_p)
            np.add.at(row, tail, np.exp(log_tail) / len(tail))
            rows.append(row)
        return np.array(rows)

    def replayed(self, temperature):
        return softmax(self.replayed_logits(temperature) / temperature)

    def corrected(self, temperature):
        """Head-corrected replay where both signals lie, [N, V]; logit rows that have none: nan."""
        logits = self.replayed_logits(temperature) / temperature
        place = {row: n for n, row in enumerate(self.positions("hidden")[0].tolist())}
        found = []
        for row, (ids, log_p, log_tail) in zip(
            self.positions("logit")[0].tolist(), self.head_and_tail(temperature), strict=True
        ):
            scaled = logits[place[row]].copy()
            scaled[ids] = -np.inf
            q = np.exp(log_tail + scaled - log_sum(scaled))
            q[ids] = np.exp(log_p)
            found.append(q)
        return np.array(found)

    def residual_target(self):
        """Replay put right by its residual draws, at the sample temperature, [N, V]."""
        target = self.corrected(self.sample_temperature)
        half = self.encoding["residual_samples"] // 2
        draws = self.columns["residual_ids"].reshape(len(target), 2, half).astype(int)
        for row, (more, less), mass in zip(
            target, draws, self.columns["residual_mass"].astype(float), strict=True
        ):
            np.add.at(row, more, mass / half)
            np.add.at(row, less, -mass / half)
        return target


def unpack_codes(limits, planes):
    """Packed codes [G, H] to codes [D, H]."""
    ranges = [2 * limit + 1 for limit in limits]
    wide = [d for d, r in enumerate(ranges) if r > 256]
    digits = [(d, 256, 1) for d in wide]
    digits += [(d, r, 1) for d, r in enumerate(ranges) if r <= 256]
    digits += [(d, math.ceil(ranges[d] / 256), 256) for d in wide]
    groups, product = [], 257
    for digit in digits:
        if product * digit[1] > 256:
            groups.append([])
            product = 1
        groups[-1].append(digit)
        product *= digit[1]
    assert len(groups) == len(planes)
    codes = np.zeros((len(limits), planes.shape[1]), int)
    for plane, group in zip(planes, groups, strict=True):
        after = 1
        for d, values, worth in reversed(group):
            codes[d] += plane // after % values * worth
            after *= values
    return codes - np.array(limits)[:, None]


def log_sum(x):
    return np.log(np.exp(x - x.max()).sum()) + x.max()


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)
