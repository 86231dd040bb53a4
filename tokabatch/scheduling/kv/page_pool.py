"""The pool of KV pages, with a reference count for each. It does not depend on slots and prompts, which hold the references."""

from __future__ import annotations

import numpy as np

from tokabatch.arrays import Int32

MANY = 16
"""From one reference dropped for so many pages on, a pass over all pages is faster than one over the references: samples that
share a long document drop thousands of references each."""


class PagePool:
    """A pool of page ids 0 .. num_pages - 1. A page is free exactly when there is no reference to it.

    Lowest ids are allocated first and freed ones are reused last-in first-out, so a small job touches a small part of the
    cache.
    """

    def __init__(self, num_pages: int) -> None:
        self.clears = False
        """Whether pages are cleared before they are used: some may hold values that are not finite, which no mask hides."""
        self.num_pages = self.num_free = 0
        self.resize(num_pages)

    def resize(self, num_pages: int) -> None:
        """Reset the pool to another number of pages; no page may be held."""
        assert not self.num_used, "pages are held"
        self.num_pages = self.num_free = num_pages
        self.references = np.zeros(num_pages, np.int32)
        self._free = np.arange(num_pages - 1, -1, -1, dtype=np.int32)
        self._to_clear: list[Int32] = []

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    def allocate(self, count: int) -> Int32:
        """Allocate `count` pages with one reference each, and return their ids. The caller has checked `num_free`."""
        assert count <= self.num_free, f"asked for {count}, {self.num_free} free"
        self.num_free -= count
        pages = self._free[self.num_free : self.num_free + count][::-1].copy()
        self.references[pages] = 1
        if self.clears:
            self._to_clear.append(pages)
        return pages

    def take_to_clear(self) -> Int32:
        """Return the pages allocated since the last call that the next step must clear before it uses them."""
        pages, self._to_clear = self._to_clear, []
        return np.concatenate(pages) if pages else np.zeros(0, np.int32)

    def retain(self, pages: Int32) -> None:
        """Add a reference to each page; the ids are distinct."""
        self.references[pages] += 1

    def free(self, pages: Int32) -> None:
        """Drop the only reference to each of these distinct pages."""
        self.references[pages] = 0
        self._push(pages)

    def release(self, pages: Int32) -> None:
        """Drop one reference for each entry; an id may occur several times, once for each reference dropped."""
        if (self.references[pages] == 1).all():
            # These are the only references, so no page occurs twice.
            self.free(pages)
            return
        if len(pages) < self.num_pages // MANY:
            np.subtract.at(self.references, pages, 1)
            self._push(np.unique(pages[self.references[pages] == 0]))
            return
        dropped = np.bincount(pages, minlength=self.num_pages)
        self.references -= dropped.astype(np.int32)
        self._push(np.flatnonzero((dropped > 0) & (self.references == 0)).astype(np.int32))

    def _push(self, pages: Int32) -> None:
        self._free[self.num_free : self.num_free + len(pages)] = pages[::-1]
        self.num_free += len(pages)

    def check_integrity(self, held: Int32) -> None:
        """Raise AssertionError if the counts differ from `held`, which lists every reference that a slot or a prompt holds."""
        expected = np.bincount(held, minlength=self.num_pages)
        assert np.array_equal(expected, self.references), "reference counts differ from the pages held"
        free = self._free[: self.num_free]
        assert len(np.unique(free)) == self.num_free, "a page is free twice"
        assert not self.references[free].any(), "a free page is referenced"
        assert self.num_free == int((self.references == 0).sum()), "an unreferenced page is not free"
