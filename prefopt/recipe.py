"""Recipes: one YAML file that says which model, data, judge, sampling and algorithm a run uses."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from prefopt.errors import PrefoptError
from prefopt.rounds.storage import atomic_write

Loc = tuple[str | int, ...]
Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of a recipe: frozen, unknown keys refused, values never coerced."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class LoraSection(Section):
    """A LoRA adapter trained in place of the full weights; the base model is the reference."""

    r: Count = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | list[str] = "all-linear"

    @field_validator("target_modules", mode="before")
    @classmethod
    def _check_target_modules(cls, value: object) -> object:
        names = value if isinstance(value, list) else [value]
        if names and all(isinstance(name, str) and name for name in names):
            return value
        raise ValueError(f"expected all-linear or a list of module names, found {_show(value)}")


class ModelSection(Section):
    """The policy a run starts from."""

    path: Text  # a local folder or a Hub id
    revision: Text | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    trust_remote_code: bool = False
    chat_template: Text | None = None  # a jinja file that replaces the tokenizer's template
    lora: LoraSection | None = None
    quantization: Literal["nf4", "int8"] | None = None  # of the weights under the adapter

    @model_validator(mode="after")
    def _check_quantization(self) -> ModelSection:
        if self.quantization and self.lora is None:
            raise ValueError(
                f"found quantization {self.quantization}, whose weights cannot be trained; expected"
                " 'model.lora' beside it, such as lora: {}"
            )
        return self


class Source(Section):
    """One of several data sets; each of its rows appears `weight` times in an epoch."""

    path: Text
    weight: Annotated[float, Field(gt=0)] = 1.0
    split: Text = "train"
    name: Text | None = None  # the configuration of a Hub data set
    revision: Text | None = None


class DataSection(Section):
    """The rows to train on, from one `path` or from weighted `sources`, and the held-out rows."""

    path: Text | None = None  # a JSONL or Parquet file, a folder, or a Hub id
    split: Text = "train"
    name: Text | None = None  # the configuration of a Hub data set
    revision: Text | None = None
    sources: Annotated[list[Source], Field(min_length=1)] | None = None
    eval_path: Text | None = None
    eval_split: Text | None = None
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of the prompts, not of the rows
    max_prompt_length: Count | None = 1024  # tokens; longer prompts are dropped
    max_length: Count | None = 2048  # tokens of prompt and completion together
    invalid_rows: Literal["error", "drop"] = "error"
    max_rows: Count | None = None

    @model_validator(mode="after")
    def _check_origin(self) -> DataSection:
        if (self.path is None) == (self.sources is None):
            found = "neither" if self.path is None else "both; set one of them to null"
            raise ValueError(f"expected one of 'data.path' and 'data.sources', found {found}")
        if self.sources and (self.split, self.name, self.revision) != ("train", None, None):
            raise ValueError("with 'data.sources', give split, name and revision in each source")
        if self.sources and self.eval_split and not self.eval_path:
            raise ValueError("with 'data.sources', 'data.eval_split' needs 'data.eval_path' too")
        if self.eval_fraction and (self.eval_path or self.eval_split):
            raise ValueError(
                "expected 'data.eval_fraction' or 'data.eval_path'/'data.eval_split'"
                " as the held-out rows, found both"
            )
        return self


class JudgeSection(Section):
    """What scores completions."""

    kind: Literal["reward_model", "preference_model"]
    path: Text  # a local folder or a Hub id
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    engine: Literal["transformers", "vllm"] = "transformers"
    gpu_memory: Annotated[float, Field(gt=0, lt=1)] = 0.3  # the share that vLLM takes


class SamplingPart(Section):
    """One of several settings that share a prompt's samples; what is null is the section's."""

    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None


def _check_address(url: str) -> None:
    if set(url) & set("@?#"):  # it would stand in files and logs: not repeated
        raise ValueError("an address has a name, password or query in it; leave them out")


class RolloutSection(Section):
    """How completions are sampled from the policy."""

    engine: Literal["transformers", "vllm", "vllm_server", "auto"] = "transformers"
    samples_per_prompt: Count = 2
    temperature: Annotated[float, Field(ge=0)] = 1.0  # 0 is greedy decoding
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0  # 0 keeps the whole vocabulary
    max_new_tokens: Count = 512
    batch_size: Count = 64  # completions generated at a time; transformers only
    gpu_memory: Annotated[float, Field(gt=0, lt=1)] = 0.5  # vllm: share of the device, at most
    servers: Annotated[list[Text], Field(min_length=1)] | None = None  # vllm_server: URLs
    transfer: Literal["disk", "nccl"] = "disk"  # vllm_server: how weights get there
    mix: Annotated[list[SamplingPart], Field(min_length=1)] | None = None

    @field_validator("servers")
    @classmethod
    def _check_addresses(cls, value: list[str] | None) -> list[str] | None:
        for url in value or ():
            _check_address(url)
        return value

    @model_validator(mode="after")
    def _check_servers(self) -> RolloutSection:
        if (self.engine == "vllm_server") != (self.servers is not None):
            raise ValueError(
                "'rollout.servers' and 'rollout.engine: vllm_server' go together: expected a list "
                "of URLs such as [http://127.0.0.1:8000], or another engine"
            )
        return self

    @model_validator(mode="after")
    def _check_mix(self) -> RolloutSection:
        if self.mix and self.samples_per_prompt % len(self.mix):
            raise ValueError(
                f"expected 'rollout.samples_per_prompt' to be a multiple of the {len(self.mix)} "
                f"parts of 'rollout.mix', found {self.samples_per_prompt}"
            )
        return self


class TrainerSection(Section):
    """The algorithm and, beside it, any field of its config; see `validate_trainer_keys`."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue]

    algorithm: Text

    @property
    def options(self) -> dict[str, JsonValue]:
        """Every key of the section but `algorithm`, sorted by name."""
        return dict(sorted(self.__pydantic_extra__.items()))


