"""How many requests wait, how long, and in which order."""

import asyncio

import pytest

from twostroke.errors import Overloaded
from twostroke.router.backlog import Backlog, Line


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_it_is_bounded_and_a_place_is_given_back_once() -> None:
    backlog = Backlog(2)
    first, second = backlog.enter(), backlog.enter()
    with pytest.raises(Overloaded) as caught:
        backlog.enter()
    assert caught.value.status == 429
    assert caught.value.retry_after >= 1
    first.leave(served=True)
    first.leave(served=False)
    assert backlog.waiting == 1
    backlog.enter()
    second.leave(served=False)
    assert backlog.waiting == 1


def test_retry_after_is_what_the_queue_took_lately() -> None:
    clock = Clock()
    backlog = Backlog(1000, clock)
    assert backlog.retry_after() == 1
    places = [backlog.enter() for _ in range(50)]
    for place in places[:20]:  # two a second
        clock.now += 0.5
        place.leave(served=True)
    assert backlog.waiting == 30
    assert 13 <= backlog.retry_after() <= 16
    clock.now += 1000  # whatever was learned is old
    assert 1 <= backlog.retry_after() <= 60


@pytest.fixture
def line() -> Line:
    return Line()


async def standing(line: Line, order: list[int], count: int) -> list["asyncio.Task[None]"]:
    async def stand(number: int) -> None:
        await line.turn(number, 5)
        order.append(number)

    tasks = [asyncio.create_task(stand(line.number())) for _ in range(count)]
    await asyncio.sleep(0)
    return tasks


async def test_first_come_first_served_one_for_each_room_and_the_next_if_nobody_is_refused(line: Line) -> None:
    order: list[int] = []
    tasks = await standing(line, order, 4)
    assert line
    line.room()
    line.room()  # the first is still trying
    await asyncio.sleep(0)
    assert order == [0]
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2, 3]
    assert not line


async def test_who_is_refused_keeps_its_place_and_stops_the_others(line: Line) -> None:
    order: list[int] = []
    tasks = await standing(line, order, 3)
    line.room()
    await tasks[0]
    line.refused()
    again = asyncio.create_task(line.turn(0, 5))
    await asyncio.sleep(0.1)
    assert order == [0]
    line.room()
    await again
    assert order == [0]
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2]


async def test_who_leaves_is_passed_over(line: Line) -> None:
    order: list[int] = []
    tasks = await standing(line, order, 2)
    tasks[0].cancel()
    await asyncio.sleep(0)
    line.room()
    await tasks[1]
    assert order == [1]
    assert not line


async def test_patience_ends(line: Line) -> None:
    with pytest.raises(Overloaded, match="no decode worker had room"):
        await line.turn(line.number(), 0.01)
    assert not line
