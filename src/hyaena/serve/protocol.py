"""What clients send and receive: the OpenAI API as vLLM speaks it. What is not supported is refused, not ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from hyaena.errors import nearest, printable

MAX_CHOICES = 64
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_BATCH = 256
MAX_BIASES = 1024
MAX_MESSAGES = 4096

Strings = Annotated[
    Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOPS)] | None,
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    Field(json_schema_extra={"description": "A string, or a list of strings."}),
]
# The first mistake is enough: millions of mistakes in one body must not become as many errors. Lists have fail_fast for
# that; dictionaries have not.
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]

FORMS = frozenset({"(text)", "(number)", "(ids)", "(texts)", "(list)"})
"""Tags of the forms that a field may have. An error is one of the form that was sent, and does not name it."""


def _form(given: object) -> str | None:
    if isinstance(given, list):
        first = given[0] if given else None
        return {str: "(texts)", int: "(ids)", list: "(list)", dict: "(list)"}.get(type(first))
    return {str: "(text)", int: "(number)"}.get(type(given))


def _one_of(message: str) -> Discriminator:
    return Discriminator(_form, custom_error_type="form", custom_error_message=message)


Prompts = Annotated[
    Annotated[str, Tag("(text)")]
    | Annotated[TokenIds, Tag("(ids)")]
    | Annotated[list[str], Field(min_length=1, max_length=MAX_BATCH, fail_fast=True), Tag("(texts)")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_BATCH, fail_fast=True), Tag("(list)")],
    _one_of("Give a text, a list of token ids, or a list of texts or of such lists; no list may be empty"),
]


def _few(given: object) -> object:
    if isinstance(given, dict) and len(given) > MAX_BIASES:
        text = "Dictionary should have at most {most} items, not {count}"
        raise PydanticCustomError("too_long", text, {"most": MAX_BIASES, "count": len(given)})
    return given


LogitBias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES), BeforeValidator(_few)
]


def _only(neutral: object, message: str) -> BeforeValidator:
    """Say that a field is not supported, where it has another value than the one that changes nothing."""

    def check(given: Any) -> Any:
        if given != neutral:
            raise PydanticCustomError("unsupported", message)  # type: ignore[arg-type]
        return given

    return BeforeValidator(check)


NoPenalty = Annotated[float, Field(ge=0, le=0), _only(0, "Only 0 is supported; there is repetition_penalty")]
LABEL = Field(default=None, description="Accepted; it has no effect.")


def as_prompts(given: Prompts) -> list[str | list[int]]:
    """The prompts of a body that names one or several."""
    if isinstance(given, str) or isinstance(given[0], int):
        return [given]  # type: ignore[list-item]
    return list(given)  # type: ignore[arg-type]


class Strict(BaseModel):
    """A body whose fields have the types that are named, and no others. A field that is null was not given."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_fields(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        known = {name: value for name, value in given.items() if value is not None}
        unknown = next((name for name in known if name not in cls.model_fields), None)
        if unknown is not None:
            near = nearest(unknown, cls.model_fields)
            hint = f"did you mean {near}?" if near else "leave it out (/openapi.json has all fields)"
            context = {"field": printable(unknown, limit=100), "hint": hint}
            raise PydanticCustomError("extra_forbidden", "It is not supported: {hint}", context)
        return known


class StreamOptions(Strict):
    """What a stream tells beside its tokens."""

    include_usage: bool = False
    continuous_usage_stats: Literal[False] = False
    include_obfuscation: Literal[False] = False


class GenerationBody(Strict):
    """The fields that completions and chats share.

    A field of the API that is not supported is accepted where its value asks for what the server does without it.
    """

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=0)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(default=None, ge=0, le=2**63 - 1)
    stop: Strings = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(default=None, max_length=MAX_STOPS)
    ignore_eos: bool = False
    logit_bias: LogitBias | None = None
    allowed_token_ids: TokenIds | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: str | None = Field(default=None, max_length=256)
    user: str | None = LABEL
    frequency_penalty: NoPenalty | None = None
    presence_penalty: NoPenalty | None = None


class CompletionBody(GenerationBody):
    """``POST /v1/completions``."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool = True
    return_token_ids: bool = Field(default=False, description="Add ids and texts of tokens, and ids of top_logprobs.")
    best_of: Literal[1] | None = None


class ContentPart(Strict):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One message of a conversation; a developer's is one of the system."""

    role: Annotated[
        Literal["system", "user", "assistant"],
        BeforeValidator(lambda role: "system" if role == "developer" else role),
        Field(json_schema_extra={"enum": ["system", "developer", "user", "assistant"]}),
    ]
    content: Annotated[
        Annotated[str, Tag("(text)")]
        | Annotated[list[ContentPart], Field(min_length=1, fail_fast=True), Tag("(list)")],
        _one_of("Give a text, or a list of parts with texts"),
    ]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ResponseFormat(Strict):
    """Only plain text is supported."""

    type: Literal["text"]


class ChatBody(GenerationBody):
    """``POST /v1/chat/completions``."""

    messages: Messages
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0), _only([], "Tools are not supported: leave them out")] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = LABEL
    safety_identifier: str | None = LABEL
    prompt_cache_key: str | None = LABEL
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: list[Literal["text"]] | None = Field(default=None, min_length=1, max_length=1)
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    add_generation_prompt: Literal[True] = True


class TokenizeBody(Strict):
    """``POST /tokenize``: a prompt or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class DetokenizeBody(Strict):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]] = Field(fail_fast=True)


class EmbeddingBody(Strict):
    """``POST /v1/embeddings``: vectors of texts, mean over their tokens unless told otherwise."""

    model: str | None = None
    input: Prompts
    layer: Annotated[
        Annotated[int, Tag("(number)")] | Annotated[str, Tag("(text)")], _one_of("Give a number or a name of a place")
    ] = Field(default="norm", description="A place in the model; see hyaena.embed.")
    pool: Literal["mean", "last"] = "mean"
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = LABEL


class ScoreBody(Strict):
    """``POST /score``: log-probability, entropy and rank of every token of texts."""

    model: str | None = None
    input: Prompts
    per_token: bool = False
    both_strands: bool = False


def usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    """The usage record of a response."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def check_together(body: GenerationBody) -> None:
    """Refuse fields that need another one.

    Raises:
        ApiError: the message names it.
    """
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream true", param="stream_options")
    if isinstance(body, ChatBody) and body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs true", param="top_logprobs")


class ApiError(Exception):
    """An answer with an error.

    Attributes:
        status: of HTTP.
        message: one line that says what to change.
        param: the field that is wrong, or None.
        code: a word for programs, or None.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        kind = {
            401: "authentication_error",
            403: "permission_error",
            404: "not_found_error",
            429: "rate_limit_error",
        }.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
