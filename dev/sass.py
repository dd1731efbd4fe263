"""Rules that machine code with wgmma must keep, checked over every path of a listing of sm_90a.

    python dev/sass.py [CUBIN ...]      default: those that the pack brings along

Prints the registers of either role and every fault; exits 1 where there is one. A product is in flight from its HGMMA
to the WARPGROUP.DEPBAR that retires its group; a group ends with the HGMMA that carries gsb0. Rules: PTX ISA,
wgmma.fence, wgmma.commit_group, wgmma.wait_group, setmaxnreg.
"""
from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

VALUE_STEPS = 4
"""Products that read one block of 64 values, 16 keys each."""
MOST_BLOCKS = 4
"""A consumer holds at once: two of keys, two of values."""
LAST_REGISTER = 255
NO_DESTINATION = re.compile(r"(ST|SYNCS|[IF]SETP|PLOP3|BAR|WARPSYNC|NANOSLEEP|UTM)")
"""Instructions whose first register is read."""


class Product(NamedTuple):
    """The registers and the kind of one HGMMA."""

    d: frozenset[int]
    a: frozenset[int]
    columns: int
    reads_values: bool
    ends_group: bool


class Instruction(NamedTuple):
    address: int
    predicate: str
    text: str
    """Without its predicate."""

    @property
    def name(self) -> str:
        return self.text.split(" ", 1)[0]

    @property
    def product(self) -> Product | None:
        return _product(self.text)

    @property
    def written(self) -> frozenset[int]:
        return _written(self.text)

    @property
    def touched(self) -> frozenset[int]:
        """Registers read or written; of a wide store, all that it stores."""
        return _touched(self.text)

    def __str__(self):
        return f"{self.address:#x} {self.predicate}{self.text}"


