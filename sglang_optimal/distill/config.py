"""The YAML file of a run, as pydantic models: validation with messages that name the key, and a JSON schema.

The sections ``mixing`` and ``server`` are those of the server's own file (`sglang_optimal.config.load_yaml`), so one
file can start the server and drive the run.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import yaml
from pydantic import Discriminator, Field, Tag, ValidationError, create_model, field_validator, model_validator
from pydantic.fields import FieldInfo

from sglang_optimal.config import ALPHA_KEYS, SETTINGS, MixingConfig
from sglang_optimal.distill.escalation import Escalate, Step, mixing_of_step
from sglang_optimal.distill.filters import FILTERS, FilterConfig
from sglang_optimal.distill.section import Section, optional_key
from sglang_optimal.distill.selection import Select
from sglang_optimal.names import (
    ALL_SERIES,
    MAX_TOP_K,
    MORE_SERIES,
    OTHER_MODEL,
    RESERVED_VARIABLES,
    SERIES,
    SIDES,
)
from sglang_optimal.wanted import check_amount, wanted_by

Role = Literal["system", "user", "assistant"]


class Data(Section):
    """Where the problems come from."""

    path: str | None = None
    """A .jsonl, .json, .csv, .tsv (.gz too) or .parquet file, a folder of them, or a Hugging Face dataset id.
    ``--data`` wins."""
    encoding: str = "utf-8"
    """Of a text file; a byte order mark wins over it."""
    missing: Literal["error", "skip"] = "error"
    """A problem without a value that a template shows (null, an empty CSV cell): ``error`` ends the run before it
    starts, ``skip`` leaves the problem out, and says how many were."""
    name: str | None = None
    """Configuration of a Hugging Face dataset, such as ``main``."""
    split: str = "train"
    """Split to read; files have the one split ``train``. Slices such as ``train[:100]`` work."""
    revision: str | None = None
    """Revision of a dataset on the hub."""
    fields: dict[str, str] = {}
    """Name in templates and filters: column in the data. Columns that are not named keep their own names."""
    privileged: list[str] = ["answer"]
    """Fields that the student must never see; a student template that uses one stops the run."""
    limit: Annotated[int, Field(gt=0)] | None = None
    """Read only so many problems."""

    @field_validator("path")
    @classmethod
    def _path(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("must not be empty.")
        return value


class Message(Section):
    """One message of a chat; ``content`` is a template."""

    role: Role
    content: str


class Turns(Section):
    """The usual chat, in short."""

    system: str | None = None
    """The system message."""
    user: str
    """The user's message."""
    assistant: str | None = None
    """The beginning of the assistant's answer, which the sample continues."""


def _form(value: Any) -> str | None:
    forms = {str: "<text>", dict: "<turns>", Turns: "<turns>", list: "<messages>"}
    return next((form for kind, form in forms.items() if isinstance(value, kind)), None)


# Told apart by their form, so that an error speaks of the form that was meant.
Template = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[Turns, Tag("<turns>")]
    | Annotated[list[Message], Field(min_length=1), Tag("<messages>")],
    Discriminator(
        _form,
        custom_error_type="template",
        custom_error_message="must be text, a mapping with `user`, or a list of messages",
    ),
]


class Strategy(Section):
    """One way to tell the teacher the answer (a prefix strategy)."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] = "default"
    """Kept in every record; letters, digits, ``_``, ``.`` and ``-``."""
    teacher: Template
    """What the teacher reads."""
    student: Template | None = None
    """What the student reads with this strategy; by default ``contexts.student``."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often it is drawn, relative to the others, with ``select: sample``."""


Format = Literal["chat", "text"]


class SideFormats(Section):
    """The format of each side's contexts, where they differ."""

    teacher: Format
    """``chat`` or ``text``: how the teacher reads."""
    student: Format
    """``chat`` or ``text``: how the student reads."""


def _format_form(value: Any) -> str:
    return "<sides>" if isinstance(value, dict | SideFormats) else "<word>"


