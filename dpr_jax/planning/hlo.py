"""Collectives of a compiled program, from its text: how many, and how many bytes a device receives.

XLA's own cost analysis counts the body of a loop once. Here every instruction counts as often
as it runs: the trip counts of the loops around it are read from the text and multiplied.
Loops whose count is not in the text (a decode loop that may stop early) take `unknown_trips`. Where
two of them nest (slots that are refilled: the outer loop admits rows, the inner one decodes),
that is how often the inner one runs in all, and the outer one counts once.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator

KINDS = (
    "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all",
    "collective-permute",
)

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2,
          "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8,
          "c128": 16, "f8e4m3fn": 1, "f8e5m2": 1}
_SHAPE = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([0-9,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(ROOT\s+)?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
  name: str
  op: str
  shape: str  # of the result, as printed.
  line: str
  root: bool


@dataclasses.dataclass(frozen=True)
class Collectives:
  """Of one execution of the program, for one device."""

  count: dict[str, int]  # by kind.
  bytes: dict[str, float]  # received per device, by kind.
  unknown_loops: int  # loops whose trip count is not in the text.


def _split_op(rhs: str) -> tuple[str, str]:
  """(shape, op) on the right of the equals sign."""
  if rhs.startswith("("):  # A tuple, whose shapes may hold parentheses of their own.
    depth, end = 0, len(rhs)
    for at, c in enumerate(rhs):
      depth += (c == "(") - (c == ")")
      if not depth:
        end = at + 1
        break
    shape, rest = rhs[:end], rhs[end:]
  else:
    shape, _, rest = rhs.partition(" ")
  found = re.match(r"\s*([\w\-]+)\(", rest)
  return shape, found.group(1) if found else ""


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Name -> instructions of every computation, and the name of the entry."""
  out, current, entry = {}, None, ""
  for line in text.splitlines():
    if line and not line[0].isspace() and line.rstrip().endswith("{") and "->" in line:
      found = re.match(r"(ENTRY\s+)?%?([\w.\-]+)", line)
      current = out.setdefault(found.group(2), [])
      entry = found.group(2) if found.group(1) else entry
    elif current is not None and (found := _INSTRUCTION.match(line)):
      shape, op = _split_op(found.group(3))
      current.append(Instruction(found.group(2), op, shape, line, bool(found.group(1))))
  return out, entry


def sizes(shape: str) -> list[float]:
  """Bytes of each array in a printed shape."""
  out = []
  for dtype, dims in _SHAPE.findall(shape):
    n = _BYTES[dtype]
    for dim in dims.split(","):
      n *= int(dim) if dim else 1
    out.append(n)
  return out


def trip_count(line: str, comps: dict[str, list[Instruction]]) -> int | None:
  """How often a `while` runs its body; None where the text does not say."""
  known = re.search(r'known_trip_count"?[:=]\s*\{\s*"?n"?[:=]\s*"?(\d+)', line)
  if known:
    return int(known.group(1))
  # TPU text has no such note: the condition compares a counter, from 0, with a constant, and the
  # body of an unrolled loop adds more than 1 to it.
  condition = comps.get(re.search(r"condition=%?([\w.\-]+)", line).group(1), [])
  root = next((i for i in condition if i.root), None)
  if root is None or root.op != "compare" or "direction=LT" not in root.line:
    return None
  counter, limit = (_operands(root) + ["", ""])[:2]
  limit = _constant(condition, limit)
  if limit is None:
    return None
  step = _step(comps, line, next((i for i in condition if i.name == counter), None))
  return -(-limit // step)


def _operands(instruction: Instruction) -> list[str]:
  rest = instruction.line.partition(f" {instruction.op}(")[2]
  return re.findall(r"%([\w.\-]+)", rest.partition("), ")[0])


def _constant(instructions: list[Instruction], name: str) -> int | None:
  line = next((i.line for i in instructions if i.name == name and i.op == "constant"), "")
  found = re.search(r" constant\((\d+)\)", line)
  return int(found.group(1)) if found else None


def _step(comps, line: str, counter: Instruction | None) -> int:
  """What the body of a `while` adds to its counter, an element of its tuple; 1 if unclear."""
  index = re.search(r"index=(\d+)", counter.line) if counter else None
  body = comps.get(re.search(r"body=%?([\w.\-]+)", line).group(1), [])
  root = next((i for i in body if i.root and i.op == "tuple"), None)
  if index is None or root is None:
    return 1
  results = _operands(root)
  name = results[int(index.group(1))] if int(index.group(1)) < len(results) else ""
  add = next((i for i in body if i.name == name and i.op == "add"), None)
  values = [_constant(body, x) for x in _operands(add)] if add else []
  return next((v for v in values if v), 1)


def group_size(line: str) -> int | None:
  """Devices that one group of a collective spans; None where the text does not say."""
  mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line)
  if mesh:
    axes = {k: int(v) for k, v in re.findall(r"'([^']+)'=(\d+)", mesh.group(1))}
    size = 1
    for name in re.findall(r"'([^']+)'", mesh.group(2)):
      size *= axes[name]
    return size
  iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
  if iota:
    return int(iota.group(2))
  listed = re.search(r"replica_groups=\{\{([^}]*)\}", line)
  return listed.group(1).count(",") + 1 if listed else None


