"""MT-bench: two turns of eight kinds, each graded from 1 to 10."""

import dataclasses

from dpr_jax.config.fields import setting
from dpr_jax.data.demos import Demo
from dpr_jax.data.records import iter_records
from dpr_jax.errors import UserError
from dpr_jax.evaluation.benchmarks.judged import FENCES, JudgedBenchmark, JudgePrompt, over_prompts
from dpr_jax.evaluation.judges.base import Question
from dpr_jax.evaluation.metrics import Column

GUIDED = ("math", "reasoning", "coding")  # categories that are graded beside a reference answer.
# Questions to which the reference answers of GPT-4 that come with the benchmark are wrong.
WRONG = frozenset((104, 105, 109, 111, 113, 114, 120, 122, 124, 125, 126, 128, 130))


def _prompt(guided: bool, turns: int) -> JudgePrompt:
  """The package's words for one of the four prompts."""
  last = "" if turns == 1 else (
      " The conversation has two questions. Grade the answer to the second one alone; the first "
      "one and its answer are there to understand it."
  )
  beside = " A correct answer is given. Compare with it, and name what is wrong." if guided else ""
  system = (
      f"You grade an answer: is it right, helpful, to the point, thorough and clear?{beside}{last} "
      f"{FENCES}\n\nGive your reasons in a few sentences. End with a line that holds your grade "
      "alone, a number from 1 (useless) to 10 (could not be better) in double brackets: [[5]]."
  )
  numbers = [""] if turns == 1 else ["_1", "_2"]
  fenced = lambda name, text: f"<<{name} {{key}}>>\n{{{text}}}\n<<end {{key}}>>"
  parts = []
  for number in numbers:
    parts.append(fenced("question", f"question{number}"))
    if guided:
      parts.append(fenced("correct answer", f"ref_answer{number or '_1'}"))
    parts.append(fenced("answer", f"answer{number}"))
  return JudgePrompt("\n\n".join(parts), system)


_ONE = (("question",), ("answer",))
_TWO = (("question_1",), ("answer_1",), ("question_2",), ("answer_2",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MTBench(JudgedBenchmark):
  """`score` is the mean grade of both turns; lm-sys/FastChat, llm_judge (arXiv 2306.05685).

  There the temperature depends on the category; here it is that of the evaluation.
  """

  kind = "mt_bench"
  title = "MT-bench"
  max_new_tokens = 1024
  texts = {
      "single-v1": _ONE, "single-math-v1": (*_ONE, ("ref_answer_1",)),
      "single-v1-multi-turn": _TWO,
      "single-math-v1-multi-turn": (*_TWO, ("ref_answer_1",), ("ref_answer_2",)),
  }
  prompts = {name: _prompt("math" in name, 1 + ("multi" in name)) for name in texts}
  mark = r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]"
  summaries = {
      f"{what}{suffix}": Column(f"{label}{words}", "", better=1, main=not suffix)
      for what, label in (("score", "Grade, 1 to 10"), ("reward", "Reward"))
      for suffix, words in (
          ("", ""), ("_turn_1", ", first turn"), ("_turn_2", ", second turn"),
          ("_right_references", ", right references"),
      )
  } | JudgedBenchmark.summaries
  references: str = setting("", "file of the reference answers to math, reasoning and coding")

  def read(self, path, limit=0):
    references = {}
    for record, where in iter_records(self.references) if self.references else ():
      try:
        references[record["question_id"]] = _turns(record["choices"][0]["turns"])
      except (LookupError, TypeError):
        raise UserError(f"{where}: a reference answer has a question_id and "
                        "choices[0].turns") from None
    demos = []
    for record, where in iter_records(path):
      try:
        turns, number = _turns(record["turns"]), record["question_id"]
      except (LookupError, TypeError):
        raise UserError(f"{where}: a question has a question_id, a category and one or two turns"
                        ) from None
      meta = {"question_id": number, "later": turns[1:]}
      if record.get("category") in GUIDED:
        meta["references"] = references.get(number, ())
        if len(meta["references"]) < len(turns):
          raise UserError(f"{where}: no reference answer to question {number} in "
                          f"--benchmark.references={self.references}; {record['category']} is "
                          "graded beside one")
      demos.append(Demo(({"role": "user", "content": turns[0]},), None,
                        str(record.get("category", "")), meta, where))
      if limit and len(demos) == limit:
        break
    return demos

  def later_turns(self, demo):
    return demo.meta["later"]

  def questions(self, demo, record, prompts):
    talk = _talk(record)
    references = demo.meta.get("references", ())
    kind = "single-math-v1" if references else "single-v1"
    asked = [self.ask("turn_1", kind, prompts, (*talk[0], *references[:1]))]
    if len(talk) > 1:
      texts = (*talk[0], *talk[1], *references[:2])
      asked.append(self.ask("turn_2", f"{kind}-multi-turn", prompts, texts))
    return asked

  def conversations(self, demo, record):
    said = [
        {"role": role, "content": text}
        for turn in _talk(record) for role, text in zip(("user", "assistant"), turn)
    ]
    return [Question(f"turn_{n // 2}", tuple(said[:n])) for n in range(2, len(said) + 1, 2)]

  def _grade(self, reply):
    if "reward" in reply:
      return reply["reward"]
    found = self.verdict(reply["text"])
    return float(found) if found and 1 <= float(found) <= 10 else None

  def judged(self, record):
    replies = record["replies"].values()
    known = [grade for reply in replies if (grade := self._grade(reply)) is not None]
    what = "reward" if "reward" in record["replies"]["turn_1"] else "score"
    return {what: sum(known) / len(known) if known else None}

  def summarize(self, records):
    grades = [{part: self._grade(r) for part, r in rec["replies"].items()} for rec in records]
    what = "reward" if "reward" in records[0]["replies"]["turn_1"] else "score"

    def mean(parts=("turn_1", "turn_2"), chosen=lambda demo: True):
      values = []
      for record, grade in zip(records, grades, strict=True):
        known = [grade[p] for p in parts if grade.get(p) is not None]
        values.append(sum(known) / len(known) if known and chosen(record["demo"]) else None)
      return over_prompts(records, values)

    figures = {
        what: mean(), f"{what}_turn_1": mean(("turn_1",)), f"{what}_turn_2": mean(("turn_2",)),
        f"{what}_right_references": mean(chosen=lambda d: d.meta["question_id"] not in WRONG),
    }
    for group in sorted({record["demo"].task for record in records}):
      figures[f"{what}/{group}"] = mean(chosen=lambda d, g=group: d.task == g)
    figures |= self.counts(records, [g for grade in grades for g in grade.values()])
    return {name: figure for name, figure in figures.items() if figure}


def _turns(value) -> tuple[str, ...]:
  """Raises TypeError for anything but one or two texts."""
  if not isinstance(value, list) or not 1 <= len(value) <= 2 or (
      not all(isinstance(text, str) for text in value)):
    raise TypeError
  return tuple(value)


def _talk(record) -> list[tuple[str, str]]:
  """(asked, said) of each turn."""
  turns = [record, *record.get("turns", ())]
  return [(turn["prompt"], turn["response"]) for turn in turns]