class Contexts(Section):
    """What both models read. Templates are Jinja (``{{ problem }}``, any field), or short: ``{problem}``."""

    format: Annotated[
        Annotated[Format, Tag("<word>")] | Annotated[SideFormats, Tag("<sides>")], Discriminator(_format_form)
    ] = "chat"
    """``chat``: each model's own chat template is applied by the server. ``text``: the rendered text as it is. Or one
    for each side: ``{teacher: chat, student: text}``."""
    student: Template
    """What the student reads: text (in chats the user's), ``system``/``user``/``assistant``, or a list of messages."""
    strategies: Annotated[list[Strategy], Field(min_length=1)]
    """What the teacher reads: one or more prefix strategies."""
    select: Literal["sample", "cross"] = "sample"
    """``sample``: each sample draws one strategy by weight. ``cross``: ``n`` samples with every strategy."""
    guard: bool = True
    """Refuse to start when the student would see a privileged field. Off only for experiments such as ensembles."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables for both chat templates, such as ``{enable_thinking: false}``."""
    teacher_chat_template_kwargs: dict[str, Any] = {}
    """Variables for the teacher's chat template alone, over ``chat_template_kwargs``."""
    student_chat_template_kwargs: dict[str, Any] = {}
    """Variables for the student's chat template alone, over ``chat_template_kwargs``."""

    @field_validator("format")
    @classmethod
    def _one_form(cls, value: Format | SideFormats) -> Format | SideFormats:
        # One form for one meaning: it decides whether a run may be resumed.
        return value.teacher if isinstance(value, SideFormats) and value.teacher == value.student else value

    @field_validator("chat_template_kwargs", "teacher_chat_template_kwargs", "student_chat_template_kwargs")
    @classmethod
    def _variables(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if name in RESERVED_VARIABLES:
                raise ValueError(f"{name!r} is no variable of a chat template, and servers refuse it; leave it out.")
        return value

    def format_of(self, side: str) -> Format:
        """How ``teacher`` or ``student`` reads."""
        return self.format if isinstance(self.format, str) else getattr(self.format, side)

    def variables_of(self, side: str) -> dict[str, Any]:
        """What the chat template of ``teacher`` or ``student`` is given beside the messages."""
        return {**self.chat_template_kwargs, **getattr(self, f"{side}_chat_template_kwargs")}

    @model_validator(mode="after")
    def _consistent(self) -> Contexts:
        names = [strategy.name for strategy in self.strategies]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"strategies: the name {name!r} occurs twice; give each its own.")
        for side in ("teacher", "student"):
            if self.format_of(side) == "text":
                self._check_text(side)
        return self

    def _check_text(self, side: str) -> None:
        """Of a side that reads plain text."""
        templates = {f"strategies[{i}].{side}": getattr(strategy, side) for i, strategy in enumerate(self.strategies)}
        if side == "student":
            templates = {"student": self.student, **templates}
        for where, template in templates.items():
            if template is not None and not isinstance(template, str):
                raise ValueError(
                    f"format: 'text' takes templates that are plain text, not messages; {where} is not, which the "
                    f"{side} reads."
                )
        own = f"{side}_chat_template_kwargs"
        if getattr(self, own):
            raise ValueError(f"{own}: has no effect with format 'text'.")
        if self.chat_template_kwargs and self.format == "text":
            raise ValueError("chat_template_kwargs: has no effect with format 'text'.")
        if self.chat_template_kwargs:
            other = OTHER_MODEL[side]
            raise ValueError(
                f"chat_template_kwargs: is for both sides, and the {side} reads plain text; give "
                f"{other}_chat_template_kwargs."
            )


