"""A slow reader of caches: blocks one by one, positions one by one, and what a batch must be.

Plain loops over the words of docs/format.md; batches of the loader are held against it.
"""

import numpy as np
import torch


def positions_of(block, signal, policy):
    """Positions of a signal in each sequence, as lists."""
    if policy == "all":
        return [list(range(int(n))) for n in block["lengths"]]
    name = "masked" if policy == "masked" else f"{signal}_position"
    counts = block["masked_counts" if policy == "masked" else f"{signal}_position_counts"]
    flat = block[f"{name}s" if policy != "masked" else "masked_positions"].tolist()
    found = []
    for count in counts.tolist():
        found.append(flat[:count])
        flat = flat[count:]
    assert not flat
    return found


def slow_logits(block, encoding):
    """What is stored for each logit position, in their order."""
    count = len(block["log_odds"]) // (1 + len(encoding.temperatures))
    at, found = 0, []
    for n in range(count):
        kept = int(block["logit_lengths"][n]) if encoding.top_p < 1 else encoding.top_k
        ids = [0] * encoding.top_k
        values = [-np.inf] * encoding.top_k
        for k in range(kept):
            ids[k] = int(block["logit_ids"][at + k])
            values[k] = np.float32(block["logit_values"][at + k])
            if encoding.logits_dtype == "uint8":
                scale = np.float32(block["logit_scale"][n])
                values[k] = np.float32(block["logit_base"][n]) - scale * values[k]
        at += kept
        row = {"logit_ids": ids, "logit_values": values}
        for name, width in (
            ("log_odds", 1 + len(encoding.temperatures)),
            ("tail_ids", encoding.tail_samples),
            ("residual_ids", encoding.residual_samples),
        ):
            if width:
                row[name] = block[name][n * width : (n + 1) * width].tolist()
        if encoding.residual_samples:
            row["residual_mass"] = block["residual_mass"][n]
        found.append(row)
    return found


def slow_hidden(block, stored, count):
    """Hidden states of each position as stored: bytes of each plane, or raw values."""
    flat = block[stored.column]
    if stored.dtype == "coded":
        return [[flat[g * count + n] for g in range(stored.planes)] for n in range(count)]
    return [flat[n * stored.width : (n + 1) * stored.width] for n in range(count)]


def slow_rows(cache, round_index=0):
    """Every sequence of a round: what it holds at which of its positions."""
    encoding, found = cache.encoding, []
    for number in cache.round_range(round_index):
        block = cache.read_block(int(number))
        ids, labels = block["input_ids"].tolist(), block["labels"].tolist()
        masked = positions_of(block, "masked", "masked")
        places = {}
        if encoding.stores_logits and not encoding.mask_only:
            places["logit"] = positions_of(block, "logit", encoding.logit_positions)
            logits = slow_logits(block, encoding)
        if encoding.hidden:
            places["hidden"] = positions_of(block, "hidden", encoding.hidden_positions)
            count = sum(map(len, places["hidden"]))
            states = {h.column: slow_hidden(block, h, count) for h in encoding.hidden}
        done = {"logit": 0, "hidden": 0}
        for row, length in enumerate(block["lengths"].tolist()):
            entry = {
                "ids": ids[:length],
                "masked": masked[row],
                "labels": labels[: len(masked[row])],
            }
            ids, labels = ids[length:], labels[len(masked[row]) :]
            for signal, by_row in places.items():
                entry[signal] = {}
                for position in by_row[row]:
                    n = done[signal]
                    entry[signal][position] = (
                        logits[n] if signal == "logit" else {c: v[n] for c, v in states.items()}
                    )
                    done[signal] += 1
            found.append(entry)
        assert not ids
        assert not labels
    return found


def weight(policy, row, position):
    inside = position in row["masked"] or not policy.startswith("masked+")
    return 1.0 if inside else np.float32(1 / float(policy.removeprefix("masked+")))


NOT_STORED = {"logit_ids": 0, "logit_values": -np.inf, "log_odds": -np.inf}