class EvalJudgeSection(Section):
    """What judges evaluations: a model of ours, or one behind an OpenAI-compatible API."""

    kind: Literal["reward_model", "preference_model", "api"]
    path: Text | None = None  # a local folder or a Hub id
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    model: Text | None = None  # api: its name there
    base_url: Text = "https://api.openai.com/v1"
    key_variable: Text = "OPENAI_API_KEY"  # the environment variable that holds the key
    concurrency: Count = 16  # requests at a time

    @field_validator("base_url")
    @classmethod
    def _check_url(cls, value: str) -> str:
        _check_address(value)
        return value

    @model_validator(mode="after")
    def _check_place(self) -> EvalJudgeSection:
        needed, other = ("model", "path") if self.kind == "api" else ("path", "model")
        if getattr(self, needed) is None or getattr(self, other) is not None:
            raise ValueError(f"kind {self.kind} needs '{needed}', and takes no '{other}'")
        return self


class EvalSection(Section):
    """The win rate of the policy over its start, or over answers in a file, while it trains."""

    prompts: Text  # a JSONL or Parquet file, or a Hub id
    split: Text = "train"
    max_prompts: Count | None = None
    every: Count | None = None  # rounds, or epochs; null: 1, of rounds of samples a tenth
    baseline: Text | None = None  # a file of answers; null: the policy as training starts
    judge: EvalJudgeSection | None = None  # null: the recipe's
    temperature: Annotated[float, Field(ge=0)] = 0.0
    max_new_tokens: Count | None = None  # null: the rollout's
    stop_on_drop: Annotated[float, Field(gt=0, le=100)] | None = None  # points of the win rate


