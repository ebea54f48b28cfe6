"""The engines between hosts, UCX and torch's Gloo alike: order, sizes, what moves while nobody waits, and typed errors."""

import os
import signal
import threading
import time
from typing import Any

import pytest
import torch

import gingham
from engines import engine, message, wait
from gingham.launch import engines
from pool import RankError

ENGINES = [
    pytest.param("ucx", marks=pytest.mark.skipif(not engines.find_ucx()["found"], reason="no UCX: pip install 'gingham[hosts]'")),
    "gloo",
]
both = pytest.mark.parametrize("name", ENGINES)
MB = 1 << 20


def in_order(rank: int, name: str, size: int, count: int) -> None:
    with engine(name, rank, size) as e:
        others = [peer for peer in range(size) if peer != rank]
        sizes = [(7919 * number) % 9000 for number in range(count)]
        sent = [message(rank, peer, 4, number, bytes_) for number, bytes_ in enumerate(sizes) for peer in others]
        tickets = [e.post_send(others[at % len(others)], 4, data) for at, data in enumerate(sent)]
        for peer in others:
            for number, bytes_ in enumerate(sizes):
                got = torch.zeros(bytes_, dtype=torch.uint8)
                wait(e, e.post_recv(peer, 4, got))
                assert torch.equal(got, message(peer, rank, 4, number, bytes_)), (peer, number)
        wait(e, *tickets)


@both
@pytest.mark.parametrize("size", [2, 4])
def test_messages_of_a_tag_come_in_order(ranks: Any, name: str, size: int) -> None:
    ranks(size)(in_order, name, size, 40)


def crossing(rank: int, name: str) -> None:
    """Every tag's receive is posted before, in another order, or after its message has come."""
    with engine(name, rank, 2) as e:
        tags = [0, 1, 5, 77, 2**20, 2**31 - 2]
        early = {tag: torch.zeros(1000 + at, dtype=torch.uint8) for at, tag in enumerate(tags)}
        posted = {tag: e.post_recv(1 - rank, tag, early[tag]) for tag in reversed(tags[:3])}
        sends = [e.post_send(1 - rank, tag, message(rank, 1 - rank, tag, 0, len(early[tag]))) for tag in tags]
        time.sleep(0.05)
        posted |= {tag: e.post_recv(1 - rank, tag, early[tag]) for tag in reversed(tags[3:])}
        wait(e, *posted.values(), *sends)
        for tag in tags:
            assert torch.equal(early[tag], message(1 - rank, rank, tag, 0, len(early[tag]))), tag


@both
def test_tags_cross(ranks: Any, name: str) -> None:
    ranks(2)(crossing, name)


def both_ways(rank: int, name: str) -> None:
    with engine(name, rank, 2) as e:
        for number, size in enumerate((0, 1, 8, 4095, 4096, 4097, 65536, 300_001, MB, 16 * MB)):
            mine, got = message(rank, 1 - rank, 3, number, size), torch.zeros(size, dtype=torch.uint8)
            wait(e, e.post_recv(1 - rank, 3, got), e.post_send(1 - rank, 3, mine))
            assert torch.equal(got, message(1 - rank, rank, 3, number, size)), size


@both
def test_sizes_both_ways_at_once(ranks: Any, name: str) -> None:
    ranks(2)(both_ways, name)


def computing(rank: int, name: str) -> float:
    """Rank 1 only computes while 16 MB come: how long it waits for them afterwards."""
    with engine(name, rank, 2) as e:
        data = message(0, 1, 1, 0, 16 * MB)
        wait(e, e.post_recv(1 - rank, 9, torch.zeros(1)), e.post_send(1 - rank, 9, torch.zeros(1)))
        if rank == 0:
            started = time.monotonic()
            wait(e, e.post_send(1, 1, data))
            return time.monotonic() - started
        got = torch.zeros_like(data)
        ticket = e.post_recv(0, 1, got)
        x, end = torch.ones(300, 300), time.monotonic() + 0.5
        while time.monotonic() < end:
            x = x @ x / 300
        started = time.monotonic()
        wait(e, ticket)
        waited = time.monotonic() - started
        assert torch.equal(got, data)
        return waited


@both
def test_messages_move_while_the_receiver_computes(ranks: Any, name: str) -> None:
    sending, waited = ranks(2)(computing, name)
    assert sending < 0.4 and waited < 0.02, (sending, waited)


def wrong_size(rank: int, name: str) -> list[str]:
    texts = []
    with engine(name, rank, 2) as e:
        for early in (False, True):
            for sent, expected in ((10, 100), (1000, 10), (0, 5), (5, 0), (300_000, 299_999), (MB, 2 * MB), (MB, 5)):
                if rank == 0:
                    time.sleep(0.005 * early)
                    wait(e, e.post_send(1, 2, torch.zeros(sent, dtype=torch.uint8)))
                else:
                    time.sleep(0.005 * (not early))
                    with pytest.raises(gingham.ShapeError, match=rf"expected {expected} bytes .*rank 0.* message of {sent} bytes"):
                        wait(e, e.post_recv(0, 2, torch.zeros(expected, dtype=torch.uint8)))
        # the lane goes on
        wait(e, e.post_send(1 - rank, 2, torch.ones(50)), e.post_recv(1 - rank, 2, torch.zeros(50)))
    return texts