def slow_batch(encoding, rows, signal, layers, restrict):
    """The batch of these sequences, value by value."""
    width = max(len(row["ids"]) for row in rows)
    batch = {
        "input_ids": [row["ids"] + [encoding.pad_id] * (width - len(row["ids"])) for row in rows]
    }
    batch["attention_mask"] = [[int(i < len(row["ids"])) for i in range(width)] for row in rows]
    numbered = list(enumerate(rows))
    batch["masked_index"] = [i * width + p for i, row in numbered for p in row["masked"]]
    batch["labels"] = [label for row in rows for label in row["labels"]]
    hidden_policy = encoding.hidden_positions if layers else None
    if layers:
        batch["hidden_index"] = [i * width + p for i, row in numbered for p in row["hidden"]]
        if "+" in hidden_policy:
            batch["hidden_weight"] = [
                weight(hidden_policy, row, p) for row in rows for p in row["hidden"]
            ]
        for stored in encoding.hidden:
            if stored.layer in layers:
                values = [v[stored.column] for row in rows for v in row["hidden"].values()]
                if stored.dtype == "coded":
                    values = np.array(values, np.uint8).reshape(-1, stored.planes).T
                batch[stored.column] = values
    if signal is None or not (layers or encoding.stores_logits):
        return batch
    kind = "hidden" if layers and signal != "sparse" else "logit"
    policy = getattr(encoding, f"{kind}_positions")
    places = [row["masked"] if restrict else list(row[kind]) for row in rows]
    batch["ce_index"] = [i * width + p for i, _ in numbered for p in places[i]]
    if "+" in policy and not restrict:
        batch["ce_weight"] = [weight(policy, rows[i], p) for i, _ in numbered for p in places[i]]
    if kind == "hidden" and restrict and policy != "masked":
        batch["ce_rows"] = [batch["hidden_index"].index(i) for i in batch["ce_index"]]
    names = ["logit_ids", "logit_values", "log_odds"] if signal != "replay" else []
    if signal == "sparse" and encoding.tail_samples:
        names.append("tail_ids")
    if signal == "replay+residual":
        names += ["residual_ids", "residual_mass"]
    for name in names:
        widths = {"logit_ids": encoding.top_k, "logit_values": encoding.top_k,
                  "log_odds": 1 + len(encoding.temperatures)}  # fmt: skip
        batch[name] = [
            row["logit"][p][name] if p in row["logit"] else [NOT_STORED[name]] * widths[name]
            for i, row in numbered
            for p in places[i]
        ]
    return batch


REAL = {"hidden_weight", "ce_weight", "logit_values", "log_odds", "residual_mass"}


def check_batch(found, expected):
    assert set(found) == set(expected)
    for name, values in expected.items():
        tensor = found[name]
        # Byte planes lie by position in memory.
        assert tensor.is_contiguous() or (tensor.dtype == torch.uint8 and tensor.T.is_contiguous())
        if name.startswith("hidden_") and name[7:].isdigit():
            values = np.asarray(values)
            assert tensor.dtype in (torch.uint8, torch.float16, torch.float32)
        else:
            assert tensor.dtype == (torch.float32 if name in REAL else torch.int64), name
            values = np.asarray(values, np.float32 if name in REAL else np.int64)
        if not values.size:
            assert tensor.numel() == 0
            continue
        assert tensor.shape == values.shape, name
        assert np.array_equal(tensor.numpy(), values), name


def rows_in(batch, waiting):
    """The slow reader's sequences that a batch consists of, each taken once."""
    width = batch["input_ids"].shape[1]
    ids, lengths = batch["input_ids"].tolist(), batch["attention_mask"].sum(1).tolist()
    masked: list[list[tuple[int, int]]] = [[] for _ in ids]
    for at, label in zip(batch["masked_index"].tolist(), batch["labels"].tolist(), strict=True):
        masked[at // width].append((at % width, label))
    rows = []
    for row, length in enumerate(lengths):
        places = tuple(at for at, _ in masked[row])
        labels = tuple(label for _, label in masked[row])
        rows.append(waiting[tuple(ids[row][:length]), places, labels].pop())
    return rows


def check_epoch(data, rows, epoch=0):
    """Every sequence once, every batch as the slow reader has it; how many were padded."""
    waiting = {}
    for row in rows:
        waiting.setdefault(key(row), []).append(row)
    padded = 0
    plan = data._plan
    for step in range(data.steps_per_epoch):
        batch = data[epoch * data.steps_per_epoch + step]
        taken = rows_in(batch, waiting)
        is_last = step == data.steps_per_epoch - 1
        assert len(taken) == (len(rows) - step * data.batch_size if is_last else data.batch_size)
        check_batch(
            batch,
            slow_batch(
                data.cache.encoding, taken, plan.signal, plan.layers, plan.restrict_ce_to_mask
            ),
        )
        padded += bool((batch["attention_mask"] == 0).any())
    assert not any(waiting.values())
    return padded


def key(row):
    return (tuple(row["ids"]), tuple(row["masked"]), tuple(row["labels"]))


def signals_of(encoding) -> list[str | None]:
    """Signals that a cache of an encoding can train with."""
    found: list[str | None] = [None]
    if encoding.stores_logits:
        found.append("sparse")
    if encoding.hidden:
        found += ["replay", *(["replay+topk"] if encoding.top_k else [])]
        found += ["replay+residual"] if encoding.residual_samples else []
    return found