def received(kind: str, line: str, shape: str, started: bool) -> float:
  """Bytes that one device must receive for one collective, whatever the algorithm.

  With g devices a group and R bytes of result: all-gather R (g - 1) / g; reduce-scatter
  R (g - 1); all-reduce, which is one after the other, 2 R (g - 1) / g; all-to-all R (g - 1) / g;
  permute R.
  """
  arrays = sizes(shape)
  if started and shape.startswith("(") and kind != "all-reduce":
    # (operands, results, contexts): the second element is what arrives.
    arrays = sizes(_top_level(shape)[1])
  result, g = sum(arrays), group_size(line) or 2
  share = (g - 1) / g
  return {
      "all-gather": result * share,
      "reduce-scatter": result * (g - 1),
      "all-reduce": 2 * result * share,
      "all-to-all": result * share,
      "ragged-all-to-all": result * share,
      "collective-permute": result,
  }[kind]


def _top_level(shape: str) -> list[str]:
  """Elements of a printed tuple shape."""
  out, depth, part = [], 0, ""
  for c in shape[1:-1]:
    depth += (c in "([{") - (c in ")]}")
    if c == "," and not depth:
      out.append(part)
      part = ""
    else:
      part += c
  return [*out, part]


def _callees(i: Instruction) -> list[str]:
  """Computations that an instruction runs: of a loop its body."""
  if i.op == "while":
    return [re.search(r"body=%?([\w.\-]+)", i.line).group(1)]
  if i.op not in ("fusion", "call", "async-start", "conditional", "custom-call"):
    return []
  found = _CALLED.findall(i.line)
  for group in re.findall(r"branch_computations=\{([^}]*)\}", i.line):
    found += [x.strip().lstrip("%") for x in group.split(",")]
  return found


def _executed(
    comps: dict[str, list[Instruction]], entry: str, unknown_trips: int
) -> Iterator[tuple[Instruction, int, str, bool]]:
  """(instruction, times it runs, the computation that holds it, whether it is an unknown loop)."""
  holding: dict[str, bool] = {}

  def holds_unknown(name):
    """Whether a computation, or one that it calls, has a loop of unknown count."""
    if name not in holding:
      holding[name] = False  # While it is looked at.
      holding[name] = any(
          (i.op == "while" and trip_count(i.line, comps) is None)
          or any(holds_unknown(x) for x in _callees(i))
          for i in comps.get(name, ())
      )
    return holding[name]

  def walk(name, times, path):
    if name in path:
      return
    for i in comps.get(name, ()):
      unknown = False
      if i.op == "while":
        trips = trip_count(i.line, comps)
        (body,) = _callees(i)
        unknown = trips is None
        if unknown:
          trips = 1 if holds_unknown(body) else unknown_trips
        yield from walk(body, times * trips, (*path, name))
      else:
        for x in _callees(i):
          yield from walk(x, times, (*path, name))
      yield i, times, name, unknown

  yield from walk(entry, 1, ())


def collectives(text: str, unknown_trips: int = 1) -> Collectives:
  """Counts the collectives of `compiled.as_text()`.

  Args:
    unknown_trips: what a loop counts for whose trip count is not in the text; of two that nest
      the inner one, in all runs of the outer.
  """
  comps, entry = computations(text)
  unknown_loops, found = 0, {}
  for i, times, where, unknown in _executed(comps, entry, unknown_trips):
    unknown_loops += unknown
    kind = i.op.removesuffix("-start")
    if kind not in KINDS:
      continue
    size = received(kind, i.line, i.shape, i.op.endswith("-start"))
    if kind == "all-reduce" and where.startswith("all-reduce-scatter"):
      # How a TPU prints a reduce-scatter: a fusion of an all-reduce and a slice.
      kind, size = "reduce-scatter", size / 2
    channel = re.search(r"channel_id=(\d+)", i.line)
    key = (kind, channel.group(1) if channel else f"{where}/{i.name}")
    pieces = found.setdefault(key, {})
    times_before = pieces.get((where, i.name), (0, 0.0))[0]
    pieces[where, i.name] = (times_before + times, size)
  count, volume = collections.Counter(), collections.Counter()
  for (kind, _), pieces in found.items():
    # The pieces of one asynchronous collective repeat its channel; those that wait inside of a
    # loop, to overlap with it, do not run it again.
    times, size = min(pieces.values())
    count[kind] += times
    volume[kind] += times * size
  return Collectives(dict(count), dict(volume), unknown_loops)
