"""What must hold of any hand-over, proved over the whole tables: they are small enough to walk every path."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from twostroke.handover.diagram import diagram, document
from twostroke.handover.machine import (
    CONSUMER,
    PRODUCER,
    Action,
    ConsumerAction,
    ConsumerEvent,
    Event,
    IllegalEvent,
    Machine,
    ProducerAction,
    ProducerEvent,
    State,
    Table,
)
from twostroke.handover.machine import ConsumerState as C
from twostroke.handover.machine import ProducerState as P

Path_ = list[tuple[State, Event, tuple[Action, ...], State]]


def reachable(table: Table[State, Event, Action], start: State) -> set[State]:
    seen, todo = {start}, [start]
    while todo:
        state = todo.pop()
        for (source, _), (target, _) in table.items():
            if source is state and target not in seen:
                seen.add(target)
                todo.append(target)
    return seen


def paths(table: Table[State, Event, Action], start: State, end: set[State]) -> Iterator[Path_[State, Event, Action]]:
    """Every way from ``start`` to an end that takes no arrow twice; what loops do shows in the first round."""

    def walk(state: State, path: Path_[State, Event, Action]) -> Iterator[Path_[State, Event, Action]]:
        if state in end:
            yield path
        taken = {(source, event) for source, event, _, _ in path}
        for (source, event), (target, actions) in table.items():
            if source is state and (source, event) not in taken:
                yield from walk(target, [*path, (source, event, actions, target)])

    return walk(start, [])


PRODUCER_PATHS = list(paths(PRODUCER, P.NEW, {P.CLOSED}))
CONSUMER_PATHS = list(paths(CONSUMER, C.ATTACHING, {C.RESUMED, C.CLOSED}))


# -- both ends -------------------------------------------------------------------------------------------------------


def test_every_state_can_be_reached() -> None:
    assert reachable(PRODUCER, P.NEW) == set(P)
    assert reachable(CONSUMER, C.ATTACHING) == set(C)


@pytest.mark.parametrize("state", P)
def test_the_producer_can_end_from_everywhere(state: P) -> None:
    assert P.CLOSED in reachable(PRODUCER, state)


@pytest.mark.parametrize("state", C)
def test_the_consumer_can_end_from_everywhere(state: C) -> None:
    assert reachable(CONSUMER, state) & {C.RESUMED, C.CLOSED}


def test_nothing_leaves_the_ends() -> None:
    assert {P.CLOSED} == set(P) - {state for state, _ in PRODUCER}
    assert {C.RESUMED, C.CLOSED} == set(C) - {state for state, _ in CONSUMER}


def test_every_event_and_action_is_used() -> None:
    assert {event for _, event in PRODUCER} == set(ProducerEvent)
    assert {event for _, event in CONSUMER} == set(ConsumerEvent)
    assert {action for _, actions in PRODUCER.values() for action in actions} == set(ProducerAction)
    assert {action for _, actions in CONSUMER.values() for action in actions} == set(ConsumerAction)


@pytest.mark.parametrize("state", P)
@pytest.mark.parametrize("event", ProducerEvent)
def test_the_producer_takes_what_is_in_its_table_and_nothing_else(state: P, event: ProducerEvent) -> None:
    machine = Machine(PRODUCER, state)
    if (state, event) in PRODUCER:
        assert machine.accepts(event)
        assert (machine.state, machine.on(event)) == (state, PRODUCER[state, event][1])
        assert machine.state is PRODUCER[state, event][0]
    else:
        assert not machine.accepts(event)
        with pytest.raises(IllegalEvent, match=f"{event.name} is illegal in {state.name}"):
            machine.on(event)
        assert machine.state is state


@pytest.mark.parametrize("state", C)
@pytest.mark.parametrize("event", ConsumerEvent)
def test_the_consumer_takes_what_is_in_its_table_and_nothing_else(state: C, event: ConsumerEvent) -> None:
    machine = Machine(CONSUMER, state)
    assert machine.accepts(event) == ((state, event) in CONSUMER)
    if not machine.accepts(event):
        with pytest.raises(IllegalEvent):
            machine.on(event)
        assert machine.state is state


# -- the producer ----------------------------------------------------------------------------------------------------


def producer_actions(path: Path_[P, ProducerEvent, ProducerAction]) -> list[ProducerAction]:
    return [action for _, _, actions, _ in path for action in actions]


def test_a_lease_that_held_something_is_released_once_at_the_end() -> None:
    assert PRODUCER_PATHS
    for path in PRODUCER_PATHS:
        actions = producer_actions(path)
        held = ProducerAction.COMPUTE in actions
        assert actions.count(ProducerAction.RELEASE) == held
        if held:
            assert actions[-1] is ProducerAction.RELEASE


def test_a_prefill_is_submitted_once_and_aborted_only_while_it_runs() -> None:
    for path in PRODUCER_PATHS:
        actions = producer_actions(path)
        assert actions.count(ProducerAction.COMPUTE) <= 1
        finished = any(event is ProducerEvent.FINISH for _, event, _, _ in path)
        computes = ProducerAction.COMPUTE in actions
        assert (ProducerAction.ABORT in actions) == (computes and not finished)


def test_nothing_is_published_without_a_consumer() -> None:
    for path in PRODUCER_PATHS:
        attached = False
        for _, event, actions, _ in path:
            attached |= event is ProducerEvent.ATTACH
            assert attached or ProducerAction.PUBLISH not in actions


def test_everything_is_published_once_prefill_is_done_and_a_consumer_is_there() -> None:
    for (_, _), (target, actions) in PRODUCER.items():
        if target is P.OFFERED:
            assert ProducerAction.PUBLISH in actions or ProducerAction.RENEW in actions
    for path in PRODUCER_PATHS:
        into = [actions for state, _, actions, target in path if target is P.OFFERED and state is not P.OFFERED]
        assert all(ProducerAction.PUBLISH in actions for actions in into)


@pytest.mark.parametrize("state", [P.EXPECTED, P.HELD, P.OFFERED])
def test_whoever_waits_for_the_other_end_has_a_deadline(state: P) -> None:
    """It is set on the way in, and it ends the hand-over."""
    into = [actions for (source, _), (target, actions) in PRODUCER.items() if target is state and source is not state]
    assert into
    assert all(ProducerAction.RENEW in actions for actions in into)
    assert PRODUCER[state, ProducerEvent.EXPIRE][0] is P.CLOSED


def test_a_failed_request_can_be_told_in_every_state_but_the_first() -> None:
    assert {state for state, event in PRODUCER if event is ProducerEvent.FAIL} == set(P) - {P.NEW, P.CLOSED}


def test_a_confirmation_changes_no_state() -> None:
    assert all(state is target for (state, event), (target, _) in PRODUCER.items() if event is ProducerEvent.CONFIRM)


def test_a_second_consumer_is_never_legal() -> None:
    for path in PRODUCER_PATHS:
        assert [event for _, event, _, _ in path].count(ProducerEvent.ATTACH) <= 1


# -- the consumer ----------------------------------------------------------------------------------------------------


def test_blocks_are_kept_only_when_verified() -> None:
    """The seqlock rule."""
    for (_, event), (_, actions) in CONSUMER.items():
        assert (ConsumerAction.KEEP in actions) == (event is ConsumerEvent.VERIFIED)
        assert (ConsumerAction.READ in actions) == (event is ConsumerEvent.PUBLISHED)


def test_nothing_is_read_before_the_pool_is_known() -> None:
    for path in CONSUMER_PATHS:
        opened = False
        for _, event, actions, _ in path:
            opened |= event is ConsumerEvent.OPENED
            assert opened or ConsumerAction.READ not in actions


def test_the_engine_gets_the_job_back_exactly_once_or_ends_it() -> None:
    assert CONSUMER_PATHS
    for path in CONSUMER_PATHS:
        actions = [action for _, _, actions, _ in path for action in actions]
        resumes, aborts = actions.count(ConsumerAction.RESUME), actions.count(ConsumerAction.ABORT)
        assert resumes + aborts == 1
        assert (path[-1][3] is C.RESUMED) == (resumes == 1)


def test_the_first_token_is_sent_at_most_once() -> None:
    for path in CONSUMER_PATHS:
        emitted = [event for _, event, actions, _ in path if ConsumerAction.EMIT in actions]
        assert len(emitted) <= 1
        assert set(emitted) <= {ConsumerEvent.SAMPLED, ConsumerEvent.SAMPLED_LAST}


def test_a_producer_that_was_reached_is_released() -> None:
    for path in CONSUMER_PATHS:
        events = [event for _, event, _, _ in path]
        actions = [action for _, _, actions, _ in path for action in actions]
        if ConsumerEvent.OPENED in events:
            assert actions.count(ConsumerAction.RELEASE) == 1


def test_a_client_may_leave_and_a_producer_be_lost_at_any_time() -> None:
    open_ = set(C) - {C.RESUMED, C.CLOSED}
    assert {state for state, event in CONSUMER if event is ConsumerEvent.ABORT} == open_
    assert {state for state, event in CONSUMER if event is ConsumerEvent.LOST} == open_


# -- the document ----------------------------------------------------------------------------------------------------


def test_the_document_is_what_the_tables_say() -> None:
    path = Path(__file__).parents[2] / "docs" / "handover.md"
    assert path.read_text() == document(), "run: python -m twostroke.handover.diagram > docs/handover.md"


def test_the_document_shows_everything() -> None:
    text = document()
    for kind in (P, ProducerEvent, ProducerAction, C, ConsumerEvent, ConsumerAction):
        for name in kind:
            assert f"| {name.name} | {name.value} |" in text
    assert "    HELD --> CLOSED: EXPIRE / RELEASE\n" in text
    assert "    EXPECTED --> CLOSED: EXPIRE\n" in text


def test_a_diagram_has_an_arrow_for_each_entry_its_start_and_its_ends() -> None:
    assert diagram(PRODUCER, P.NEW).count("-->") == len(PRODUCER) + 2
    assert diagram(CONSUMER, C.ATTACHING).count("-->") == len(CONSUMER) + 3