class Sampling(Section):
    """SGLang's sampling parameters, for every request."""

    n: Annotated[int, Field(gt=0)] = 1
    """Samples a problem (with ``select: cross``, a problem and strategy)."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 512
    """Most tokens of one sample."""
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    """Fewest tokens of one sample: no end before."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """0 is greedy. Alpha is solved for both models at this temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus, of the mixture."""
    top_k: int = -1
    """-1: all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Of the mixture."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Applied to both models' logits."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Applied to both models' logits."""
    repetition_penalty: Annotated[float, Field(ge=0, le=2)] = 1.0
    """Applied to both models' logits."""
    stop: list[str] = []
    """Strings that end a sample; not part of its text."""
    stop_token_ids: list[int] = []
    """Tokens that end a sample, beside the end-of-text tokens."""
    regex: str | None = None
    """The text must match it."""
    json_schema: str | None = None
    """The text must be JSON of this schema."""
    one_model: Literal["auto", "always", "never"] = "auto"
    """With ``fixed_alpha`` 0 (the student's text) or 1 (the teacher's) only that model need run, at half the forward
    passes; its records lack the other's series. ``auto``: the student alone, where a server can and no ``output`` key
    asks for more; ``always``: either, or the run is refused; ``never``: both run."""
    seed: int = 0
    """Decides which strategy each sample draws, and is the base of each request's ``sampling_seed``, which SGLang
    honours with ``enable_deterministic_inference``."""

    @field_validator("stop", mode="before")
    @classmethod
    def _stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class _Mixing(Section):
    """The mixture. The alpha keys go with every request; the others are for a server that the run starts."""

    @model_validator(mode="after")
    def _consistent(self) -> _Mixing:
        MixingConfig.from_dict(self.given())
        return self

    def request_fields(self) -> dict[str, Any]:
        """The mixing fields of every request."""
        return {k: v for k, v in self.given().items() if k in ALPHA_KEYS}


def _optional(name: str, field: FieldInfo) -> Any:
    """A server's setting as a key of a run, where none is the server's own."""
    kind: Any = None
    if name == "student_weights":  # a run without a student is no distillation
        kind = Literal[*(value for value in get_args(field.annotation) if value != "none")]
    return optional_key(field, kind)


if TYPE_CHECKING:

    class Mixing(_Mixing):
        """What a type checker sees."""

else:
    Mixing = create_model(
        "Mixing",
        __base__=_Mixing,
        __doc__=_Mixing.__doc__,
        __module__=__name__,
        **{name: _optional(name, field) for name, field in SETTINGS.items()},
    )


class Client(Section):
    """How the run talks to its servers."""

    endpoints: list[str] = []
    """URLs of running servers (or of one router); requests go round them. Empty: the run starts a server of its own
    from the sections ``mixing`` and ``server``. ``--endpoint`` wins."""
    concurrency: Annotated[int, Field(gt=0)] = 64
    """Requests in flight, over all servers. At least the servers' ``max_running_requests`` together keeps them busy."""
    timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds for one request, then it is tried again."""
    retries: Annotated[int, Field(ge=0)] = 8
    """Times that a request is tried again when a server fails on it while others succeed."""
    max_downtime: Annotated[float, Field(ge=0)] = 600.0
    """Seconds without one answer from any server, after which the run stops (and can be resumed)."""
    api_key_env: str | None = None
    """Environment variable with the servers' API key."""
    tokenizer: str | None = None
    """Folder or id of the tokenizer that says which tokens of a sample write the expected answer, for the column
    ``answer_probability`` and the filter ``surprise``; by default the student's or the teacher's, where it is on this
    machine. Nothing is downloaded."""

    @field_validator("endpoints")
    @classmethod
    def _endpoints(cls, value: list[str]) -> list[str]:
        for url in value:
            if not re.match(r"https?://[^/]+", url):
                raise ValueError(f"{url!r} is no URL; write it as http://host:port.")
        return [url.rstrip("/") for url in value]


_SeriesName = Annotated[str, Field(json_schema_extra={"enum": list(ALL_SERIES)})]
_Side = Annotated[str, Field(json_schema_extra={"enum": list(SIDES)})]