@cache
def _product(text: str) -> Product | None:
    found = re.match(r"HGMMA\.64x(\d+)x16\S* R(\d+), R(\d+), gdesc\[\w+\](\.tnspB)?(.*)", text)
    if not found:
        return None
    columns, d, a = map(int, found.groups()[:3])
    return Product(frozenset(range(d, d + columns // 2)), frozenset(range(a, a + 4)), columns, bool(found[4]),
                   "gsb0" in found[5])


def _width(name: str) -> int:
    """Registers of an instruction's widest operand, which is what it writes or stores."""
    if ".128" in name or (name.startswith("LDSM") and name.endswith(".4")):
        return 4
    return 2 if re.search(r"\.64\b|WIDE", name) or name == "CS2R" else 1


@cache
def _written(text: str) -> frozenset[int]:
    found = re.match(r"(\S+) (?:!?U?P\w+, )*R(\d+)\b", text)
    if not found or NO_DESTINATION.match(text):
        return frozenset()
    return frozenset(range(int(found[2]), int(found[2]) + _width(found[1])))


@cache
def _touched(text: str) -> frozenset[int]:
    plain = {int(number) for number in re.findall(r"\bR(\d+)\b", text)}
    plain |= {int(number) + 1 for number in re.findall(r"\bR(\d+)\.64\b", text)}
    if text.startswith("ST") and (stored := re.search(r", R(\d+)$", text)):
        plain |= set(range(int(stored[1]), int(stored[1]) + _width(text.split(" ", 1)[0])))
    return _written(text) | plain


class Listing:
    """A kernel's instructions and where each may go on."""

    def __init__(self, text: str):
        self.code, self._labels = [], {}
        for line in text.splitlines():
            if found := re.match(r"\s*(\S+):\s*$", line):
                self._labels[found[1]] = len(self.code)
            elif found := re.match(r"\s*/\*([0-9a-f]+)\*/\s+(@!?U?P\w+ )?\s*(.*?)\s*;", line):
                self.code.append(Instruction(int(found[1], 16), found[2] or "", found[3]))
        if not self.code:
            raise ValueError("no instruction in this listing")
        self.following = [self._following(i) for i in range(len(self.code))]

    def _following(self, i: int) -> tuple[int, ...]:
        instruction = self.code[i]
        on = (i + 1,) if i + 1 < len(self.code) else ()
        if instruction.name in ("EXIT", "RET.REL.NODEC") or instruction.text.startswith("BPT.TRAP"):
            return on if instruction.predicate else ()
        if instruction.name.startswith(("BRA", "CALL")):
            target = self._labels[re.search(r"`\((\S+)\)", instruction.text)[1]]
            always = not instruction.predicate and re.fullmatch(r"BRA `\(\S+\)", instruction.text)
            return (target,) if always else (target, *on)
        return on

    def reached(self, start: int, end: str = "EXIT") -> list[Instruction]:
        """What may run from one instruction on, up to those of a name that begins with `end`."""
        seen, waiting = {start}, [start]
        while waiting:
            i = waiting.pop()
            ends = self.code[i].name.startswith(end) and not self.code[i].predicate
            new = () if ends else set(self.following[i]) - seen
            seen |= set(new)
            waiting += new
        return [self.code[i] for i in sorted(seen)]

    def states(self, start, step: Callable) -> None:
        """Calls `step(instruction, state)` -> state once for every state in which an instruction may run."""
        seen, waiting = set(), [(0, start)]
        while waiting:
            if (at := waiting.pop()) in seen:
                continue
            seen.add(at)
            after = step(self.code[at[0]], at[1])
            waiting += ((i, after) for i in self.following[at[0]])


def products_in_flight(listing: Listing) -> set[str]:
    """Faults: registers of a product are used before the wait that retires it."""
    faults = set()

    def step(instruction, state):
        groups, opened = state                                   # products: (d, a) of each
        product = instruction.product
        flying = [pair for group in (*groups, opened) for pair in group]
        if product:
            for d, a in flying:
                if product.a & d or product.d & a or (product.d & d and product.d != d):
                    faults.add(f"{instruction}: its registers overlap those of a product in flight")
            opened |= {(product.d, product.a)}
            return ((*groups, opened), frozenset()) if product.ends_group else (groups, opened)
        if (kept := pending(instruction)) is not None:
            if opened:
                faults.add(f"{instruction}: products before it belong to no group")
            return groups[len(groups) - kept:] if kept < len(groups) and kept else groups if kept else (), frozenset()
        for d, a in flying:
            if registers := (instruction.touched & d) | (instruction.written & a):
                faults.add(f"{instruction}: uses R{min(registers)} of a product in flight")
        if instruction.name == "EXIT" and flying:
            faults.add(f"{instruction}: products are in flight at the end")
        return state

    listing.states(((), frozenset()), step)
    return faults


def pending(instruction: Instruction) -> int | None:
    """How many groups a wait leaves in flight; None for another instruction."""
    found = re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\w+)", instruction.text)
    return int(found[1], 16) if found else None


def unfenced_products(listing: Listing) -> set[str]:
    """Faults: another instruction has used a product's registers after the last WARPGROUP.ARRIVE, or there was none."""
    faults, waiting = set(), [(0, frozenset(range(LAST_REGISTER)))]
    seen = [None] * len(listing.code)
    while waiting:
        i, used = waiting.pop()
        if seen[i] is not None and used <= seen[i]:
            continue
        seen[i] = used = used | (seen[i] or frozenset())
        instruction = listing.code[i]
        if product := instruction.product:
            if unfenced := used & (product.a | product.d):
                faults.add(f"{instruction}: R{min(unfenced)} is used without a fence in between")
        elif instruction.name == "WARPGROUP.ARRIVE":
            used = frozenset()
        else:
            used |= instruction.touched
        waiting += ((following, used) for following in listing.following[i])
    return faults


def early_releases(listing: Listing, empty_offset: int) -> set[str]:
    """Faults: a consumer releases a slot before the product that reads it has ended. Blocks are released in the order
    in which products read them; slots released before the first product are those of q.
    """
    faults = set()
    dim = head_dim(listing)

    def step(instruction, state):
        done, groups, opened, begun = state                      # done: blocks read and not released; groups: of blocks
        if product := instruction.product:
            opened = opened[0] + (not product.reads_values), opened[1] + product.reads_values
            if not product.ends_group:
                return done, groups, opened, True
            blocks, rest = divmod(opened[0] * 16, dim) if opened[0] else divmod(opened[1], VALUE_STEPS)
            if rest or all(opened):
                faults.add(f"{instruction}: ends a group of {opened[0]} products of keys, {opened[1]} of values")
            return done, (*groups, blocks), (0, 0), True
        if (kept := pending(instruction)) is not None:
            retired = max(len(groups) - kept, 0)
            done += sum(groups[:retired])
            groups = groups[retired:]
        elif releases(instruction, empty_offset) and begun:
            if done == 0:
                faults.add(f"{instruction}: releases a slot whose product may still run")
            done = max(done - 1, 0)
        if done + sum(groups) > MOST_BLOCKS:
            faults.add(f"{instruction}: more than {MOST_BLOCKS} blocks are held")
            done = 0
        return done, groups, opened, begun

    listing.states((0, (), (0, 0), False), step)
    return faults


def head_dim(listing: Listing) -> int:
    """Columns of the products of values; 0 without any."""
    return max((p.columns for p in (x.product for x in listing.code) if p and p.reads_values), default=0)


def releases(instruction: Instruction, empty_offset: int) -> bool:
    """Whether it arrives at a barrier `empty`."""
    return instruction.name.startswith("SYNCS.ARRIVE") and f"+{empty_offset:#x}]" in instruction.text


class Role(NamedTuple):
    highest: int
    """Register that its code uses."""
    granted: int
    products: int
    copies: int


def roles(listing: Listing) -> dict[str, Role]:
    """What producer and consumers run after their setmaxnreg; each must be there once."""
    found = {}
    for name, word in (("producer", "DEALLOC"), ("consumer", "TRY_ALLOC")):
        start, = (i for i, x in enumerate(listing.code) if x.text.startswith(f"USETMAXREG.{word}"))
        code = listing.reached(start)
        found[name] = Role(highest(code), int(listing.code[start].text.split()[-1], 16),
                           sum(x.product is not None for x in code), sum(x.name.startswith("UTMALDG") for x in code))
    return found


def highest(code: list[Instruction]) -> int:
    return max((max(x.touched, default=0) for x in code), default=0)


def misused_registers(listing: Listing, launched: int) -> Iterator[str]:
    """Faults: code needs more registers than it has. launched: what every thread has at the start."""
    before = highest(listing.reached(0, "USETMAXREG"))
    if before >= launched:
        yield f"R{before} is used before setmaxnreg, of {launched} registers"
    for name, role in roles(listing).items():
        if role.highest >= role.granted:
            yield f"{name}: R{role.highest} is used of {role.granted} registers"
        if (role.products if name == "producer" else role.copies):
            yield f"{name}: runs what is the other's"


def faults(listing: Listing, empty_offset: int, launched: int) -> list[str]:
    return sorted([*products_in_flight(listing), *unfenced_products(listing), *early_releases(listing, empty_offset),
                   *misused_registers(listing, launched)])


def main(paths: list[str]) -> int:
    from cubin import disassembled, resources
    from load_pack import load_pack
    load_pack()
    from pack.kernels.cuda_sm90.cache import DIGEST_BYTES
    from pack.kernels.cuda_sm90.loader import BUNDLED, constant

    found = []
    for path in map(Path, paths or sorted(BUNDLED.glob("*.cubin"))):
        content = path.read_bytes()
        cubin = content[content.index(b"\x7fELF", 0, DIGEST_BYTES + 4):]
        listing = Listing(disassembled(cubin))
        found += (new := faults(listing, constant("EMPTY_OFFSET", head_dim(listing)), resources(cubin).registers))
        used = (f"{name} R{role.highest} of {role.granted}" for name, role in roles(listing).items())
        print(path.name, *used, *new, sep="\n  ")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