class GuardsSection(Section):
    """What a run watches for while it trains; where it is found, the run saves and ends."""

    action: Literal["stop", "warn"] = "stop"
    max_kl: Annotated[float, Field(gt=0)] | None = None  # nats from the initial policy
    max_mean_length: Annotated[float, Field(gt=0)] | None = None  # tokens of a completion
    min_finished: Annotated[float, Field(gt=0, le=1)] | None = None  # share of samples with EOS
    equal_scores: Count | None = 3  # rounds in a row in which the judge tells no sample apart
    over_optimisation: bool = True  # the judge is pleased more and more, that of `eval` is not


class Recipe(Section):
    """Everything a run is made of."""

    name: Text
    run_dir: Text = Field(default_factory=lambda fields: f"runs/{fields['name']}")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # the range NumPy's generator accepts
    model: ModelSection
    data: DataSection
    judge: JudgeSection | None = None
    rollout: Annotated[RolloutSection, BeforeValidator(lambda v: {} if v is None else v)] = (
        RolloutSection()
    )
    trainer: TrainerSection
    eval: EvalSection | None = None
    guards: GuardsSection = GuardsSection()

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        plain = value.isprintable() and not {*"/\\"} & {*value} and not value.startswith(".")
        if plain and len(value.encode(errors="replace")) <= 200:  # with it a folder's name is made
            return value
        raise ValueError(
            f"expected a name of up to 200 letters without slashes and no dot in front, found "
            f"{_show(value)}; 'run_dir' may be any folder"
        )

    def resolved(self) -> dict[str, Any]:
        """Returns the recipe as plain values, sections in a fixed order, defaults spelled out.

        The defaults of the trainer's options belong to the algorithm's config and are not added.
        """
        trainer = {"algorithm": self.trainer.algorithm, **self.trainer.options}
        return {**self.model_dump(), "trainer": trainer}

    def write_resolved(self, path: str | Path) -> None:
        """Writes `resolved()` as YAML that `load_recipe` reads back to an equal recipe.

        The file appears whole or not at all.

        Raises:
            PrefoptError: The file cannot be written.
        """
        text = yaml.dump(self.resolved(), Dumper=_Dumper, sort_keys=False)
        try:
            atomic_write(Path(path), text)
        except OSError as error:
            raise PrefoptError(f"{path}: cannot be written: {error.strerror}") from error


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    known: Mapping[str, Collection[str]] | None = None,
) -> Recipe:
    """Reads a recipe.

    Args:
        path: The YAML file; its stem is the default `name`.
        overrides: `section.key=value` each, the value in YAML; a later one wins.
        known: The option names of every algorithm. With it, the trainer section is checked
            by `validate_trainer_keys`; without it, any trainer option is accepted.

    Raises:
        PrefoptError: The file, an override, a key or a value is wrong.
    """
    document = _read(path)
    places = {_override(document, text): _named(text) for text in overrides}

    def where(loc: Loc) -> str:
        named = [place for start, place in places.items() if loc[: len(start)] == start]
        return named[-1] if named else str(path)

    document.setdefault("name", Path(path).stem)
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        # A misspelt required key is also a missing one; the misspelling is the useful message.
        problems = error.errors(include_url=False)
        first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
        raise PrefoptError(f"{where(first['loc'])}: {_explain(first, known or {})}") from None
    if known is not None:
        trainer = recipe.trainer
        for key in ("algorithm", *trainer.options):
            validate_trainer_keys([key], known, trainer.algorithm, where(("trainer", key)))
    return recipe


