"""Requests and answers of an embedding server. What the model does not take is no such request, by type."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, create_model

from src.serving.bodies import Body
from src.serving.embedding_types import Embedder

MOST_IMAGES = 32
"""Of a request: each is half a megabyte in memory."""
INPUTS = "a text that is not blank, a list of such texts, the token ids of one, or a list of lists of them"

Text = Annotated[str, Field(min_length=1, pattern=r"\S")]
User = Annotated[str, Field(max_length=256)] | None
USER = "Who asks, for a fair share where several share a connection; the connection unless given."
DIMENSIONS = "Only the first N dimensions, scaled to length 1; for models that were trained for it."


def _list(most: int | None) -> Any:
    """A list's limits. The first item that is wrong ends it: megabytes of them would make gigabytes of messages."""
    return Field(min_length=1, max_length=most, fail_fast=True)


def embeddings_request(embedder: Embedder, max_texts: int) -> type[Body]:
    """Of /v1/embeddings: OpenAI's fields, and `truncate`."""
    kinds: Any = Text | Annotated[list[Text], _list(max_texts)]
    if embedder.takes_tokens:
        token = Annotated[int, Field(ge=0, lt=embedder.vocabulary_size)]
        tokens = Annotated[list[token], _list(embedder.max_length), BeforeValidator(_whole_numbers)]
        kinds = kinds | tokens | Annotated[list[tokens], _list(max_texts)]
    limits = (
        f"; at most {max_texts} of them, token ids of this model below {embedder.vocabulary_size}, taken as they are"
    )
    return create_model(
        "EmbeddingsRequest", __base__=Body,
        model=(str, Field(description="the served model's name")),
        input=(kinds, Field(description=INPUTS + limits)),
        encoding_format=(Literal["float", "base64"], Field("float", description="float or base64 (of float32)")),
        user=(User, Field(None, description=USER)), **_common(embedder),
    )  # fmt: skip


def texts_request(embedder: Embedder, max_texts: int) -> type[Body]:
    """Of /embed_text."""
    texts = Annotated[list[Text], _list(max_texts)]
    return create_model(
        "TextsRequest", __base__=Body,
        texts=(texts, Field(description=f"a list of 1 to {max_texts} texts that are not blank")),
        user=(User, Field(None, description=USER)), **_common(embedder),
    )  # fmt: skip


def images_request(embedder: Embedder) -> type[Body]:
    """Of /embed_image."""
    images = Annotated[list[Annotated[str, Field(min_length=1)]], _list(MOST_IMAGES)]
    told = f"a list of 1 to {MOST_IMAGES} image files (PNG, JPEG, WEBP, GIF or BMP) in base64"
    dimensions = {"dimensions": _common(embedder)["dimensions"]}
    return create_model(
        "ImagesRequest", __base__=Body, images=(images, Field(description=told)),
        user=(User, Field(None, description=USER)), **dimensions,
    )  # fmt: skip


def _whole_number(value: Any) -> Any:
    """JSON has one kind of number, so that 3.0 is as good as 3."""
    return int(value) if type(value) is float and value.is_integer() else value


def _whole_numbers(values: Any) -> Any:
    has_floats = isinstance(values, list) and any(type(value) is float for value in values)
    return [_whole_number(value) for value in values] if has_floats else values


def _common(embedder: Embedder) -> dict[str, Any]:
    size = Annotated[Annotated[int, Field(ge=1, le=embedder.dim)] | None, BeforeValidator(_whole_number)]
    cut = (
        "Cut off texts that are longer than the model reads, instead of refusing them; absent: the server's --truncate."
    )
    return {
        "dimensions": (size, Field(None, description=DIMENSIONS)),
        "truncate": (bool | None, Field(None, description=cut)),
    }


class Embedding(BaseModel):
    """One vector."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens, special ones included."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(BaseModel):
    """OpenAI's shape."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class TextsAnswer(BaseModel):
    """A vector a text, with the tokens that made it and whether the text was cut off."""

    model: str
    embeddings: list[list[float]]
    n_tokens: list[int]
    truncated: list[bool]


class ImagesAnswer(BaseModel):
    """A vector an image."""

    model: str
    embeddings: list[list[float]]
