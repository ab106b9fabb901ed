"""Reads all records and images once, and says what is wrong before hours of training are spent on them."""

import base64
import io
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Final

import jinja2
import torch
from PIL import Image
from tqdm import tqdm

from training.data.image_files import read_image
from training.data.records import DataError, Record, Records, open_records
from training.data.texts import MAX_WORDS, clean_caption

_SIDE: Final = 160  # of a sample on the page
_MAX_NAMED: Final = 200  # of what is wrong; the rest is counted
_READ_AHEAD: Final = 64
_JPEG_QUALITY: Final = 80


@dataclass(frozen=True, slots=True)
class Sample:
    """A record as training sees it. image: a data: URI. captions: cleaned."""

    image_id: str
    image: str
    captions: tuple[str, ...]
    question: str | None
    answers: tuple[str, ...]


@dataclass(slots=True)
class DataCheck:
    """The result of one check: what is in a file of records, and what cannot be used.

    faults: of the first records that cannot be used, each a sentence. num_faulty: of all. num_words: how many
    captions have so many, after cleaning. unread_keys: how many records have a key that means nothing here.
    """

    records: Path
    images: Path
    num_records: int = 0
    num_faulty: int = 0
    num_captions: int = 0
    num_questions: int = 0
    faults: list[str] = field(default_factory=list)
    num_words: Counter[int] = field(default_factory=Counter)
    unread_keys: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)

    @property
    def share_faulty(self) -> float:
        return self.num_faulty / self.num_records

    @property
    def num_cut(self) -> int:
        """The number of captions that have all the words that training keeps, and may have had more."""
        return self.num_words[MAX_WORDS]

    @property
    def num_empty(self) -> int:
        """The number of captions of which cleaning leaves nothing."""
        return self.num_words[0]

    def add(self, result: "_Result") -> None:
        """Count one record."""
        self.num_records += 1
        if isinstance(result, DataError):
            self.num_faulty += 1
            self.faults += [str(result)] if len(self.faults) < _MAX_NAMED else []
            return
        record, image = result
        captions = tuple(map(clean_caption, record.captions))
        self.num_captions += len(captions)
        self.num_questions += record.question is not None
        self.num_words.update(len(caption.split()) for caption in captions)
        self.unread_keys.update(record.unread_keys)
        if image is not None:
            self.samples.append(
                Sample(record.image_id, _to_uri(image), captions, record.question, record.answers)
            )

    def check(self, max_share: float) -> None:
        """Raise DataError where more than this share of the records cannot be used."""
        if self.share_faulty > max_share:
            raise DataError(
                f"{self.records}: {self.num_faulty:,} of {self.num_records:,} records cannot be used, "
                f"{self.share_faulty:.1%}, and the limit is {max_share:.1%}; the first: {self.faults[0]}"
            )


_Result = DataError | tuple[Record, Image.Image | None]


def check_data(path: Path, images: Path, *, num_samples: int, seed: int = 0) -> DataCheck:
    """Read each record of a file and its image.

    images: the folder of the images. num_samples: records, drawn by the seed, whose images are kept for
    the page. Raises DataError where the file cannot be read or the folder is none.
    """
    records = open_records(path)
    if not images.is_dir():
        raise DataError(f"{images} is no folder; give that of the images")
    check = DataCheck(path, images)
    drawn = random.Random(seed).sample(range(len(records)), min(num_samples, len(records)))
    for result in tqdm(
        _read_all(records, images, set(drawn)), total=len(records), desc=path.name, mininterval=1
    ):
        check.add(result)
    return check


def write_page(check: DataCheck, path: Path) -> None:
    """Write what was found into one self-contained HTML file."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(environment.get_template("check.html.j2").render(check=check), encoding="utf-8")


def _read_all(records: Records, images: Path, drawn: set[int]) -> Iterator[_Result]:
    """Yield the records in order, read by as many threads as torch uses, a few ahead of the reader."""

    def read(index: int) -> _Result:
        try:
            record = records[index]
            image = read_image(images / record.image, _SIDE)
        except DataError as error:
            return error
        return record, image if index in drawn else None

    indices = iter(range(len(records)))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        ahead = [pool.submit(read, index) for index in islice(indices, _READ_AHEAD)]
        while ahead:
            yield ahead.pop(0).result()
            ahead += [pool.submit(read, index) for index in islice(indices, 1)]


def _to_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