def validate_trainer_keys(
    keys: Iterable[str],
    known: Mapping[str, Collection[str]],
    algorithm: str,
    where: str = "recipe",
) -> list[str]:
    """Checks the options of the trainer section.

    An option of another algorithm is allowed, so that switching `trainer.algorithm` needs no
    other change.

    Args:
        keys: The option names found; `algorithm` itself may be among them.
        known: The option names of every algorithm.
        algorithm: The algorithm chosen.
        where: The place named in errors.

    Returns:
        The keys this algorithm ignores because only others know them, sorted.

    Raises:
        PrefoptError: The algorithm, or a key, is known nowhere.
    """
    if algorithm not in known:
        near = difflib.get_close_matches(algorithm.lower(), known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        names = ", ".join(sorted(known))
        raise PrefoptError(f"{where}: unknown algorithm {algorithm!r}; {hint}known: {names}")
    options = {*keys} - {"algorithm"}
    for key in sorted(options.difference(*known.values())):
        raise PrefoptError(f"{where}: {_unknown_key(('trainer', key), known)}")
    return sorted(options.difference(known[algorithm]))


# --- messages ------------------------------------------------------------------------------------

_EXPECTED = {
    "string_type": "text (in quotes if it looks like something else)",
    "string_too_short": "some text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "too_short": "at least one entry",
    "model_type": "keys and values",
}


def _explain(problem: Mapping[str, Any], known: Mapping[str, Collection[str]]) -> str:
    loc, kind = problem["loc"], problem["type"]
    if kind == "extra_forbidden":
        return _unknown_key(loc, known)
    if kind == "missing":
        return f"missing {'key' if len(loc) > 1 else 'section'} {_dotted(loc)!r}"
    if kind == "value_error":
        return f"{_dotted(loc)!r}: {problem['ctx']['error']}"
    expected = _EXPECTED.get(kind, problem["msg"].removeprefix("Input should be "))
    return f"{_dotted(loc)!r}: expected {expected}, found {_show(problem['input'])}"


def _unknown_key(loc: Loc, known: Mapping[str, Collection[str]]) -> str:
    """Names the nearest key: the same name elsewhere if unique, else a close one beside it."""
    *parent, leaf = loc
    section = ".".join(part for part in parent if isinstance(part, str))
    options = {f"trainer.{option}" for options in known.values() for option in options}
    pairs = sorted(key.rpartition(".")[::2] for key in options.union(_keys(Recipe)))
    siblings = [name for place, name in pairs if place == section]
    elsewhere = [".".join(filter(None, pair)) for pair in pairs if pair[1] == leaf]
    close = difflib.get_close_matches(str(leaf).lower(), siblings, n=1)
    found = f"unknown key {_dotted(loc)!r}"
    if len(elsewhere) == 1:
        return f"{found}; did you mean {elsewhere[0]!r}?"
    if close:
        return f"{found}; did you mean {_dotted((*parent, close[0]))!r}?"
    if section == "trainer":  # over a hundred: too many to list
        return f"{found}; expected a field of an algorithm's config, see docs/recipes.md"
    return f"{found}; known: {', '.join(siblings)}"


def _dotted(loc: Loc) -> str:
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return "".join(parts).removeprefix(".")


def _show(value: object) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        for nested in _sections_in(field.annotation):
            yield from _keys(nested, f"{prefix}{name}.")


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)


# --- YAML ----------------------------------------------------------------------------------------

_MAX_DEPTH = 50


class _Loader(yaml.SafeLoader):
    """Plain data only: scalars as in YAML 1.2, text keys written once, no tags, no aliases."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _refusal("aliases (*name) are not supported; write the value out", event)
        if self.depth == _MAX_DEPTH:
            raise _refusal(f"nested more than {_MAX_DEPTH} levels deep", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_items(self, node: Any) -> list[Any]:
        return self.construct_sequence(node, deep=True)

    def construct_keys(self, node: Any) -> dict[str, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise _refusal("expected keys and values", node)
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _refusal(f"expected text as a key, found {_show(key)}", key_node)
            if key in result:
                raise _refusal(f"key {key!r} is written twice", key_node)
            result[key] = self.construct_object(value_node, deep=True)
        return result


# Nothing of SafeLoader's YAML 1.1 is inherited.
_Loader.yaml_implicit_resolvers = {}
_Loader.yaml_constructors = {}


class _Dumper(yaml.SafeDumper):
    """Quotes whatever `_Loader` would not read back as the same text."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _refusal(problem: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


