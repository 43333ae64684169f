"""The hand-over's documentation, made of its tables: ``python -m twostroke.handover.diagram > docs/handover.md``."""

import sys
from collections.abc import Iterable
from enum import Enum

from twostroke.handover.machine import (
    CONSUMER,
    PRODUCER,
    Action,
    ConsumerAction,
    ConsumerEvent,
    ConsumerState,
    Event,
    ProducerAction,
    ProducerEvent,
    ProducerState,
    State,
    Table,
)

_HEAD = """# The hand-over of one request

Generated from the tables in `src/twostroke/handover/machine.py`; do not edit. To make it anew:
`python -m twostroke.handover.diagram > docs/handover.md`.

Each arrow is *event / actions*. An event that a state has no arrow for is illegal there.
"""


def document() -> str:
    """``docs/handover.md``."""
    producer = _glossary(ProducerState, ProducerEvent, ProducerAction)
    consumer = _glossary(ConsumerState, ConsumerEvent, ConsumerAction)
    return "\n".join(
        [
            _HEAD,
            _end("The producer (P)", diagram(PRODUCER, ProducerState.NEW), producer),
            _end("The consumer (D)", diagram(CONSUMER, ConsumerState.ATTACHING), consumer),
        ]
    )


def diagram(table: Table[State, Event, Action], start: State) -> str:
    """A table as a Mermaid state diagram, from its start to the states that nothing leaves."""
    states = {state for state, _ in table}
    lines = ["stateDiagram-v2", f"    [*] --> {start.name}"]
    for (state, event), (target, actions) in table.items():
        does = f" / {', '.join(action.name for action in actions)}" if actions else ""
        lines.append(f"    {state.name} --> {target.name}: {event.name}{does}")
    ends = dict.fromkeys(target for target, _ in table.values() if target not in states)
    lines += [f"    {end.name} --> [*]" for end in ends]
    return "\n".join(lines)


def _end(title: str, drawing: str, glossary: str) -> str:
    return f"## {title}\n\n```mermaid\n{drawing}\n```\n\n{glossary}"


def _glossary(*kinds: Iterable[Enum]) -> str:
    parts = []
    for heading, names in zip(("State", "Event", "Action"), kinds, strict=True):
        rows = [f"| {name.name} | {name.value} |" for name in names]
        parts.append("\n".join([f"| {heading} | Meaning |", "|---|---|", *rows, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(document())
