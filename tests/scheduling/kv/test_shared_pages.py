"""The arrays of neighbours against sorted texts, whose common prefixes they must track as prompts come and go."""

from __future__ import annotations

from itertools import pairwise, takewhile

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tokabatch.scheduling.kv.shared_pages import SharedPages


def lcp(left: str, right: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


def check(found: SharedPages, texts: list[str], there: set[int], chosen: list[int]) -> None:
    order = sorted(there)
    between = [lcp(texts[a], texts[b]) for a, b in pairwise(order)]
    assert found.requests.tolist() == order and len(found) == len(order)
    assert found.sizes.tolist() == [len(texts[request]) for request in order]
    assert found.shared.tolist() == ([0, *between] if order else [])
    behind = [*between, 0][: len(order)]
    assert found.attributed().tolist() == [len(texts[r]) - shared for r, shared in zip(order, behind, strict=True)]
    some = [request for request in order if request in chosen]
    expected = [0, *(lcp(texts[a], texts[b]) for a, b in pairwise(some))] if some else []
    assert found.shared_between(np.array(some, np.int32)).tolist() == expected
    assert found.any_shared(2) == any(pages >= 2 for pages in between)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.lists(st.text("ab", max_size=5), min_size=1, max_size=30).map(sorted))
def test_whoever_comes_and_goes(data: st.DataObject, texts: list[str]) -> None:
    found, there, next_one = SharedPages(), set[int](), 0
    indices = st.lists(st.integers(0, len(texts) - 1), unique=True)
    for _ in range(8):
        count = data.draw(st.integers(0, len(texts) - next_one))
        if count:
            new = list(range(next_one, next_one + count))
            shared = [
                lcp(texts[max(there)], texts[new[0]]) if there else 0,
                *(lcp(texts[a], texts[b]) for a, b in pairwise(new)),
            ]
            found.append(new, [len(texts[request]) for request in new], np.array(shared, np.int32))
            there.update(new)
            next_one += count
        gone = [request for request in data.draw(indices) if request in there]
        if gone:
            found.remove(sorted(gone))
            there.difference_update(gone)
        for request in data.draw(indices):
            if request < next_one and request not in there:
                before, after = found.around(request)
                shared, shared_after = (0 if other is None else lcp(texts[other], texts[request]) for other in (before, after))
                found.insert(request, len(texts[request]), shared, shared_after)
                there.add(request)
        check(found, texts, there, data.draw(indices))


def test_one_that_is_cut_shares_no_more_than_it_has() -> None:
    found = SharedPages()
    found.append([3, 4, 9], [5, 6, 7], np.array([0, 4, 5], np.int32))
    found.cut(4, 2)
    assert found.sizes.tolist() == [5, 2, 7] and found.shared.tolist() == [0, 2, 2]
    found.cut(9, 1)
    assert found.sizes.tolist() == [5, 2, 1] and found.shared.tolist() == [0, 2, 1]
