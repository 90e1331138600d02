"""Waiting requests: their order, and those that leave before their turn."""

import random

import pytest

from folovllm.request import Request, SamplingParams
from folovllm.request_queue import RequestQueue


def request_at(*place: int) -> Request:
    return Request(
        request_id=str(place),
        prompt_token_ids=[1],
        sampling_params=SamplingParams(),
        place=(place[0], place[1]),
    )


def test_lowest_place_comes_first_whatever_the_order_of_pushing() -> None:
    queue = RequestQueue()
    requests = [request_at(1, 0), request_at(0, 3), request_at(0, 1), request_at(1, 2)]
    for request in requests:
        queue.push(request)
    assert queue.first is requests[2]
    assert [queue.pop() for _ in range(4)] == [requests[i] for i in (2, 1, 0, 3)]
    assert not queue


def test_removed_request_is_passed_over_and_counts_no_more() -> None:
    queue = RequestQueue()
    requests = [request_at(0, n) for n in range(5)]
    for request in requests:
        queue.push(request)
    queue.remove(requests[0])
    queue.remove(requests[2])
    queue.remove(requests[2])
    assert len(queue) == 3
    assert [queue.pop() for _ in range(3)] == [requests[i] for i in (1, 3, 4)]
    assert len(queue) == 0


def test_request_that_left_may_come_back_to_its_place() -> None:
    queue = RequestQueue()
    first, second = request_at(0, 0), request_at(0, 1)
    queue.push(first)
    queue.push(second)
    queue.remove(first)
    queue.push(first)
    assert [queue.pop(), queue.pop()] == [first, second]
    assert not queue


def test_nobody_is_first_in_an_empty_queue() -> None:
    queue = RequestQueue()
    queue.push(request_at(0, 0))
    queue.remove(request_at(0, 0))
    with pytest.raises(IndexError):
        _ = queue.first


def test_places_of_those_who_left_do_not_pile_up_behind_one_who_stays() -> None:
    queue = RequestQueue()
    queue.push(request_at(0, 0))
    for number in range(1, 1000):
        late = request_at(0, number)
        queue.push(late)
        queue.remove(late)
        assert len(queue._places) <= 2


def test_queue_agrees_with_a_sorted_list_under_random_use() -> None:
    rng = random.Random(0)
    queue, expected = RequestQueue(), []
    for number in range(5000):
        action = rng.choice(["push", "push", "pop", "remove", "remove"])
        if action == "push":
            expected.append(request_at(rng.randrange(3), number))
            queue.push(expected[-1])
        elif expected and action == "pop":
            expected.sort(key=lambda request: request.place)
            assert queue.first is expected[0]
            assert queue.pop() is expected.pop(0)
        elif expected:
            queue.remove(expected.pop(rng.randrange(len(expected))))
        assert len(queue) == len(expected)
        assert len(queue._places) <= 2 * len(expected)
