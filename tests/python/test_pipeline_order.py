"""The order in which messages between stages are queued on GPUs: no two ranks wait for each other, and a step takes no longer for it."""

import pytest

from gingham.pipeline.orders import FORWARD, UNITS, Message, of_rank, order, stages_of, with_messages
from gingham.plan.pipeline import SCHEDULES, rank_of

SIZES = [(2, 4), (2, 8), (3, 6), (4, 8), (4, 16)]


def carried(queues: list[list[Message]]) -> int:
    """Messages that arrive where each rank has one queue for all, and both ends must have come to a message before either goes on."""
    count, at = 0, [0] * len(queues)
    moved = True
    while moved:
        moved = False
        heads = {(m.forward, m.stage, m.part): [] for q, n in zip(queues, at, strict=True) if n < len(q) for m in (q[n],)}
        for rank, queue in enumerate(queues):
            if at[rank] < len(queue):
                each = queue[at[rank]]
                heads[each.forward, each.stage, each.part].append(rank)
        for ranks in heads.values():
            if len(ranks) == 2:
                count, moved = count + 1, True
                for rank in ranks:
                    at[rank] += 1
    return count


def finished(queues: list[list], place_of: list[int]) -> int:
    """When the last rank ends, if nothing of a rank begins before what it has queued earlier is done, by the clock of UNITS."""
    at, clock, left = [0] * len(queues), [0] * len(queues), sum(map(len, queues))
    while left:
        before = left
        for rank, queue in enumerate(queues):
            while at[rank] < len(queue):
                each = queue[at[rank]]
                if isinstance(each, Message):
                    source = place_of[each.stage + (-1 if each.forward else 1)]
                    other = place_of[each.stage] if each.sends else source
                    there = queues[other][at[other]] if at[other] < len(queues[other]) else None
                    if there != Message(not each.sends, each.forward, each.stage, each.part):
                        break
                    clock[rank] = clock[other] = max(clock[rank], clock[other])
                    at[other] += 1
                    left -= 1
                else:
                    clock[rank] += UNITS[each.kind]
                at[rank] += 1
                left -= 1
        assert left < before, "ranks wait for each other"
    return max(clock)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("train", [True, False])
def test_no_ranks_wait_for_each_other(schedule: str, train: bool) -> None:
    stages = stages_of(schedule, None)
    for size, parts in SIZES:
        place_of = [rank_of(stage, size, schedule) for stage in range(size * stages)]
        queues = [of_rank(rank, size, schedule, parts, stages, train, True) for rank in range(size)]
        for rank, queue in enumerate(queues):
            expected = [each for each in order(schedule, rank, size, parts, stages) if train or each.kind == FORWARD]
            assert [each for each in queue if not isinstance(each, Message)] == expected
        messages = [[each for each in queue if isinstance(each, Message)] for queue in queues]
        crossing = sum(a != b for a, b in zip(place_of, place_of[1:], strict=False)) * parts * (2 if train else 1)
        assert carried(messages) == crossing == sum(map(len, messages)) // 2
        finished(queues, place_of)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_the_order_takes_no_time_where_stages_are_alike(schedule: str) -> None:
    """3 units of each micro-batch, and those of the ranks before and behind: as without messages."""
    for size, parts in SIZES:
        orders = [order(schedule, rank, size, parts, 1) for rank in range(size)]
        assert finished(with_messages(orders, list(range(size))), list(range(size))) == 3 * (parts + size - 1)


def test_a_receive_comes_before_the_send_that_it_would_hold_up() -> None:
    """What rank 0 sends while rank 1 is in its first pass comes there before the gradient leaves: both would wait if it came behind."""
    said = ["".join("sr"[not m.sends] + "gx"[m.forward] + str(m.part) if isinstance(m, Message) else m.kind + str(m.part) for m in (each,))
            for each in of_rank(1, 2, "1f1b", 3, 1, True, True)]  # fmt: skip
    assert said[:5] == ["rx0", "F0", "rx1", "B0", "sg0"]