class Output(Section):
    """Where records go."""

    dir: str | None = None
    """Folder of the run. The same folder again: the run is resumed. ``--out`` wins."""
    format: Literal["parquet", "jsonl"] = "parquet"
    """Format of the finished shards; ``datasets.load_dataset`` reads both."""
    shard_records: Annotated[int, Field(gt=0)] = 1000
    """Records in one shard."""
    series: bool | Annotated[list[_SeriesName], Field(min_length=1)] = True
    """Keep the per-token series beside alpha (log-probabilities, KLs, ESS ratio). Filters always see them. Names of
    more: ask for those too, and keep them beside these."""
    return_top_k: Annotated[int, Field(ge=0, le=MAX_TOP_K, strict=True)] = 0
    """Ask for so many of the most likely tokens at each position, with their log-probabilities under teacher, student
    and mixture, and keep them as ``top_k_*`` columns. Not SGLang's ``sampling.top_k``, which cuts what is drawn."""
    top_k_of: Annotated[list[_Side], Field(min_length=1)] | None = None
    """Whose most likely tokens: ``teacher``, ``student``, ``mixture``, or several; by default both models'."""

    @field_validator("series", mode="before")
    @classmethod
    def _series(cls, value: Any) -> Any:
        if isinstance(value, bool):
            return value
        if not isinstance(value, list | tuple) or not value:
            raise ValueError(f"must be true, false or a list of series, got {value!r}.")
        for name in value:
            if name not in ALL_SERIES:
                raise ValueError(f"unknown series {name!r}. {_nearest(str(name), list(ALL_SERIES))}")
        # One form for one meaning: it decides whether a run may be resumed.
        return [name for name in MORE_SERIES if name in value] or True

    @field_validator("top_k_of", mode="before")
    @classmethod
    def _sides(cls, value: Any) -> Any:
        given = [value] if isinstance(value, str) else value
        if not isinstance(given, list | tuple):
            return given
        for side in given:
            if side not in SIDES:
                raise ValueError(f"unknown side {side!r}. {_nearest(str(side), list(SIDES))}")
        return [side for side in SIDES if side in given]

    @model_validator(mode="after")
    def _read(self) -> Output:
        if self.top_k_of is not None and not self.return_top_k:
            raise ValueError("top_k_of: only read with return_top_k.")
        return self

    def request_fields(self) -> dict[str, Any]:
        """The mixing fields of every request, where more than the seven series is to come back."""
        fields: dict[str, Any] = {}
        if isinstance(self.series, list):
            fields["return_mixing_info"] = [*SERIES, *self.series]
        if self.return_top_k:
            fields["return_top_k"] = self.return_top_k
            if self.top_k_of is not None:
                fields["top_k_of"] = self.top_k_of
        return fields


class DistillConfig(Section):
    """A distillation run; see configs/distillation.yaml for every key."""

    data: Data = Data()
    contexts: Contexts
    sampling: Sampling = Sampling()
    escalate: Escalate | None = None
    """Several alphas in turn, each for the problems that the ones before did not solve; left out: one alpha, that of
    ``mixing``."""
    filters: list[FilterConfig] = []
    """In this order; the first that a sample fails rejects it."""
    select: Select | None = None
    """Which samples of a problem are kept of those that the filters accept; for ``distill filter``, refused by
    ``distill run``."""
    output: Output = Output()
    client: Client = Client()
    mixing: Mixing = Mixing()
    server: dict[str, Any] = {}
    """Any argument of SGLang's server, with underscores; for the server that the run starts itself."""

    @model_validator(mode="after")
    def _names(self) -> DistillConfig:
        names = [f.label for f in self.filters]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"filters: {name!r} occurs twice; give each a `name` of its own.")
        return self

    @model_validator(mode="after")
    def _steps(self) -> DistillConfig:
        for i, step in enumerate(self.escalate.steps if self.escalate is not None else ()):
            try:
                MixingConfig.from_dict(mixing_of_step(self.mixing.given(), step))
            except ValueError as error:
                raise ValueError(f"escalate.steps[{i}]: with the section mixing: {error}") from None
        return self

    @model_validator(mode="after")
    def _templates(self) -> DistillConfig:
        for side in ("teacher", "student"):
            if getattr(self.mixing, f"{side}_chat_template") is not None and self.contexts.format_of(side) == "text":
                raise ValueError(
                    f"mixing.{side}_chat_template: has no effect, since the {side} reads plain text "
                    "(contexts.format); leave it out."
                )
        return self

    @model_validator(mode="after")
    def _amount(self) -> DistillConfig:
        try:
            check_amount(wanted_by(self.output.request_fields()), self.sampling.max_new_tokens)
        except ValueError as error:
            raise ValueError(f"output.{error}") from None
        return self


SECTIONS = tuple(DistillConfig.model_fields)


def load_config(path: str | Path) -> DistillConfig:
    """Read and check the YAML file of a run.

    Nothing that the file names is opened: neither the data nor a server.

    Args:
        path: of the file, in UTF-8. configs/distillation.yaml has every key, docs/distillation_guide.md their meaning.

    Returns:
        The settings, with defaults where the file is silent. `sglang_optimal.distill.run` takes them.

    Raises:
        ValueError: no such file, no YAML mapping, an unknown key, a missing one or a value out of range. The message
            names the file, every key that is wrong, and the nearest known key for a misspelt one.
    """
    return parse_config(read_values(path), str(path))


