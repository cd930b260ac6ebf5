"""What the fields of a record and of its turns mean.

A field either decides something (it is read here or by the reader of its format), or is known to
decide nothing (`CARRIED`). Any other one is refused by name: it might say that a turn is not to be
trained, or that the prompt has another part.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dpr_jax.data.demos import Message
from dpr_jax.data.limits import MAX_DEPTH, check_unicode, parse_json
from dpr_jax.data.records import kind_of
from dpr_jax.errors import UserError

# Whether a turn, or all turns of a record, are trained: OpenAI and mistral-finetune, axolotl,
# ms-swift, and others. Only 0 and 1 (false and true) have a meaning here.
TRAINED = ("weight", "train", "training", "trainable", "loss", "loss_mask")
SYSTEM = ("system", "system_prompt", "system_message")
# What chat templates read of a message, beside its role and content.
TEMPLATE_FIELDS = ("tool_calls", "reasoning_content", "reasoning", "thinking", "name",
                   "tool_call_id")
# Of every record, whatever its format.
COMMON = frozenset((*TRAINED, *SYSTEM, "tools", "response", "answer", "task", "hit_eos"))
# Names and numbers of records, their origin, and what people and programs said about them, as
# well-known datasets have them; and what the entry points of dpr_jax add to a line.
CARRIED = frozenset("""
    id _id idx index uid uuid key hash item_id row_id example_id sample_id task_id prompt_id
    question_id message_id msg_id conversation_id conversation_hash dialogue_id orig_index
    unique_id ID Type
    source sources dataset dataset_name subset split origin original_source url link license
    timestamp tstamp time date created_at updated_at author lang language languages
    model model_name model_id generator ans_id annotator annotators user_id avatarUrl
    category categories subcategory topic topics subject domain field cluster tag tags type
    meta metadata info extra extra_info language_code
    level difficulty Difficulty Skill solution_type formula Equation
    score scores rating ratings quality rank views likes score_chosen score_rejected
    num_turns num_tokens n_tokens token_count turn turns_count length
    title hash_id motivation_app instruction_id_list kwargs ground_truth reference
    toxic redacted openai_moderation detoxify_moderation state country hashed_ip header turn_id
    parallel_tool_calls skip_prompt_formatting custom_instruction
    token_ids tokens token_rewards logp_sft logp_ref endogenous reward filter_score sample
    """.split())


def present(value: Any, where: str, depth: int = 0) -> Any:
  """The value without its null fields, which every row of an Arrow table has."""
  if not isinstance(value, dict | list):
    return value
  if depth > MAX_DEPTH:
    raise UserError(f"{where}: nested deeper than {MAX_DEPTH} levels")
  if isinstance(value, list):
    return [present(v, where, depth + 1) for v in value]
  return {k: v if type(v) is str else present(v, where, depth + 1)
          for k, v in value.items() if v is not None}


def check_known(
  record: Mapping[str, Any], known: Collection[str], extra: Collection[str], where: str
) -> None:
  """Refuses fields that are in neither list and say something.

  Args:
    extra: names that the user carries along; "*" stands for all.
  """
  for field, value in record.items():
    if field in known or field in CARRIED or field in extra or "*" in extra:
      continue
    if value not in ("", [], {}):
      raise UserError(f"{where}: field {field!r} is not known and could change what is trained; "
                      "remove it, or carry it along by naming it in extra_fields")


def text_of(record: Mapping[str, Any], field: str, where: str, default: str | None = None) -> str:
  """The text of a field; `default`, where given, stands for an absent one."""
  if field not in record:
    if default is not None:
      return default
    raise UserError(f"{where}: field {field!r} is missing; found {sorted(record)}")
  check_text(record[field], f"{where}: field {field!r}")
  return record[field]


def check_text(value: Any, what: str) -> None:
  """Refuses what is no Unicode text."""
  if not isinstance(value, str):
    raise UserError(f"{what} must be text, got {kind_of(value)}")
  check_unicode(value, what)


def parsed(text: str, where: str, what: str) -> Any:
  """The value of JSON that stands as text in a record.

  Raises:
    UserError: it is not JSON, or JSON that no record may hold.
  """
  try:
    return parse_json(text, f"{where}: {what}")
  except json.JSONDecodeError as e:
    raise UserError(f"{where}: {what} is text that is not JSON: {e.msg}") from None


def trained(fields: Mapping[str, Any], where: str) -> bool | None:
  """Whether a turn or record says that it is trained; None if it says nothing."""
  said = None
  for name in TRAINED:
    if name not in fields:
      continue
    value = fields[name]
    if not isinstance(value, int | float) or value not in (0, 1):
      raise UserError(f"{where}: field {name!r} must be 0 or false (not trained), or 1 or true; "
                      f"got {json.dumps(value, default=str)[:40]}")
    said = bool(value) and said is not False
  return said


def ended(record: Mapping[str, Any], where: str) -> bool:
  """Whether the response came to its end: "hit_eos", which `dpr_jax.generate` writes."""
  value = record.get("hit_eos", True)
  if not isinstance(value, bool):
    raise UserError(f"{where}: field 'hit_eos' must be true or false, got {kind_of(value)}")
  return value


def template_fields(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
  """What the chat template may read of a turn, beside role and content."""
  found = {name: turn[name] for name in TEMPLATE_FIELDS if turn.get(name) not in (None, "", [])}
  for name, value in found.items():
    if name == "tool_calls":
      calls = parsed(value, where, "field 'tool_calls'") if isinstance(value, str) else value
      if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"{where}: field 'tool_calls' must be a list of objects")
      found[name] = calls
    else:
      check_text(value, f"{where}: field {name!r}")
  return found


def leading_messages(record: Mapping[str, Any], where: str) -> list[Message]:
  """What a record puts before its turns: descriptions of tools, and a system message."""
  messages: list[Message] = []
  if tools := record.get("tools"):
    tools = parsed(tools, where, "field 'tools'") if isinstance(tools, str) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
      raise UserError(f"{where}: field 'tools' must be a list of objects")
    if tools:
      content = json.dumps(tools, ensure_ascii=False)
      check_text(content, f"{where}: field 'tools'")
      messages.append({"role": "tools", "content": content})
  said = [name for name in SYSTEM if name in record and text_of(record, name, where)]
  if len({record[name] for name in said}) > 1:
    raise UserError(f"{where}: fields {said[0]!r} and {said[1]!r} differ; keep one")
  if said:
    messages.append({"role": "system", "content": record[said[0]]})
  return messages


def with_leading(
  leading: Sequence[Message], messages: Sequence[Message], where: str
) -> list[Message]:
  """`leading`, then the turns; a system message that both have is kept once."""
  if leading and messages and leading[-1]["role"] == messages[0]["role"] == "system":
    if leading[-1]["content"] != messages[0]["content"]:
      raise UserError(f"{where}: field 'system' differs from the system message of the turns; "
                      "keep one")
    leading = leading[:-1]
  return [*leading, *messages]
