"""The body of a request as a pydantic model, or an error that names the field."""

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from src.serving.errors import ApiError

Model = TypeVar("Model", bound=BaseModel)
SHOWN_ERRORS, SHOWN_LETTERS = 3, 200
LARGE_BYTES = 65_536


class Body(BaseModel):
    """A request: a field that it does not know is an error, for a misspelt one would be ignored."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


async def read_json(request: Request, model: type[Model]) -> Model:
    """
    Raises ApiError: 415 for another content type (which a page of another site could send without asking), 400 for
    what is no UTF-8, no JSON or no such request; 408 and 413 come from the guard's `receive`.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"content type {kind or 'missing'}: expected application/json")
    try:
        body = await request.body()
    except ClientDisconnect:
        # Nobody reads this; it ends the request.
        raise ApiError(400, "the client has gone") from None
    if len(body) > LARGE_BYTES:
        _refuse_fields(body, model)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _explained(error, model) from None


def _refuse_fields(body: bytes, model: type[BaseModel]) -> None:
    """The first field that the model does not know. pydantic would tell of each of a million."""
    try:
        found = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is no such JSON: {error}") from None
    wrong = next((name for name in found if name not in model.model_fields), None) if isinstance(found, dict) else None
    if wrong is not None:
        raise ApiError(400, _no_field(wrong, model), param=wrong[:SHOWN_LETTERS])


def _no_field(name: str, model: type[BaseModel]) -> str:
    return f"{name[:SHOWN_LETTERS]}: there is no such field; expected {', '.join(model.model_fields)}"


def _explained(error: ValidationError, model: type[BaseModel]) -> ApiError:
    """A union reports each of its kinds; then the field's description says what is expected."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    names = list(dict.fromkeys(str(each["loc"][0]) for each in errors if each["loc"]))
    if not names:
        return ApiError(400, f"the body is no such JSON: {errors[0]['msg']}")
    told = []
    for name in names[:SHOWN_ERRORS]:
        own = [each for each in errors if each["loc"] and str(each["loc"][0]) == name]
        field = model.model_fields.get(name)
        if own[0]["type"] == "extra_forbidden":
            told.append(_no_field(name, model))
        elif len(own) > 1 and field is not None and field.description:
            told.append(f"{name}: expected {field.description}")
        else:
            place = ".".join(str(part) for part in own[0]["loc"])
            told.append(f"{place}: {own[0]['msg']}")
    return ApiError(400, "; ".join(told), param=names[0][:SHOWN_LETTERS])
