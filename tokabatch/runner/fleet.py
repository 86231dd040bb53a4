"""The members of a run and how work is divided between them; a run with one member is a fleet of one.

Main holds the plan and the only record of which member holds which samples (`Ledger`). A member reports when it has room for
more and is given a run of the plan, or samples that the member with the longest queue has not begun. The samples of a lost
member go to the others or to the process that replaces it. A member whose processes are lost again and again is dropped as
long as others are left. All samples of rows that are suspected of killing workers go to one member, so that no other worker
is lost to them.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from multiprocessing.connection import wait

import numpy as np

from tokabatch.arrays import Bool, Int32, Int64
from tokabatch.errors import EngineError, ReplicaLost, TokabatchError
from tokabatch.forecast.step_log import StepLog, Steps, by_time
from tokabatch.number_text import counted
from tokabatch.report.labels import behind_label
from tokabatch.report.summary import ReplicaShare
from tokabatch.runner.interruption import Interruption
from tokabatch.runner.ledger import Ledger, Part, to_give
from tokabatch.runner.member import STOP_SECONDS, Fork, Launch, Member
from tokabatch.runner.member_process import STANDING_SECONDS, Build
from tokabatch.runner.messages import Cancel, Ended, Finished, Given, Lengths, Message, Pace, Share, Suspects, Wants, Withdraw
from tokabatch.runner.replica import ReplicaCounts, Standing
from tokabatch.runner.row_stops import RowLimits
from tokabatch.runner.supply import Supply
from tokabatch.scheduling.completion_batch import Completions, PackedCompletions
from tokabatch.scheduling.contracts import Requests
from tokabatch.scheduling.counts import SchedulerCounts
from tokabatch.scheduling.scheduler import SchedulerLimits

TICK_SECONDS = 0.2
"""Seconds after which `run` yields even if no sample is finished."""
FEED_SECONDS = 0.1
"""Seconds between offers of work to members that requested more, in addition to whenever samples become free."""
TELL_SECONDS = 1.0
"""Seconds between messages that send members the lengths observed by others."""
MESSAGE_SECONDS = 2e-4
"""Main's time for a message in seconds. Members collect finished samples for that long times their number, so that main can
keep up."""
MOST_TOLD = 1 << 16
"""The most lengths sent at a time, to all members together; in a large fleet each member gets a part of them."""


class Fleet:
    """The members of a run, with the methods of `Replica`. `launch` starts a member's process; without it, main is forked and
    `leave` closes main's resources in the fork. `build` creates the replica in that process."""

    def __init__(
        self,
        requests: Requests,
        limits: SchedulerLimits,
        devices: Sequence[Sequence[str]],
        build: Build,
        *,
        stop: Interruption,
        tell: Callable[[str], None],
        max_restarts: int = 0,
        hang_seconds: float = math.inf,
        interval: float | None = None,
        leave: Callable[[], None] = lambda: None,
        supply: Supply | None = None,
        begun: Int64 | None = None,
        launch: Launch | None = None,
    ) -> None:
        """Create a member for each entry of `devices`, the names of its GPUs.

        A member is dropped after more than `max_restarts` of its processes in a row were lost without a finished sample. A
        process without a heartbeat for `hang_seconds` is killed; hanging steps are detected by the replica, which watches its
        worker. `interval` is the time in seconds between the standings of a single member; None requests only the first and the
        last. With a `supply`, only the samples of `requests` that it offers are computed, until it has ended. `begun` is the
        number of samples of each row that may begin before `follow` raises it, shape [rows]; None is all.
        """
        self._supply = supply
        self._ledger = Ledger(requests, begun, withheld=supply is not None)
        self._first_left = self._ledger.left
        self._build, self._launch = build, launch
        self._stop, self._tell, self._leave = stop, tell, leave
        self._max_restarts, self._hang_seconds = max_restarts, hang_seconds
        self._members = [Member(number, names, Standing.before(limits)) for number, names in enumerate(devices)]
        # Their standings show how many samples each member can give to others.
        standing = STANDING_SECONDS if len(self._members) > 1 else interval
        seconds = MESSAGE_SECONDS * len(self._members)
        self._pace = Pace(None if standing is None else max(standing, seconds), seconds, len(self._members) > 1)
        self._lengths: list[tuple[Int64, Int32, Bool]] = []
        """Samples since the last message about lengths: the member of each, its length, and whether it stopped by itself."""
        self._gathering: dict[int, int] = {}
        """For some prompts, the member that is to receive all their samples."""
        self._fed = self._told = 0.0
        self._began = self._ended = 0.0

    def run(self) -> Iterator[Completions]:
        """As `Replica.run`, with packed samples: those of several steps at once if there are many, and an empty batch from time
        to time if none is finished."""
        # Load no model before there is something to compute.
        while not self._ledger.left and self._goes_on():
            with self._stop.at_once():
                time.sleep(TICK_SECONDS)
        for member in self._members if self._ledger.left else ():
            self._start(member)
        looked = time.monotonic()
        while self._ledger.left or self._goes_on():
            with self._stop.at_once():
                ready = set(wait([member.pipe for member in self._members if member.pipe is not None], TICK_SECONDS))
            if self._supply is not None:
                self._supply.tick(self._ledger)
            # Limited, as main itself may have been suspended.
            passed, looked = min(time.monotonic() - looked, TICK_SECONDS), time.monotonic()
            completions, failure = PackedCompletions.of(()), None
            taken: list[tuple[int, PackedCompletions]] = []
            try:
                try:
                    for member in self._live():
                        try:
                            if member.pipe in ready and len(finished := self._take(member, member.receive())):
                                taken.append((member.number, finished))
                            elif (silent := member.pass_time(passed)) > self._hang_seconds:
                                member.kill()
                                raise ReplicaLost(f"the scheduler's process did not respond for {silent:.0f} s and was killed")
                        except ReplicaLost as fault:
                            self._replace(member, fault)
                finally:
                    completions = self._book(taken)
                self._feed()
            except TokabatchError as error:
                # Yield what the others have finished first.
                failure = error
            if completions or any(member.begun for member in self._members):
                yield completions
            if failure is not None:
                raise failure
        self._ended = time.monotonic()
        self.stop()

    def follow(self, changes: Sequence[RowLimits]) -> None:
        """Apply new limits to rows: begin no sample beyond them, and cancel the samples from a row's end on, running ones
        too."""
        ends: dict[int, list[tuple[int, int]]] = {}
        for change in changes:
            self._ledger.begin(change.row, change.begin)
            for number in self._ledger.cancel(change.row, change.end):
                ends.setdefault(number, []).append((change.row, change.end))
        begun = self._ledger.prompts([change.row for change in changes]).tolist() if self._gathering and changes else ()
        for number in {self._gathering[prompt] for prompt in begun if prompt in self._gathering}:
            self._gather(self._members[number])
        for number, pairs in ends.items():
            rows, first = zip(*pairs, strict=True)
            self._members[number].send(Cancel(np.array(rows, np.int64), np.array(first, np.int32)))
        if changes and self._ledger.has_free:
            self._fed = 0.0
            self._feed()

    def standing(self, *, foresee: bool = False) -> Standing:
        """Return the sum of the members' latest standings; `finished` counts the samples that have arrived or were
        cancelled."""
        standings = [member.standing for member in self._members]
        scheduled, counts = SchedulerCounts(), ReplicaCounts()
        for total, parts in ((scheduled, [s.scheduled for s in standings]), (counts, [s.counts for s in standings])):
            for field in fields(total):
                empty = Counter[str]() if field.name == "restarts" else 0
                setattr(total, field.name, sum((getattr(part, field.name) for part in parts), empty))
        scheduled.finished = self._first_left - self._ledger.left
        if self._supply is not None:
            # What is left grows with what it offers, and no rows stop.
            scheduled.finished = sum(member.finished for member in self._members)
        scheduled.finished_prompts = self._ledger.finished_prompts
        running = sum(standing.running for standing in standings)
        known, seen = [s.tokens_left for s in standings if s.tokens_left is not None], [s for s in standings if s.tokens_left]
        held = sum(standing.running + standing.waiting for standing in seen)
        return Standing(
            scheduled,
            counts,
            replace(standings[0].limits, num_pages=sum(standing.limits.num_pages for standing in standings)),
            running,
            max(0, self._ledger.left - running),
            sum(standing.used_pages for standing in standings),
            # Of samples that no member has yet as of those that they have.
            round(sum(known) * max(1.0, self._ledger.left / held)) if known and held else sum(known) if known else None,
        )

    def steps(self) -> Steps:
        """Return the finished steps of all members, ordered by each member's elapsed time; empty before the end."""
        nothing = StepLog().steps()
        return by_time([nothing if member.ended is None else member.ended.steps for member in self._members])

    def shares(self) -> tuple[ReplicaShare, ...]:
        """Return what each member did."""
        return tuple(member.share(self._began, self._ended) for member in self._members)

    def stop(self) -> PackedCompletions:
        """Stop the work and return the finished samples that were not yielded yet. A process that is still loading, or does not
        stop soon, is ended by `close`."""
        stopped = [PackedCompletions.of(())]
        self._ended = self._ended or time.monotonic()
        deadline = time.monotonic() + STOP_SECONDS
        waited = [member for member in self._live() if member.begun and member.ended is None]
        for member in waited:
            member.send(None)
        while waited and (ready := wait([m.pipe for m in waited if m.pipe], max(0.0, deadline - time.monotonic()))):
            for member in [member for member in waited if member.pipe in ready]:
                try:
                    message = member.receive()
                except ReplicaLost:
                    waited.remove(member)
                    continue
                if isinstance(message, Finished):
                    finished = self._take(member, message)
                    self._ledger.finish(member.number, finished)
                    stopped.append(finished)
                elif isinstance(message, Ended):
                    waited.remove(member)
                elif isinstance(message, str):
                    self._say(member, message)
        return PackedCompletions.joined(stopped)

    def close(self) -> None:
        """End the processes and their workers."""
        for member in self._members:
            member.hang_up()
        for member in self._members:
            member.close()

    def _goes_on(self) -> bool:
        """Return whether more samples may still be offered although none is left now."""
        if self._supply is None:
            return False
        self._supply.tick(self._ledger)
        return self._supply.more(self._ledger) or not self._supply.ended

    def _live(self) -> list[Member]:
        return [member for member in self._members if member.pipe is not None]

    def _start(self, member: Member) -> None:
        """Start a process for a member, with its first run. A launched process may be pending at first; it gets its work once
        it runs."""
        if self._launch is not None:
            member.begin(self._launch(member.number, self._build, self._ledger, member.before, self._pace))
            return
        run = self._next_run(member, self._num_sharing()) or Part.joined([])

        def leave() -> None:
            for each in self._members:
                if each.pipe is not None:
                    each.pipe.close()
            self._leave()

        member.begin(Fork(member, self._build, run, self._ledger, self._pace, leave))

    def _num_sharing(self) -> int:
        """Return the number of members between which the work is divided."""
        # A process may be pending for long: no work is reserved for it.
        return sum(not each.given_up and (each.placed or self._launch is None) for each in self._members)

    def _next_run(self, member: Member, sharing: int) -> Part | None:
        return self._ledger.next_run(member.number, sharing, whole=sharing == 1)

    def _take(self, member: Member, message: Message | None) -> PackedCompletions:
        """Process a message of a member and return its finished samples, which are still to be booked."""
        if isinstance(message, str):
            self._say(member, message)
        elif isinstance(message, Finished):
            assert isinstance(message.completions, PackedCompletions), "they come so from another process"
            self._began = self._began or time.monotonic()
            self._ledger.note_headway(member.number, message.headway)
            member.finished += len(message.completions)
            if message.completions:
                member.barren = 0
            return message.completions
        elif isinstance(message, Wants):
            # Otherwise a part is on its way.
            if message.parts == member.parts:
                member.wants, self._fed = message.waiting, 0.0
        elif isinstance(message, Given):
            if isinstance(member.unanswered.popleft(), Share):
                member.can_give = len(message.part) > 0
            self._ledger.give_back(member.number, message.part)
            self._fed = 0.0
            for number in {self._gathering[p] for p in message.part.prompts.tolist() if p in self._gathering}:
                self._gather(self._members[number])
        elif isinstance(message, Suspects):
            self._gathering = {prompt: number for prompt, number in self._gathering.items() if number != member.number}
            prompts = self._ledger.prompts(message.rows).tolist()
            self._gathering |= {prompt: member.number for prompt in prompts if prompt not in self._gathering}
            self._gather(member)
        elif isinstance(message, Ended):
            if not isinstance(message.error, EngineError):
                raise message.error or EngineError(
                    "a replica ended before its work was done; please report this with the job file"
                )
            if len(self._live()) == 1:
                raise message.error
            member.barren = self._max_restarts
            self._replace(member, message.error)
        return PackedCompletions.of(())

    def _book(self, taken: Sequence[tuple[int, PackedCompletions]]) -> PackedCompletions:
        """Record the samples that these members, given by number, have finished, and return all of them."""
        if not taken:
            return PackedCompletions.of(())
        completions = PackedCompletions.joined([each for _, each in taken])
        number = np.repeat(np.array([number for number, _ in taken], np.int64), [len(each) for _, each in taken])
        self._ledger.finish(number, completions)
        good = ~completions.failed
        self._lengths.append((number[good], completions.num_tokens[good], completions.stopped[good]))
        return completions

    def _feed(self) -> None:
        """Give free samples to the members that requested more, or request some from the members that hold the most."""
        now, live = time.monotonic(), self._live()
        if now - self._told > TELL_SECONDS:
            self._told = now
            self._tell_lengths(live)
        hungry = sorted((member for member in live if member.wants is not None), key=lambda member: member.wants or 0)
        if not hungry or now - self._fed < FEED_SECONDS:
            return
        self._fed, sharing = now, self._num_sharing()
        starved: list[Member] = []
        for member in hungry:
            if self._supply is not None and not self._ledger.has_free:
                self._supply.more(self._ledger)
            run = self._next_run(member, sharing)
            if run is not None:
                member.send(run)
            else:
                starved.append(member)
        starved = starved[sum(bool(each.unanswered) for each in live) :]
        if not starved or self._ledger.has_free:
            return
        # The member with the most to spare gives to the one with the least, the next to the next, and so on.
        trying, work = set(self._gathering.values()), self._ledger.work
        least = work(starved[0].number)
        givers = [each for each in live if each.begun and each.can_give and not each.unanswered and each.number not in trying]
        givers.sort(key=lambda each: to_give(work(each.number), each.standing.waiting, least), reverse=True)
        for member, giver in zip(starved, givers, strict=False):
            own = work(member.number)
            if giver is member or not to_give(work(giver.number), giver.standing.waiting, own):
                break
            giver.send(Share(own))

    def _tell_lengths(self, live: Sequence[Member]) -> None:
        """Send each member the lengths that others observed since the last time."""
        news, self._lengths = self._lengths, []
        if not news or len(live) == 1:
            return
        number, length, stopped = (np.concatenate(column) for column in zip(*news, strict=True))
        told = np.linspace(0, len(number) - 1, min(len(number), MOST_TOLD // len(live))).astype(np.int64)
        number, length, stopped = number[told], length[told], stopped[told]
        for member in live:
            others = number != member.number
            if member.begun and others.any():
                member.send(Lengths(length[others], stopped[others]))

    def _gather(self, member: Member) -> None:
        """Assign all samples of the rows that a member suspects to it, after the others have given them back."""
        prompts = np.array(sorted(prompt for prompt, number in self._gathering.items() if number == member.number), np.int32)
        if not len(prompts):
            return
        free, holders = self._ledger.others(member.number, prompts)
        rows = self._ledger.plan.row_index[prompts]
        for holder in [self._members[number] for number in holders.tolist()]:
            if not any(isinstance(order, Withdraw) and np.isin(rows, order.rows).all() for order in holder.unanswered):
                holder.send(Withdraw(rows))
        if len(free) and member.pipe is not None:
            self._ledger.take_over(member.number, free)
            member.send(free)

    def _replace(self, member: Member, fault: EngineError) -> None:
        """Start a process in place of a lost one, or drop the member. Raises EngineError if no member is left."""
        member.close()
        member.standing = replace(member.standing, running=0, waiting=0, used_pages=0, tokens_left=None)
        self._ledger.give_back(member.number)
        member.barren += 1
        member.standing.counts.restarts["scheduler"] += 1
        self._gathering = {prompt: number for prompt, number in self._gathering.items() if number != member.number}
        for number in set(self._gathering.values()):
            # Before other members can get the lost one's samples of suspected rows.
            self._gather(self._members[number])
        if member.barren <= self._max_restarts:
            self._say(member, f"warning: {fault}. Starting another; what was under way is computed again")
            self._start(member)
            return
        member.given_up = True
        if not self._live():
            raise EngineError(f"{fault}; giving up (engine.max_restarts). What is finished is committed.") from fault
        self._say(
            member, f"warning: {fault}; the run continues with {len(self._live())} of {counted(len(self._members), 'replica')}"
        )

    def _say(self, member: Member, text: str) -> None:
        self._tell(text if len(self._members) == 1 else behind_label(text, f"replica {member.number}:"))
