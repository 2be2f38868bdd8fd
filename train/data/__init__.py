"""Text to packed blocks of tokens. No torch here.

Files in reading order:

    chat.py         conversations through a chat template
    snapshot.py     folders with splits, as `datasets` reads them
    files.py        records of local JSON, CSV and text files
    tables.py       parquet and arrow files, hub and saved datasets
    sources.py      the local files behind a source
    reader.py       Reader: a record becomes a document
    documents.py    the documents of all sources
    tokens.py       Corpus: documents become tokens
    packing.py      Packed: tokens become blocks
    answers.py      answers of conversations, and their groups
    cache.py        tokens that are kept between runs
    blocks.py       Blocks: the packed data of a run, on disk
    order.py        the order of samples, and mixtures of sources
    stream.py       sources that are read during training
"""

from .answers import Answers
from .blocks import Blocks, build, load
from .order import Mixture, Order
from .packing import Packed, pack, split
from .stream import Stream
from .tokens import LEARN, START, Corpus, tokenise

__all__ = [
    "LEARN",
    "START",
    "Answers",
    "Blocks",
    "Corpus",
    "Mixture",
    "Order",
    "Packed",
    "Stream",
    "build",
    "load",
    "pack",
    "split",
    "tokenise",
]
