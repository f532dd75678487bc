"""CLIP models: texts and images as vectors of one space, by transformers' own classes."""

import io
import json
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from src.common.errors import InputError
from src.embedding.batching import batch_of_first
from src.embedding.encoder import CPU_TOKENS, GPU_TOKENS, Batch, encoder_dtype
from src.embedding.model_files import MODULES, embedding_fingerprint
from src.embedding.records import Piece
from src.embedding.settings import EmbedderSettings
from src.embedding.tokenizing import PieceTokenizer
from src.models.hub import model_folder

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MOST_PIXELS = 50_000_000
"""Width × height of an image at most: a file of kilobytes can claim gigabytes."""


def image_text_folder(model_id: str, revision: str | None) -> Path | None:
    """The folder of a CLIP model, as transformers or an older sentence-transformers saves one; None for others."""
    folder = model_folder(model_id, revision)
    if (folder / MODULES).is_file():
        modules = json.loads((folder / MODULES).read_text(encoding="utf-8"))
        if not modules or not modules[0]["type"].endswith("CLIPModel"):
            return None
        folder = folder / modules[0]["path"]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return folder if config.get("model_type") == "clip" else None


def load_image_text(folder: Path, settings: EmbedderSettings, device: torch.device) -> "ImageTextModel":
    """Raises InputError for files that do not fit together and for settings that a CLIP model has no use for."""
    from safetensors import SafetensorError
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    if settings.prompt_name is not None or settings.backend == "openvino":
        raise InputError(f"--model_id {settings.model_id}: a CLIP model runs on st and has no named prompts")
    dtype = encoder_dtype(settings.dtype, device)
    try:
        model = CLIPModel.from_pretrained(folder, dtype=dtype, local_files_only=True).eval().to(device)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        # Not torchvision's: what is installed beside must not change the vectors.
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    except (ValueError, OSError, KeyError, SafetensorError) as error:
        first = str(error).strip().split("\n")[0]
        raise InputError(f"--model_id {folder}: not loadable ({first}); fetch it again") from error
    positions = model.config.text_config.max_position_embeddings
    if settings.max_length and settings.max_length > positions:
        raise InputError(f"--max_length {settings.max_length}: the model has positions for {positions} tokens")
    max_length = settings.max_length or positions
    pieces = PieceTokenizer(tokenizer, settings.prompt or "", max_length)
    tokens = settings.tokens_per_batch or (CPU_TOKENS if device.type == "cpu" else GPU_TOKENS)
    facts = {
        "backend": "transformers", "dtype": str(dtype).removeprefix("torch."), "device": str(device),
        "model_fingerprint": embedding_fingerprint(folder), "prompt": settings.prompt or "", "max_length": max_length,
        "tokens_per_batch": tokens, "dim": model.config.projection_dim,
    }  # fmt: skip
    return ImageTextModel(model, pieces, tokenizer, processor, facts)


class ImageTextModel:
    """Vectors are projected and scaled to length 1, as CLIP compares them."""

    takes_images = True

    def __init__(
        self, model: Any, pieces: PieceTokenizer, tokenizer: Any, processor: Any, facts: dict[str, Any]
    ) -> None:
        self._model, self._pieces, self._processor = model, pieces, processor
        self._pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.facts, self.dim, self.max_length = facts, facts["dim"], facts["max_length"]
        self.vocabulary_size = min(len(tokenizer), model.config.text_config.vocab_size)
        self.takes_tokens = not facts["prompt"]
        vision = model.config.vision_config
        self._image_tokens = (vision.image_size // vision.patch_size) ** 2 + 1

    def pieces_of(self, texts: Sequence[str]) -> list[Piece]:
        """Token ids of each text, cut off where the model reads no further."""
        return self._pieces.pieces(texts)

    def pixels_of(self, data: bytes) -> np.ndarray:
        """
        (3, height, width) float32 of an image file, as the model takes it. Any thread may.
        Raises InputError for what is no image of a known format, is cut off, or has too many pixels.
        """
        from PIL import Image, ImageOps

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = Image.open(io.BytesIO(data), formats=FORMATS)
                # The size stands in the header: nothing is unpacked yet.
                if image.width * image.height > MOST_PIXELS:
                    raise InputError(f"{image.width} × {image.height} pixels; expected at most {MOST_PIXELS}")
                image = ImageOps.exif_transpose(image).convert("RGB")
        except Image.UnidentifiedImageError:
            raise InputError(f"no image that is known here; expected one of {', '.join(FORMATS)}") from None
        except Image.DecompressionBombError:
            raise InputError(f"too many pixels; expected at most {MOST_PIXELS}") from None
        except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"a damaged image ({error}); expected a whole one") from None
        return self._processor(images=[image], return_tensors="np")["pixel_values"][0].astype(np.float32)

    def batch(self, lengths: Sequence[int]) -> list[int]:
        """Which of the inputs that wait are embedded now, the first among them; lengths: their tokens."""
        return batch_of_first(lengths, self.facts["tokens_per_batch"])

    def computed_tokens(self, kind: str, lengths: Sequence[int]) -> int:
        """Tokens that a batch of inputs of these lengths is computed with, padding included."""
        return len(lengths) * max(lengths)

    def image_length(self) -> int:
        """Tokens that an image counts as: its patches."""
        return self._image_tokens

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Within it, in one thread, `embed` may be called."""
        with torch.inference_mode():
            yield

    def embed(self, kind: str, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """inputs: token ids of each text or pixels of each image. Returns (n, dim) float32."""
        features = self._images(inputs) if kind == "image" else self._texts(inputs)
        return torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy()

    def _images(self, inputs: Sequence[np.ndarray]) -> torch.Tensor:
        pixels = torch.from_numpy(np.stack(inputs)).to(self._model.device, self._model.dtype)
        return self._model.get_image_features(pixel_values=pixels).pooler_output

    def _texts(self, inputs: Sequence[np.ndarray]) -> torch.Tensor:
        pieces = [Piece(n, 0, ids, truncated=False) for n, ids in enumerate(inputs)]
        batch = Batch(pieces, max(len(ids) for ids in inputs), self._pad_id, pads_left=False)
        ids, mask = (torch.from_numpy(each).to(self._model.device) for each in (batch.input_ids, batch.attention_mask))
        return self._model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
