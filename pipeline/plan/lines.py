"""A plan as lines for a terminal."""

import math
from collections.abc import Mapping
from typing import Any

from distilcache.pipeline.report.text import (
    duration,
    number,
    short_bytes,
    short_count,
    span,
    text_table,
)


def format_plan(values: Mapping[str, Any]) -> str:
    """All sections of the plan."""
    parts = [_head(values), _bytes(values), _hours(values)]
    price = _price(values["price"])
    return "\n\n".join([*parts, *([price] if price else [])])


def _head(values: Mapping[str, Any]) -> str:
    teacher, text = values["teacher"], values["text"]
    masked, tokens = text["masked_positions"], text["tokens"]
    lines = [
        ["teacher", f"{teacher['model']}: {teacher['layers']}x{teacher['width']}, vocabulary "
                    f"{teacher['vocabulary']:,}"],
        ["tokens", f"{tokens:,.0f} ({text['source']})"],
        ["sequences", f"{text['sequences']:,.0f} of {tokens / text['sequences']:,.0f} tokens"],
        ["masked", f"{masked:,.0f} positions a round ({masked / tokens:.1%})"],
        ["rounds", str(text["rounds"])],
    ]  # fmt: skip
    if text["signal_positions"] not in (0, masked):
        lines.insert(4, ["signals", f"{text['signal_positions']:,.0f} positions a round"])
    return "\n".join(f"{name:<10} {value}" for name, value in lines)


def _bytes(values: Mapping[str, Any]) -> str:
    found, text = values["bytes"], values["text"]
    stored = text["tokens"] * text["rounds"]
    rows = []
    pairs = {n: c["per_token"] for n, c in found["columns"].items()}
    for name, pair in sorted(pairs.items(), key=lambda item: -item[1][1]):
        rows.append([name, span(pair, ",.2f"), short_bytes(*(b * stored for b in pair))])
    signals = [each * stored for each in found["per_token"]]
    rows.append(["signals", span(found["per_token"], ",.1f"), short_bytes(*signals)])
    rows.append(["teacher's copy", "", short_bytes(found["teacher"])])
    rows.append(["cache", "", short_bytes(*found["total"])])
    lines = [text_table(["column", "bytes per token", "in all"], rows), f"bytes: {found['source']}"]
    whole, vocabulary = found["all_logits_per_token"], values["teacher"]["vocabulary"]
    if whole is not None and whole[1] < found["per_token"][0]:
        lines.append(
            f"bytes: the logits of all {vocabulary} ids take {span(whole, ',.1f')} per token and "
            f"lose only what their type rounds: --set cache.top_k={vocabulary} --set "
            "cache.hidden_dtype=none --set train.signal=sparse --set train.alpha_cos=0"
        )
    return "\n".join(lines)


def _hours(values: Mapping[str, Any]) -> str:
    headings = ["", "params", "tokens", "PFLOP", "tokens/s", "time", "time live"]
    first = values["stage_one"]
    made = not first["tokens"]  # before, by another project
    rows = [] if made else [["stage one", *_work(first), ""]]
    for student in values["students"]:
        rows.append([student["size"], *_work(student), duration(student["live_hours"])])
    against = values["against_live"]
    lines = [text_table(headings, rows)]
    if first["hours"] is None or any(s["hours"] is None for s in values["students"]):
        lines.append(
            "hours: pass --tflops, --measure BLOCKS, or --teacher-tokens-per-s and "
            "--student-tokens-per-s"
        )
    else:
        lines.append(f"hours: rates {values['rates']}")
    ratio = against["hours_ratio"]
    known = f"{ratio:.2f} of the hours of" if ratio is not None else ""
    known = known or f"{against['flops_ratio']:.2f} of the FLOPs of"
    done = "from the finished cache" if made else "and stage one"
    lines.append(f"{_students(values)} {done}: {known} live distillation")
    if against["break_even_students"] is not None:
        rounds = values["text"]["rounds"]
        times = "once" if values["passes"] == 1 else f"{values['passes']:.3g} times"
        lines.append(
            f"{_break_even(against['break_even_students'])} (each reads the text {times}, of "
            f"{rounds} round{'s' * (rounds > 1)})"
        )
    if against["not_counted"]:
        lines.append(f"not counted: {', '.join(against['not_counted'])}")
    lines += values["advice"]
    return "\n".join(lines)


def _break_even(students: float) -> str:
    """From how many students on the cache is the cheaper way."""
    rounded = round(students, 2)
    count = math.floor(rounded) + 1
    even = f", with {rounded:.0f} it costs as much" if rounded == count - 1 and rounded else ""
    if count == 1:
        return "stage one pays for itself with the first student"
    return f"stage one pays for itself from {count:,} students on{even}"


def _students(values: Mapping[str, Any]) -> str:
    count = len(values["students"])
    return f"{count} student{'s' * (count > 1)}"


def _work(row: Mapping[str, Any]) -> list[str]:
    return [
        short_count(row["parameters"]),
        short_count(row["tokens"]),
        f"{row['flops'] / 1e15:,.3g}" if row["flops"] < 1e18 else f"{row['flops'] / 1e15:,.0f}",
        number(row["tokens_per_s"], ",.0f"),
        duration(row["hours"]),
    ]


def _price(price: Mapping[str, Any]) -> str:
    words = {"teacher": "stage one", "cache": "stage one and students", "live": "live"}
    lines = [
        f"price: {words[name]} {price[name]:,.2f}" for name in words if price.get(name) is not None
    ]
    if "storage_month" in price:
        lines.append(f"price: storage for a month {span(price['storage_month'], ',.2f')}")
    return "\n".join(lines)
