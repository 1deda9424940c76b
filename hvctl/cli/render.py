"""Data on stdout in the four formats, everything else on stderr. Text from guests and foreign domains never reaches
a terminal raw: control characters are shown as escapes."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvctl import codec
from hvctl.cli.context import Format, Globals
from hvctl.cli.output import ReaderGoneError, drop_output
from hvctl.cli.printable import in_json, one_line, printable
from hvctl.errors import HvctlError, OutputError
from hvctl.model.operation import Outcome
from hvctl.units import format_seconds

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Column:
    """key of the row's dictionary, the heading, and how a person reads the value."""

    key: str
    heading: str
    text: Callable[[Any], str] = lambda v: "-" if v is None else str(v)


def complain(error: HvctlError) -> None:
    print(f"hvctl: {printable(error.message)}", file=sys.stderr)
    if error.hint:
        print(f"  hint: {printable(error.hint)}", file=sys.stderr)


def _document(document: Mapping[str, Any], form: Format) -> None:
    whole = {"schema_version": SCHEMA_VERSION, **document}
    if form is Format.YAML:
        import yaml

        # Without allow_unicode everything that a terminal could act on is an escape, and so are other letters.
        yaml.safe_dump(whole, sys.stdout, sort_keys=False, allow_unicode=False)
    else:
        sys.stdout.write(in_json(json.dumps(whole, indent=2, ensure_ascii=False)) + "\n")


def rows(context: Globals, name: str, data: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> None:
    """A list: `name` is its key in the JSON document."""
    if context.format in (Format.JSON, Format.YAML):
        _document({name: list(data)}, context.format)
    elif context.format is Format.CSV:
        writer = csv.writer(sys.stdout)
        writer.writerow(c.key for c in columns)
        writer.writerows([_flat(row.get(c.key)) for c in columns] for row in data)
    else:
        _table([c.heading for c in columns], [[c.text(row.get(c.key)) for c in columns] for row in data])


def _flat(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    return json.dumps(value) if isinstance(value, list | dict) else value


def _table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    cells = [list(headings), *([one_line(c) for c in line] for line in lines)]
    for text in laid_out(cells, shutil.get_terminal_size().columns if sys.stdout.isatty() else None):
        print(text)


def laid_out(cells: Sequence[Sequence[str]], terminal: int | None) -> Iterator[str]:
    """Lines of a table, whose first row are the headings. Where its last column would begin only in the second half of
    a row's second line on the terminal (its columns; None: there is none), nobody can read along a column any more:
    then a line a value."""
    from rich.cells import cell_len

    widths = [max(cell_len(line[i]) for line in cells) for i in range(len(cells[0]))]
    if terminal is None or sum(widths[:-1]) + 2 * (len(widths) - 1) <= terminal * 3 // 2:
        for line in cells:
            padded = (c + " " * (w - cell_len(c)) for c, w in zip(line, widths, strict=True))
            yield "  ".join(padded).rstrip()
        return
    width = max(cell_len(heading) for heading in cells[0])
    for number, line in enumerate(cells[1:]):
        if number:
            yield ""
        yield from (f"{h:<{width}}  {c}" for h, c in zip(cells[0], line, strict=True) if c != "-")


def detail(context: Globals, name: str, data: Mapping[str, Any], lines: Sequence[tuple[str, str]]) -> None:
    """One thing: the whole of it as a document, or its lines for a person."""
    if context.format in (Format.JSON, Format.YAML):
        _document({name: data}, context.format)
    elif context.format is Format.CSV:
        writer = csv.writer(sys.stdout)
        writer.writerow(data)
        writer.writerow(_flat(v) for v in data.values())
    else:
        width = max((len(k) for k, _ in lines), default=0)
        for key, value in lines:
            print(f"{key:<{width}}  {one_line(value)}".rstrip())


def in_words(facts: Mapping[str, Any]) -> str:
    """What a step found out, a fraction no longer than it is true."""
    return " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in facts.items())


def outcome(context: Globals, result: Outcome, diff: Sequence[tuple[str, str, str]] = ()) -> None:
    """How an operation ended, or what it would do; diff lines are (what, before, after). OutputError names it."""
    try:
        _outcome(context, result, diff)
        sys.stdout.flush()
    except ReaderGoneError:
        drop_output()
    except OutputError as e:
        if result.operation is None:
            raise
        what = f"{result.goal}: {result.state}, operation {result.operation}, but {e.message}"
        raise OutputError(what, f"hvctl operation show {result.operation}") from e
    finally:
        if context.format is Format.TABLE:
            for warning in result.warnings:
                context.say(f"warning: {warning}")


def _outcome(context: Globals, result: Outcome, diff: Sequence[tuple[str, str, str]]) -> None:
    if context.format is not Format.TABLE:
        data = codec.dump(result)
        data["changed"] = bool(result.plan)
        data["plan"] = [{"step": s, "detail": d} for s, d in result.plan]
        data["diff"] = [{"what": w, "before": b, "after": a} for w, b, a in diff]
        detail(context, "operation", data, ())
        return
    for what, before, after in diff:
        print(printable(f"  {what}: {before} -> {after}"))
    reasons = f" ({'; '.join(result.reasons)})" if result.reasons else ""
    if not result.plan:
        print(printable(f"{result.goal}: nothing to do{reasons}"))
    elif result.state is None:
        print(printable(f"{result.goal}: would do{reasons}"))
        for step, text in result.plan:
            print(printable(f"  {step} {text}".rstrip()))
    else:
        number = f", operation {result.operation}" if result.operation else ""
        print(printable(f"{result.goal}: {result.state}{reasons} in {format_seconds(result.seconds)}{number}"))
        for record in result.steps:
            facts = in_words(record.facts)
            done = "" if record.outcome == "done" else f" {record.outcome}"
            shown = f"  {record.name} {record.detail}{done}".rstrip()
            print(printable(f"{shown}  {format_seconds(record.seconds)}  {facts}".rstrip()))