@both
def test_a_message_of_another_size_is_an_error_with_both_sizes(ranks: Any, name: str) -> None:
    ranks(2)(wrong_size, name)


def killed(rank: int, name: str, computes: bool) -> tuple[float, str]:
    """Rank 1 dies; what rank 0 knows of it while it only receives, or does nothing at all; rank 2 is not concerned."""
    with engine(name, rank, 3) as e:
        if rank == 1:
            wait(e, e.post_send(0, 9, torch.zeros(1)), e.post_send(2, 9, torch.zeros(1)))
            time.sleep(0.1)
            os.kill(os.getpid(), 9)
        wait(e, e.post_recv(1, 9, torch.zeros(1)))
        ticket = e.post_recv(1, 5, torch.zeros(100))
        started = time.monotonic()
        while not e.failure(1) and time.monotonic() < started + 5:
            if computes:
                time.sleep(0.01)
            else:
                e.rest(0.5, e.changes)
        took = time.monotonic() - started
        with pytest.raises(gingham.PeerDied, match=f"rank {rank} waited for 400 bytes from rank 1 under tag 5") as caught:
            e.wait(ticket, 5)
        assert caught.value.rank == 1
        with pytest.raises(gingham.PeerDied, match="sending .* rank 1"):
            e.wait(e.post_send(1, 5, torch.zeros(100_000)), 5)
        other = 2 - rank
        assert not e.failure(other)
        wait(e, e.post_send(other, 5, torch.ones(MB)), e.post_recv(other, 5, torch.zeros(MB)))
        return took, e.failure(1)


@both
@pytest.mark.parametrize("computes", [False, True])
def test_a_killed_peer_is_named_while_this_rank_only_receives(ranks: Any, name: str, computes: bool) -> None:
    outcomes = ranks(3)(killed, name, computes, outcomes=True)
    assert isinstance(outcomes[1], RankError)
    for rank in (0, 2):
        assert not isinstance(outcomes[rank], RankError), outcomes[rank]
        took, text = outcomes[rank]
        assert took < 1.1 and "rank 1" in text and ("connection" in text), outcomes[rank]


def stopped(rank: int, name: str) -> int:
    """Rank 1 is stopped for 4.5 s with its sockets full: slow, but no failure."""
    with engine(name, rank, 2) as e:
        mine, other = torch.tensor([os.getpid()]), torch.zeros(1, dtype=torch.long)
        wait(e, e.post_send(1 - rank, 1, mine), e.post_recv(1 - rank, 1, other))
        count, size = 1200, 65536
        if rank == 1:
            for number in range(count):
                got = torch.zeros(size, dtype=torch.uint8)
                wait(e, e.post_recv(0, 2, got))
                assert got.eq(number % 251).all()
            return count
        os.kill(int(other), signal.SIGSTOP)
        try:
            tickets = [e.post_send(1, 2, torch.full((size,), number % 251, dtype=torch.uint8)) for number in range(count)]
            end = time.monotonic() + 4.5
            while time.monotonic() < end:
                e.rest(0.2, e.changes)
                assert not e.failure(1)
        finally:
            os.kill(int(other), signal.SIGCONT)
        wait(e, *tickets)
        return count


@both
def test_a_peer_that_is_stopped_for_a_while_is_no_failure(ranks: Any, name: str) -> None:
    assert ranks(2)(stopped, name) == [1200, 1200]


def in_turn(rank: int, name: str) -> tuple[str, bool]:
    """Rank 1 leaves at once after its last message; rank 0 reads that message later."""
    with engine(name, rank, 2) as e:
        if rank == 1:
            wait(e, e.post_send(0, 1, message(1, 0, 1, 0, 5000)), e.post_recv(0, 2, torch.zeros(4)))
            return "", True
        wait(e, e.post_send(1, 2, torch.zeros(4)))
        if name == "gloo":  # only read does such a message end for its sender
            got = torch.zeros(5000, dtype=torch.uint8)
            wait(e, e.post_recv(1, 1, got))
        end = time.monotonic() + 5
        while not e.left(1) and time.monotonic() < end:
            time.sleep(0.01)
        if name == "ucx":
            time.sleep(0.1)
            got = torch.zeros(5000, dtype=torch.uint8)
            wait(e, e.post_recv(1, 1, got))
        assert torch.equal(got, message(1, 0, 1, 0, 5000))
        with pytest.raises(gingham.PeerDied, match="rank 1 under tag 1, which has closed its engine in order"):
            e.wait(e.post_recv(1, 1, got), 5)
        return e.failure(1), e.left(1)


