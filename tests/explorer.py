"""Every interleaving of the turn protocols, with crashes: small models whose rules are the package's own functions.

A state holds what is in shared memory, how far every process has got, and what each keeps in its registers. `explore`
walks through all states that any scheduling can reach. What must hold in every state is checked where it could break,
and the breach is a sentence in `errors`; a state in which nobody can move is either a proper end or a deadlock.

Each float vector is stood for by its history: one half of a block is the string of the visits that were added to it, so
a lost, doubled or misplaced update shows. Blocks have two halves, so that a worker can die in the middle of one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, Protocol

from easgd_local import free_turns, turns
from easgd_local.referee import NEVER, Referee
from easgd_local.rules.sgd import SGD
from easgd_local.schedules import Calendar

LIMIT = 2_000_000  # states; nothing here needs a tenth of it


class Explored(NamedTuple):
    """What `explore` met: the breaches, the states in which everybody was done, and the way to the first breach."""

    errors: set[str]
    endings: list[Any]
    trail: list[Any]

    def story(self) -> str:
        """What changes along the trail, step by step."""
        lines = [", ".join(sorted(self.errors))]
        for before, after in pairwise(self.trail):
            changed = [name for name in after._fields if getattr(before, name) != getattr(after, name)]
            lines.append("; ".join(f"{name} {getattr(after, name)}" for name in changed))
        return "\n".join(lines)


class Model(Protocol):
    """Processes that share memory."""

    errors: set[str]

    def initial(self) -> Hashable: ...
    def steps(self, state: Any) -> Iterator[Hashable]: ...
    def accidents(self, state: Any) -> Iterator[Hashable]: ...
    def is_done(self, state: Any) -> bool: ...


def explore(model: Model, enough: Callable[[set[str]], bool] = bool) -> Explored:
    """All states that `model` can reach. Steps may happen at any time; accidents too, but nobody may rely on them.

    Stops when the breaches met so far are `enough`: at the first, unless told otherwise.
    """
    came_from: dict[Any, Any] = {model.initial(): None}
    waiting, endings, breach = list(came_from), [], None
    while waiting and not enough(model.errors):
        state = waiting.pop()
        following = list(model.steps(state))
        if not following:
            if model.is_done(state):
                endings.append(state)
            else:
                model.errors.add("deadlock")
        for one in (*following, *model.accidents(state)):
            if one not in came_from:
                came_from[one] = state
                waiting.append(one)
        if model.errors and breach is None:
            breach = state
        assert len(came_from) < LIMIT, f"more than {LIMIT} states"
    return Explored(model.errors, endings, list(trail(came_from, breach))[::-1])


def trail(came_from: dict[Any, Any], state: Any) -> Iterator[Any]:
    """The state, the one before it, and so on."""
    while state is not None:
        yield state
        state = came_from[state]


def everything(errors: set[str]) -> bool:
    """For `explore`: nothing is enough."""
    return False


def put(row: tuple, index: int, value: Any) -> tuple:
    """The row with another value at one place."""
    return (*row[:index], value, *row[index + 1 :])


def quick(kind: type) -> type:
    """The named tuple with a `_replace` that takes a third of the time, as exploring does little else."""
    places = {name: place for place, name in enumerate(kind._fields)}

    def replaced(state: Any, **new: Any) -> Any:
        values = list(state)
        for name, value in new.items():
            values[places[name]] = value
        return tuple.__new__(kind, values)

    kind._replace = replaced
    return kind


def never(round: int) -> bool:
    """A calendar without snapshots."""
    return False


# The strict order


class Op(NamedTuple):
    """One step of a worker's program: `kind` says what it does with the block, `turn` is the visit's number there."""

    kind: str
    block: int  # or the worker that announces, or that is met
    turn: int  # with p turns of a block in each round


LAST = ("withdraw", "close 0", "close 1", "await taken", "copy 0", "copy 1")  # only the last visitor of a round


@quick
class StrictState(NamedTuple):
    """One moment under strict turns. Rows have one entry for each worker, or for each (half of a) block."""

    turn: tuple[int, ...]
    c: tuple[bytes, ...]  # half h of block b is number 2b + h: the visits added to it, in order
    snapshot: tuple[bytes, ...]
    taken: int
    at: tuple[int, ...]  # the next operation of each worker
    read: tuple[tuple[bytes, bytes] | None, ...]  # what each has read of the block that it is in
    dead: tuple[bool, ...]
    gone: tuple[int, ...]  # what the launcher believes: the first round that waits for this worker
    launcher: tuple[Any, ...]  # what it is in the middle of
    reader: tuple[int, int]  # which snapshot is read next, and which of its blocks
    crashes: int  # that may still happen
    readmissions: int
    first_life: tuple[int, ...]  # operations before the death of a worker whose rank was readmitted
    start: tuple[int, ...]  # the operation with which the present life of each rank begins


@dataclass
class Strict:
    """p workers, G blocks, so many rounds; a launcher that reaps, passes turns and readmits; a reader of snapshots.

    The fields from `position` on are the protocol. Their defaults are the real one, other values are known to be wrong.
    """

    order: ClassVar[str] = "strict"

    workers: int
    blocks: int
    rounds: int
    crashes: int = 0
    mortal: Collection[int] | None = None  # who may crash, None for everybody; ranks are alike up to a rotation
    readmissions: int = 0
    stops: dict[int, int] = field(default_factory=dict)  # worker: after how many rounds it has finished
    calendar: Calendar | None = None  # with τ = 1, so that rounds and steps are the same
    position: Callable[..., int] = turns.position
    walk: Callable[..., list[int]] = turns.walk
    owner: Callable[..., int] = turns.owner
    visit: Sequence[str] = ("enter", "read", "write 0", "write 1", "await taken", "copy 0", "copy 1", "leave")
    supervisor: str = "reaps"  # or "times out", or "sleeps"
    readmits_early: int = 0  # rounds
    launcher_copies: bool = True

    def __post_init__(self) -> None:
        self.errors: set[str] = set()
        self.snapshot_after = self.calendar.snapshot_after if self.calendar else never
        self.snapshots = [k for k in range(self.rounds) if self.snapshot_after(k)]
        self.programs = [self._program(rank) for rank in range(self.workers)]
        self.ends = [self._first_op(rank, self.stops.get(rank, self.rounds)) for rank in range(self.workers)]
        self._turns_to_pass = lru_cache(None)(self._turns_to_pass)
        self._first_waiting = lru_cache(None)(self._first_waiting)

    def initial(self) -> StrictState:
        p, G = self.workers, self.blocks
        return StrictState(
            turn=(0,) * G, c=(b"",) * 2 * G, snapshot=(b"",) * 2 * G, taken=0, at=(0,) * p, read=(None,) * p,
            dead=(False,) * p, gone=(0,) * p, launcher=(), reader=(0, 0), crashes=self.crashes,
            readmissions=self.readmissions, first_life=(0,) * p, start=(0,) * p,
        )  # fmt: skip

    def steps(self, state: StrictState) -> Iterator[StrictState]:
        for rank in range(self.workers):
            if not state.dead[rank] and state.at[rank] < self.ends[rank]:
                yield from self._work(state, rank)
        yield from self._launch(state)
        yield from self._read_snapshots(state)

    def accidents(self, state: StrictState) -> Iterator[StrictState]:
        for rank in range(self.workers):
            alive = not state.dead[rank] and state.at[rank] < self.ends[rank]
            if alive and state.crashes and (self.mortal is None or rank in self.mortal):
                yield self._die(state._replace(dead=put(state.dead, rank, True), crashes=state.crashes - 1), rank)
            if alive and self.supervisor == "times out" and NEVER not in state.gone:
                yield state._replace(gone=put(state.gone, rank, NEVER))

    def is_done(self, state: StrictState) -> bool:
        """Everybody has finished or died; unless all are gone, every turn has been made and every snapshot taken."""
        for rank in range(self.workers):
            if not state.dead[rank] and state.at[rank] < self.ends[rank]:
                return False
        somebody_left = min(state.gone) < NEVER
        if somebody_left and (min(state.turn) < self.rounds * self.workers or state.reader[0] < len(self.snapshots)):
            return False
        self._check_center(state)
        return True

    def _check_center(self, state: Any) -> None:
        if state.c != self.expected(state):
            self.errors.add("the center is not what the visits make of it")

    def expected(self, state: StrictState) -> tuple[bytes, ...]:
        """The center after the visits that were made, in the fixed cyclic order of each block."""
        halves: list[list[tuple[int, int]]] = [[] for _ in range(2 * self.blocks)]
        for rank, op in self._made(state):
            if op.kind.startswith("write"):
                halves[2 * op.block + int(op.kind[-1])].append((op.turn, self._mark(rank, op)))
        return tuple(bytes(mark for _, mark in sorted(half)) for half in halves)

    def _made(self, state: Any) -> Iterator[tuple[int, Op]]:
        """The operations that were made, by whom."""
        for rank, program in enumerate(self.programs):
            for number, op in enumerate(program):
                if number < state.first_life[rank] or state.start[rank] <= number < state.at[rank]:
                    yield rank, op

    # The workers

    def _program(self, rank: int) -> list[Op]:
        ops = []
        for k in range(self.rounds):
            for b in self.walk(rank, self.workers, self.blocks):
                place = self.position(b, rank, self.workers, self.blocks)
                copies = self.snapshot_after(k) and place == self.workers - 1
                ops += [Op(kind, b, k * self.workers + place) for kind in self.visit if copies or kind not in LAST]
        return ops

    def _first_op(self, rank: int, round: int) -> int:
        """The number of the first operation of the round."""
        before = (op for op in self.programs[rank] if op.turn // self.workers < round)
        return sum(1 for _ in before)

    def _mark(self, rank: int, op: Op) -> int:
        return op.turn // self.workers * self.marks + rank

    @property
    def marks(self) -> int:
        """How many kinds of marks a round can leave."""
        return self.workers

    def _die(self, state: Any, rank: int) -> Any:
        return state._replace(read=put(state.read, rank, None))

    def _work(self, state: StrictState, rank: int) -> Iterator[StrictState]:
        op = self.programs[rank][state.at[rank]]
        on = state._replace(at=put(state.at, rank, state.at[rank] + 1))
        match op.kind:
            case "enter":
                if state.turn[op.block] >= op.turn:
                    self._check_entry(state, rank, op)
                    yield on
            case "read":
                yield on._replace(read=put(state.read, rank, state.c[2 * op.block : 2 * op.block + 2]))
            case "write 0" | "write 1":
                yield self._write(state, on, rank, op)
            case "await taken":
                if self._may_copy(state, op.turn):
                    yield on
            case "copy 0" | "copy 1":
                place = 2 * op.block + int(op.kind[-1])
                yield on._replace(snapshot=put(state.snapshot, place, state.c[place]))
            case "leave":
                if state.turn[op.block] > op.turn + 1:
                    self.errors.add("a turn word goes backward")
                yield on._replace(turn=put(state.turn, op.block, op.turn + 1))

    def _check_entry(self, state: StrictState, rank: int, op: Op) -> None:
        if state.turn[op.block] > op.turn:
            self.errors.add("a worker finds its turn passed")
        for other in range(self.workers):
            if other != rank and not state.dead[other] and state.at[other] < self.ends[other]:
                theirs = self.programs[other][state.at[other]]
                if theirs.block == op.block and theirs.kind in self.visit[1:]:
                    self.errors.add("two workers in one block")

    def _write(self, state: StrictState, on: StrictState, rank: int, op: Op) -> StrictState:
        half = int(op.kind[-1])
        read, place = state.read[rank], 2 * op.block + half
        assert read is not None
        if state.c[place] != read[half]:
            self.errors.add("an update is lost")
        value = read[half] + bytes([self._mark(rank, op)])
        return on._replace(c=put(state.c, place, value), read=put(state.read, rank, None if half else read))

    def _may_copy(self, state: StrictState, turn: int) -> bool:
        assert self.calendar
        earlier = self.calendar.previous_snapshot(turn // self.workers)
        return earlier is None or state.taken > earlier

    # The launcher

    def _launch(self, state: StrictState) -> Iterator[StrictState]:
        match state.launcher:
            case ("copy", half, block, turn):
                place = 2 * block + half
                next_one = ("copy", 1, block, turn) if half == 0 else ("pass", block, turn)
                yield state._replace(snapshot=put(state.snapshot, place, state.c[place]), launcher=next_one)
            case ("pass", block, turn):
                yield self._pass(state, block, turn)
            case ("readmit", rank, *words):
                yield self._readmit(state, rank, words)
            case ():
                yield from self._begin(state)

    def _begin(self, state: StrictState) -> Iterator[StrictState]:
        if self.supervisor == "sleeps":
            return
        for rank in range(self.workers):
            finished = state.at[rank] == self.ends[rank] and rank in self.stops
            if (state.dead[rank] or finished) and state.gone[rank] != NEVER:
                yield self._retire(state, rank)
            elif state.dead[rank] and state.readmissions:
                yield state._replace(launcher=("readmit", rank), readmissions=state.readmissions - 1)
        for block, turn in self._turns_to_pass(state.turn, state.gone):
            copies = self._is_last(turn) and self.snapshot_after(turn // self.workers) and self.launcher_copies
            if not copies or self._may_copy(state, turn):
                yield self._begin_to_pass(state, block, turn, copies)

    def _retire(self, state: Any, rank: int) -> Any:
        return state._replace(gone=put(state.gone, rank, NEVER))

    def _begin_to_pass(self, state: Any, block: int, turn: int, copies: bool) -> Any:
        return state._replace(launcher=("copy", 0, block, turn)) if copies else self._pass(state, block, turn)

    def _is_last(self, turn: int) -> bool:
        return turn % self.workers == self.workers - 1

    def _turns_to_pass(self, turn: tuple[int, ...], gone: tuple[int, ...]) -> list[tuple[int, int]]:
        """The first turn that each block can be passed now: any of them may be next, whatever the order of the list."""
        if not any(gone):
            return []
        believed = {rank: first for rank, first in enumerate(gone) if first}
        answer = turns.pass_turns(list(turn), believed, self.workers, self.blocks, self.owner)
        return [(b, s) for b, s in answer if s == turn[b] and s < self.rounds * self.workers]

    def _pass(self, state: StrictState, block: int, turn: int) -> StrictState:
        if state.turn[block] != turn:
            self.errors.add("a turn word goes backward")
        return state._replace(turn=put(state.turn, block, turn + 1), launcher=())

    def _readmit(self, state: StrictState, rank: int, words: list[int]) -> StrictState:
        """Looks at one turn word after another; then the rank has a new worker, which begins with the round given."""
        if len(words) < self.blocks:
            return state._replace(launcher=("readmit", rank, *words, state.turn[len(words)]))
        first = self._first_waiting(rank, tuple(words)) - self.readmits_early
        start = self._joins_at(rank, first)
        return state._replace(
            launcher=(), gone=put(state.gone, rank, first), dead=put(state.dead, rank, False),
            first_life=put(state.first_life, rank, state.at[rank]), at=put(state.at, rank, start),
            start=put(state.start, rank, start),
        )  # fmt: skip

    def _joins_at(self, rank: int, round: int) -> int:
        """The operation with which a new worker begins whose first round is this."""
        return self._first_op(rank, round)

    def _first_waiting(self, rank: int, words: tuple[int, ...]) -> int:
        layout = SimpleNamespace(workers=self.workers, blocks=self.blocks)
        center: Any = SimpleNamespace(turn=list(words), read=[0] * self.workers, layout=layout, vectors={})
        referee = Referee(center, self.calendar or Calendar(1, self.rounds), SGD(), self.order)
        referee.retire(rank)
        return referee.readmit(rank)

    # The reader of snapshots

    def _read_snapshots(self, state: StrictState) -> Iterator[StrictState]:
        number, block = state.reader
        if number == len(self.snapshots):
            return
        round = self.snapshots[number]
        if min(state.turn) < (round + 1) * self.workers:
            return
        for place in (2 * block, 2 * block + 1):
            after_round = bytes(mark for mark in state.c[place] if mark // self.marks <= round)
            if state.snapshot[place] != after_round:
                self.errors.add("a snapshot is not the center after its round")
        if block + 1 < self.blocks:
            yield state._replace(reader=(number, block + 1))
        else:
            yield state._replace(reader=(number + 1, 0), taken=round + 1)


# The rendezvous


@quick
class TogetherState(NamedTuple):
    """One moment in a rendezvous: as under strict turns, and the words that only a rendezvous looks at."""

    turn: tuple[int, ...]
    visited: tuple[int, ...]
    has_read: tuple[int, ...]  # the words `read` of the center
    c: tuple[bytes, ...]
    snapshot: tuple[bytes, ...]
    taken: int
    at: tuple[int, ...]
    dead: tuple[bool, ...]
    gone: tuple[int, ...]
    launcher: tuple[Any, ...]
    reader: tuple[int, int]
    crashes: int
    readmissions: int
    first_life: tuple[int, ...]
    start: tuple[int, ...]


@dataclass
class Together(Strict):
    """As `Strict`, but all read the center before anybody moves it, and each round of a block is closed.

    In its rounds a worker reads every block, meets the others, and visits every block; after its last it reads once
    more, as rules do that go on from the new center. A worker that finishes early leaves after such a reading. A
    readmitted one begins with a visit, without a reading, as `Worker.join` does.

    A close leaves the mark p of its round, so that the history of every block must be sorted.
    """

    order: ClassVar[str] = "together"

    owner: Callable[..., int] = turns.by_rank
    visit: Sequence[str] = (
        "enter", "write 0", "write 1", "visited", "withdraw", "close 0", "close 1", "await taken", "copy 0", "copy 1",
        "leave",
    )  # fmt: skip
    meets: bool = True
    reads: str = "after the round before"  # or "at once"
    retires_readers: bool = True
    launcher_closes: str = "visited"  # rounds; or "every", or "no"

    def initial(self) -> Any:
        p, G = self.workers, self.blocks
        return TogetherState(
            turn=(0,) * G, visited=(0,) * G, has_read=(0,) * p, c=(b"",) * 2 * G, snapshot=(b"",) * 2 * G, taken=0,
            at=(0,) * p, dead=(False,) * p, gone=(0,) * p, launcher=(), reader=(0, 0), crashes=self.crashes,
            readmissions=self.readmissions, first_life=(0,) * p, start=(0,) * p,
        )  # fmt: skip

    def _check_center(self, state: TogetherState) -> None:
        """Every block has seen the visits that were made, in the order of ranks, and a close of each round to which
        somebody came, if its last visitor did not die in the close."""
        writes: list[set[int]] = [set() for _ in range(2 * self.blocks)]
        came = set()
        for rank, op in self._made(state):
            if op.kind.startswith("write"):
                writes[2 * op.block + int(op.kind[-1])].add(self._mark(rank, op))
            elif op.kind == "visited" and self._is_over(state, op.block, op.turn // self.workers):
                came.add((op.block, op.turn // self.workers))
        for place, half in enumerate(state.c):
            visits = {mark for mark in half if mark % self.marks < self.workers}
            if visits != writes[place] or list(half) != sorted(half):
                self.errors.add("the center is not what the visits make of it")
        for block, round in came.difference(self._torn(state)):
            if not all(round * self.marks + self.workers in half for half in state.c[2 * block : 2 * block + 2]):
                self.errors.add("a round to which somebody came is not closed")

    def _torn(self, state: TogetherState) -> Iterator[tuple[int, int]]:
        """(block, round) whose last visitor died between its own visit and the end of the close."""
        for number in (state.first_life[-1], *([state.at[-1]] if state.dead[-1] else [])):
            op = self.programs[-1][number]
            if op.kind in self.visit[self.visit.index("visited") + 1 :]:
                yield op.block, op.turn // self.workers

    def _is_over(self, state: TogetherState, block: int, round: int) -> bool:
        return state.turn[block] >= (round + 1) * self.workers

    # The workers

    def _program(self, rank: int) -> list[Op]:
        ops, p = [], self.workers
        for k in range(self.rounds):
            ops += [Op("read center", b, k * p) for b in range(self.blocks)] + [Op("announce", rank, k * p)]
            ops += [Op("meet", other, k * p) for other in range(p) if self.meets]
            for b in range(self.blocks):
                ops += [Op(kind, b, k * p + rank) for kind in self.visit if self._does(rank, k, kind)]
        return ops + [Op("read center", b, self.rounds * p) for b in range(self.blocks)]

    def _does(self, rank: int, round: int, kind: str) -> bool:
        last = rank == self.workers - 1
        always = kind in ("withdraw", "close 0", "close 1")
        return kind not in LAST or (last and (always or self.snapshot_after(round)))

    def _first_op(self, rank: int, round: int) -> int:
        """The end of the reading with which a round begins."""
        first = (round * self.workers, "announce")
        program = self.programs[rank]
        return next((n for n, op in enumerate(program) if (op.turn, op.kind) == first), len(program))

    @property
    def marks(self) -> int:
        return self.workers + 1

    def _die(self, state: Any, rank: int) -> Any:
        return state

    def _work(self, state: Any, rank: int) -> Iterator[Any]:
        op = self.programs[rank][state.at[rank]]
        on = state._replace(at=put(state.at, rank, state.at[rank] + 1))
        match op.kind:
            case "read center":
                if state.turn[op.block] >= op.turn or self.reads == "at once":
                    self._check_reading(state, op)
                    yield on
            case "announce":
                yield on._replace(has_read=put(state.has_read, rank, op.turn // self.workers + 1))
            case "meet":
                if state.has_read[op.block] > op.turn // self.workers:
                    yield on
            case "write 0" | "write 1":
                self._check_writing(state, rank, op)
                place = 2 * op.block + int(op.kind[-1])
                yield on._replace(c=put(state.c, place, state.c[place] + bytes([self._mark(rank, op)])))
            case "visited":
                yield on._replace(visited=put(state.visited, op.block, op.turn // self.workers + 1))
            case "withdraw":
                yield on._replace(visited=put(state.visited, op.block, 0))
            case "close 0" | "close 1":
                self._check_turn(state, op)
                yield self._close(on, 2 * op.block + int(op.kind[-1]), op.turn)
            case _:
                yield from super()._work(state, rank)

    def _check_reading(self, state: TogetherState, op: Op) -> None:
        """What is read is the center after the round before: a function of the history, hence the same for all."""
        round = op.turn // self.workers
        if any(mark // self.marks >= round for half in state.c[2 * op.block : 2 * op.block + 2] for mark in half):
            self.errors.add("a block is read after somebody's visit")
        if not self._is_over(state, op.block, round - 1):
            self.errors.add("a block is read before the end of the round before")

    def _check_writing(self, state: TogetherState, rank: int, op: Op) -> None:
        self._check_turn(state, op)
        round = op.turn // self.workers
        for other in range(self.workers):
            if other != rank and not state.dead[other] and state.at[other] < self.ends[other]:
                theirs = self.programs[other][state.at[other]]
                now = theirs.turn // self.workers
                if now < round or (now == round and theirs.kind == "read center" and theirs.block <= op.block):
                    self.errors.add("a block is written before everybody has read it")

    def _check_turn(self, state: TogetherState, op: Op) -> None:
        """As nobody moves a block in another turn, all who read it between two rounds read the same."""
        if state.turn[op.block] != op.turn:
            self.errors.add("a block is moved in another turn")

    def _close(self, state: Any, place: int, turn: int) -> Any:
        round = turn // self.workers
        if not any(mark // self.marks == round for mark in state.c[place]):
            self.errors.add("a round to which nobody came is closed")
        mark = round * self.marks + self.workers
        if mark in state.c[place]:
            self.errors.add("a round is closed twice")
        return state._replace(c=put(state.c, place, state.c[place] + bytes([mark])))

    # The launcher

    def _launch(self, state: Any) -> Iterator[Any]:
        match state.launcher:
            case ("close", half, block, turn, copies):
                after = ("copy", 0, block, turn) if copies else ("pass", block, turn)
                following = after if half else ("close", 1, block, turn, copies)
                yield self._close(state, 2 * block + half, turn)._replace(launcher=following)
            case _:
                yield from super()._launch(state)

    def _retire(self, state: Any, rank: int) -> Any:
        retired = super()._retire(state, rank)
        return retired._replace(has_read=put(state.has_read, rank, NEVER)) if self.retires_readers else retired

    def _begin_to_pass(self, state: Any, block: int, turn: int, copies: bool) -> Any:
        came = state.visited[block] == turn // self.workers + 1
        if self._is_last(turn) and {"visited": came, "every": True, "no": False}[self.launcher_closes]:
            return state._replace(launcher=("close", 0, block, turn, copies))
        return super()._begin_to_pass(state, block, turn, copies)

    def _readmit(self, state: Any, rank: int, words: list[int]) -> Any:
        after = super()._readmit(state, rank, words)
        if after.launcher:
            return after
        return after._replace(has_read=put(state.has_read, rank, after.gone[rank]))


# The free order


@quick
class FreeState(NamedTuple):
    """One moment under free turns. `grant` and `done` have p·G entries, as in the center."""

    request: tuple[int, ...]
    grant: tuple[int, ...]
    done: tuple[int, ...]
    c: tuple[frozenset[tuple[int, int]], ...]  # the visits added to half h of block b, at 2b + h
    inside: tuple[tuple[int, int] | None, ...]  # (block, halves written) of each worker
    read: tuple[Any, ...]
    finished: tuple[int, ...]  # exchanges, by each worker
    dead: tuple[bool, ...]
    gone: frozenset[int]
    last: tuple[int, ...]  # what the arbiter remembers
    writing: tuple[tuple[int, int], ...]  # grants that it has decided on and not stored yet: (place, number)
    crashes: int
    readmissions: int
    start: tuple[int, ...]  # the exchange in which the predecessor of each present worker died, 0 for none


@dataclass
class Free:
    """p workers that take blocks as they are granted, and the real `Arbiter`, which may act on what it saw long ago."""

    workers: int
    blocks: int
    exchanges: int
    crashes: int = 0
    readmissions: int = 0
    supervisor: str = "reaps"  # or "times out", or "sleeps"

    def __post_init__(self) -> None:
        self.errors: set[str] = set()
        self._decide = lru_cache(None)(self._decide)

    def initial(self) -> FreeState:
        p, G = self.workers, self.blocks
        return FreeState(
            request=(0,) * p, grant=(0,) * p * G, done=(0,) * p * G, c=(frozenset(),) * 2 * G, inside=(None,) * p,
            read=(None,) * p, finished=(0,) * p, dead=(False,) * p, gone=frozenset(), last=(0,) * G, writing=(),
            crashes=self.crashes, readmissions=self.readmissions, start=(0,) * p,
        )  # fmt: skip

    def steps(self, state: FreeState) -> Iterator[FreeState]:
        for rank in range(self.workers):
            if not state.dead[rank] and state.finished[rank] < self.exchanges:
                yield from self._work(state, rank)
        yield from self._launch(state)

    def accidents(self, state: FreeState) -> Iterator[FreeState]:
        for rank in range(self.workers):
            alive = not state.dead[rank] and state.finished[rank] < self.exchanges
            if alive and state.crashes:
                yield state._replace(
                    dead=put(state.dead, rank, True), inside=put(state.inside, rank, None),
                    read=put(state.read, rank, None), crashes=state.crashes - 1,
                )  # fmt: skip
            if alive and self.supervisor == "times out" and not state.gone:
                yield state._replace(gone=frozenset([rank]))

    def is_done(self, state: FreeState) -> bool:
        for rank in range(self.workers):
            if not state.dead[rank] and state.finished[rank] < self.exchanges:
                return False
        for rank in range(self.workers):
            whole = {(rank, number) for number in range(1, state.finished[rank] + 1) if number != state.start[rank]}
            if not all(whole <= half for half in state.c):
                self.errors.add("an exchange leaves out a block")
        return True

    # The workers

    def _work(self, state: FreeState, rank: int) -> Iterator[FreeState]:
        number, G = state.finished[rank] + 1, self.blocks
        mine = range(rank * G, (rank + 1) * G)
        if state.inside[rank] is not None:
            yield self._visit(state, rank, number)
        elif state.request[rank] < number:
            yield state._replace(request=put(state.request, rank, number))
        elif all(state.done[place] == number for place in mine):
            yield state._replace(finished=put(state.finished, rank, number))
        else:
            for place in mine:
                if state.grant[place] == number > state.done[place]:
                    yield self._enter(state, rank, place - rank * G)

    def _enter(self, state: FreeState, rank: int, block: int) -> FreeState:
        if any(other is not None and other[0] == block for other in state.inside):
            self.errors.add("two workers in one block")
        read = state.c[2 * block : 2 * block + 2]
        return state._replace(inside=put(state.inside, rank, (block, 0)), read=put(state.read, rank, read))

    def _visit(self, state: FreeState, rank: int, number: int) -> FreeState:
        block, half = state.inside[rank] or (0, 0)
        if half == 2:
            return state._replace(
                done=put(state.done, rank * self.blocks + block, number), inside=put(state.inside, rank, None)
            )
        place = 2 * block + half
        if state.c[place] != state.read[rank][half]:
            self.errors.add("an update is lost")
        if (rank, number) in state.c[place]:
            self.errors.add("an exchange visits a block twice")
        return state._replace(
            c=put(state.c, place, state.read[rank][half] | {(rank, number)}),
            inside=put(state.inside, rank, (block, half + 1)),
            read=put(state.read, rank, None if half else state.read[rank]),
        )

    # The launcher

    def _launch(self, state: FreeState) -> Iterator[FreeState]:
        if state.writing:  # it holds the lock: nobody is retired or readmitted meanwhile
            (place, number), *rest = state.writing
            yield state._replace(grant=put(state.grant, place, number), writing=tuple(rest))
            return
        writing, last = self._decide(state.request, state.grant, state.done, state.gone, state.last)
        if writing:
            yield state._replace(writing=writing, last=last)
        for rank in range(self.workers):
            if state.dead[rank] and self.supervisor != "sleeps":
                if rank not in state.gone:
                    yield state._replace(gone=state.gone | {rank})
                elif state.readmissions:
                    yield self._readmit(state, rank)

    def _decide(self, request: Any, grant: Any, done: Any, gone: Any, last: Any) -> tuple[Any, Any]:
        """What `Arbiter.grant` would store, and what it remembers, if it saw these words."""
        center = self._center(request, grant, done)
        arbiter = free_turns.Arbiter(center)
        arbiter._last = list(last)
        went = arbiter.grant(gone)
        writing = tuple((place, new) for place, new in enumerate(center.grant) if new != grant[place])
        assert went == bool(writing)
        return writing, tuple(arbiter._last)

    def _readmit(self, state: FreeState, rank: int) -> FreeState:
        """A new worker sets itself up while its rank is still gone, and is admitted."""
        center = self._center(state.request, state.grant, state.done)
        new = free_turns.FreeTurns(center, rank, lambda: None)
        return state._replace(
            request=tuple(center.request), done=tuple(center.done), finished=put(state.finished, rank, new.round),
            dead=put(state.dead, rank, False), gone=state.gone - {rank}, readmissions=state.readmissions - 1,
            start=put(state.start, rank, new.round),
        )  # fmt: skip

    def _center(self, request: Any, grant: Any, done: Any) -> Any:
        layout = SimpleNamespace(workers=self.workers, blocks=self.blocks)
        updates = [0] * self.blocks
        words = {"request": list(request), "grant": list(grant), "done": list(done)}
        return SimpleNamespace(layout=layout, updates=updates, **words)


# No order


@quick
class HogwildState(NamedTuple):
    """One coordinate of the center, and what each worker does to it: additions made, and what it has read for one."""

    c: int
    made: tuple[int, ...]
    read: tuple[int | None, ...]


@dataclass
class Hogwild:
    """Workers that add numbers to one coordinate, so many times each, by a load and a store."""

    adds: tuple[int, ...]
    times: int

    def __post_init__(self) -> None:
        self.errors: set[str] = set()

    def initial(self) -> HogwildState:
        return HogwildState(0, (0,) * len(self.adds), (None,) * len(self.adds))

    def steps(self, state: HogwildState) -> Iterator[HogwildState]:
        for rank, add in enumerate(self.adds):
            read, made = state.read[rank], state.made[rank]
            if read is not None:
                yield HogwildState(read + add, put(state.made, rank, made + 1), put(state.read, rank, None))
            elif made < self.times:
                yield state._replace(read=put(state.read, rank, state.c))

    def accidents(self, state: HogwildState) -> Iterator[HogwildState]:
        return iter(())

    def is_done(self, state: HogwildState) -> bool:
        return True
