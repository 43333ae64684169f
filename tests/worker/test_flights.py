"""Who brings which block, and who waits for it."""

import asyncio

from tests.store.blocks import key, keys
from twostroke.worker.flights import Flights


async def test_the_second_waits_for_what_it_shares() -> None:
    flights = Flights()
    flights.begin(keys(1, 2, 3), 0)
    waiting = asyncio.create_task(flights.wait(keys(1, 2, 9), (), 0))
    await asyncio.sleep(0)
    for number in (1, 3):
        flights.land([key(number)])
        await asyncio.sleep(0)
        assert not waiting.done()
    flights.land([key(2)])
    assert await waiting
    assert not len(flights)


async def test_nothing_to_wait_for() -> None:
    flights = Flights()
    assert not await flights.wait(keys(1), (), 0)
    flights.begin(keys(1, 2), 3)
    assert not await flights.wait(keys(5, 1), (), 3)
    assert not await flights.wait(keys(1, 2), keys(1, 2), 3)
    assert not await flights.wait(keys(1), (), 2), "it is served before us"


async def test_whoever_gives_up_lets_others_go_on() -> None:
    flights = Flights()
    first = flights.begin(keys(1, 2), 0)
    second = flights.begin(keys(1, 2, 3), 0)
    waiting = asyncio.create_task(flights.wait(keys(1, 2), (), 0))
    await asyncio.sleep(0)
    second.end()
    await asyncio.sleep(0)
    assert not waiting.done()
    first.end()
    assert await waiting
    first.end()
    assert not len(flights)


async def test_several_wait_for_the_same_block_and_one_of_them_leaves() -> None:
    flights = Flights()
    flight = flights.begin(keys(1), 0)
    some = [asyncio.create_task(flights.wait(keys(1), (), 0)) for _ in range(3)]
    await asyncio.sleep(0)
    some[0].cancel()
    flight.end()
    assert await asyncio.gather(*some[1:]) == [True, True]