def _scalar(convert: Callable[[str], Any]) -> Callable[[_Loader, Any], Any]:
    def construct(loader: _Loader, node: Any) -> Any:
        text = loader.construct_scalar(node)
        try:
            return convert(text)
        except ValueError as error:
            raise _refusal(f"{_show(text)}: {error}", node) from None

    return construct


def _finite(text: str) -> float:
    number = float(text.replace(".inf", "inf").replace(".nan", "nan"))
    if not math.isfinite(number):
        raise ValueError("expected a finite number")
    return number


def _refuse_word(text: str) -> None:
    raise ValueError("ambiguous: write true, false or null, or quote it if the word is meant")


def _refuse_tag(loader: _Loader, node: Any) -> None:
    raise _refusal(f"the tag {node.tag!r} is not supported", node)


# YAML 1.1, PyYAML's default, reads 1e-6 as text, no as false, 010 as 8 and 1:30 as 90.
_AMBIGUOUS = "yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF|None"
_SCALARS: list[tuple[str, str, Callable[[str], Any]]] = [
    ("null", r"~|null|Null|NULL|", lambda text: None),
    ("bool", r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    ("int", r"[-+]?[0-9]+(_[0-9]+)*", int),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", _finite),
    ("word", _AMBIGUOUS, _refuse_word),
]
for _name, _pattern, _convert in _SCALARS:
    _tag = f"tag:yaml.org,2002:{_name}"
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), None)
    _Loader.add_constructor(_tag, _scalar(_convert))
_Loader.add_constructor("tag:yaml.org,2002:str", _scalar(str))
_Loader.add_constructor("tag:yaml.org,2002:seq", _Loader.construct_items)
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_keys)
_Loader.add_constructor(None, _refuse_tag)


def _read(path: str | Path) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PrefoptError(f"{path}: no such file; expected a recipe in YAML") from None
    except OSError as error:
        raise PrefoptError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise PrefoptError(f"{path}: expected UTF-8 text: bad byte at {error.start}") from None
    document = _parse(text, str(path))
    if document is None:
        raise PrefoptError(f"{path}: the file is empty; a recipe has model, data and trainer")
    if not isinstance(document, dict):
        raise PrefoptError(f"{path}: expected sections (model, data, ...), found {_show(document)}")
    return document


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark: Any = error.problem_mark  # set in every error of a text with marks
        opened = error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}"
        context = f" ({error.context} from line {opened.line + 1})" if opened else ""
        raise PrefoptError(f"{where}: {place}: {error.problem}{context}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        found = chr(error.character)
        raise PrefoptError(f"{where}: line {line}: {found!r} is not allowed in YAML") from None
    except (ValueError, OverflowError) as error:  # PyYAML passes on chr() of a bad escape
        raise PrefoptError(f"{where}: bad escape or directive: {error}") from None


def _override(document: dict[str, Any], text: str) -> Loc:
    """Sets one key of the document and returns the place of the topmost thing it created."""
    key, equals, value = text.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise PrefoptError(f"{_named(text)}: expected section.key=value")
    created: Loc = ()
    target = document
    for depth, part in enumerate(parts[:-1], start=1):
        if target.get(part) is None:
            target[part] = {}
            created = created or tuple(parts[:depth])
        if not isinstance(target[part], dict):
            raise PrefoptError(
                f"{_named(text)}: {'.'.join(parts[:depth])!r} is "
                f"{_show(target[part])}, which has no keys; set it as a whole"
            )
        target = target[part]
    target[parts[-1]] = _parse(value, _named(text))
    return created or tuple(parts)


def _named(override: str) -> str:
    """An override in errors: without its value, which may be a password in the wrong place."""
    return f"override {override.partition('=')[0]!r}"