@both
def test_a_peer_that_leaves_in_order_is_no_failure(ranks: Any, name: str) -> None:
    for _ in range(5):
        assert ranks(2)(in_turn, name) == [("", True), ("", True)]


def withdrawn(rank: int, name: str) -> None:
    with engine(name, rank, 2) as e:
        for size in (16, MB):
            given_up = torch.zeros(size, dtype=torch.uint8)
            ticket = e.post_recv(1 - rank, 1, given_up)
            time.sleep(0.02)
            e.withdraw(ticket)
            with pytest.raises(gingham.MeshError, match="has ended already"):
                e.done(ticket)
            got = torch.zeros(size, dtype=torch.uint8)
            wait(e, e.post_send(1 - rank, 2, torch.zeros(1)), e.post_recv(1 - rank, 2, torch.zeros(1)))
            wait(e, e.post_send(1 - rank, 1, torch.ones(size, dtype=torch.uint8)), e.post_recv(1 - rank, 1, got))
            assert got.all() and not given_up.any()


@both
def test_a_withdrawn_receive_lets_the_next_have_the_message(ranks: Any, name: str) -> None:
    ranks(2)(withdrawn, name)


def withdrawn_send(rank: int, name: str) -> None:
    """Rank 1 receives nothing of what rank 0 withdraws, and goes on to serve it."""
    with engine(name, rank, 2) as e:
        for number, size in enumerate((100, 100_000, MB, 16 * MB)):
            if rank == 0:
                ticket = e.post_send(1, 2 * number, torch.ones(size, dtype=torch.uint8))
                time.sleep(0.02)
                started = time.monotonic()
                e.withdraw(ticket)
                assert time.monotonic() - started < 1 and not e.failure(1)
                wait(e, e.post_send(1, 2 * number + 1, message(0, 1, 3, number, size)))
            else:
                time.sleep(0.1)
                got = torch.zeros(size, dtype=torch.uint8)
                wait(e, e.post_recv(0, 2 * number + 1, got))
                assert torch.equal(got, message(0, 1, 3, number, size))


@both
def test_a_withdrawn_send_frees_its_memory(ranks: Any, name: str) -> None:
    ranks(2)(withdrawn_send, name)


def lives(rank: int, name: str, count: int) -> list[tuple[int, int]]:
    """Descriptors and threads after each life, whose last messages are read after their sender has left."""
    held = []
    for number in range(count):
        with engine(name, rank, 2) as e:
            got = torch.zeros(3000, dtype=torch.uint8)
            sent = e.post_send(1 - rank, 1, message(rank, 1 - rank, 1, number, 3000))
            if rank == number % 2:
                time.sleep(0.01)
            wait(e, e.post_recv(1 - rank, 1, got), sent)
            assert torch.equal(got, message(1 - rank, rank, 1, number, 3000)) and not e.failure(1 - rank)
        held.append((len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
    return held


@both
def test_lives_follow_each_other(ranks: Any, name: str) -> None:
    for held in ranks(2)(lives, name, 12):
        assert held[-1] == held[1], held


def two_threads(rank: int, name: str) -> None:
    """The caller's thread and a second one exchange messages on tags of their own, over the same engine."""
    with engine(name, rank, 2) as e:
        wrong: list[str] = []

        def work(tag: int) -> None:
            for number in range(60):
                size = (number * 4099 * (tag + 1)) % 100_000
                got = torch.zeros(size, dtype=torch.uint8)
                tickets = e.post_recv(1 - rank, tag, got), e.post_send(1 - rank, tag, message(rank, 1 - rank, tag, number, size))
                if not all(e.wait(ticket, 20) for ticket in tickets) or not torch.equal(got, message(1 - rank, rank, tag, number, size)):
                    wrong.append(f"tag {tag}, message {number}")
                    return

        thread = threading.Thread(target=work, args=(1,))
        thread.start()
        work(0)
        thread.join()
        assert not wrong, wrong


@both
def test_two_threads_share_an_engine(ranks: Any, name: str) -> None:
    ranks(2)(two_threads, name)


def misused(rank: int, name: str) -> None:
    with engine(name, rank, 2) as e:
        with pytest.raises(gingham.MeshError, match="rank 7 is no peer"):
            e.post_send(7, 0, torch.zeros(1))
        with pytest.raises(gingham.MeshError, match="tag 2147483648 of a message, expected below"):
            e.post_send(1 - rank, 2**31, torch.zeros(1))
        with pytest.raises(gingham.ShapeError, match="contiguous"):
            e.post_send(1 - rank, 0, torch.zeros(4, 4).t()[1:])
        with pytest.raises(gingham.MeshError, match="ticket 99999"):
            e.done(99999)


@both
def test_misuse_is_named(ranks: Any, name: str) -> None:
    ranks(2)(misused, name)
