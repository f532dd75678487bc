"""src.serve embeddings with a CLIP model: real picture files, and what is none."""

import base64
import io
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.served_embedder import Served, served
from tests.tiny_clip import DIM, picture, save_tiny_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(save_tiny_clip(tmp_path_factory.mktemp("clip") / "clip")) as running:
        yield running


def encoded(*files: bytes) -> list[str]:
    return [base64.b64encode(file).decode() for file in files]


def by_transformers(folder: Path, files: Sequence[bytes]) -> np.ndarray:
    """Vectors of images by the library's own processor and model."""
    from transformers import AutoImageProcessor, CLIPModel

    images = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
    model = CLIPModel.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    with torch.inference_mode():
        features = model.get_image_features(**processor(images=images, return_tensors="pt")).pooler_output
    return torch.nn.functional.normalize(features, dim=-1).numpy()


def test_images_and_texts_in_one_space(clip: Served, tmp_path: Path) -> None:
    files = [picture(0), picture(1), picture(2, "JPEG"), picture(3, "WEBP"), picture(4, "PNG", (33, 200), "L"),
             picture(5, "PNG", (40, 40), "RGBA"), picture(6, "GIF", mode="P")]  # fmt: skip
    answer = clip.http.post("/embed_image", json={"images": encoded(*files)})
    assert answer.status_code == 200, answer.text
    found = np.array(answer.json()["embeddings"])
    assert found.shape == (7, DIM) and np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert np.allclose(found, by_transformers(save_tiny_clip(tmp_path / "clip"), files), atol=1e-5)
    one = clip.http.post("/embed_image", json={"images": encoded(files[1]), "dimensions": 4}).json()["embeddings"][0]
    assert np.allclose(one, found[1][:4] / np.linalg.norm(found[1][:4]), atol=1e-5)
    # A text does not depend on the texts beside it, longer ones among them, nor on images in the queue.
    texts = ["river stone", "river stone quiet lantern orchard copper", "window"]
    together = np.array(clip.embed(texts).json()["embeddings"])
    alone = np.array([clip.embed([text]).json()["embeddings"][0] for text in texts])
    assert together.shape == (3, DIM) and np.allclose(together, alone, atol=1e-5)


def png_that_claims(width: int, height: int) -> bytes:
    """A header of an image of that size, as of a decompression bomb."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (["no base64!"], "0 is no base64"),
        (["é"], "0 is no base64"),
        (encoded(b"hello"), "no image that is known"),
        (encoded(picture(0), picture(1)[:200]), "images: 1: a damaged image"),
        (encoded(picture(2, "JPEG")[:300]), "a damaged image"),
        (encoded(png_that_claims(60_000, 60_000)), "3600000000|too many pixels|60000 × 60000"),
        (encoded(png_that_claims(9_000, 9_000)), "9000 × 9000 pixels"),
        (encoded(png_that_claims(0, 5)), "image"),
        (encoded(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "no image that is known"),
        (encoded(*[b"x"] * 33), "1 to 32|at most 32"),
        ([], "at least 1"),
        (["http://127.0.0.1/picture.png"], "0 is no base64"),
    ],
)
def test_what_is_no_image_is_refused(clip: Served, images: list[str], said: str) -> None:
    answer = clip.http.post("/embed_image", json={"images": images})
    assert answer.status_code == 400 and re.search(said, answer.json()["error"]["message"]), answer.text
    assert clip.http.post("/embed_image", json={"images": encoded(picture(0))}).status_code == 200


def test_a_text_model_says_that_it_takes_no_images(tiny_embedder: Path) -> None:
    with served(tiny_embedder) as server:
        answer = server.http.post("/embed_image", json={"images": encoded(picture(0))})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "no_images"
    assert "tiny takes no images; serve a CLIP model" in answer.text