def read_values(path: str | Path) -> dict[str, Any]:
    """The sections of a run's file as they stand there.

    Raises:
        ValueError: no such file, or no YAML mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such configuration file: {path}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping with the sections {', '.join(SECTIONS)}.")
    return values


def parse_config(values: dict[str, Any], where: str = "config") -> DistillConfig:
    """Check the settings of a run.

    Args:
        values: sections by name, as in the YAML file.
        where: the name of their source, with which messages begin.

    Raises:
        ValueError: as `load_config`.
    """
    try:
        return DistillConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError(_listed_or_one(where, _messages(error))) from None


def parse_select(path: Path | None, given: dict[str, Any]) -> Select:
    """The section ``select`` of a file, if it has one, with the command line's values on top.

    Raises:
        ValueError: as `load_config`.
    """
    section = (read_values(path).get("select") if path is not None else None) or {}
    where = "the command line" if path is None else f"{path} and the command line"
    contexts = {"student": "-", "strategies": [{"teacher": "-"}]}
    select = parse_config({"contexts": contexts, "select": {**section, **given}}, where).select
    assert select is not None
    return select


def _listed_or_one(where: str, messages: list[str]) -> str:
    return f"{where}: {messages[0]}" if len(messages) == 1 else _listed(where, messages)


def _listed(where: str, messages: list[str]) -> str:
    return f"{where}: {len(messages)} errors:\n" + "\n".join(f"  {message}" for message in messages)


def _messages(error: ValidationError) -> list[str]:
    """One line for each error, with the key's path and, for an unknown key, the nearest known one."""
    lines = []
    for item in error.errors():
        path = _path(item["loc"])
        kind, value = item["type"], item.get("input")
        if kind == "extra_forbidden":
            section, _, key = path.rpartition(".")
            message = f"unknown key {key!r}. {_place(key) or _nearest(key, _known_keys(item['loc'][:-1]))}"
            path = section
        elif kind == "missing":
            message = "is required."
        elif kind == "union_tag_not_found":
            message = f"needs a `type`: {', '.join(FILTERS)}."
        elif kind == "union_tag_invalid":
            message = f"unknown filter {item['ctx']['tag']!r}. {_nearest(item['ctx']['tag'], list(FILTERS))}"
        elif kind == "value_error":
            message = str(item["ctx"]["error"])
        else:
            message = f"{item['msg']}; got {value!r}."
        lines.append(f"{path}: {message}" if path else message)
    return lines


def _place(key: str) -> str | None:
    """A hint at the section whose key it is: the nearest one here would be another, as ``top_k`` for `return_top_k`."""
    for name, field in DistillConfig.model_fields.items():
        if key in getattr(field.annotation, "model_fields", ()):
            return f"It belongs to `{name}`."
    return None


def _nearest(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."


def _path(location: tuple) -> str:
    """``filters[1].match``: pydantic's location without the names of a union's members."""
    path = ""
    for i, part in enumerate(location):
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("<") and not (i == 2 and location[0] == "filters"):
            path += f".{part}" if path else part
    return path


def _known_keys(location: tuple) -> list[str]:
    """The keys of the section at pydantic's ``location``."""
    section: Any = DistillConfig
    for part in location:
        if part in _FORMS:
            section = _FORMS[part]
        elif part in FILTERS and location[0] == "filters":
            section = FILTERS[part]
        elif isinstance(part, str):
            section = _SECTIONS.get((section, part), section)
    return list(section.model_fields)


_FORMS = {"<turns>": Turns, "<messages>": Message, "<sides>": SideFormats}
_SECTIONS: dict[tuple[Any, str], Any] = {
    **{(DistillConfig, name): f.annotation for name, f in DistillConfig.model_fields.items()},
    (DistillConfig, "select"): Select,
    (DistillConfig, "escalate"): Escalate,
    (Escalate, "steps"): Step,
    (Contexts, "strategies"): Strategy,
}


def json_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a run's file, for editors and for checks elsewhere."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **DistillConfig.model_json_schema(),
        "title": "sglang_optimal distillation run",
    }
